"""The policy that a robot runs: a checkpoint through PyTorch, or an ONNX file through its runtime.

Importing this loads neither; each backend is imported when it is asked for, so that a small robot
computer needs ONNX Runtime alone. Noise comes from numpy's generator in both, so one seed gives one
chunk whatever the backend. B batch, H chunk length, A action size, W the model's action width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float, Int

from trajectory_store.contract import Contract
from vla_post.export.card import is_export, policy_contract
from vla_post.policies.checkpoint import CheckpointError, read_card

Backend = Literal["auto", "torch", "onnx", "remote"]
RtcForm = Literal["identity", "jacobian"]
StoredObservation = Mapping[str, np.ndarray]
"""As the store keeps it: vectors float32, images (height, width, 3) uint8."""


class PolicyInputError(ValueError):
    """An observation or instruction that the policy was not made for."""


class ChunkPolicy(Protocol):
    """One loaded policy. Not thread-safe: one caller at a time."""

    observation_keys: tuple[str, ...]
    horizon: int
    action_size: int
    contract_sha256: str
    takes_previous: bool
    """`act` can continue a running chunk (real-time chunking); otherwise the caller blends."""

    def act(
        self,
        observation: StoredObservation,
        instruction: str,
        seed: int = 0,
        *,
        previous: Float[np.ndarray, "k A"] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "H A"]:
        """A chunk in robot units, float32, from one observation without batch axis.

        Args:
            previous: rows of the chunk that is being executed, from this observation's tick on, in
                robot units; the new chunk continues it. Only where `takes_previous`.
            delay: how many of these rows will have been executed when the new chunk arrives.

        Raises:
            PolicyInputError: missing feature, wrong shape, or (ONNX) an instruction that the
                export did not know.
        """
        ...

    def act_batch(
        self,
        observation: StoredObservation,
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
    ) -> Float[np.ndarray, "B H A"]:
        """Like `act` for observations with a batch axis; item i is `act` with seed i."""
        ...

    def reload(self, path: str | Path) -> None:
        """Takes the weights of another version; fast where the architecture is the same."""
        ...

    def close(self) -> None: ...


class LoadedPolicy(ABC):
    """What every backend's `ChunkPolicy` shares: the checks, and one observation as a batch of one.

    A backend gives chunks for a checked batch (`_chunks`), and says in `_shapes` what it takes.
    """

    observation_keys: tuple[str, ...]
    horizon: int
    action_size: int
    contract_sha256: str
    takes_previous: bool
    _shapes: Mapping[str, Sequence[int]]
    """Of each observation feature, without batch axis."""

    @property
    def any_batch(self) -> bool:
        """`_chunks` takes more than one observation at once."""
        return True

    def act(
        self,
        observation: StoredObservation,
        instruction: str,
        seed: int = 0,
        *,
        previous: Float[np.ndarray, "k A"] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "H A"]:
        batch = self._checked(observation, lead=0)
        rows = self._checked_previous(previous, delay)
        return self._chunks(batch, [instruction], np.array([seed]), rows, delay)[0]

    def act_batch(
        self,
        observation: StoredObservation,
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
    ) -> Float[np.ndarray, "B H A"]:
        batch = self._checked(observation, lead=1)
        sizes = {len(instructions), len(seeds), *(len(value) for value in batch.values())}
        if len(sizes) != 1:
            raise PolicyInputError(
                f"{len(instructions)} instructions and {len(seeds)} seeds for observations of "
                f"{sorted({len(value) for value in batch.values()})}; expected one size"
            )
        if self.any_batch:
            return self._chunks(batch, instructions, seeds, None, 0)
        # What takes one observation at a time is made for a robot, which needs no more.
        return np.concatenate(
            [
                self._chunks(
                    {key: value[i : i + 1] for key, value in batch.items()},
                    [instruction],
                    seeds[i : i + 1],
                    None,
                    0,
                )
                for i, instruction in enumerate(instructions)
            ]
        )

    @abstractmethod
    def _chunks(
        self,
        observation: dict[str, np.ndarray],
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
        previous: Float[np.ndarray, "k A"] | None,
        delay: int,
    ) -> Float[np.ndarray, "B H A"]:
        """For a checked batch with a batch axis; `previous`, at most a horizon of rows, comes with
        a batch of one."""
        ...

    def _checked(self, observation: StoredObservation, lead: int) -> dict[str, np.ndarray]:
        """What the policy reads, with a batch axis; views, no copies."""
        check_observation(observation, self._shapes, lead)
        seen = {key: np.asarray(observation[key]) for key in self.observation_keys}
        return seen if lead else {key: value[None] for key, value in seen.items()}

    def _checked_previous(
        self, previous: Float[np.ndarray, "k A"] | None, delay: int
    ) -> Float[np.ndarray, "k A"] | None:
        if previous is None:
            return None
        if not self.takes_previous:
            raise PolicyInputError("this policy cannot continue a running chunk; blend instead")
        if previous.ndim != 2 or previous.shape[1] != self.action_size:
            raise PolicyInputError(
                f"previous: found shape {previous.shape}, expected (rows, {self.action_size})"
            )
        if not np.isfinite(previous).all() or delay < 0:
            raise PolicyInputError("previous holds NaN or infinity, or the delay is negative")
        return previous[: self.horizon].astype(np.float32)


def load_policy(
    path: str | Path,
    backend: Backend = "auto",
    *,
    threads: int = 1,
    cores: Sequence[int] = (),
    contract: Contract | None = None,
    rtc_form: RtcForm = "identity",
) -> ChunkPolicy:
    """Loads a checkpoint folder (torch) or an export folder (onnx), and warms it up.

    Args:
        path: the folder, or the URL of a policy server (ws://HOST:PORT, wss:// with TLS).
        backend: `auto` tells these apart.
        threads: of the inference library. More than one makes the latency of small policies vary.
        cores: CPU numbers to pin these threads to (onnx).
        contract: of the cell; a policy of another one is refused.
        rtc_form: of the guidance in real-time chunking, see `vla_post.policies.rtc`. An export has
            the form `identity`.

    Raises:
        CheckpointError: not such a folder; incomplete, corrupted, or of another format.
        trajectory_store.contract.ContractMismatch: a policy of another cell; names the fields.
        vla_post.export.remote.RemoteError: no policy server, or it refuses us.
    """
    if backend == "remote" or (backend == "auto" and str(path).startswith(("ws://", "wss://"))):
        from vla_post.export.remote import RemotePolicy

        return RemotePolicy(str(path), contract=contract)
    path = Path(path)
    if backend == "auto":
        backend = "onnx" if is_export(path) else "torch"
    if backend == "onnx":
        from vla_post.export.onnx_policy import OnnxPolicy

        if rtc_form != "identity":
            raise ValueError(f"an export continues chunks in the form 'identity', not {rtc_form!r}")
        return OnnxPolicy(path, threads=threads, cores=cores, contract=contract)
    if contract is not None:
        contract.require_same(policy_contract(path), here="this cell", there=str(path))
    return TorchPolicy(path, threads=threads, rtc_form=rtc_form)


def draw_noise(
    seeds: Int[np.ndarray, " B"], horizon: int, width: int
) -> Float[np.ndarray, "B H W"]:
    """Standard normal float32, one generator per seed: an item does not depend on its batch."""
    return np.stack(
        [
            np.random.default_rng(int(seed)).standard_normal((horizon, width), dtype=np.float32)
            for seed in seeds
        ]
    )


def check_observation(
    observation: StoredObservation, shapes: Mapping[str, Sequence[int]], lead: int
) -> None:
    """Refuses what the policy was not made for; `lead` is the number of batch axes."""
    for key, shape in shapes.items():
        if key not in observation:
            raise PolicyInputError(
                f"the observation lacks {key!r}; the policy needs {', '.join(shapes)}"
            )
        value = np.asarray(observation[key])
        dtype = value.dtype
        if len(shape) == 3 and dtype != np.uint8:
            raise PolicyInputError(f"{key}: found pictures of {dtype}, expected uint8 as stored")
        if len(shape) != 3 and not np.issubdtype(dtype, np.floating):
            raise PolicyInputError(f"{key}: found numbers of {dtype}, expected float32 as stored")
        found = value.shape[lead:]
        if tuple(found) != tuple(shape):
            raise PolicyInputError(f"{key}: found shape {found}, expected {tuple(shape)}")
        if dtype != np.uint8 and not np.isfinite(value).all():
            raise PolicyInputError(f"{key}: holds NaN or infinity")


class TorchPolicy(LoadedPolicy):
    """A checkpoint through PyTorch, on the CPU or the GPU that the checkpoint's config names."""

    def __init__(self, path: Path, *, threads: int = 1, rtc_form: RtcForm = "identity") -> None:
        card = read_card(path)
        try:
            import torch
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"{path}: a checkpoint runs through PyTorch, which this machine does not have; "
                "export it with `vla-post export` and run the export, or install vla-post[learn]"
            ) from error

        from vla_post.policies.lerobot_adapter import LeRobotPolicy

        torch.set_num_threads(threads)
        self._torch = torch
        self.policy = LeRobotPolicy.load(path)
        self.contract_sha256 = str(card["contract_sha256"])
        self.rtc_form: RtcForm = rtc_form
        self._describe()
        self._warm_up()

    def _chunks(
        self,
        observation: dict[str, np.ndarray],
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
        previous: Float[np.ndarray, "k A"] | None,
        delay: int,
    ) -> Float[np.ndarray, "B H A"]:
        from vla_post.batch import observation_from_numpy
        from vla_post.policies.rtc import RtcConfig

        noise = draw_noise(seeds, self.horizon, self.policy.noise_size)
        device = self.policy.device
        rows = None if previous is None else self._torch.from_numpy(previous[None])
        chunk = self.policy.act(
            observation_from_numpy(observation, device),
            list(instructions),
            noise=self._torch.from_numpy(noise)[:, None].to(device),
            previous=None if rows is None else rows.to(device),
            delay=delay,
            rtc=RtcConfig(form=self.rtc_form),
        )
        return chunk[:, 0].float().cpu().numpy()

    def reload(self, path: str | Path) -> None:
        """Copies the weights in place where kind, contract and statistics are the same."""
        from vla_post.policies.lerobot_adapter import LeRobotPolicy, load_weights, read_guidance

        path = Path(path)
        card = read_card(path)
        guidance = read_guidance(card)
        same = (
            card["kind"] == self.policy.kind
            and (guidance is None) == (self.policy.guidance is None)
            and card["contract_sha256"] == self.contract_sha256
            and card["statistics"] == _plain(self.policy.statistics)
        )
        if same:
            load_weights(self.policy.module, path)
            self.policy.module.eval()
            self.policy.guidance = guidance
        else:
            self.policy = LeRobotPolicy.load(path)
            self.contract_sha256 = str(card["contract_sha256"])
            self._describe()

    def close(self) -> None:
        pass

    def _describe(self) -> None:
        features = self.policy.contract.observations
        wanted = self.policy.config.input_features
        self._shapes = {key: features[key].shape for key in features if key in wanted}
        self.observation_keys = tuple(self._shapes)
        self.horizon, self.action_size = self.policy.horizon, self.policy.action_size
        self.takes_previous = self.policy.can_continue

    def _warm_up(self) -> None:
        """The first calls of a network allocate and compile; a robot should not wait for that."""
        features = self.policy.contract.observations
        blank = {
            key: np.zeros(shape, np.uint8 if features[key].is_image else np.float32)
            for key, shape in self._shapes.items()
        }
        instruction = next(iter(self.policy.contract.tasks.values())).instruction
        for seed in range(2):
            self.act(blank, instruction, seed)
        if self.takes_previous:
            self.act(blank, instruction, previous=np.zeros((1, self.action_size), np.float32))


def _plain(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Statistics as they look after a round trip through the card's JSON."""
    return {
        key: {name: np.asarray(value).tolist() for name, value in entry.items()}
        for key, entry in statistics.items()
    }

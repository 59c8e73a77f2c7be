"""The policy that a robot runs: a checkpoint through PyTorch, or an ONNX file through its runtime.

Importing this loads neither; each backend is imported when it is asked for, so that a small robot
computer needs ONNX Runtime alone. Noise comes from numpy's generator in both, so one seed gives one
chunk whatever the backend. B batch, H chunk length, A action size, W the model's action width.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float, Int

from trajectory_store.contract import Contract, parse_contract
from vla_post.policies.checkpoint import CheckpointError, read_card

POLICY_FILE = "policy.onnx"
POLICY_CARD = "policy.json"

Backend = Literal["torch", "onnx"]
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


def load_policy(
    path: str | Path,
    backend: Backend = "torch",
    *,
    threads: int = 1,
    rtc_form: RtcForm = "identity",
) -> ChunkPolicy:
    """Loads a checkpoint folder (torch) or an export folder (onnx), and warms it up.

    Args:
        rtc_form: of the guidance in real-time chunking, see `vla_post.policies.rtc`. An export has
            the form that it was exported with.
        threads: of the inference library. More than one makes the latency of small policies vary.

    Raises:
        CheckpointError: not such a folder; incomplete, corrupted, or of another format.
    """
    path = Path(path)
    if backend == "onnx":
        return OnnxPolicy(path, threads=threads)
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
        found = observation[key].shape[lead:]
        if tuple(found) != tuple(shape):
            raise PolicyInputError(f"{key}: found shape {found}, expected {tuple(shape)}")
        if not np.isfinite(observation[key]).all():
            raise PolicyInputError(f"{key}: holds NaN or infinity")


class TorchPolicy:
    """A checkpoint through PyTorch, on the CPU or the GPU that the checkpoint's config names."""

    def __init__(self, path: Path, *, threads: int = 1, rtc_form: RtcForm = "identity") -> None:
        card = read_card(path)
        import torch

        from vla_post.policies.lerobot_adapter import LeRobotPolicy

        torch.set_num_threads(threads)
        self._torch = torch
        self.policy = LeRobotPolicy.load(path)
        self.contract_sha256 = str(card["contract_sha256"])
        self.rtc_form: RtcForm = rtc_form
        self._describe()
        self._warm_up()

    def act(
        self,
        observation: StoredObservation,
        instruction: str,
        seed: int = 0,
        *,
        previous: Float[np.ndarray, "k A"] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "H A"]:
        batch = {key: observation[key][None] for key in self.observation_keys if key in observation}
        rows = None if previous is None else previous[None]
        return self._act(batch, [instruction], np.array([seed]), rows, delay)[0]

    def act_batch(
        self,
        observation: StoredObservation,
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
    ) -> Float[np.ndarray, "B H A"]:
        return self._act(observation, instructions, seeds, None, 0)

    def _act(
        self,
        observation: StoredObservation,
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
        previous: Float[np.ndarray, "B k A"] | None,
        delay: int,
    ) -> Float[np.ndarray, "B H A"]:
        from vla_post.batch import observation_from_numpy
        from vla_post.policies.rtc import RtcConfig

        check_observation(observation, self._shapes, lead=1)
        inputs = {key: observation[key] for key in self.observation_keys}
        noise = draw_noise(seeds, self.horizon, self.policy.noise_size)
        device = self.policy.device
        chunk = self.policy.act(
            observation_from_numpy(inputs, device),
            list(instructions),
            noise=self._torch.from_numpy(noise)[:, None].to(device),
            previous=None
            if previous is None
            else self._torch.from_numpy(previous.astype(np.float32)).to(device),
            delay=delay,
            rtc=RtcConfig(form=self.rtc_form),
        )
        return chunk[:, 0].float().cpu().numpy()

    def reload(self, path: str | Path) -> None:
        """Copies the weights in place where kind, contract and statistics are the same."""
        from vla_post.policies.lerobot_adapter import LeRobotPolicy, load_weights

        path = Path(path)
        card = read_card(path)
        same = (
            card["kind"] == self.policy.kind
            and card["contract_sha256"] == self.contract_sha256
            and card["statistics"] == _plain(self.policy.statistics)
        )
        if same:
            load_weights(self.policy.module, path)
            self.policy.module.eval()
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


class OnnxPolicy:
    """An exported policy through ONNX Runtime; `policy.json` says what the file expects."""

    takes_previous = False

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        import onnxruntime

        self._onnxruntime = onnxruntime
        self._threads = threads
        self._open(path)

    def _open(self, path: Path) -> None:
        card = read_policy_card(path)
        options = self._onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Spinning threads take the core that the arbiter needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        wanted = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
        available = self._onnxruntime.get_available_providers()
        try:
            self._session: Any = self._onnxruntime.InferenceSession(
                (path / POLICY_FILE).read_bytes(),
                options,
                providers=[name for name in wanted if name in available],
            )
        except Exception as error:  # ONNX Runtime's own classes share no useful base
            raise CheckpointError(
                f"{path / POLICY_FILE}: ONNX Runtime cannot load it ({str(error)[:300]}). Export "
                "again; a copy may have been cut short."
            ) from error
        self._card = card
        self._shapes = {key: tuple(f["shape"]) for key, f in card["observations"].items()}
        self.observation_keys = tuple(self._shapes)
        self.horizon, self.action_size = int(card["horizon"]), int(card["action_size"])
        self._width = int(card["noise_size"])
        self.contract_sha256 = str(card["contract_sha256"])
        self._language = {
            instruction: {name: np.asarray(v, np.int32)[None] for name, v in inputs.items()}
            for instruction, inputs in card["instructions"].items()
        }
        self._check_example(path)

    def act(
        self,
        observation: StoredObservation,
        instruction: str,
        seed: int = 0,
        *,
        previous: Float[np.ndarray, "k A"] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "H A"]:
        if previous is not None:
            raise PolicyInputError("this export cannot continue a running chunk; blend instead")
        check_observation(observation, self._shapes, lead=0)
        feeds = {key: _as_network_input(observation[key])[None] for key in self.observation_keys}
        noise = draw_noise(np.array([seed]), self.horizon, self._width)
        return self._run(feeds | self._tokens(instruction) | {"noise": noise})

    def act_batch(
        self,
        observation: StoredObservation,
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
    ) -> Float[np.ndarray, "B H A"]:
        # The graph has static shapes with a batch of one, which is what a robot needs.
        return np.stack(
            [
                self.act({k: v[i] for k, v in observation.items()}, instruction, int(seeds[i]))
                for i, instruction in enumerate(instructions)
            ]
        )

    def reload(self, path: str | Path) -> None:
        self._open(Path(path))

    def close(self) -> None:
        self._session = None

    def _tokens(self, instruction: str) -> dict[str, np.ndarray]:
        try:
            return self._language[instruction]
        except KeyError:
            known = "; ".join(map(repr, self._language))
            raise PolicyInputError(
                f"the export knows no instruction {instruction!r}; it knows {known}. Add the task "
                "to the contract and export again"
            ) from None

    def _run(self, feeds: dict[str, np.ndarray]) -> Float[np.ndarray, "H A"]:
        return self._session.run(["action"], feeds)[0][0]

    def _check_example(self, path: Path) -> None:
        """The example that was exported with the file must come out the same on this machine."""
        example = np.load(path / "example.npz", allow_pickle=False)
        feeds = {name: example[name] for name in example.files if name != "action"}
        started = time.perf_counter()
        error = float(np.abs(self._run(feeds) - example["action"][0]).max())
        bound = float(self._card["parity"]["bound"])
        if not error <= bound:
            raise CheckpointError(
                f"{path}: its own example differs by {error:.3g} on this machine (bound "
                f"{bound:.3g}, after {time.perf_counter() - started:.2f} s); do not run it. Export "
                "again, and check the provider's precision settings"
            )


def read_policy_card(path: Path) -> dict[str, Any]:
    """`policy.json` of an export folder.

    Raises:
        CheckpointError: not an export folder, or one of another format.
    """
    card_path = path / POLICY_CARD
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not an exported policy ({POLICY_CARD} is missing); make one with "
            "`vla-post export CHECKPOINT`"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{card_path}: cannot be read ({error}); export again") from error
    if not isinstance(card, dict) or card.get("format") != EXPORT_FORMAT:
        raise CheckpointError(f"{card_path}: expected format {EXPORT_FORMAT!r}; export again")
    if not (path / POLICY_FILE).is_file():
        raise CheckpointError(f"{path / POLICY_FILE}: missing; export again")
    return card


def policy_contract(path: str | Path) -> Contract:
    """The cell that a checkpoint or export folder was made for.

    Raises:
        CheckpointError: neither of the two.
    """
    path = Path(path)
    card = read_policy_card(path) if (path / POLICY_CARD).is_file() else read_card(path)
    return parse_contract(card["contract"], name=str(path))


EXPORT_FORMAT = "vla_post/export/1"


def _as_network_input(value: np.ndarray) -> np.ndarray:
    """The numpy twin of `vla_post.batch.observation_from_numpy`, for one item."""
    if value.dtype == np.uint8:
        return np.ascontiguousarray(np.moveaxis(value, -1, -3), dtype=np.float32) / 255.0
    return np.ascontiguousarray(value, dtype=np.float32)


def _plain(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Statistics as they look after a round trip through the card's JSON."""
    return {
        key: {name: np.asarray(value).tolist() for name, value in entry.items()}
        for key, entry in statistics.items()
    }

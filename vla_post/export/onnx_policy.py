"""An exported policy through ONNX Runtime; `policy.json` says what its graphs expect.

Needs numpy and onnxruntime, no torch. B batch, H chunk length, A action size.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from trajectory_store.contract import Contract
from vla_post.export.card import (
    EXAMPLE_FILE,
    language_inputs,
    read_policy_card,
)
from vla_post.export.runtime import (
    LoadedPolicy,
    PolicyInputError,
    draw_noise,
)
from vla_post.policies.checkpoint import CheckpointError
from vla_post.policies.prefix import prefix_weights

PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
"""In order of preference; what the installed onnxruntime lacks is left out."""

log = logging.getLogger(__name__)


class OnnxPolicy(LoadedPolicy):
    """See `vla_post.export.runtime.ChunkPolicy`.

    Args:
        path: folder that `vla-post export` wrote.
        threads: of ONNX Runtime; they never spin, so that they leave the core to the arbiter.
        cores: CPU numbers to pin the threads to, `threads` of them. The first is the caller's:
            pinning it is left to the process (`taskset`), for the library cannot.
        contract: of the cell; an export that was made for another one is refused.
        providers: ONNX Runtime's, instead of `PROVIDERS`.
        prove: run the example first and refuse a graph that does not give its result.

    Raises:
        CheckpointError: the folder is incomplete, damaged, of another format, or its example does
            not come out the same on this machine.
        trajectory_store.contract.ContractMismatch: made for another cell; names the fields.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        cores: Sequence[int] = (),
        contract: Contract | None = None,
        providers: Sequence[str] | None = None,
        prove: bool = True,
    ) -> None:
        import onnxruntime

        if cores and len(cores) != threads:
            raise ValueError(f"{len(cores)} cores for {threads} threads; name one core a thread")
        self._onnxruntime: Any = onnxruntime
        self._contract = contract
        available = onnxruntime.get_available_providers()
        self._providers = [p for p in providers or PROVIDERS if p in available]
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if len(cores) > 1:
            # The library counts CPUs from 1 and pins the threads that it starts itself.
            affinity = ";".join(str(core + 1) for core in cores[1:])
            options.add_session_config_entry("session.intra_op_thread_affinities", affinity)
        options.log_severity_level = 4  # its errors reach us as exceptions
        self._options, self._prove = options, prove
        self._open(path)

    def _open(self, path: Path) -> None:
        card = read_policy_card(path)
        if self._contract is not None and card.contract_sha256 != self._contract.sha256:
            self._contract.require_same(card.the_contract(), here="this cell", there=str(path))
        self.card = card
        self.observation_keys = tuple(card.observations)
        self.horizon, self.action_size = card.horizon, card.action_size
        self.contract_sha256 = card.contract_sha256
        self.takes_previous = card.takes_previous
        self._shapes = {key: feature.shape for key, feature in card.observations.items()}
        self._language = {
            text: {name: np.asarray(values, np.int32)[None] for name, values in inputs.items()}
            for text, inputs in card.instructions.items()
        }
        self._sessions = [self._session(path / name) for name in card.graphs]
        self._check_borders(path)
        if self._prove:
            self._check_example(path)

    @property
    def any_batch(self) -> bool:
        return self.card.dynamic_batch

    def _chunks(
        self,
        observation: dict[str, np.ndarray],
        instructions: Sequence[str],
        seeds: Int[np.ndarray, " B"],
        previous: Float[np.ndarray, "k A"] | None,
        delay: int,
    ) -> Float[np.ndarray, "B H A"]:
        tokens = [self._tokens(instruction) for instruction in instructions]
        feeds = dict(observation)
        feeds |= {name: np.concatenate([t[name] for t in tokens]) for name in tokens[0]}
        feeds |= self._overlap(previous, delay, len(seeds))
        return self._run(feeds | {"noise": draw_noise(seeds, self.horizon, self.card.noise_size)})

    def reload(self, path: str | Path) -> None:
        self._open(Path(path))

    def close(self) -> None:
        self._sessions = []

    # ---------------------------------------------------------------------------------------------

    def _tokens(self, instruction: str) -> dict[str, np.ndarray]:
        try:
            return self._language[instruction]
        except KeyError:
            known = "; ".join(map(repr, self._language))
            raise PolicyInputError(
                f"the export knows no instruction {instruction!r}; it knows {known}. Add the task "
                "to the contract and export again"
            ) from None

    def _overlap(
        self, previous: Float[np.ndarray, "k A"] | None, delay: int, size: int
    ) -> dict[str, np.ndarray]:
        """The running chunk and how to follow it, as the graph takes them."""
        if not self.takes_previous:
            return {}
        rows = np.zeros((size, self.horizon, self.action_size), np.float32)
        follow = np.zeros((size, self.horizon), np.float32)
        if previous is not None:
            rows[:, : len(previous)] = previous
            follow[:] = prefix_weights(delay, len(previous), self.horizon)
        return {"previous": rows, "follow": follow}

    def _run(self, feeds: dict[str, np.ndarray]) -> Float[np.ndarray, "B H A"]:
        """Binds the arrays where they lie; on a CPU nothing is copied in."""
        values = {name: self._value(array) for name, array in feeds.items()}
        try:
            if self.card.layout == "unrolled":
                return self._call(self._sessions[0], values)["action"].numpy()
            encoder, step = self._sessions
            names = {i.name for i in encoder.get_inputs()}
            context = self._call(encoder, {k: v for k, v in values.items() if k in names})
            steps, size = self.card.denoising_steps, len(feeds["noise"])
            inputs = {k: values[k] for k in ("previous", "follow")} | context
            inputs["x"] = values["noise"]
            inputs["dt"] = self._value(np.full(size, 1.0 / steps, np.float32))
            out: dict[str, Any] = {}
            for number in range(steps):
                inputs["time"] = self._value(np.full(size, number / steps, np.float32))
                out = self._call(step, inputs)
                inputs["x"] = out["x_next"]
            return out["action"].numpy()
        except Exception as error:  # ONNX Runtime's own classes share no useful base
            raise PolicyInputError(
                f"ONNX Runtime cannot run this input: {str(error)[:300]}"
            ) from error

    def _value(self, array: np.ndarray) -> Any:
        dtype = array.dtype if array.dtype in (np.uint8, np.int32) else np.float32
        array = np.ascontiguousarray(array, dtype)
        return self._onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def _call(self, session: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        outputs = [output.name for output in session.get_outputs()]
        for name in outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=True))

    def _session(self, file: Path) -> Any:
        try:
            return self._onnxruntime.InferenceSession(
                str(file), self._options, providers=self._providers
            )
        except Exception as error:  # ONNX Runtime's own classes share no useful base
            raise CheckpointError(
                f"{file}: ONNX Runtime cannot load it ({str(error)[:300]}). Export again with a "
                "version of this machine's age, or install a newer onnxruntime"
            ) from error

    def _check_borders(self, path: Path) -> None:
        """The card and the graphs must speak of the same inputs."""
        card = self.card
        expected = set(card.observations) | language_inputs(card) | {"noise"}
        if card.takes_previous:
            expected |= {"previous", "follow"}
        found = {i.name for session in self._sessions for i in session.get_inputs()}
        if card.layout == "steps":
            found -= {o.name for o in self._sessions[0].get_outputs()}
            found = found - {"x", "time", "dt"} | {"noise"}
        # The tracer leaves out an input that nothing depends on.
        if not found <= expected:
            raise CheckpointError(
                f"{path}: the graph wants {sorted(found - expected)}, of which {path.name}'s card "
                "says nothing; export again"
            )

    def _check_example(self, path: Path) -> None:
        """The example that was exported with the graph must come out the same on this machine.

        Its second run is the warm-up: the first allocates, and compiles on a GPU.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            example = load_file(path / EXAMPLE_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / EXAMPLE_FILE}: cannot be read ({error})") from error
        feeds = {name: value for name, value in example.items() if name != "action"}
        try:
            self._run(feeds)
            started = time.perf_counter()
            error = float(np.abs(self._run(feeds) - example["action"]).max())
        except (PolicyInputError, KeyError) as failure:
            raise CheckpointError(f"{path}: its own example does not run: {failure}") from failure
        log.debug(
            "%s: example off by %.2g, %.1f ms", path, error, 1e3 * (time.perf_counter() - started)
        )
        bound = self.card.parity.bound
        if not error <= bound:
            raise CheckpointError(
                f"{path}: its own example differs by {error:.3g} on this machine (bound "
                f"{bound:.3g}); do not run it. Export again, and check the provider's precision "
                "settings"
            )

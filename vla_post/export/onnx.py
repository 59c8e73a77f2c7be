"""Checkpoint -> ONNX: one graph with normalisation, encoder and unrolled denoising inside.

Inputs: each observation feature (1, ...) before normalisation (vectors in robot units, images
(1, 3, height, width) in [0, 1]), the instruction's tokens (int32), and the noise (1, H, W). Output:
the action chunk (1, H, A) in robot units. The export is refused unless ONNX Runtime agrees with
PyTorch on recorded observations.
"""

import io
import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trajectory_store.contract import Contract
from vla_post.export.runtime import (
    EXPORT_FORMAT,
    POLICY_CARD,
    POLICY_FILE,
    OnnxPolicy,
    TorchPolicy,
)
from vla_post.policies.lerobot_adapter import LeRobotPolicy

OPSET = 20
log = logging.getLogger(__name__)

Probe = tuple[Mapping[str, np.ndarray], str]
"""A recorded observation without batch axis, as stored, and its instruction."""


class ExportError(ValueError):
    """The policy cannot be exported, or the exported file does not equal it."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """PyTorch against ONNX Runtime on recorded observations, in action units."""

    observations: int
    max_error: float
    mean_error: float
    cosine: float
    """Smallest cosine between the two chunks of one observation."""
    bound: float

    @property
    def ok(self) -> bool:
        return self.max_error <= self.bound


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    folder: Path
    parity: Parity
    export_s: float
    torch_ms: float
    """Median latency of one chunk, eager PyTorch, one thread."""
    onnx_ms: float
    """Median latency of one chunk, ONNX Runtime, one thread, in the same run."""
    file_mb: float
    opset: int

    @property
    def speedup(self) -> float:
        return self.torch_ms / self.onnx_ms


class PolicyGraph(nn.Module):
    """What is exported: tensors in, one tensor out, no Python objects at the border."""

    def __init__(self, policy: LeRobotPolicy, keys: Sequence[str], language: Sequence[str]) -> None:
        super().__init__()
        self.module = policy.module
        self.policy = policy
        self.keys, self.language = tuple(keys), tuple(language)
        for number, key in enumerate(keys):
            scale, offset = _input_affine(policy, key)
            self.register_buffer(f"scale{number}", scale)
            self.register_buffer(f"offset{number}", offset)
        zero = torch.zeros(1, 1, policy.action_size, device=policy.device)
        offset = policy.unnormalise(zero)
        self.register_buffer("action_scale", policy.unnormalise(zero + 1) - offset)
        self.register_buffer("action_offset", offset)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Observation features in the order of `keys`, language inputs, noise."""
        inputs: dict[str, Any] = {}
        for number, key in enumerate(self.keys):
            scale = self.get_buffer(f"scale{number}")
            inputs[key] = tensors[number] * scale + self.get_buffer(f"offset{number}")
        for name, tensor in zip(self.language, tensors[len(self.keys) :], strict=False):
            inputs[name] = tensor != 0 if name.endswith("mask") else tensor.long()
        head = self.policy.head
        context = head.encode(inputs)
        x = head.sample(context, tensors[-1][:, None])[:, 0]
        return x * self.get_buffer("action_scale") + self.get_buffer("action_offset")


def export_policy(
    checkpoint: str | Path,
    folder: str | Path,
    probes: Sequence[Probe],
    *,
    bound: float = 1e-4,
) -> ExportReport:
    """Writes `policy.onnx`, `policy.json` and `example.npz`, and proves them equal to PyTorch.

    Args:
        probes: recorded observations to compare on; at least one.
        bound: largest absolute difference in action units.

    Raises:
        vla_post.policies.checkpoint.CheckpointError: no such checkpoint.
        ExportError: nothing to compare on, an operator that does not export, or parity beyond
            `bound` (the files stay, beside a report of the error).
    """
    if not probes:
        raise ExportError("no recorded observation to compare on; name a store with episodes")
    folder = Path(folder)
    runtime = TorchPolicy(Path(checkpoint))
    policy, contract = runtime.policy, runtime.policy.contract
    policy.module.eval()
    keys = runtime.observation_keys
    instructions = {task.instruction: None for task in contract.tasks.values()}
    tokens = _same_length(
        {text: _language_inputs(policy, contract, keys, text) for text in instructions}
    )
    names = list(next(iter(tokens.values())))

    observation, instruction = probes[0]
    feeds = _feeds(observation, keys) | tokens[instruction]
    feeds["noise"] = np.zeros((1, policy.horizon, policy.noise_size), np.float32)
    graph = PolicyGraph(policy, keys, names).eval()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    _export(graph, feeds, folder / POLICY_FILE)
    export_s = time.perf_counter() - started

    rng = np.random.default_rng(0)
    feeds["noise"] = rng.standard_normal(feeds["noise"].shape, dtype=np.float32)
    with torch.inference_mode():
        action = graph(*(torch.from_numpy(value) for value in feeds.values())).numpy()
    np.savez(folder / "example.npz", action=action, allow_pickle=False, **feeds)
    card = _card(runtime, contract, tokens, bound)
    _write_card(folder, card)

    exported = OnnxPolicy(folder)
    parity = compare(runtime, exported, probes, bound=bound)
    torch_ms, onnx_ms = _latency_ms(runtime, exported, probes)
    report = ExportReport(
        folder=folder,
        parity=parity,
        export_s=export_s,
        torch_ms=torch_ms,
        onnx_ms=onnx_ms,
        file_mb=(folder / POLICY_FILE).stat().st_size / 1e6,
        opset=OPSET,
    )
    card["parity"] = asdict(parity)
    card["latency_ms"] = {"torch": torch_ms, "onnx": onnx_ms}
    _write_card(folder, card)
    if not parity.ok:
        raise ExportError(
            f"{folder}: ONNX Runtime differs from PyTorch by {parity.max_error:.3g} (bound "
            f"{bound:.3g}) on {parity.observations} recorded observations; do not deploy this file"
        )
    return report


def compare(
    reference: TorchPolicy, exported: OnnxPolicy, probes: Sequence[Probe], *, bound: float
) -> Parity:
    """Both on every probe, with equal noise."""
    errors: list[np.ndarray] = []
    cosines: list[float] = []
    for seed, (observation, instruction) in enumerate(probes):
        a = reference.act(observation, instruction, seed).astype(np.float64)
        b = exported.act(observation, instruction, seed).astype(np.float64)
        errors.append(np.abs(a - b))
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosines.append(float((a * b).sum()) / scale if scale else 1.0)
    return Parity(
        observations=len(probes),
        max_error=float(np.max(errors)),
        mean_error=float(np.mean(errors)),
        cosine=min(cosines),
        bound=bound,
    )


def _export(graph: PolicyGraph, feeds: Mapping[str, np.ndarray], path: Path) -> None:
    arguments = tuple(torch.from_numpy(value) for value in feeds.values())
    chatter = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(chatter), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                arguments,
                input_names=list(feeds),
                output_names=["action"],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=False)
    except Exception as error:
        log.debug("torch.onnx.export said: %s", chatter.getvalue())
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ExportError(
            f"{graph.policy.kind} does not export to ONNX opset {OPSET}: "
            f"{type(error).__name__}: {first[:300]}"
        ) from error


def _input_affine(policy: LeRobotPolicy, key: str) -> tuple[Tensor, Tensor]:
    """(scale, offset) of lerobot's normaliser for one feature, read off the normaliser itself."""
    shape = policy.config.input_features[key].shape
    blank = {
        k: torch.zeros(1, *f.shape, device=policy.device)
        for k, f in policy.config.input_features.items()
    }
    text = next(iter(policy.contract.tasks.values())).instruction
    offset: Tensor = policy.preprocess(dict(blank) | {"task": [text]})[key]
    one = blank | {key: torch.ones(1, *shape, device=policy.device)}
    scale: Tensor = policy.preprocess(dict(one) | {"task": [text]})[key] - offset
    if len(shape) == 3:
        # A picture is normalised per channel, if at all: keep one number a channel in the graph.
        return scale[..., :1, :1].clone(), offset[..., :1, :1].clone()
    return scale.clone(), offset.clone()


def _language_inputs(
    policy: LeRobotPolicy, contract: Contract, keys: Sequence[str], instruction: str
) -> dict[str, np.ndarray]:
    """What the preprocessor makes of an instruction: tokens and mask, or the task's slot."""
    blank: dict[str, Any] = {
        key: torch.zeros(1, *policy.config.input_features[key].shape, device=policy.device)
        for key in keys
    }
    made = policy.preprocess(blank | {"task": [instruction]})
    out = {
        name: value.to(torch.int32).cpu().numpy()
        for name, value in made.items()
        if isinstance(value, Tensor)
        and name.startswith("observation.")
        and name not in keys
        and not value.dtype.is_floating_point
    }
    if not out and hasattr(policy.module, "slot"):
        from vla_post.policies.flow import TASK_INDEX

        module: Any = policy.module
        out = {TASK_INDEX: np.array([module.slot(instruction)], np.int32)}
    return out


def _same_length(
    tokens: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, dict[str, np.ndarray]]:
    """Pads to the longest instruction: shapes are static, and the mask hides the padding."""
    longest = {
        name: max(inputs[name].shape[-1] for inputs in tokens.values())
        for name in next(iter(tokens.values()))
    }
    return {
        text: {
            name: np.pad(
                value, [(0, 0)] * (value.ndim - 1) + [(0, longest[name] - value.shape[-1])]
            )
            for name, value in inputs.items()
        }
        for text, inputs in tokens.items()
    }


def _feeds(observation: Mapping[str, np.ndarray], keys: Sequence[str]) -> dict[str, np.ndarray]:
    from vla_post.batch import observation_from_numpy

    batch = observation_from_numpy({key: observation[key][None] for key in keys})
    return {key: tensor.numpy() for key, tensor in batch.items()}


def _card(
    runtime: TorchPolicy,
    contract: Contract,
    tokens: Mapping[str, Mapping[str, np.ndarray]],
    bound: float,
) -> dict[str, Any]:
    import onnx
    import onnxruntime

    return {
        "format": EXPORT_FORMAT,
        "kind": runtime.policy.kind,
        "contract": contract.to_json(),
        "contract_sha256": contract.sha256,
        "observations": {
            key: {
                "shape": list(contract.observations[key].shape),
                "unit": contract.observations[key].unit,
                "names": list(contract.observations[key].names),
            }
            for key in runtime.observation_keys
        },
        "action": {"names": list(contract.action.names), "unit": contract.action.unit},
        "horizon": runtime.horizon,
        "action_size": runtime.action_size,
        "noise_size": runtime.policy.noise_size,
        "control_hz": contract.control_hz,
        "execute_steps": contract.execute_steps,
        "denoising_steps": runtime.policy.head.denoising_steps,
        "instructions": {
            text: {name: value[0].tolist() for name, value in inputs.items()}
            for text, inputs in tokens.items()
        },
        "opset": OPSET,
        "parity": {"bound": bound},
        "versions": {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def _write_card(folder: Path, card: Mapping[str, Any]) -> None:
    (folder / POLICY_CARD).write_text(json.dumps(card, indent=2, default=str) + "\n")


def _latency_ms(
    reference: TorchPolicy, exported: OnnxPolicy, probes: Sequence[Probe], repeats: int = 20
) -> tuple[float, float]:
    """Medians of both, measured in turn so that other load on the machine hits them alike."""
    times = np.zeros((2, repeats))
    observation, instruction = probes[0]
    for repeat in range(repeats):
        for row, policy in enumerate((reference, exported)):
            started = time.perf_counter()
            policy.act(observation, instruction, repeat)
            times[row, repeat] = time.perf_counter() - started
    medians = np.median(times, axis=1) * 1e3
    return float(medians[0]), float(medians[1])

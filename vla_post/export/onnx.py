"""Checkpoint -> ONNX folder: traced, simplified, and held against PyTorch on recorded observations.

Two layouts. `unrolled` is one graph, `policy.onnx`, with all denoising steps inside: the fastest
for small policies. `steps` is `encoder.onnx`, run once, and `step.onnx`, run once per denoising
step: smaller, and quicker to trace and to build engines of for large policies.
"""

import importlib.metadata
import io
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from vla_post.export.card import (
    ENCODER_FILE,
    EXAMPLE_FILE,
    POLICY_CARD,
    STEP_FILE,
    WHOLE_FILE,
    Action,
    Feature,
    Layout,
    ParityCard,
    PolicyCard,
    Precision,
    hashes,
    write_policy_card,
)
from vla_post.export.graph import (
    ACTION,
    FOLLOW,
    NOISE,
    PREVIOUS,
    TIME,
    X_NEXT,
    EncoderGraph,
    StepGraph,
    WholeGraph,
    X,
    flatten,
    is_flow,
)
from vla_post.export.onnx_policy import OnnxPolicy
from vla_post.export.parity import Probe, compare, first_deviation, run_graph
from vla_post.export.passes import simplify
from vla_post.export.precision import change_precision
from vla_post.export.rewrite import rewritten
from vla_post.export.runtime import TorchPolicy
from vla_post.export.split import DATA_SUFFIX, save, settle_context
from vla_post.policies.lerobot_adapter import LeRobotPolicy

OPSET = 20
"""Of ONNX 1.15: what ONNX Runtime 1.17 and TensorRT 10 (JetPack 6.1) and later read."""

DT = "dt"
BOUNDS: dict[Precision, float] = {
    "fp32": 1e-4,
    "fp16": 0.02,
    "bf16": 0.05,
    "int8": 0.1,
    "int8-calibrated": 0.5,
}
"""Largest error allowed, as a share of the widest action's range; fp32's is in action units."""

log = logging.getLogger(__name__)


class ExportError(ValueError):
    """The policy cannot be exported, or the exported file does not equal it."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    layout: Layout = "unrolled"
    precision: Precision = "fp32"
    dynamic_batch: bool = False
    """Any number of observations at once; robots need one, and static shapes run faster."""
    bound: float | None = None
    """Largest difference from PyTorch in action units; by default `BOUNDS`."""
    denoising_steps: int | None = None
    """Fewer than the policy's own make it faster and less exact."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    folder: Path
    card: PolicyCard
    export_s: float
    """Of tracing and simplifying, without the comparison."""
    file_mb: float

    @property
    def parity(self) -> ParityCard:
        return self.card.parity

    @property
    def speedup(self) -> float:
        """Median latency of PyTorch over ONNX Runtime's, in turn, one thread each."""
        return self.card.latency_ms["torch"] / self.card.latency_ms["onnx"]


def export_policy(
    checkpoint: str | Path,
    folder: str | Path,
    probes: Sequence[Probe],
    config: ExportConfig | None = None,
) -> ExportReport:
    """Writes an export folder and proves it equal to the checkpoint.

    Args:
        probes: recorded observations to compare on (and to calibrate int8 on); at least one.

    Raises:
        vla_post.policies.checkpoint.CheckpointError: no such checkpoint.
        ExportError: nothing to compare on, an operator that does not export, a policy whose inputs
            cannot be inputs of a graph, or parity beyond the bound. The message then names the
            first layer that differs; the graphs stay in the folder, without a card.
    """
    config = config or ExportConfig()
    if not probes:
        raise ExportError("no recorded observation to compare on; name a store with episodes")
    runtime = TorchPolicy(Path(checkpoint))
    policy = runtime.policy
    policy.module.eval()
    if config.denoising_steps is not None:
        policy.head.denoising_steps = config.denoising_steps
    if config.layout == "steps" and not is_flow(policy):
        raise ExportError(
            f"{policy.kind} integrates no velocity, so it has no step graph; export it unrolled"
        )
    tokens = _language(policy, probes)
    observation, instruction = probes[0]
    feeds = {key: observation[key][None] for key in runtime.observation_keys} | tokens[instruction]
    if is_flow(policy):
        feeds[PREVIOUS] = np.zeros((1, policy.horizon, policy.action_size), np.float32)
        feeds[FOLLOW] = np.zeros((1, policy.horizon), np.float32)
    shape = (1, policy.horizon, policy.noise_size)
    feeds[NOISE] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / POLICY_CARD).unlink(missing_ok=True)
    names = list(tokens[instruction])
    with torch.no_grad():
        example = WholeGraph(policy, names)(*(torch.from_numpy(v) for v in feeds.values()))
    started = time.perf_counter()
    with rewritten(), torch.no_grad():
        programs = _trace(policy, names, feeds, folder, config)
    export_s = time.perf_counter() - started
    if config.precision != "fp32":
        change_precision(folder, tuple(programs), config.precision, _feeds(runtime, tokens, probes))

    save_file(
        {k: np.ascontiguousarray(v) for k, v in feeds.items()} | {ACTION: example.numpy()},
        folder / EXAMPLE_FILE,
    )
    card = _card(runtime, tokens, config, _bound(policy, config))
    beside = (f"{name}{DATA_SUFFIX}" for name in card.graphs)  # weights of graphs near 2 GB
    parts = (*card.graphs, *(name for name in beside if (folder / name).is_file()))
    files = (*parts, EXAMPLE_FILE)
    card = card.model_copy(update={"files": hashes(folder, files)})
    write_policy_card(folder, card)
    try:
        exported = OnnxPolicy(folder, prove=False)
    finally:
        (folder / POLICY_CARD).unlink()  # until it is proven
    parity = compare(runtime, exported, probes, bound=card.parity.bound)
    if not parity.ok:
        where = "; ".join(
            f"{name}: first differs at {deviation}"
            for name, deviation in _deviations(programs, folder, feeds, policy, names).items()
        )
        raise ExportError(
            f"{folder}: ONNX Runtime differs from PyTorch by {parity.max_error:.3g} (bound "
            f"{parity.bound:.3g}, cosine {parity.cosine:.4f}) on {parity.observations} recorded "
            f"observations; do not deploy this file. {where or 'No single layer stands out'}"
        )
    latency = _latency_ms(runtime, exported, probes)
    card = card.model_copy(update={"parity": parity, "latency_ms": latency})
    write_policy_card(folder, card)
    return ExportReport(
        folder=folder,
        card=card,
        export_s=export_s,
        file_mb=sum((folder / name).stat().st_size for name in parts) / 1e6,
    )


# Tracing ----------------------------------------------------------------------------------------


def _trace(
    policy: LeRobotPolicy,
    language: Sequence[str],
    feeds: Mapping[str, np.ndarray],
    folder: Path,
    config: ExportConfig,
) -> dict[str, Any]:
    """Writes the graphs; returns what PyTorch traced, by file name."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in feeds.items()}
    if config.dynamic_batch:
        # A traced size of 1 would be taken for a constant.
        tensors = {name: torch.cat([t, t]) for name, t in tensors.items()}
    if config.layout == "unrolled":
        graph = WholeGraph(policy, language).eval()
        return {WHOLE_FILE: _export(graph, tensors, [ACTION], folder / WHOLE_FILE, config)}
    borders = (PREVIOUS, FOLLOW, NOISE)
    seen = {name: t for name, t in tensors.items() if name not in borders}
    encoder = EncoderGraph(policy, language).eval()
    context, rebuild = flatten(encoder.head.encode(encoder.border.inputs(list(seen.values()))))
    parts = {f"context{number}": t.clone() for number, t in enumerate(context)}
    size = len(tensors[NOISE])
    step_inputs = parts | {
        PREVIOUS: tensors[PREVIOUS],
        FOLLOW: tensors[FOLLOW],
        X: tensors[NOISE],
        TIME: torch.full((size,), 0.5),
        DT: torch.full((size,), 1.0 / int(policy.head.denoising_steps)),
    }
    step = StepGraph(policy, language, rebuild).eval()
    programs = {
        ENCODER_FILE: _export(encoder, seen, list(parts), folder / ENCODER_FILE, config),
        STEP_FILE: _export(step, step_inputs, [X_NEXT, ACTION], folder / STEP_FILE, config),
    }
    settle_context(folder / ENCODER_FILE, folder / STEP_FILE)
    return programs


def _export(
    graph: nn.Module,
    tensors: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    config: ExportConfig,
) -> Any:
    dynamic: Any = None
    if config.dynamic_batch:
        batch = torch.export.Dim("batch", min=1, max=1024)
        dynamic = (tuple({0: batch} for _ in tensors),)
    chatter = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(chatter), redirect_stderr(chatter):
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                graph,
                tuple(tensors.values()),
                input_names=list(tensors),
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=dynamic,
                external_data=False,
                verbose=False,
            )
            model = simplify(program)
            if config.dynamic_batch:
                _require_dynamic(model)
            save(model, path)
            return program.exported_program
    except Exception as error:
        log.debug("torch.onnx.export said: %s", chatter.getvalue())
        lines = [line for line in str(error).splitlines() if line.strip()]
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = str(cause).strip().splitlines() or lines or [""]
        raise ExportError(
            f"{path.name} does not export to ONNX opset {OPSET}: {type(cause).__name__}: "
            f"{said[0][:300]}"
        ) from error


def _require_dynamic(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        size = value.type.tensor_type.shape.dim[0]
        if size.HasField("dim_value"):
            raise ExportError(
                f"the policy's code makes the batch size a constant ({value.name} has "
                f"{size.dim_value}); export with static shapes"
            )


# Language ---------------------------------------------------------------------------------------


def _language(policy: LeRobotPolicy, probes: Sequence[Probe]) -> dict[str, dict[str, np.ndarray]]:
    """Instruction -> what the preprocessor makes of it (1, L) int32, padded to one length.

    Shapes are static, and the mask hides the padding.
    """
    texts = dict.fromkeys(
        [task.instruction for task in policy.contract.tasks.values()] + [text for _, text in probes]
    )
    made = {text: _prompt_inputs(policy, text, 0.0) for text in texts}
    first = next(iter(texts))
    moved = _prompt_inputs(policy, first, 1.0)
    if any(not np.array_equal(made[first][name], moved[name]) for name in moved):
        raise ExportError(
            f"{policy.kind} writes the robot's state into its prompt, so the tokens change with "
            "every observation, and ONNX has no tokenizer; serve it with `vla-post serve` instead"
        )
    longest = {name: max(i[name].shape[-1] for i in made.values()) for name in made[first]}

    def padded(name: str, value: np.ndarray) -> np.ndarray:
        # The default mask of a slot or a fixed-length prompt needs no padding.
        return np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, longest[name] - value.shape[-1])])

    return {text: {n: padded(n, v) for n, v in inputs.items()} for text, inputs in made.items()}


def _prompt_inputs(policy: LeRobotPolicy, text: str, state: float) -> dict[str, np.ndarray]:
    """(1, ...) of the prompt that the policy reads, or (1, 2, ...) where it reads two."""
    prompts = [text]
    if policy.guidance is not None:
        prompts = [passed[0] for passed in policy.guidance.prompts([text])]
    made = [_language_inputs(policy, prompt, state) for prompt in prompts]
    if len(made) == 1:
        return made[0]
    both: dict[str, np.ndarray] = {}
    for name in made[0]:
        values = [inputs[name] for inputs in made]
        if values[0].ndim > 1:  # tokens: one length for both; the mask hides the padding
            longest = max(value.shape[-1] for value in values)
            values = [np.pad(v, [(0, 0), (0, longest - v.shape[-1])]) for v in values]
        both[name] = np.stack(values, axis=1)
    return both


def _language_inputs(policy: LeRobotPolicy, text: str, state: float) -> dict[str, np.ndarray]:
    blank: dict[str, Any] = {
        key: torch.full((1, *feature.shape), state, device=policy.device)
        for key, feature in policy.config.input_features.items()
    }
    out = {
        name: value.to(torch.int32).cpu().numpy()
        for name, value in policy.preprocess(blank | {"task": [text]}).items()
        if isinstance(value, Tensor)
        and name.startswith("observation.")
        and name not in policy.observation_keys
        and not value.dtype.is_floating_point
    }
    if not out and hasattr(policy.module, "slot"):
        from vla_post.policies.flow import TASK_INDEX

        module: Any = policy.module
        out = {TASK_INDEX: np.array([module.slot(text)], np.int32)}
    return out


# Report -----------------------------------------------------------------------------------------


def _bound(policy: LeRobotPolicy, config: ExportConfig) -> float:
    if config.bound is not None:
        return config.bound
    if config.precision == "fp32":
        return BOUNDS["fp32"]
    low, high = np.asarray(policy.contract.action.limits.position, np.float64).T
    return BOUNDS[config.precision] * float((high - low).max())


def _feeds(
    runtime: TorchPolicy,
    tokens: Mapping[str, Mapping[str, np.ndarray]],
    probes: Sequence[Probe],
) -> list[dict[str, np.ndarray]]:
    """The graph's inputs on the probes, with noise and every other one with a running chunk."""
    policy = runtime.policy
    out: list[dict[str, np.ndarray]] = []
    for seed, (observation, instruction) in enumerate(probes):
        feeds = {key: observation[key][None] for key in runtime.observation_keys}
        feeds |= tokens[instruction]
        if is_flow(policy):
            rows = (1, policy.horizon, policy.action_size)
            feeds[PREVIOUS] = np.zeros(rows, np.float32)
            feeds[FOLLOW] = np.zeros(rows[:2], np.float32)
        shape = (1, policy.horizon, policy.noise_size)
        feeds[NOISE] = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        out.append(feeds)
    return out


def _deviations(
    programs: Mapping[str, Any],
    folder: Path,
    feeds: Mapping[str, np.ndarray],
    policy: LeRobotPolicy,
    language: Sequence[str],
) -> dict[str, Any]:
    """File -> its first layer that differs; a step graph is looked at on the first step."""
    given: dict[str, Mapping[str, np.ndarray]] = {WHOLE_FILE: feeds}
    if ENCODER_FILE in programs:
        seen = {k: v for k, v in feeds.items() if k not in (PREVIOUS, FOLLOW, NOISE)}
        with torch.no_grad():
            context = EncoderGraph(policy, language)(*(torch.from_numpy(v) for v in seen.values()))
        given[ENCODER_FILE] = seen
        given[STEP_FILE] = {f"context{n}": t.numpy() for n, t in enumerate(context)} | {
            PREVIOUS: feeds[PREVIOUS],
            FOLLOW: feeds[FOLLOW],
            X: feeds[NOISE],
            TIME: np.zeros(1, np.float32),
            DT: np.full(1, 1.0 / int(policy.head.denoising_steps), np.float32),
        }
    found: dict[str, Any] = {}
    settled: dict[str, np.ndarray] = {}
    for name, program in programs.items():
        found[name] = first_deviation(program, folder / name, given[name], more=settled)
        if name == ENCODER_FILE:
            settled = run_graph(folder / name, given[name])
    return {name: deviation for name, deviation in found.items() if deviation is not None}


def _card(
    runtime: TorchPolicy,
    tokens: Mapping[str, Mapping[str, np.ndarray]],
    config: ExportConfig,
    bound: float,
) -> PolicyCard:
    policy, contract = runtime.policy, runtime.policy.contract
    packages = ("vla-post", "torch", "lerobot", "onnx", "onnxscript", "onnxruntime")
    return PolicyCard(
        kind=policy.kind,
        layout=config.layout,
        precision=config.precision,
        dynamic_batch=config.dynamic_batch,
        opset=OPSET,
        contract=contract.to_json(),
        contract_sha256=contract.sha256,
        observations={
            key: Feature(
                shape=tuple(contract.observations[key].shape),
                dtype="uint8" if contract.observations[key].is_image else "float32",
                unit=contract.observations[key].unit,
                names=tuple(contract.observations[key].names),
            )
            for key in runtime.observation_keys
        },
        action=Action(names=tuple(contract.action.names), unit=contract.action.unit),
        horizon=policy.horizon,
        action_size=policy.action_size,
        noise_size=policy.noise_size,
        control_hz=contract.control_hz,
        execute_steps=contract.execute_steps,
        denoising_steps=int(policy.head.denoising_steps),
        takes_previous=is_flow(policy),
        instructions={
            text: {name: value[0].tolist() for name, value in inputs.items()}
            for text, inputs in tokens.items()
        },
        files={},
        parity=ParityCard(observations=0, max_error=0.0, mean_error=0.0, cosine=1.0, bound=bound),
        versions={name: importlib.metadata.version(name) for name in packages},
    )


def _latency_ms(
    reference: TorchPolicy, exported: OnnxPolicy, probes: Sequence[Probe]
) -> dict[str, float]:
    """Medians of both, measured in turn so that other load on the machine hits them alike: twenty
    turns, or as many as ten seconds hold and at least three."""
    times: list[list[float]] = []
    observation, instruction = probes[0]
    end = time.perf_counter() + 10.0
    while len(times) < 20 and (len(times) < 3 or time.perf_counter() < end):
        turn: list[float] = []
        for policy in (reference, exported):
            started = time.perf_counter()
            policy.act(observation, instruction, len(times))
            turn.append(time.perf_counter() - started)
        times.append(turn)
    torch_ms, onnx_ms = np.median(times, axis=0) * 1e3
    return {"torch": float(torch_ms), "onnx": float(onnx_ms)}

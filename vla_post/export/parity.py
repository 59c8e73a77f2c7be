"""Is the exported file the policy? On recorded observations, in action units; if not, since where.

B batch, H chunk length, A action size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from vla_post.export.card import ParityCard
from vla_post.export.passes import layer_of
from vla_post.export.runtime import ChunkPolicy

Probe = tuple[Mapping[str, np.ndarray], str]
"""A recorded observation without batch axis, as stored, and its instruction."""


def compare(
    reference: ChunkPolicy, exported: ChunkPolicy, probes: Sequence[Probe], *, bound: float
) -> ParityCard:
    """Both on every probe, with equal noise; every other one continues the chunk before it."""
    errors: list[np.ndarray] = []
    cosines: list[float] = []
    running: np.ndarray | None = None
    for seed, (observation, instruction) in enumerate(probes):
        overlap: dict[str, Any] = {}
        if running is not None and seed % 2 and exported.takes_previous:
            half = max(1, len(running) // 2)
            overlap = {"previous": running[half:], "delay": half // 2}
        a = reference.act(observation, instruction, seed, **overlap).astype(np.float64)
        b = exported.act(observation, instruction, seed, **overlap).astype(np.float64)
        running = a.astype(np.float32)
        errors.append(np.abs(a - b))
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosines.append(float((a * b).sum()) / scale if scale else 1.0)
    worst = np.max(errors)
    return ParityCard(
        observations=len(probes),
        # NaN must not pass for a small error, nor break the card's JSON.
        max_error=float(worst) if np.isfinite(worst) else 1e30,
        mean_error=float(np.nan_to_num(np.mean(errors), nan=1e30, posinf=1e30)),
        cosine=float(np.nan_to_num(min(cosines), nan=-1.0)),
        bound=bound,
    )


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One value inside the graph that differs between PyTorch and ONNX Runtime."""

    layer: str
    """Module that computes it, by its dotted name in the policy."""
    value: str
    """Its name in both graphs."""
    operator: str
    error: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute value in PyTorch."""

    def __str__(self) -> str:
        return (
            f"{self.layer or 'the border of the graph'} ({self.operator}, value {self.value!r}): "
            f"{self.error:.3g} off where the largest value is {self.scale:.3g}"
        )


def first_deviation(
    program: torch.export.ExportedProgram,
    file: Path,
    feeds: Mapping[str, np.ndarray],
    *,
    more: Mapping[str, np.ndarray] | None = None,
    tolerance: float = 1e-3,
) -> Deviation | None:
    """The first value, in the order of the graph, that is off by more than a share of its size.

    Args:
        program: what PyTorch traced: values of the file carry its names.
        feeds: the program's inputs, in its order.
        more: inputs of the file that the program does not have.
        tolerance: share of the value's largest magnitude.

    Returns:
        None if no value that both graphs name differs so much.
    """
    wanted = _values(program, feeds)
    model = onnx.load(file)
    nodes = {name: node for node in model.graph.node for name in node.output if name in wanted}
    model = onnx.shape_inference.infer_shapes(model)
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    present = {output.name for output in model.graph.output}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    names = [n for n in nodes if n in present or kinds.get(n) in floats]
    for name in names:
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kinds[name], None))
    found = _run(model.SerializeToString(), names, {**feeds, **(more or {})})
    for name, value in zip(names, found, strict=True):
        expected = wanted[name]
        if expected.shape != value.shape or expected.size == 0:
            continue
        # Masked scores are the most negative number there is; only their order matters.
        real = np.abs(expected) < 1e30
        if not real.any():
            continue
        error = float(
            np.abs(expected - value.astype(np.float64), where=real, out=np.zeros(value.shape)).max()
        )
        scale = float(np.abs(expected[real]).max())
        if not error <= tolerance * max(scale, 1e-6):
            node = nodes[name]
            return Deviation(
                layer=layer_of(node), value=name, operator=node.op_type, error=error, scale=scale
            )
    return None


def run_graph(file: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a file in ONNX Runtime; feeds that it does not take are left out."""
    names = [o.name for o in onnx.load(file, load_external_data=False).graph.output]
    return dict(zip(names, _run(str(file), names, feeds), strict=True))


def _run(
    model: bytes | str, names: Sequence[str], feeds: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    takes = {i.name for i in session.get_inputs()}
    return session.run(list(names), {k: v for k, v in feeds.items() if k in takes})


def _values(
    program: torch.export.ExportedProgram, feeds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Every floating-point value that PyTorch computes, by its name in the traced graph."""
    found: dict[str, np.ndarray] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            if (
                n.op == "call_function"
                and isinstance(out, torch.Tensor)
                and out.is_floating_point()
            ):
                found[n.name] = out.detach().double().numpy()
            return out

    module = program.module()
    assert isinstance(module, torch.fx.GraphModule)
    with torch.no_grad():
        Watch(module).run(*(torch.from_numpy(v) for v in feeds.values()))
    return found

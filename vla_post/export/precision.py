"""Smaller numbers in an exported graph: fp16, bf16, int8. In standard ONNX operators only.

fp16              weights and arithmetic; inputs and outputs stay float32
bf16              weights are stored in bf16 and widened when used: ONNX Runtime has no bf16
                  arithmetic on a CPU. Half the file, activations as before
int8              weights per output channel in int8, widened when used
int8-calibrated   weights and the activations of matrix products in int8; the ranges of activations
                  come from recorded observations
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import TopologicalSortPass

from vla_post.export.card import ENCODER_FILE, STEP_FILE, Precision
from vla_post.export.split import save

SMALLEST = 256
"""Weights with fewer numbers stay as they are: nothing is gained."""

Feeds = Mapping[str, np.ndarray]


def change_precision(
    folder: Path, graphs: Sequence[str], precision: Precision, feeds: Sequence[Feeds]
) -> None:
    """Rewrites the graphs of a folder in place.

    Args:
        feeds: inputs of the whole policy on recorded observations, for calibration.
    """
    if precision == "int8-calibrated":
        inputs = _inputs_of(folder, graphs, feeds)
        for name in graphs:
            _calibrated(folder / name, inputs[name])
        return
    change: Callable[[onnx.ModelProto], onnx.ModelProto] = {
        "fp16": _half,
        "bf16": _bf16_weights,
        "int8": _int8_weights,
    }[precision]
    for name in graphs:
        save(change(onnx.load(folder / name)), folder / name)


def _half(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(model, keep_io_types=True, max_finite_val=65504.0)
    # It appends its casts at the end, where ONNX's own checker does not look for them.
    sorted_model = onnx_ir.from_proto(model)
    TopologicalSortPass()(sorted_model)
    return onnx_ir.to_proto(sorted_model)


def _bf16_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    def widened(weight: np.ndarray, name: str, axis: int) -> tuple[list[TensorProto], list[Any]]:
        small = numpy_helper.from_array(weight.astype(ml_dtypes.bfloat16), f"{name}_bf16")
        node = helper.make_node(
            "Cast", [small.name], [name], name=f"{name}_widen", to=TensorProto.FLOAT
        )
        return [small], [node]

    return _with_weights(model, widened)


def _int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    def widened(weight: np.ndarray, name: str, axis: int) -> tuple[list[TensorProto], list[Any]]:
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = np.abs(weight).max(axis=others, keepdims=True) / 127.0
        scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
        small = np.rint(weight / scale).clip(-127, 127).astype(np.int8)
        tensors = [
            numpy_helper.from_array(small, f"{name}_int8"),
            numpy_helper.from_array(scale.reshape(-1), f"{name}_scale"),
            numpy_helper.from_array(np.zeros(scale.size, np.int8), f"{name}_zero"),
        ]
        node = helper.make_node(
            "DequantizeLinear",
            [t.name for t in tensors],
            [name],
            name=f"{name}_widen",
            axis=axis,
        )
        return tensors, [node]

    return _with_weights(model, widened)


def _with_weights(
    model: onnx.ModelProto,
    widened: Callable[[np.ndarray, str, int], tuple[list[TensorProto], list[Any]]],
) -> onnx.ModelProto:
    """Replaces the weights of matrix products, convolutions and embeddings."""
    graph = model.graph
    axes: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            if node.op_type == "MatMul":
                axes.setdefault(name, -1)
            elif node.op_type == "Gemm":
                turned = any(a.name == "transB" and a.i for a in node.attribute)
                axes.setdefault(name, 0 if turned else -1)
            elif node.op_type in ("Conv", "Gather"):
                axes.setdefault(name, 0)
    weights: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        fits = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) >= 2
        if tensor.name not in axes or not fits or np.prod(tensor.dims) < SMALLEST:
            weights.append(tensor)
            continue
        array = numpy_helper.to_array(tensor)
        made, widen = widened(array, tensor.name, axes[tensor.name] % array.ndim)
        weights += made
        nodes += widen
    del graph.initializer[:]
    graph.initializer.extend(weights)
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _calibrated(path: Path, inputs: Sequence[Feeds]) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    takes = {i.name for i in onnx.load(path, load_external_data=False).graph.input}

    class Recorded(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> Any:
            feeds = next(self.left, None)
            return None if feeds is None else {k: v for k, v in feeds.items() if k in takes}

    target = path.with_suffix(".int8.onnx")
    # It advises a pre-processing step on the root logger, which the simplified graph has behind it.
    logging.getLogger().addFilter(_no_advice)
    # Symmetric int8 activations, as TensorRT takes them; products and convolutions only, because
    # norms and softmax lose most and gain nothing.
    try:
        quantize_static(
            str(path),
            str(target),
            Recorded(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
    finally:
        logging.getLogger().removeFilter(_no_advice)
    target.replace(path)


def _no_advice(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()


def _inputs_of(
    folder: Path, graphs: Sequence[str], feeds: Sequence[Feeds]
) -> dict[str, list[Feeds]]:
    """The inputs of each graph; a step's are those of every denoising step of a real run."""
    if STEP_FILE not in graphs:
        return {name: list(feeds) for name in graphs}
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    sessions: list[Any] = [
        onnxruntime.InferenceSession(
            str(folder / name), options, providers=["CPUExecutionProvider"]
        )
        for name in (ENCODER_FILE, STEP_FILE)
    ]
    encoder, step = sessions
    outputs = [o.name for o in encoder.get_outputs()]
    seen = {i.name for i in encoder.get_inputs()}
    taken = {i.name for i in step.get_inputs()}
    steps: list[Feeds] = []
    for inputs in feeds:
        context = encoder.run(outputs, {k: v for k, v in inputs.items() if k in seen})
        given = dict(inputs) | dict(zip(outputs, context, strict=True)) | {"x": inputs["noise"]}
        for number in range(5):
            given["time"] = np.full(1, number / 5, np.float32)
            given["dt"] = np.full(1, 0.2, np.float32)
            steps.append({k: v for k, v in given.items() if k in taken})
            given["x"] = step.run(["x_next"], steps[-1])[0]
    return {ENCODER_FILE: list(feeds), STEP_FILE: steps}

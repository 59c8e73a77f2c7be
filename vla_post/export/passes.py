"""What is done to a traced graph before it is written: smaller, without paths, 32-bit integers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_SCOPES = "pkg.torch.onnx.name_scopes"


def simplify(program: Any) -> onnx.ModelProto:
    """Folds constants, merges equals, drops unused nodes and the tracer's notes, narrows int64.

    Args:
        program: what `torch.onnx.export` returned. Its notes hold source lines and paths of this
            machine; of them only the layer's name stays (`layer_of`).
    """
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    # The tracer turns small weights round anew for every denoising step and leaves large ones to
    # the runtime; equal constants must be one before equal sub-expressions can be.
    largest = 1 << 30
    fold_constants(program.model, input_size_limit=largest, output_size_limit=largest)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(program.model)
    for value in program.model.graph.initializers.values():
        array = value.const_value.numpy()
        if not array.flags.c_contiguous:  # turned round by the folding; hashing wants plain memory
            value.const_value = onnx_ir.tensor(np.ascontiguousarray(array), name=value.name)
    common.DeduplicateHashedInitializersPass(size_limit=largest)(program.model)
    common.CommonSubexpressionEliminationPass()(program.model)
    common.RemoveUnusedNodesPass()(program.model)
    model = join_products(program.model_proto)
    for node in model.graph.node:
        scopes = [p.value for p in node.metadata_props if p.key == _SCOPES]
        node.doc_string = ""
        del node.metadata_props[:]
        if scopes:
            node.metadata_props.add(key=_SCOPES, value=scopes[0])
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.graph.doc_string = ""
    return narrow_int64(model)


def layer_of(node: onnx.NodeProto) -> str:
    """Dotted name of the module that a node was traced in; empty if unknown."""
    for prop in node.metadata_props:
        if prop.key == _SCOPES:
            scopes = [s for s in prop.value.strip("[]").replace("'", "").split(", ") if s]
            return scopes[-2] if len(scopes) > 1 else ""
    return ""


def join_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """[x A, x B, ...] side by side becomes x [A, B, ...]: queries, keys and values at once."""
    graph = model.graph
    weights = {i.name: i for i in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    gone: set[str] = set()
    for node in graph.node:
        parts = [made.get(name) for name in node.input]
        if node.op_type != "Concat" or not all(
            part is not None
            and part.op_type == "MatMul"
            and part.input[1] in weights
            and len(weights[part.input[1]].dims) == 2
            and uses[part.output[0]] == 1
            for part in parts
        ):
            continue
        products = [part for part in parts if part is not None]
        (axis,) = (a.i for a in node.attribute if a.name == "axis")
        if len({part.input[0] for part in products}) > 1 or axis not in (-1, 2):
            continue
        joined = np.concatenate(
            [numpy_helper.to_array(weights[part.input[1]]) for part in products], axis=1
        )
        name = f"{node.output[0]}_weight"
        graph.initializer.append(numpy_helper.from_array(joined, name))
        gone.update(part.output[0] for part in products)
        node.op_type, node.input[:] = "MatMul", [products[0].input[0], name]
        del node.attribute[:]
    kept = [node for node in graph.node if not gone.intersection(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    return model


def narrow_int64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Computes in int32 where the graph casts to int64: TensorRT has slow or no int64 arithmetic.

    Tokens, positions and slots are small. Shapes and axes are constants and stay int64, as ONNX
    demands. What an operator insists on having as int64 is cast back in front of it.
    """
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    kinds: dict[str, int] = {i.name: i.data_type for i in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kinds[value.name] = value.type.tensor_type.elem_type
    constants = {i.name: i for i in graph.initializer}
    narrow: set[str] = set()
    nodes: list[onnx.NodeProto] = []

    def cast(name: str, to: int) -> str:
        out = f"{name}_as_{TensorProto.DataType.Name(to).lower()}"
        if all(out not in node.output for node in nodes):
            nodes.append(onnx.helper.make_node("Cast", [name], [out], name=out, to=to))
        return out

    def small(name: str) -> str:
        """A constant or a run-time value as int32."""
        if name in narrow:
            return name
        if name not in constants:
            return cast(name, TensorProto.INT32)
        out = f"{name}_int32"
        if out not in constants:
            array = numpy_helper.to_array(constants[name])
            tensor = numpy_helper.from_array(array.astype(np.int32), out)
            graph.initializer.append(tensor)
            constants[out] = tensor
        return out

    for node in graph.node:
        if node.op_type == "Cast" and kinds.get(node.output[0]) == TensorProto.INT64:
            node.attribute[0].i = TensorProto.INT32
            narrow.update(node.output)
        elif any(name in narrow for name in node.input):
            _narrow_node(node, opset, kinds, narrow, small, cast)
        nodes.append(node)
    for value in graph.output:
        if value.name in narrow:
            value.type.tensor_type.elem_type = TensorProto.INT32
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    used = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _narrow_node(
    node: onnx.NodeProto, opset: int, kinds: dict[str, int], narrow: set[str], small: Any, cast: Any
) -> None:
    """Gives a node with narrowed inputs a consistent type, by the operator's own schema."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    letters = [_letter(schema.inputs, index) for index in range(len(node.input))]
    wide = TensorProto.INT64
    takes = {
        c.type_param_str: "tensor(int32)" in c.allowed_type_strs for c in schema.type_constraints
    }
    turned = {
        letter
        for name, letter in zip(node.input, letters, strict=True)
        if name in narrow and takes.get(letter)
    }
    for index, (name, letter) in enumerate(zip(node.input, letters, strict=True)):
        if letter in turned and (kinds.get(name) == wide or name in narrow):
            node.input[index] = small(name)
        elif name in narrow:
            node.input[index] = cast(name, wide)
    for index, name in enumerate(node.output):
        if _letter(schema.outputs, index) in turned and kinds.get(name) == wide:
            narrow.add(name)


def _letter(parameters: Sequence[Any], index: int) -> str:
    """Type parameter of the index-th input or output; the last may be variadic."""
    return str(parameters[min(index, len(parameters) - 1)].type_str)

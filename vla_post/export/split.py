"""Encoder and step graphs of one policy: what does not change from step to step is computed once.

lerobot's denoising step projects the prefix's keys, builds masks and turns positions into tables
anew each time. Whatever in the step graph depends on the context alone moves to the end of the
encoder, and its results are the step's context instead.
"""

from pathlib import Path
from typing import Any

import onnx

CONTEXT = "context"
"""Values that go from encoder to step have names that begin with this."""
DATA_SUFFIX = ".data"


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph whose weights are all in memory; files end at 2 GB, so more go beside it."""
    data = path.with_name(f"{path.name}{DATA_SUFFIX}")
    data.unlink(missing_ok=True)  # onnx would write behind what is there
    apart: dict[str, Any] = {}
    if model.ByteSize() > 1_800_000_000:
        apart = {"save_as_external_data": True, "location": data.name, "size_threshold": 1024}
    onnx.save(model, path, **apart)


def settle_context(encoder: Path, step: Path) -> None:
    """Rewrites both files: the step keeps what depends on x and time, both drop what is unused."""
    first, second = onnx.load(encoder), onnx.load(step)
    move_to_encoder(first, second)
    drop_unused(first, second)
    save(first, encoder)
    save(second, step)


def move_to_encoder(first: onnx.ModelProto, second: onnx.ModelProto) -> None:
    """Moves the nodes of the step (`second`) that depend on the context alone to the encoder."""
    typed = onnx.shape_inference.infer_shapes(second, data_prop=True).graph
    types = {v.name: v.type for v in (*typed.value_info, *typed.input)}
    weights = {i.name: i for i in second.graph.initializer}
    outputs = {o.name for o in second.graph.output}
    fixed = {i.name for i in second.graph.input if i.name.startswith(CONTEXT)}
    moved: list[onnx.NodeProto] = []
    kept: list[onnx.NodeProto] = []
    for node in second.graph.node:
        given = {name for name in node.input if name}
        if (
            given & fixed
            and given <= fixed | weights.keys()
            # Sizes stay where they are used: a parser wants to see through them.
            and all(name in types and name not in outputs for name in node.output)
            and node.op_type not in ("Shape", "Size")
        ):
            fixed.update(node.output)
            moved.append(node)
        else:
            kept.append(node)
    made = {name for node in moved for name in node.output}
    needed = [n for n in dict.fromkeys(name for node in kept for name in node.input) if n in made]
    names = {name: f"{CONTEXT}_{name}" for name in made}
    copied: dict[str, onnx.TensorProto] = {}
    for node in (*moved, *kept):
        node.input[:] = [names.get(name, name) for name in node.input]
    for node in moved:
        node.name = f"{CONTEXT}_{node.name}"  # nodes of one graph have different names
        node.output[:] = [names[name] for name in node.output]
        for index, name in enumerate(node.input):
            if name in weights:
                node.input[index] = f"{CONTEXT}_{name}"
                copied[name] = weights[name]
    for name, tensor in copied.items():
        twin = onnx.TensorProto()
        twin.CopyFrom(tensor)
        twin.name = f"{CONTEXT}_{name}"
        first.graph.initializer.append(twin)
    values = [onnx.ValueInfoProto(name=names[name], type=types[name]) for name in needed]
    first.graph.node.extend(moved)
    first.graph.output.extend(values)
    second.graph.input.extend(values)
    del second.graph.value_info[:]
    del second.graph.node[:]
    second.graph.node.extend(kept)


def drop_unused(first: onnx.ModelProto, second: onnx.ModelProto) -> None:
    """Leaves out what the encoder computes for others than the step (features for critics, say)."""
    used = {name for node in second.graph.node for name in node.input}
    unused = {i.name for i in second.graph.input if i.name.startswith(CONTEXT)} - used
    for model, values in ((first, first.graph.output), (second, second.graph.input)):
        kept = [v for v in values if v.name not in unused]
        del values[:]
        values.extend(kept)
        needed = {v.name for v in model.graph.output}
        nodes: list[onnx.NodeProto] = []
        for node in reversed(model.graph.node):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        del model.graph.node[:]
        model.graph.node.extend(reversed(nodes))
        weights = [i for i in model.graph.initializer if i.name in needed]
        del model.graph.initializer[:]
        model.graph.initializer.extend(weights)

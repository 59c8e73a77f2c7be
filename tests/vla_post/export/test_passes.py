"""What is done to graphs after tracing leaves their numbers alone; on graphs written by hand."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from vla_post.export.passes import join_products
from vla_post.export.split import settle_context

HEAD = '<ir_version: 9, opset_import: ["" : 20]>'


def graph(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"{HEAD} {text}")
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_products_of_one_input_side_by_side_become_one():
    weights = {"a": normal(4, 2), "b": normal(4, 3), "c": normal(4, 1)}
    x = normal(1, 5, 4)
    joined = """g (float[1,5,4] x) => (float[1,5,6] y)
        { p = MatMul(x, a) q = MatMul(x, b) r = MatMul(x, c) y = Concat<axis=-1>(p, q, r) }"""
    model = graph(joined, **weights)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    after = join_products(model)
    onnx.checker.check_model(after, full_check=True)
    assert operators(after) == ["MatMul"]
    (got,) = ReferenceEvaluator(after).run(None, {"x": x})
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_products_that_others_need_or_of_other_inputs_stay():
    weights = {"a": normal(4, 2), "b": normal(4, 3)}
    needed = """g (float[1,5,4] x) => (float[1,5,5] y, float[1,5,2] z)
        { p = MatMul(x, a) q = MatMul(x, b) y = Concat<axis=-1>(p, q) z = Neg(p) }"""
    other = """g (float[1,5,4] x, float[1,5,4] w) => (float[1,5,5] y)
        { p = MatMul(x, a) q = MatMul(w, b) y = Concat<axis=-1>(p, q) }"""
    rows = """g (float[1,5,4] x) => (float[1,10,2] y)
        { p = MatMul(x, a) q = MatMul(x, b) y = Concat<axis=1>(p, q) }"""
    for text, given in [(needed, weights), (other, weights), (rows, weights | {"b": normal(4, 2)})]:
        model = graph(text, **given)
        before = operators(model)
        assert operators(join_products(model)) == before


def test_what_depends_on_the_context_alone_is_computed_once(tmp_path: Path):
    encoder = graph(
        """g (float[1,4] seen) => (float[1,4] context0, float[1,4] context1, float[1,4] context2)
        { context0 = Neg(seen) context1 = Exp(seen) context2 = Abs(seen) }"""
    )
    step = graph(
        """g (float[1,4] context0, float[1,4] context1, float[1,4] context2, float[1,3] x)
        => (float[1,3] x_next)
        { k = MatMul(context0, w) t = Tanh(k) u = Mul(t, k) s = Add(x, u) r = ReduceSum(context1)
          x_next = Mul(s, r) }""",
        w=normal(4, 3),
    )
    for model in (encoder, step):
        for number, node in enumerate(model.graph.node):
            node.name = f"node{number}"
    seen, x = normal(1, 4), normal(1, 3)

    def run() -> np.ndarray:
        first, second = (
            ReferenceEvaluator(onnx.load(tmp_path / name)) for name in ("e.onnx", "s.onnx")
        )
        context = dict(zip(first.output_names, first.run(None, {"seen": seen}), strict=True))
        value = x
        for _ in range(3):
            (value,) = second.run(None, context | {"x": value})
        return value

    onnx.save(encoder, tmp_path / "e.onnx")
    onnx.save(step, tmp_path / "s.onnx")
    expected = run()
    settle_context(tmp_path / "e.onnx", tmp_path / "s.onnx")
    first, second = (onnx.load(tmp_path / name) for name in ("e.onnx", "s.onnx"))
    for model in (first, second):
        onnx.checker.check_model(model, full_check=True)
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert operators(second) == ["Add", "Mul"]
    assert "Abs" not in operators(first)
    assert [i.name for i in second.graph.input] == ["x", "context_u", "context_r"]
    assert [o.name for o in first.graph.output] == ["context_u", "context_r"]
    np.testing.assert_array_equal(run(), expected)

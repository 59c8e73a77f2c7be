"""What `vla-post export --check` finds in any ONNX file, and that a damaged one is a finding."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vla_post.cli.main import main
from vla_post.export.check import check_file, graph_stage, onnxruntime_stage, tensorrt_stage
from vla_post.export.passes import narrow_int64

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def model(
    nodes: list[onnx.NodeProto], inputs: dict, outputs: dict, constants: dict
) -> onnx.ModelProto:
    def values(named: dict) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in named.items()]

    graph = helper.make_graph(
        nodes,
        "graph",
        values(inputs),
        values(outputs),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.fixture
def positions() -> onnx.ModelProto:
    """Positions of the real tokens, as language models count them: int64 throughout."""
    return model(
        [
            helper.make_node("Cast", ["mask"], ["wide"], to=INT64),
            helper.make_node("CumSum", ["wide", "axis"], ["counted"]),
            helper.make_node("Sub", ["counted", "one"], ["position"]),
            helper.make_node("Gather", ["table", "position"], ["seen"]),
            helper.make_node("Cast", ["position"], ["out"], to=FLOAT),
            helper.make_node("Expand", ["out", "position_shape"], ["spread"]),
        ],
        {"mask": (INT32, [1, 6])},
        {"spread": (FLOAT, [1, 6]), "seen": (FLOAT, [1, 6])},
        {
            "axis": np.array(1, np.int64),
            "one": np.array(1, np.int64),
            "table": np.arange(6, dtype=np.float32),
            "position_shape": np.array([1, 6], np.int64),
        },
    )


def run(made: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def test_int64_arithmetic_becomes_int32_and_computes_the_same(
    positions: onnx.ModelProto, tmp_path: Path
):
    mask = np.array([[1, 1, 0, 1, 1, 0]], np.int32)
    expected = run(positions, mask=mask)
    onnx.save(positions, tmp_path / "wide.onnx")
    texts = [str(f) for f in graph_stage(tmp_path / "wide.onnx")[0]]
    assert any("warning" in t and "3 nodes compute in int64 (Cast" in t for t in texts)

    narrow = narrow_int64(positions)
    onnx.checker.check_model(narrow, full_check=True)
    onnx.save(narrow, tmp_path / "narrow.onnx")
    findings, _ = graph_stage(tmp_path / "narrow.onnx")
    assert any("no arithmetic in int64" in f.text for f in findings)
    for a, b in zip(expected, run(narrow, mask=mask), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_operator_that_insists_on_int64_gets_it(tmp_path: Path):
    made = model(
        [
            helper.make_node("Cast", ["count"], ["wide"], to=INT64),
            helper.make_node("Add", ["wide", "one"], ["size"]),
            helper.make_node("Tile", ["row", "size"], ["rows"]),
        ],
        {"count": (INT32, [1])},
        {"rows": (FLOAT, [None])},
        {"one": np.array([1], np.int64), "row": np.array([1.0, 2.0], np.float32)},
    )
    narrow = narrow_int64(made)
    onnx.checker.check_model(narrow, full_check=True)
    (rows,) = run(narrow, count=np.array([2], np.int32))
    np.testing.assert_array_equal(rows, [1.0, 2.0] * 3)


def test_control_flow_float64_and_slow_operators_are_named(tmp_path: Path):
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "b",
        [],
        [helper.make_tensor_value_info("y", FLOAT, [2])],
    )
    made = model(
        [
            helper.make_node("If", ["flag"], ["a"], then_branch=branch, else_branch=branch),
            helper.make_node("ScatterND", ["a", "where", "what"], ["b"]),
            helper.make_node("Cast", ["b"], ["c"], to=TensorProto.DOUBLE),
            helper.make_node("Sin", ["c"], ["d"]),
        ],
        {"flag": (TensorProto.BOOL, []), "x": (FLOAT, ["n"])},
        {"d": (TensorProto.DOUBLE, ["n"])},
        {"where": np.array([[0]], np.int64), "what": np.array([1.0], np.float32)},
    )
    file = tmp_path / "odd.onnx"
    onnx.save(made, file)
    findings, facts = graph_stage(file)
    found = {(f.level, f.text.split(" (")[0]) for f in findings}
    assert ("error", "dynamic control flow: 1 x If") in found
    assert ("error", "2 nodes compute in float64") in found
    assert ("warning", "1 x ScatterND: write parts of a tensor by joining them instead") in found
    assert any(level == "warning" and "dynamic axes: n" in text for level, text in found)
    assert facts["opset"] == {"ai.onnx": 20}
    assert facts["inputs"] == {"flag": "bool ()", "x": "float (n)"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_damaged_file_is_a_finding(
    positions: onnx.ModelProto, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
):
    data = bytearray(positions.SerializeToString())
    random = np.random.default_rng(0)
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        for place in random.integers(len(data), size=40):
            data[place] ^= 0x55
    else:
        data = bytearray(b"not a graph")
    file = tmp_path / "damaged.onnx"
    file.write_bytes(bytes(data))
    report = check_file(file)
    assert not report.ok
    assert any("cannot be read" in f.text for f in report.findings)


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from vla_post.export.check import graph_stage, onnxruntime_stage

data, file = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
random = np.random.default_rng(0)
refused = 0
for number in range(200):
    broken = bytearray(data)
    if number % 4 == 0:
        broken = broken[: int(random.integers(len(data)))]
    else:
        for _ in range(number % 4):
            broken[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    file.write_bytes(broken)
    found = [*graph_stage(file)[0], *onnxruntime_stage(file)[0]]
    refused += any(f.level == "error" for f in found)
print()
print(refused)
"""


def test_damage_of_a_file_without_a_card_never_ends_a_parser(
    positions: onnx.ModelProto, tmp_path: Path
):
    """It might: that is why `check_file` gives each parser a process. These 200 do not."""
    onnx.save(positions, tmp_path / "whole.onnx")
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path / "whole.onnx"), str(tmp_path / "broken.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) > 100


def test_a_native_crash_is_a_finding_too(
    positions: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The parser's process is killed as a segmentation fault would end it."""
    onnx.save(positions, tmp_path / "fine.onnx")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "__init__.py").write_text("import os; os.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    report = check_file(tmp_path / "fine.onnx")
    assert not report.ok
    assert "the parser crashed with signal 11" in report.findings[0].text


def test_the_command_says_what_it_found(
    positions: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    onnx.save(narrow_int64(positions), good)
    main(["export", "--check", str(good)])
    out = capsys.readouterr().out
    assert "no arithmetic in int64" in out
    assert "loads it" in out
    assert 'inputs  {"mask": "int32 (1, 6)"}' in out
    bad.write_bytes(b"\x08")
    with pytest.raises(SystemExit):
        main(["export", "--check", str(bad)])
    assert "not ready" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "--check", str(tmp_path / "none.onnx")])
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export"])
    assert "name a checkpoint to export, or files to --check" in capsys.readouterr().err


def test_tensorrt_builds_an_engine_without_a_gpu(positions: onnx.ModelProto, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx", reason="the optional extra `tensorrt`")
    file = tmp_path / "positions.onnx"
    onnx.save(narrow_int64(positions), file)
    findings, facts = tensorrt_stage(file)
    assert [f.level for f in findings] == ["ok", "ok"], findings
    assert facts["tensorrt"]["engine_mb"] > 0

    made = model(
        [helper.make_node("Unique", ["x"], ["y"])], {"x": (FLOAT, [3])}, {"y": (FLOAT, [None])}, {}
    )
    onnx.save(made, file)
    findings, _ = tensorrt_stage(file)
    assert findings[0].level == "error"
    assert "Unique" in findings[0].text or "refuses" in findings[0].text
    assert onnxruntime_stage(file)[0][0].level == "ok"

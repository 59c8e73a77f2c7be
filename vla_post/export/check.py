"""Would TensorRT and ONNX Runtime take this ONNX file? What is slow or unsupported in it?

For any ONNX file. Parsers are native libraries that a damaged file can crash, so each runs in a
process of its own: whatever happens there becomes a finding here.

    python -m vla_post.export.check FILE.onnx STAGE      one stage, findings as JSON on stdout
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Level = Literal["error", "warning", "ok", "skipped"]

STAGES = ("graph", "onnxruntime", "tensorrt")
STAGE_TIMEOUT_S = 600.0

CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
UNSUPPORTED = {
    "Bernoulli": "TensorRT draws no such numbers",
    "BitShift": "TensorRT has no such operator",
    "DFT": "TensorRT has no such operator",
    "Multinomial": "TensorRT draws no such numbers",
    "SequenceAt": "TensorRT has no sequences",
    "SequenceConstruct": "TensorRT has no sequences",
    "SequenceEmpty": "TensorRT has no sequences",
    "SequenceInsert": "TensorRT has no sequences",
    "StringNormalizer": "TensorRT has no strings",
    "StringConcat": "TensorRT has no strings",
    "StringSplit": "TensorRT has no strings",
    "TfIdfVectorizer": "TensorRT has no strings",
    "Unique": "its output's size depends on the data",
}
"""After the operator list of TensorRT 10's ONNX parser; the parser itself has the last word."""
SLOW = {
    "ScatterND": "write parts of a tensor by joining them instead",
    "ScatterElements": "write parts of a tensor by joining them instead",
    "NonZero": "its output's size depends on the data",
    "Compress": "its output's size depends on the data",
    "RandomNormal": "make noise an input, so that results can be repeated",
    "RandomNormalLike": "make noise an input, so that results can be repeated",
    "RandomUniform": "make noise an input, so that results can be repeated",
    "RandomUniformLike": "make noise an input, so that results can be repeated",
    "GRU": "recurrent layers run step by step",
    "LSTM": "recurrent layers run step by step",
    "RNN": "recurrent layers run step by step",
    "NonMaxSuppression": "its output's size depends on the data",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    level: Level
    stage: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.stage}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    file: Path
    findings: tuple[Finding, ...]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ok(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)


def check_file(file: Path, *, timeout_s: float = STAGE_TIMEOUT_S) -> CheckReport:
    """Every stage, each in its own process.

    Raises:
        FileNotFoundError: no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    findings: list[Finding] = []
    facts: dict[str, Any] = {}
    for stage in STAGES:
        found = _in_process(file, stage, timeout_s)
        facts |= found.pop("facts", {})
        findings += [Finding(**f) for f in found["findings"]]
        if stage == "graph" and any(f.level == "error" and "cannot" in f.text for f in findings):
            break  # nothing else would read it either
    return CheckReport(file=file, findings=tuple(findings), facts=facts)


def _in_process(file: Path, stage: str, timeout_s: float) -> dict[str, Any]:
    def failed(text: str) -> dict[str, Any]:
        return {"findings": [asdict(Finding(level="error", stage=stage, text=text))]}

    command = [sys.executable, "-m", "vla_post.export.check", str(file), stage]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return failed(f"did not finish within {timeout_s:.0f} s")
    if done.returncode < 0:
        return failed(f"cannot be read: the parser crashed with signal {-done.returncode}")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return failed(f"cannot be read: {last[:300]}")


# The stages, each run in a process of its own -----------------------------------------------------


def graph_stage(file: Path) -> tuple[list[Finding], dict[str, Any]]:
    """Reads the file with ONNX's own checker and looks at operators, types and shapes."""
    import onnx

    findings: list[Finding] = []

    def say(level: Level, text: str) -> None:
        findings.append(Finding(level=level, stage="graph", text=text))

    try:
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file, load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # protobuf, onnx and numpy each raise their own
        first = (str(error).strip().splitlines() or [""])[0]
        say("error", f"cannot be read as ONNX: {type(error).__name__}: {first[:300]}")
        return findings, {}
    graph = model.graph
    opset = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    operators = Counter(node.op_type for node in graph.node)
    facts: dict[str, Any] = {
        "opset": opset,
        "nodes": len(graph.node),
        "operators": dict(operators.most_common()),
        "inputs": {i.name: _describe(i) for i in graph.input},
        "outputs": {o.name: _describe(o) for o in graph.output},
    }
    foreign = sorted({n.domain for n in graph.node if n.domain not in ("", "ai.onnx")})
    if foreign:
        say("error", f"operators of other domains than ONNX's: {', '.join(foreign)}")
    for name in sorted(operators.keys() & CONTROL_FLOW):
        say("error", f"dynamic control flow: {operators[name]} x {name}")
    for name in sorted(operators.keys() & UNSUPPORTED.keys()):
        say("error", f"{operators[name]} x {name}: {UNSUPPORTED[name]}")
    for name in sorted(operators.keys() & SLOW.keys()):
        say("warning", f"{operators[name]} x {name}: {SLOW[name]}")
    for kind, word in ((onnx.TensorProto.INT64, "int64"), (onnx.TensorProto.DOUBLE, "float64")):
        nodes = _computed_in(model, kind)
        if nodes:
            some = ", ".join(f"{n.op_type} {n.name or n.output[0]}" for n in nodes[:4])
            level: Level = "error" if word == "float64" else "warning"
            say(level, f"{len(nodes)} nodes compute in {word} ({some}); TensorRT wants 32 bits")
        else:
            say("ok", f"no arithmetic in {word}")
    moving = sorted(
        {
            d.dim_param or "?"
            for value in graph.input
            for d in value.type.tensor_type.shape.dim
            if not d.HasField("dim_value")
        }
    )
    if moving:
        say("warning", f"dynamic axes: {', '.join(moving)}; an engine needs a profile for them")
    else:
        say(
            "ok",
            "static shapes, no control flow"
            if not operators.keys() & CONTROL_FLOW
            else "static shapes",
        )
    say(
        "ok",
        f"opset {opset.get('ai.onnx')}, {len(graph.node)} nodes, IR version {model.ir_version}",
    )
    return findings, facts


def _computed_in(model: Any, kind: int) -> list[Any]:
    """Nodes that compute a value of this type from the inputs, rather than from constants."""
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    constant = {i.name for i in graph.initializer} | {""}
    found: list[Any] = []
    for node in graph.node:
        if node.op_type in ("Constant", "Shape", "Size") or all(n in constant for n in node.input):
            constant.update(node.output)
        elif any(kinds.get(name) == kind for name in node.output):
            found.append(node)
    return found


def _describe(value: Any) -> str:
    import onnx

    kind = value.type.tensor_type
    shape = ", ".join(
        str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim
    )
    return f"{onnx.TensorProto.DataType.Name(kind.elem_type).lower()} ({shape})"


def onnxruntime_stage(file: Path) -> tuple[list[Finding], dict[str, Any]]:
    """Loads the file in ONNX Runtime."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes share no useful base
        text = f"{type(error).__name__}: {str(error)[:300]}"
        return [Finding(level="error", stage="onnxruntime", text=text)], {}
    text = f"version {onnxruntime.__version__} loads it"
    return [Finding(level="ok", stage="onnxruntime", text=text)], {}


def tensorrt_stage(file: Path) -> tuple[list[Finding], dict[str, Any]]:
    """Parses the file with TensorRT's own parser and builds an engine ahead of time."""
    if find_spec("tensorrt_rtx") is None:
        text = "not installed (pip install 'vla-post[tensorrt]'); nothing was parsed or built"
        return [Finding(level="skipped", stage="tensorrt", text=text)], {}
    from vla_post.export.tensorrt import build_engine

    return build_engine(file)


_RUN: dict[str, Callable[[Path], tuple[list[Finding], dict[str, Any]]]] = {
    "graph": graph_stage,
    "onnxruntime": onnxruntime_stage,
    "tensorrt": tensorrt_stage,
}


def main(arguments: list[str]) -> int:
    """One stage; see the module."""
    findings, facts = _RUN[arguments[1]](Path(arguments[0]))
    print(json.dumps({"findings": [asdict(f) for f in findings], "facts": facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

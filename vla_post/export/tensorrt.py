"""TensorRT's own parser and an engine built ahead of time, on a machine without a GPU.

With the extra `tensorrt` (the package tensorrt-rtx). The engine it builds is for the named
generation of GPUs and is not run here: this proves that the parser takes every operator and that
the builder finds a plan, and says nothing about speed.
"""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

from vla_post.export.check import Finding

CAPABILITY = "SM120"
"""GeForce RTX 50 and RTX PRO Blackwell; SM75 to SM121 are the others that tensorrt-rtx knows."""


def build_engine(
    file: Path, *, capability: str = CAPABILITY, out: Path | None = None
) -> tuple[list[Finding], dict[str, Any]]:
    """Parses and builds.

    Args:
        out: where to write the engine, if it is wanted.

    Returns:
        Findings of level ok or error, and facts: layers, seconds, megabytes.
    """
    trt: Any = import_module("tensorrt_rtx")  # typed as Any: an optional package

    findings: list[Finding] = []

    def say(level: Any, text: str) -> None:
        findings.append(Finding(level=level, stage="tensorrt", text=text))

    class Listener(trt.ILogger):  # pyright: ignore[reportUntypedBaseClass]
        """Keeps what TensorRT says instead of printing it."""

        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.WARNING:
                self.said.append(msg)

    logger = Listener()
    builder: Any = trt.Builder(logger)
    network: Any = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser: Any = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        for number in range(parser.num_errors):
            error = parser.get_error(number)
            say("error", f"the parser refuses node {error.node()}: {error.desc()}")
        return findings, {}
    say("ok", f"TensorRT for RTX {trt.__version__} parses it into {network.num_layers} layers")
    config: Any = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    _add_profile(builder, network, config)
    started = time.perf_counter()
    engine: Any = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if engine is None:
        said = "; ".join(logger.said[-3:]) or "it does not say why"
        say("error", f"no engine for {capability}: {said[:300]}")
        return findings, {}
    size_mb = engine.nbytes / 1e6
    say("ok", f"engine for {capability} built in {seconds:.1f} s, {size_mb:.1f} MB (not run here)")
    if out is not None:
        out.write_bytes(bytes(engine))
    facts = {"layers": network.num_layers, "build_s": seconds, "engine_mb": size_mb}
    return findings, {"tensorrt": facts}


def _add_profile(builder: Any, network: Any, config: Any) -> None:
    """A range of sizes for dynamic axes: 1 to 8, best at 1."""
    profile = builder.create_optimization_profile()
    moving = False
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = list(tensor.shape)
        if -1 in shape:
            moving = True
            sizes = [[n if d == -1 else d for d in shape] for n in (1, 1, 8)]
            profile.set_shape(tensor.name, *sizes)
    if moving:
        config.add_optimization_profile(profile)

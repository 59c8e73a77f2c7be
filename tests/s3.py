"""A real S3 server in a process of its own, for the tests that need one."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "benchmarks" / "s3_local.py"
_spec = importlib.util.spec_from_file_location("s3_local", _path)
assert _spec
assert _spec.loader
s3_local = importlib.util.module_from_spec(_spec)
sys.modules["s3_local"] = s3_local
_spec.loader.exec_module(s3_local)
S3Server, Proxy, client_environment = (
    s3_local.S3Server,
    s3_local.Proxy,
    s3_local.client_environment,
)

"""Message definitions as MCAP wants them: the .msg text and, below it, that of every part.

The files lie in `share/PACKAGE/msg` of a ROS installation or of the wheels' environment.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path

_FIELD = re.compile(r"^\s*([A-Za-z][\w/]*)(?:<=\d+)?(?:\[.*?\])?\s+[A-Za-z]\w*")
_SIMPLE = {
    "bool", "byte", "char", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32",
    "uint32", "int64", "uint64", "string", "wstring",
}  # fmt: skip


@cache
def definition(kind: str) -> str:
    """Of `package/msg/Name`, followed by its parts in the order in which they are met.

    Raises:
        OSError: a file is missing.
        ValueError: not such a name.
    """
    out = [_text(kind)]
    known, queue = {kind}, _parts(kind, out[0])
    while queue:
        part = queue.pop(0)
        if part in known:
            continue
        known.add(part)
        text = _text(part)
        package, _, name = part.split("/")
        out.append("=" * 80 + f"\nMSG: {package}/{name}\n" + text)
        queue += _parts(part, text)
    return "\n".join(out)


def _parts(kind: str, text: str) -> list[str]:
    """Full names of the message types in a definition."""
    package = kind.split("/")[0]
    found: list[str] = []
    for line in text.splitlines():
        match = _FIELD.match(line.partition("#")[0])
        if match is None or match[1] in _SIMPLE:
            continue
        names = match[1].split("/")
        found.append(f"{names[0] if len(names) > 1 else package}/msg/{names[-1]}")
    return found


def _text(kind: str) -> str:
    parts = kind.split("/")
    if len(parts) != 3 or parts[1] != "msg":
        raise ValueError(f"{kind!r} is no message type; expected package/msg/Name")
    prefixes = [*os.environ.get("AMENT_PREFIX_PATH", "").split(":"), sys.prefix]
    for prefix in prefixes:
        path = Path(prefix) / "share" / parts[0] / "msg" / f"{parts[2]}.msg"
        if prefix and path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(f"no definition of {kind} under {', '.join(p for p in prefixes if p)}")

"""Off-screen OpenGL for MuJoCo: finds a way that works here, and keeps rendering cheap.

`prepare` tries egl, then osmesa (the system's library, or the one inside the wheel
`lavavu-osmesa`), each in a process of its own because a broken OpenGL may abort the interpreter,
and remembers the answer in the environment, so that child processes start at once. `new_context`
takes the back end's own class, because `mujoco.GLContext` is bound to what MUJOCO_GL said when
mujoco was imported.
"""

import ctypes
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PROVEN = "VLA_POST_GL"
"""Set to the back end that rendered in this environment; children then skip the trial."""
BACKENDS = ("egl", "osmesa")
REMEDY = (
    "install one of: `apt-get install libegl1 libopengl0 libgl1` (egl), "
    "`apt-get install libosmesa6` (osmesa), `pip install lavavu-osmesa` (osmesa without root)"
)

_TRIAL = """
import os, sys
from sim.headless import use
use(sys.argv[1])
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom size='1' rgba='1 0 0 1'/></worldbody></mujoco>"
)
model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(data)
    if renderer.render().max() == 0:
        sys.exit("the picture is black")
"""


class NoOpenGL(RuntimeError):
    """No off-screen OpenGL works here; the message says what to install."""


@dataclass(frozen=True)
class GlReport:
    """What `vla-post doctor` prints of OpenGL."""

    ok: bool
    backend: str
    """`egl` or `osmesa`; empty when nothing works."""
    detail: str
    remedy: str


def use(backend: str) -> None:
    """Selects a back end for this process and its children, without trying it."""
    os.environ["MUJOCO_GL"] = backend
    os.environ["PYOPENGL_PLATFORM"] = backend
    library = _packaged_osmesa()
    if backend == "osmesa" and library is not None:
        _answer_for("libOSMesa.so", library)


def prepare() -> str:
    """Selects a back end that renders here, for this process and its children.

    Returns:
        The back end. A user's own MUJOCO_GL is kept when it works.

    Raises:
        NoOpenGL: nothing works.
    """
    proven = os.environ.get(PROVEN)
    if proven and proven == os.environ.get("MUJOCO_GL"):
        use(proven)
        return proven
    report = check()
    if not report.ok:
        raise NoOpenGL(f"cannot render off screen: {report.detail}. {report.remedy}")
    use(report.backend)
    os.environ[PROVEN] = report.backend
    return report.backend


@cache
def _context_class() -> Any:
    return importlib.import_module(f"mujoco.{prepare()}").GLContext


def new_context(width: int, height: int) -> Any:
    """An OpenGL context with `make_current()` and `free()`. Raises NoOpenGL."""
    return _context_class()(width, height)


@cache
def check() -> GlReport:
    """Tries the back ends in turn (about a second each) and reports the first that renders."""
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    order = [wanted] if wanted in BACKENDS else []
    order += [backend for backend in BACKENDS if backend not in order]
    failures: list[str] = []
    for backend in order:
        failure = _trial(backend)
        if failure is None:
            where = "system library"
            if backend == "osmesa" and _packaged_osmesa() is not None:
                where = "library of the lavavu-osmesa wheel"
            return GlReport(True, backend, f"{backend} renders off screen ({where})", "")
        failures.append(f"{backend}: {failure}")
    return GlReport(False, "", "; ".join(failures), REMEDY)


def tune(model: Any) -> None:
    """Switches off shadows and multisampling, which cost most of a software renderer's time.

    Call it on an `mjModel` before its renderer exists.
    """
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0


def _trial(backend: str) -> str | None:
    """None when the back end draws a picture, else the last line of what it said."""
    environment = {k: v for k, v in os.environ.items() if k != PROVEN}
    environment.pop("PYOPENGL_PLATFORM", None)
    environment["MUJOCO_GL"] = backend
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL, backend],
            env=environment,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no picture within 60 s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    log.debug("%s: %s", backend, done.stderr)
    return lines[-1] if lines else f"the trial ended with status {done.returncode}"


def _packaged_osmesa() -> Path | None:
    """The OSMesa library inside the wheel `lavavu-osmesa`, if it is installed."""
    found = importlib.util.find_spec("lavavu")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent.parent / "lavavu_osmesa.libs"
    return next(iter(sorted(folder.glob("libOSMesa*.so*"))), None)


def _answer_for(name: str, library: Path) -> None:
    """Lets PyOpenGL, which asks the loader for `name`, find `library` if the system has none.

    The wheel's library has a mangled name, and the loader reads LD_LIBRARY_PATH only at start.
    """
    try:
        ctypes.CDLL(name)
        return
    except OSError:
        pass
    _load_siblings(library)
    plain: Any = ctypes.CDLL

    class WithPackaged(plain):
        def __init__(self, file: str | None = None, *args: Any, **kwargs: Any) -> None:
            super().__init__(str(library) if file == name else file, *args, **kwargs)

    vars(ctypes.cdll)["_dlltype"] = WithPackaged


def _load_siblings(library: Path) -> None:
    """Loads what the wheel's library needs from its folder, which the loader does not search."""
    left = {path for path in library.parent.glob("*.so*") if path != library}
    progress = True
    while left and progress:
        progress = False
        for path in sorted(left):
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue  # needs a sibling that comes later
            left.discard(path)
            progress = True

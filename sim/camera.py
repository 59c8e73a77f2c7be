"""Cameras of simulated cells: exposure now, picture when somebody asks.

Filling an `MjvScene` takes microseconds, drawing it takes milliseconds. A camera therefore only
notes the scene when a frame is due (`expose`) and draws on demand, so a closed loop pays for the
pictures that its policy looks at. Every picture goes through the contract's JPEG, as on a robot.
"""

import atexit
import copy
from collections import deque
from typing import Any

import mujoco as _mujoco
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from sim import headless

mujoco: Any = _mujoco  # its names come from compiled modules, which pyright cannot read

MAX_GEOMS = 2000
DETAIL_M = 0.64
"""Meshes are drawn with a vertex grid of this over the picture's larger side: 1 cm at 64 pixels."""


class Darkroom:
    """OpenGL context and framebuffer that draw the scenes of one model (and of its copies).

    Belongs to the thread that made it. Close it before the interpreter exits; `darkroom` does.
    """

    def __init__(self, model: Any, height: int, width: int) -> None:
        model = copy.copy(model)
        headless.tune(model)
        coarsen_meshes(model, DETAIL_M / max(height, width))
        model.vis.global_.offwidth = width
        model.vis.global_.offheight = height
        self._gl: Any = headless.new_context(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._rectangle = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)

    def draw(self, scene: Any) -> UInt8[np.ndarray, "h w 3"]:
        """The picture of `scene`, first row on top; a new array each time."""
        self._gl.make_current()
        mujoco.mjr_render(self._rectangle, scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)
        return np.ascontiguousarray(self._pixels[::-1])

    def close(self) -> None:
        """Frees the context; the darkroom cannot draw any more."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None


_darkrooms: dict[tuple[str, int, int], Darkroom] = {}


def darkroom(scene_id: str, model: Any, height: int, width: int) -> Darkroom:
    """One darkroom a process for each scene and size, closed at exit.

    Args:
        scene_id: models of equal id have equal meshes and textures.
    """
    key = (scene_id, height, width)
    if key not in _darkrooms:
        _darkrooms[key] = Darkroom(model, height, width)
        if len(_darkrooms) == 1:  # only now: the hooks of EGL, registered before, run after ours
            atexit.unregister(close_darkrooms)
            atexit.register(close_darkrooms)
    return _darkrooms[key]


def close_darkrooms() -> None:
    """Frees every OpenGL context of this process; cameras make new ones when they draw again."""
    while _darkrooms:
        _darkrooms.popitem()[1].close()


class Exposure:
    """What a camera saw at one moment; drawn at the first call that asks, and once."""

    def __init__(self, camera: "Camera", scene: Any) -> None:
        self._camera, self.scene = camera, scene
        self._jpeg: bytes | None = None
        self._image: np.ndarray | None = None
        self.lent = False

    def clear(self) -> None:
        self._jpeg = self._image = None

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """Before compression."""
        return self._camera.draw(self.scene)

    def jpeg(self) -> bytes:
        if self._jpeg is None:
            self._jpeg = encode_jpeg(self.picture(), self._camera.quality)
        return self._jpeg

    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        """What a receiver of `jpeg()` sees. Read-only."""
        if self._image is None:
            self._image = decode_jpeg(self.jpeg())
            self._image.flags.writeable = False
        return self._image


class Camera:
    """A named camera of a model, or the model's free camera for an empty name."""

    def __init__(
        self, scene_id: str, model: Any, name: str, height: int, width: int, quality: int
    ) -> None:
        self.height, self.width, self.quality = height, width, quality
        self._scene_id, self._model = scene_id, model
        self._view = mujoco.MjvCamera()
        if name:
            self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
            self._view.fixedcamid = model.camera(name).id
            self.fovy_deg = float(model.cam_fovy[self._view.fixedcamid])
        else:
            mujoco.mjv_defaultFreeCamera(model, self._view)
            self.fovy_deg = float(model.vis.global_.fovy)
        # Meta-World's corner cameras hang upside down; people and policies get the upright view.
        self._turned = bool(name) and _upside_down(model, self._view.fixedcamid)
        self._options = mujoco.MjvOption()
        self._spare: deque[Exposure] = deque()
        self.exposure = self._new_exposure()
        """The last one."""

    def expose(self, data: Any) -> None:
        """Notes what the camera would see now."""
        if self.exposure.lent:
            self.exposure = self._spare.popleft() if self._spare else self._new_exposure()
        mujoco.mjv_updateScene(
            self._model, data, self._options, None, self._view,
            mujoco.mjtCatBit.mjCAT_ALL.value, self.exposure.scene,
        )  # fmt: skip
        self.exposure.clear()

    def lend(self) -> Exposure:
        """The last exposure, to be drawn in another thread; `give_back` it afterwards."""
        self.exposure.lent = True
        return self.exposure

    def give_back(self, exposure: Exposure) -> None:
        """From any thread."""
        exposure.lent = False
        if exposure is not self.exposure:
            self._spare.append(exposure)

    def draw(self, scene: Any) -> UInt8[np.ndarray, "h w 3"]:
        """In the thread that draws for this process."""
        drawn = darkroom(self._scene_id, self._model, self.height, self.width).draw(scene)
        return np.ascontiguousarray(drawn[::-1, ::-1]) if self._turned else drawn

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """Of the last exposure, before compression."""
        return self.exposure.picture()

    def jpeg(self) -> bytes:
        return self.exposure.jpeg()

    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        """What a receiver of `jpeg()` sees. Read-only."""
        return self.exposure.image()

    def _new_exposure(self) -> Exposure:
        return Exposure(self, mujoco.MjvScene(self._model, MAX_GEOMS))


def coarsen_meshes(model: Any, grid_m: float) -> None:
    """Joins vertices that share a grid cell and drops the faces that collapse. In place.

    A software renderer pays for each triangle, even one far smaller than a pixel. For a model that
    is only drawn: collisions of this model would see the coarse faces too.
    """
    for mesh in range(model.nmesh):
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        cells = np.floor(model.mesh_vert[first : first + count] / grid_m).astype(np.int64)
        _, keep, group = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        representative = keep[group.reshape(-1)].astype(np.int32)
        first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        rows = slice(first, first + count)
        faces = representative[model.mesh_face[rows]]
        a, b, c = faces.T
        solid = np.flatnonzero((a != b) & (b != c) & (c != a))
        if len(solid) == 0:
            continue  # smaller than the grid: keep it as it is
        _, once = np.unique(np.sort(faces[solid], axis=1), axis=0, return_index=True)
        chosen = solid[np.sort(once)]
        for name in ("mesh_face", "mesh_facenormal", "mesh_facetexcoord"):
            table = getattr(model, name)
            values = faces if name == "mesh_face" else table[rows].copy()
            table[first : first + len(chosen)] = values[chosen]
        model.mesh_facenum[mesh] = len(chosen)


def _upside_down(model: Any, camera_id: int) -> bool:
    """A camera fixed to the world whose upward axis points down."""
    axes = np.empty(9)
    mujoco.mju_quat2Mat(axes, model.cam_quat[camera_id])
    return model.cam_bodyid[camera_id] == 0 and axes.reshape(3, 3)[2, 1] < 0


def encode_jpeg(image: UInt8[np.ndarray, "h w 3"], quality: int) -> bytes:
    """The one way in which simulated cameras compress; full-resolution colour."""
    return simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling="444")


def decode_jpeg(jpeg: bytes) -> UInt8[np.ndarray, "h w 3"]:
    return simplejpeg.decode_jpeg(jpeg, colorspace="RGB")

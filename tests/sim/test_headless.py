"""Finding an OpenGL that works off screen."""

import os
import subprocess
import sys

import pytest

from sim import headless


def test_check_finds_what_renders_here():
    report = headless.check()
    assert report.ok, report.detail
    assert report.backend in headless.BACKENDS
    assert headless.prepare() == report.backend == os.environ["MUJOCO_GL"]


@pytest.mark.pixels
def test_the_packaged_osmesa_renders_without_the_systems():
    """The way for a machine where nothing may be installed as root."""
    pytest.importorskip("lavavu")
    assert headless._trial("osmesa") is None


@pytest.mark.pixels
def test_a_wrong_choice_of_the_user_is_replaced_by_one_that_works():
    code = "from sim.headless import prepare; print(prepare())"
    environment = {k: v for k, v in os.environ.items() if k != headless.PROVEN}
    environment.pop("PYOPENGL_PLATFORM", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"MUJOCO_GL": "glfw"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in headless.BACKENDS


def test_without_any_opengl_the_error_names_both_tries_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(headless, "_trial", lambda backend: f"no lib{backend}")
    monkeypatch.delenv(headless.PROVEN, raising=False)
    headless.check.cache_clear()
    try:
        with pytest.raises(headless.NoOpenGL, match=r"egl: no libegl; osmesa: no.*apt-get install"):
            headless.prepare()
        assert not headless.check().ok
    finally:
        headless.check.cache_clear()

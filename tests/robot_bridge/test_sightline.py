"""The plan over a camera's picture is where MuJoCo draws the tool."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import sim
from robot_bridge.core.sightline import ToolPath, project
from sim.camera import Camera
from trajectory_store.contract import CameraView, Contract, ContractError, load_contract

mujoco = pytest.importorskip("mujoco")

LOOKS_ALONG_X = CameraView(
    focal_px=(100.0, 50.0), position_m=(-1.0, 0.0, 0.0), quat_wxyz=(0.5, -0.5, 0.5, -0.5)
)


def test_a_pinhole_by_hand():
    """The optical frame's z is the base's x, its x is the base's -y, its y is the base's -z."""
    points = np.array([[0.0, 0.0, 0.0], [1.0, -0.2, 0.4], [-3.0, 0.0, 0.0]])
    got = project(points, LOOKS_ALONG_X, (100, 200, 3))
    # (100 + 100 * 0.2 / 2, 50 - 50 * 0.4 / 2) pixels of (200, 100)
    np.testing.assert_allclose(got[:2], [[0.5, 0.5], [0.55, 0.4]], atol=1e-12)
    assert np.isnan(got[2]).all()


def ball_pixel(model: Any, data: Any, camera: str, shape: Any, where: Any) -> np.ndarray:
    """Centre of a small glowing ball at `where`, as MuJoCo draws it, in shares of the picture."""
    eye = Camera("sightline", model, camera, shape[0], shape[1], 95)
    eye.expose(data)
    scene = eye.lend().scene
    geom = scene.geoms[scene.ngeom]
    mujoco.mjv_initGeom(
        geom, mujoco.mjtGeom.mjGEOM_SPHERE, np.full(3, 0.02), np.asarray(where), np.eye(3).ravel(),
        np.array([1.0, 0.0, 1.0, 1.0]),
    )  # fmt: skip
    geom.emission = 1.0
    # In front of everything: the hand would hide a ball in its middle.
    without = eye.draw(scene).astype(int)
    for number in range(scene.ngeom):
        scene.geoms[number].rgba[3] = 0.0
    scene.ngeom += 1
    picture = eye.draw(scene).astype(int)
    assert np.abs(picture - without).max() > 100
    red, green, blue = picture.transpose(2, 0, 1)
    rows, columns = np.nonzero((red > 150) & (blue > 150) & (green < 110))
    assert len(rows) > 3
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / [shape[1], shape[0]]


@pytest.mark.pixels
def test_the_sawyers_hand_is_where_the_plan_begins_and_where_it_goes():
    contract = load_contract(sim.CONTRACTS / "metaworld_pixels.yaml")
    key = "observation.images.corner"
    cell: Any = gymnasium.make("vla_post/MetaWorld-v0", contract=contract, images=False).unwrapped
    path = ToolPath(contract, sim.CONTRACTS)
    names = contract.observations["observation.state"].names
    for task in contract.tasks:
        observation, _ = cell.reset(seed=3, options={"task": task})
        steps = np.zeros((20, 4))
        steps[:, :3] = [0.5, 0.4, 0.5]  # away from the walls of Meta-World's own box
        planned = path.positions(steps, names, observation["observation.state"])
        assert planned is not None
        shape = (480, 480, 3)  # finer than the cell's own, to see a pixel of it
        _, model, data = cell._physics()
        hand = data.body("hand").xpos.copy()
        seen = ball_pixel(model, data, "corner", shape, hand)
        view = contract.view.cameras[key]
        share = project(hand[None], view, contract.observations[key].shape)[0]
        np.testing.assert_allclose(share, seen, atol=0.01)  # 0.6 of the cell's 64 pixels
        for step in steps:
            observation, *_ = cell.step(step.astype(np.float32))
        # The hand follows its target with a lag, so the plan is ahead of it, in its direction.
        moved = data.body("hand").xpos - hand
        wanted = planned[-1] - hand
        assert moved @ wanted > 0.9 * np.linalg.norm(moved) * np.linalg.norm(wanted)
        assert 0.4 < np.linalg.norm(moved) / np.linalg.norm(wanted) < 1.1
    cell.close()


@pytest.mark.pixels
@pytest.mark.parametrize("camera", ["front", "side"])
def test_the_frankas_tool_is_where_the_kinematics_put_it(camera: str):
    contract = load_contract(sim.CONTRACTS / "franka_joint.yaml")
    key = f"observation.images.{camera}"
    cell: Any = gymnasium.make("vla_post/Franka-v0", contract=contract, images=False).unwrapped
    observation, _ = cell.reset(seed=1, options={"task": "lift-cube"})
    state = observation["observation.state"].astype(np.float64)
    path = ToolPath(contract, sim.CONTRACTS)
    tool = path.positions(state[None], (), state)
    assert tool is not None
    _, model, data = cell._physics()
    np.testing.assert_allclose(tool[0], data.site("tool").xpos, atol=2e-3)
    shape = contract.observations[key].shape
    seen = ball_pixel(model, data, camera, (480, 480, 3), tool[0])
    got = project(tool, contract.view.cameras[key], shape)[0]
    np.testing.assert_allclose(got, seen, atol=0.01)
    cell.close()


def test_cells_that_do_not_say_where_their_tool_is_have_no_path():
    data = load_contract(sim.CONTRACTS / "metaworld_pixels.yaml").to_dict()
    plain = Contract.model_validate(data)
    assert plain.view.cameras == {}  # what stores and checkpoints keep
    with pytest.raises(ContractError, match="step_m is missing"):
        ToolPath(plain, sim.CONTRACTS)
    data["safety"]["workspace"] = None
    with pytest.raises(ContractError, match="does not say where the tool is"):
        ToolPath(Contract.model_validate(data), sim.CONTRACTS)


def test_a_view_is_checked_and_is_no_part_of_the_hash(tmp_path: Path):
    text = (sim.CONTRACTS / "metaworld_pixels.yaml").read_text()
    whole = load_contract(sim.CONTRACTS / "metaworld_pixels.yaml")
    moved = tmp_path / "moved.yaml"
    moved.write_text(text.replace("-1.1, -0.4", "-1.2, -0.4"))
    assert load_contract(moved).view != whole.view
    assert load_contract(moved).sha256 == whole.sha256
    for wrong, words in [
        (("images.corner:\n      focal", "images.attic:\n      focal"), "view.cameras names"),
        (("[0.557335,", "[2.0,"), "no unit quaternion"),
        (("focal_px: [77.255", "focal_px: [-1"), "focal_px"),
    ]:
        assert wrong[0] in text
        moved.write_text(text.replace(*wrong))
        with pytest.raises(ContractError, match=words):
            load_contract(moved)

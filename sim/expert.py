"""Scripted experts: what a skilled person would command, from the scene's privileged values."""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from sim.cell import UnknownTask
from trajectory_store import Contract

GRIPPER = 3
"""Index of the gripper's opening in Meta-World's scene values."""
OPEN = 0.95


class Expert(Protocol):
    """One task's script. Stateless: its command depends on the scene alone."""

    def act(self, scene: Float[np.ndarray, " S"]) -> Float[np.ndarray, " A"]:
        """Command within the contract's limits for values ordered by the cell's `scene_names`."""
        ...

    def retreat(self, scene: Float[np.ndarray, " S"]) -> Float[np.ndarray, " A"]:
        """Command that leads away from where the script got stuck, to try again from there."""
        ...


class MetaWorldExpert:
    """Meta-World's own scripted policy of a task, clipped to [-1, 1].

    The scripts assume that they begin with an open gripper and leave it alone until they grasp.
    After somebody else has closed it they would push with a closed hand for ever, so here a hand
    that need not grasp opens.

    Args:
        task: without the version suffix, such as `pick-place`.

    Raises:
        UnknownTask: Meta-World has no script for it.
    """

    def __init__(self, task: str) -> None:
        name = f"{task}-v3"
        if name not in _scripts():
            known = ", ".join(script.removesuffix("-v3") for script in sorted(_scripts()))
            raise UnknownTask(f"no scripted expert for task {task!r}; Meta-World has: {known}")
        self._policy = _scripts()[name]()

    def act(self, scene: Float[np.ndarray, " S"]) -> Float[np.ndarray, "4"]:
        from sim.metaworld_cell import expert_vector

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each call may say that the environment clips
            action = self._policy.get_action(expert_vector(scene))
        action = np.clip(action, -1.0, 1.0)
        if action[3] <= 0 and scene[GRIPPER] < OPEN:
            action[3] = -1.0
        return action

    def retreat(self, scene: Float[np.ndarray, " S"]) -> Float[np.ndarray, "4"]:
        return np.array([0.0, 0.0, 1.0, -1.0])


def make_expert(contract: Contract, task: str) -> Expert:
    """The expert of a task in a simulated cell. Raises UnknownTask."""
    if contract.sim.get("env_id") == "vla_post/Franka-v0":
        from sim.franka_cell import FrankaExpert

        return FrankaExpert(task)
    return MetaWorldExpert(task)


def experts(contract: Contract) -> Mapping[str, Expert]:
    """One expert for each task of the contract."""
    return {task: make_expert(contract, task) for task in contract.tasks}


@cache
def _scripts() -> dict[str, Any]:
    from metaworld.policies import ENV_POLICY_MAP

    return dict(ENV_POLICY_MAP)

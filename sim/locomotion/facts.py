"""The three environments: joints in order, D4RL's reference scores, the contract of their stores.

The scores are those of `d4rl/infos.py` (Farama-Foundation/D4RL, REF_MIN_SCORE and REF_MAX_SCORE),
the returns of a random policy and of D4RL's SAC expert on the v2 environments. They are kept for
the v5 environments, so that numbers stay comparable in kind; docs/data.md says what v5 changed.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from trajectory_store import Contract

EPISODE_STEPS = 1000
"""gymnasium's time limit of all three."""
TASK = "run"


class UnknownEnvironment(ValueError):
    """Not one of `ENVIRONMENTS`; the message lists them."""


@dataclass(frozen=True)
class Environment:
    """A gymnasium locomotion environment and what D4RL's scores of it mean."""

    name: str
    random_return: float
    expert_return: float
    joints: tuple[str, ...]
    """Actuated joints, in the order of the action."""
    dt_s: float
    """Seconds of one control step."""
    instruction: str

    @property
    def state_names(self) -> tuple[str, ...]:
        """qpos without the unobserved x, then qvel."""
        places = ("rootz", "rooty", *self.joints)
        return (*places, *(f"{name}_velocity" for name in ("rootx", *places)))

    @property
    def short_name(self) -> str:
        return self.name.split("-")[0].lower()

    def contract(self) -> Contract:
        """Of a trajectory store: `observation.state` as gymnasium gives it, torques as sent."""
        control_hz = 1.0 / self.dt_s
        return Contract.model_validate(
            {
                "schema": "vla_post/cell/1",
                "cell": self.short_name,
                "robot": self.short_name,
                "control_hz": control_hz,
                "chunk_horizon": 1,
                "execute_steps": 1,
                "observations": {
                    "observation.state": {
                        "topic": "joint_states",
                        "type": "sensor_msgs/JointState",
                        "names": self.state_names,
                        "shape": [len(self.state_names)],
                        "unit": "m, rad, m/s, rad/s",
                        "rate_hz": control_hz,
                    }
                },
                "actions": {
                    "action": {
                        "names": self.joints,
                        "unit": "normalised torque",
                        "mode": "absolute",
                        "limits": {"position": [(-1.0, 1.0)] * len(self.joints)},
                    }
                },
                "tasks": {
                    TASK: {
                        "instruction": self.instruction,
                        "time_limit_s": EPISODE_STEPS * self.dt_s,
                    }
                },
                "sim": {"gymnasium": self.name},
            }
        )


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            "Hopper-v5", -20.272305, 3234.3, ("thigh", "leg", "foot"), 0.008, "Hop forward fast"
        ),
        Environment(
            "Walker2d-v5",
            1.629008,
            4592.3,
            ("thigh", "leg", "foot", "thigh_left", "leg_left", "foot_left"),
            0.008,
            "Walk forward fast",
        ),
        Environment(
            "HalfCheetah-v5",
            -280.178953,
            12135.0,
            ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot"),
            0.05,
            "Run forward fast",
        ),
    )
}


def environment(name: str) -> Environment:
    """The facts of one environment.

    Raises:
        UnknownEnvironment
    """
    if name not in ENVIRONMENTS:
        raise UnknownEnvironment(
            f"no locomotion environment {name!r}; choose one of {', '.join(ENVIRONMENTS)}"
        )
    return ENVIRONMENTS[name]


def normalised_score(
    name: str, episode_return: float | Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """D4RL's score: 0 at the random policy's return, 100 at the expert's.

    Raises:
        UnknownEnvironment
    """
    facts = environment(name)
    span = facts.expert_return - facts.random_return
    return 100.0 * (np.asarray(episode_return) - facts.random_return) / span

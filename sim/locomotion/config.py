"""Knobs of a behaviour agent; importing them loads no learner."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """Of stable-baselines3's PPO and of the rounds it is trained in."""

    envs: int = 8
    """Environments side by side, in one process."""
    rollout_steps: int = 250
    """Of each environment, between two optimisations."""
    iterations: int = 8
    """Rollouts of a round; by default a round is 16,000 steps, two full episodes an environment."""
    batch_size: int = 100
    epochs: int = 10
    learning_rate: float = 3e-4
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    hidden: tuple[int, ...] = (64, 64)
    initial_log_std: float = -1.0
    """Of the actions; PPO's usual 0 sends many actions to their limits."""
    evaluation_episodes: int = 16
    """After each round, with sampled actions, as the data is collected."""

    def __post_init__(self) -> None:
        for name in ("envs", "rollout_steps", "iterations", "epochs", "evaluation_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 2 <= self.batch_size <= self.envs * self.rollout_steps:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be at least 2 and at most "
                f"envs * rollout_steps = {self.envs * self.rollout_steps}"
            )

    @property
    def round_steps(self) -> int:
        """Of all environments together."""
        return self.envs * self.rollout_steps * self.iterations

"""How much a policy needed people, version by version, from the episodes that robots recorded."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from trajectory_store import Episode, Outcome, Source


@dataclass
class Operation:
    """Of all finished episodes that one policy version began."""

    episodes: int = 0
    successes: int = 0
    takeovers: int = 0
    human_s: float = 0.0
    robot_s: float = 0.0
    """The policy drove."""

    @property
    def human_minutes(self) -> float:
        return self.human_s / 60.0

    @property
    def takeovers_per_episode(self) -> float:
        return self.takeovers / max(self.episodes, 1)

    @property
    def human_share(self) -> float:
        """Of the time in which anybody drove."""
        return self.human_s / max(self.human_s + self.robot_s, 1e-9)

    @property
    def takeover_free_s(self) -> float:
        """Mean time that the policy drove from one takeover to the next; all of it without any."""
        return self.robot_s / max(self.takeovers, 1)

    def to_json(self) -> dict[str, Any]:
        derived = ("human_minutes", "takeovers_per_episode", "human_share", "takeover_free_s")
        values = asdict(self) | {name: getattr(self, name) for name in derived}
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}


def operation(episodes: Iterable[Episode], control_hz: float) -> dict[int, Operation]:
    """By policy version, in their order. Episodes that are still running are left out."""
    found: dict[int, Operation] = {}
    for e in episodes:
        if e.is_open:
            continue
        one = found.setdefault(e.policy_version, Operation())
        one.episodes += 1
        one.successes += e.outcome is Outcome.SUCCESS
        one.takeovers += e.interventions
        one.human_s += e.ticks_by(Source.HUMAN) / control_hz
        one.robot_s += e.ticks_by(Source.POLICY) / control_hz
    return dict(sorted(found.items()))

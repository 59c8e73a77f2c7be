"""What people hold in their hands, read without waiting and without ROS.

Every device says at any moment which of its keys are down and where its axes are. One that is not
there, unplugged or out of focus says that nothing is held: no device can keep a deadman pressed by
going away.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Reading:
    """A device now."""

    present: bool
    held: frozenset[str] = frozenset()
    """Names of the keys or buttons that are down."""
    pressed: tuple[str, ...] = ()
    """What went down since the last reading, in order."""
    axes: Mapping[str, float] = field(default_factory=dict[str, float])
    """In [-1, 1]; an axis that is not named rests at 0."""
    problem: str = ""
    """Why it is not present."""


class Device(Protocol):
    name: str
    """For people: what it is and where."""

    def read(self) -> Reading: ...

    def close(self) -> None: ...


Clock = Callable[[], float]
"""Monotonic seconds; tests bring their own."""

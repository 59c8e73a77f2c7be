"""Who may drive a cell, and what the arbiter says of a tick: nouns that several nodes share."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class Mode(StrEnum):
    HOLD = "HOLD"
    POLICY = "POLICY"
    HUMAN = "HUMAN"
    FAULT = "FAULT"


class Phase(StrEnum):
    """Transitions inside a mode."""

    STEADY = ""
    TAKEOVER = "TAKEOVER"
    """Control was requested; the deadman is not held yet. The mode goes on as it was."""
    HANDBACK = "HANDBACK"
    """POLICY was resumed; standing still until a fresh chunk arrives, then blending into it."""


@dataclass(frozen=True)
class Decision:
    """One tick."""

    tick_ns: int
    command: Vector
    """(A,), inside the limits."""
    label: str
    """`policy:V#C`, `human:NAME` or `hold`."""
    mode: Mode
    clipped: tuple[str, ...]
    chunk_step: int | None = None


@dataclass(frozen=True)
class Answer:
    """To a request by a person or a program."""

    success: bool
    message: str

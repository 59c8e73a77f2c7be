"""Who of few operators looks after which of many cells. No ROS here.

An operator attends one cell at a time; cells that want one queue in the order in which they asked.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figures:
    """Of a session, in seconds."""

    waits_s: tuple[float, ...]
    """From asking to being attended, of every attendance."""
    attended_s: float
    """Operator time spent at cells, summed over operators."""
    span_s: float
    operators: int

    @property
    def busy(self) -> float:
        """Share of the operators' time."""
        return self.attended_s / (self.operators * self.span_s) if self.span_s > 0 else 0.0


@dataclass
class _Cell:
    ticket: int
    asked_s: float
    heard_s: float
    since_s: float | None = None
    """Attended since; None while it waits."""


@dataclass
class Attention:
    """Gives `operators` people to cells, first come, first served.

    Args:
        patience_s: a cell that has not been heard for so long is taken off the list, so that a dead
            process keeps nobody.
    """

    operators: int
    patience_s: float = 5.0
    _cells: dict[str, _Cell] = field(default_factory=dict[str, _Cell])
    _waits: list[float] = field(default_factory=list[float])
    _attended_s: float = 0.0
    _begun_s: float | None = None

    def __post_init__(self) -> None:
        if self.operators < 1:
            raise ValueError(f"operators is {self.operators}; it must be at least 1")

    @property
    def granted(self) -> dict[str, int]:
        """Cell -> ticket of what it asked for."""
        return {n: cell.ticket for n, cell in self._cells.items() if cell.since_s is not None}

    @property
    def waiting(self) -> list[str]:
        """In the order in which they will be attended."""
        return [name for name, cell in self._cells.items() if cell.since_s is None]

    def hear(self, cell: str, ticket: int, wants: bool, now_s: float) -> None:
        """What a cell says, again and again while it wants somebody.

        Args:
            ticket: a new number for every need, so that an answer to an older one is known as such.
        """
        self._begun_s = now_s if self._begun_s is None else self._begun_s
        if wants:
            if cell in self._cells and self._cells[cell].ticket != ticket:
                self._leave(cell, now_s)
            known = self._cells.setdefault(cell, _Cell(ticket, now_s, now_s))
            known.heard_s = now_s
        elif cell in self._cells:
            self._leave(cell, now_s)
        self.tick(now_s)

    def tick(self, now_s: float) -> None:
        """Frees whoever attends a silent cell, and gives the free ones away."""
        for name, cell in list(self._cells.items()):
            if now_s - cell.heard_s > self.patience_s:
                self._leave(name, cell.heard_s)
        for name in self.waiting[: self.operators - len(self.granted)]:
            cell = self._cells[name]
            cell.since_s = now_s
            self._waits.append(now_s - cell.asked_s)

    def figures(self, now_s: float) -> Figures:
        running = sum(now_s - c.since_s for c in self._cells.values() if c.since_s is not None)
        span_s = 0.0 if self._begun_s is None else now_s - self._begun_s
        return Figures(tuple(self._waits), self._attended_s + running, span_s, self.operators)

    def _leave(self, name: str, now_s: float) -> None:
        cell = self._cells.pop(name)
        if cell.since_s is not None:
            self._attended_s += max(0.0, now_s - cell.since_s)

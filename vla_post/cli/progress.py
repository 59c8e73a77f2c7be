"""The live display of a run: who drives, how it goes, what the learner does.

Reads what the processes write anyway (`events.jsonl` of the supervisor, `metrics.jsonl` of the
learner), so it can be attached to any run and costs the robot nothing.
"""

import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class JsonLines:
    """Follows a growing file of JSON lines; a line still being written waits for the next call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


@dataclass
class RunState:
    """What an onlooker wants to know, built from events and metrics as they come."""

    episodes: int = 0
    successes: int = 0
    unaided: int = 0
    recent: deque[bool] = field(default_factory=lambda: deque[bool](maxlen=12))
    """Unaided success of the last episodes: the policy on its own, newest last."""
    task: str = ""
    driver: str = "starting"
    version: int = 0
    takeovers: int = 0
    loss: float | None = None
    updates: int = 0
    learner: str = "waiting for the first correction"
    helped: bool = False
    events: int = 0
    published: int = 0

    def event(self, event: dict[str, Any]) -> str | None:
        """Takes one event in; returns a line for a plain log where it matters to an onlooker."""
        self.events += 1
        kind = event.get("type")
        if kind == "episode_start":
            self.task, self.helped, self.driver = event.get("task", ""), False, "policy"
        elif kind == "takeover":
            self.driver, self.helped = "operator", True
            self.takeovers += 1
        elif kind == "release":
            self.driver = "policy"
        elif kind == "policy_switch":
            self.version = int(event.get("version", self.version))
            return f"robot adopts v{self.version}"
        elif kind == "episode_end":
            success = event.get("outcome") == "success"
            alone = success and not self.helped
            self.episodes += 1
            self.successes += success
            self.unaided += alone
            self.recent.append(alone)
            self.driver = "between episodes"
            how = "alone" if alone else ("with help" if success else event.get("outcome", "ended"))
            return (
                f"episode {self.episodes}: {event.get('task', self.task)}: {how} (v{self.version})"
            )
        return None

    def metric(self, row: dict[str, Any]) -> None:
        """Takes one line of the learner's metrics in."""
        if "loss" in row:
            self.loss, self.updates = float(row["loss"]), int(row.get("update", self.updates))
            self.learner = "learning"
        elif "published" in row:
            self.published = int(row["published"])


class Progress:
    """Draws `RunState`: one live panel on a terminal, sparse plain lines elsewhere."""

    def __init__(self, *, episodes: int, events: Path, metrics: Path) -> None:
        self.state = RunState()
        self._total = episodes
        self._events, self._metrics = JsonLines(events), JsonLines(metrics)
        self._start = time.monotonic()
        self._stage = "starting"
        self._console = Console(file=sys.stderr)
        self._live = (
            Live(console=self._console, refresh_per_second=4, transient=False)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self.refresh()
            self._live.stop()

    def stage(self, text: str) -> None:
        """Says what happens now, in a line of its own."""
        self._stage = text
        self._line(text)
        self.refresh()

    def say(self, text: str) -> None:
        """A line above the live view, or in the plain log."""
        self._line(text)

    def refresh(self) -> None:
        """Reads what is new and draws it."""
        for row in self._metrics.new():
            self.state.metric(row)
        for event in self._events.new():
            line = self.state.event(event)
            if line and not self._live:
                self._line(line)
        if self._live:
            self._live.update(self._draw())

    def _line(self, text: str) -> None:
        seconds = time.monotonic() - self._start
        self._console.print(f"[{seconds:5.0f} s] {text}", highlight=False, markup=False)

    def _draw(self) -> Group:
        state = self.state
        seconds = time.monotonic() - self._start
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=10)
        table.add_column()
        marks = Text("".join("●" if ok else "○" for ok in state.recent))
        marks.append(f"  {sum(state.recent)}/{len(state.recent)} unaided of the last episodes")
        bar = ProgressBar(total=self._total, completed=min(state.episodes, self._total), width=40)
        table.add_row("now", f"{self._stage}   {seconds:.0f} s")
        table.add_row("episodes", bar)
        table.add_row("", f"{state.episodes} of {self._total}, {state.takeovers} takeovers")
        table.add_row("success", marks)
        table.add_row("driving", f"{state.driver}   {state.task}")
        loss = "" if state.loss is None else f", loss {state.loss:.3f}"
        table.add_row("policy", f"v{state.version} on the robot, v{state.published} is the newest")
        table.add_row("learner", f"{state.learner}: {state.updates} updates{loss}")
        return Group(table)

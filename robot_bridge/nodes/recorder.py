"""The recorder: every tick that was executed becomes a row of the trajectory store.

    python -m robot_bridge.nodes.recorder --ros-args -r __ns:=/CELL -p contract:=FILE -p store:=PATH

Its process alone writes the store. Deep queues and true stamps: it may be late, never lossy, and
nobody waits for it. Told to stop, it first writes what the last episode still owes.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from robot_bridge.core.chunks import ChunkReader
from robot_bridge.core.events import Event, EventError, EventType, parse_event
from robot_bridge.core.joints import JointReader, NamesError
from robot_bridge.core.record import Ending, EpisodeAssembler
from robot_bridge.nodes.common import (
    STEADY,
    CellNode,
    UserError,
    latched,
    reliable,
    run,
    stamp_ns,
)
from robot_bridge.nodes.streams import Streams
from trajectory_store import Outcome, Store, StoreError, StoreWriter

DRAIN_S = 0.05
"""Period in which queued rows are looked at."""
QUIET_S = 0.5
"""Told to stop, the recorder leaves when no message has come for so long and no episode runs."""


class RecorderNode(CellNode):
    def __init__(self, **options: Any) -> None:
        super().__init__("recorder", **options)
        self._path = str(self.declare_parameter("store", "").value or "")
        self._interval_s = float(self.declare_parameter("commit_interval_s", 1.0).value or 1.0)
        self._grace_s = float(self.declare_parameter("grace_s", 0.25).value or 0.25)
        if not self._path:
            raise UserError("recorder: no store; pass `--ros-args -p store:=PATH`")

    def setup(self) -> None:
        try:
            self._writer = StoreWriter.create_or_open(
                self._path, self.contract, commit_interval_s=self._interval_s
            )
        except StoreError as error:
            raise UserError(str(error)) from error
        self._assembler = EpisodeAssembler(self.contract, grace_s=self._grace_s)
        self._waiting: deque[tuple[Event, bool]] = deque()
        """Starts and ends that are to be handled in order, and whether each is history."""
        self._episode: Event | None = None
        self._begun = False
        """The store knows of the episode; it does from its first row on."""
        self._known = {episode.uuid for episode in Store(self._path).episodes}
        self._since_ns = time.time_ns()
        """Events that were published before are history, told again to a late joiner."""
        self._now_s = self._heard_s = 0.0
        """Seconds of attention: a process that was not scheduled for a while has its messages still
        in the queue, so that time must not count as their silence."""
        self._leaving = False
        self._version = 0
        self._episodes = self._bad_rows = 0
        self._problem = ""
        self._action = JointReader(self.contract.action.names, exact=True)
        self._target = JointReader(self.contract.action.names, exact=True)
        self._chunks = ChunkReader(self.contract)
        self._streams = Streams(
            self,
            self.contract,
            self._assembler.push,
            vectors=reliable(1000),
            images=reliable(100),
            lost=self._assembler.lost,
        )
        on_event: Any = self._on_event
        self._subscriptions_made = [
            self.create_subscription(
                JointState, "arbiter/executed", self._on_executed, reliable(1000)
            ),
            self.create_subscription(
                JointTrajectory, "policy/action_chunk", self._on_chunk, reliable(100)
            ),
            self.create_subscription(
                JointState, "teleop/joint_target", self._on_target, reliable(1000)
            ),
            self.create_subscription(String, "events", on_event, latched(200)),
        ]
        self._timers_made = [self.create_timer(DRAIN_S, self._look, clock=STEADY)]

    def teardown(self) -> None:
        streams: Streams | None = self.__dict__.pop("_streams", None)
        if streams is not None:
            streams.close()
        removers: tuple[tuple[str, Callable[[Any], Any]], ...] = (
            ("_timers_made", self.destroy_timer),
            ("_subscriptions_made", self.destroy_subscription),
        )
        for name, destroy in removers:
            for entity in self.__dict__.pop(name, []):
                destroy(entity)
        writer: StoreWriter | None = self.__dict__.pop("_writer", None)
        if writer is not None:
            try:
                writer.close()
            except StoreError as error:
                self.get_logger().error(str(error))

    def unfinished(self) -> bool:
        if not self._leaving:
            self._leaving, self._heard_s = True, self._now_s  # listen once more
        busy = self._episode is not None or bool(self._waiting)
        return self.live and (busy or self._now_s - self._heard_s < QUIET_S)

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        if not self.live:
            return DiagnosticStatus.STALE, "", {}
        health = self._writer.health
        values = {
            "episodes": self._episodes,
            "committed_ticks": health.committed_ticks,
            "pending_ticks": health.pending_ticks,
            "refused_rows": self._bad_rows,
        }
        for topic, counter in self._streams.counters.items():
            values[f"received {topic}"] = counter.received
            values[f"lost {topic}"] = counter.lost
            heard_s = self._streams.heard_s.get(topic)
            if heard_s is not None:
                values[f"age_ms {topic}"] = round((time.monotonic() - heard_s) * 1e3)
        text = health.error or self._problem
        level = DiagnosticStatus.ERROR if not health.ok else DiagnosticStatus.OK
        return (DiagnosticStatus.WARN if text and health.ok else level), text, values

    # Inputs

    def _on_executed(self, message: JointState) -> None:
        try:
            command = self._action.read(message.name, message.position)
        except NamesError as error:
            self.get_logger().error(f"arbiter/executed: {error}", throttle_duration_sec=5.0)
            return
        stamp, label = stamp_ns(message.header.stamp), message.header.frame_id
        self._heard_s = self._now_s
        self._assembler.executed(stamp, command, label, self._heard_s)
        self._drain()

    def _on_chunk(self, message: JointTrajectory) -> None:
        points: Any = message.points
        try:
            chunk = self._chunks.read(
                stamp_ns(message.header.stamp),
                message.joint_names,
                [point.positions for point in points],
                message.header.frame_id,
            )
        except ValueError:
            return  # the arbiter refuses it too, and says so
        self._assembler.chunk(chunk)

    def _on_target(self, message: JointState) -> None:
        try:
            command = self._target.read(message.name, message.position)
        except NamesError:
            return  # the arbiter refuses it too, and says so
        self._assembler.human(stamp_ns(message.header.stamp), command)

    def _on_event(self, message: String, info: Any) -> None:
        self._heard_s = self._now_s
        try:
            event = parse_event(message.data)
        except EventError as error:
            self.get_logger().warning(str(error))
            return
        if event.type == EventType.POLICY_SWITCH:
            self._version = event.integer("version")
        elif event.type in (EventType.EPISODE_START, EventType.EPISODE_END):
            self._waiting.append((event, info["source_timestamp"] < self._since_ns))
            self._drain()
        elif event.type == EventType.LABEL and info["source_timestamp"] >= self._since_ns:
            self._relabel(event)

    def _relabel(self, event: Event) -> None:
        """An operator corrects a recorded episode; only this process may write the store."""
        names = ("outcome", "task", "instruction", "notes")
        changes: dict[str, Any] = {n: event.text(n) for n in names if n in event.fields}
        try:
            if "outcome" in changes:
                changes["outcome"] = Outcome(changes["outcome"])
            if "task" in changes:
                self.contract.task(changes["task"])
            self._writer.change_episode(event.text("episode"), lambda e: e.replace(**changes))
        except (StoreError, ValueError) as error:
            self.get_logger().warning(f"label refused: {error}")

    # Rows

    def _look(self) -> None:
        self._now_s += DRAIN_S
        self._drain()

    def _drain(self) -> None:
        """Writes what is complete, and handles starts and ends in their order."""
        if not self.live:
            return
        now = self._now_s
        while True:
            if self._episode is None:
                if not self._waiting:
                    return
                self._begin(*self._waiting.popleft())
                continue
            if self._waiting and not self._assembler.ending:
                self._announce_end(*self._waiting.popleft(), now)
            for row in self._assembler.rows_ready(now):
                self._append(row)
            if not self._assembler.finished(now):
                return
            self._finish()

    def _begin(self, event: Event, history: bool) -> None:
        if event.type != EventType.EPISODE_START:
            return  # the end of an episode that began before this recorder
        uuid = event.text("episode")
        # A recorder that lags behind sees whole episodes in its queue, and records each of them;
        # only those that were over before it came are gone.
        over = any(later.text("episode") == uuid for later, _ in self._waiting)
        if uuid in self._known or (history and over):
            return
        self._episode, self._begun = event, False
        self._assembler.begin(event.integer("start_stamp_ns"))

    def _begin_in_store(self, first_ns: int) -> None:
        event = self._episode
        assert event is not None
        start_ns = event.integer("start_stamp_ns")
        late = first_ns - start_ns > self.contract.dt_ns
        self._begun = True
        self._known.add(event.text("episode"))
        self._writer.begin_episode(
            event.text("task"),
            event.text("instruction"),
            event.text("operator"),
            self._version,
            uuid=event.text("episode"),
            notes=f"first row {(first_ns - start_ns) / 1e6:.0f} ms after the start" if late else "",
        )

    def _announce_end(self, event: Event, history: bool, now: float) -> None:
        assert self._episode is not None
        same = event.text("episode") == self._episode.text("episode")
        if event.type == EventType.EPISODE_START or not same:
            # The supervisor was restarted and the end of our episode was never told.
            self._assembler.end(
                Ending(event.stamp_ns - 1, Outcome.INTERRUPTED, reason="its end was never told"),
                now,
            )
            self._waiting.appendleft((event, history))
            return
        self._assembler.end(
            Ending(
                event.integer("end_stamp_ns", event.stamp_ns),
                event.text("outcome", Outcome.INTERRUPTED),
                event.fields.get("truncated") is True,
                event.text("reason"),
            ),
            now,
        )

    def _finish(self) -> None:
        outcome, problems = self._assembler.outcome, self._assembler.problems
        last, rates = self._assembler.finish()
        if last is not None:
            self._append(last)
        assert self._episode is not None
        uuid, self._episode = self._episode.text("episode"), None
        if not self._begun:
            self.get_logger().warning(f"episode {uuid} has no rows; nothing was stored")
            return
        problems += [str(rate) for rate in rates if not rate.good]
        try:
            self._writer.end_episode(Outcome(outcome), problems=problems)
        except (StoreError, ValueError) as error:
            self.get_logger().error(f"episode {uuid}: {error}")
        if problems:
            self.get_logger().warning(f"episode {uuid} is marked: {'; '.join(problems)}")
        self._episodes += 1

    def _append(self, row: Any) -> None:
        try:
            if not self._begun:
                self._begin_in_store(row.stamp_ns)
            self._writer.append(row)
        except (StoreError, ValueError) as error:
            self._bad_rows += 1
            self._problem = f"row refused: {error}"
            self.get_logger().error(self._problem, throttle_duration_sec=5.0)


def main(arguments: list[str] | None = None) -> int:
    return run(RecorderNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

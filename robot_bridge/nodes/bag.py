"""Every topic of the cell, as it went over the wire, in MCAP files: an option beside the store.

    python -m robot_bridge.nodes.bag --ros-args -r __ns:=/CELL -p contract:=FILE -p bag:=FOLDER

Messages are never decoded, so recording is cheap, and a process of its own, so that neither a full
disk nor a slow one touches the store. Files are cut at `split_mb`; an unfinished one can be read up
to its last chunk (`vla-post store from-mcap` and `mcap recover` do). Lost messages are counted
exactly, by the publishers' sequence numbers, and written into each file's metadata record `loss`.
"""

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from robot_bridge.core.align import SequenceCounter
from robot_bridge.nodes.common import STEADY, CellNode, UserError, run
from robot_bridge.nodes.definitions import definition

LOOK_S = 0.5
GLOBAL_TOPICS = ("/clock", "/tf", "/tf_static")
"""Recorded beside those of the cell's namespace."""
CHUNK_BYTES = 256 * 1024
"""Written at once; a killed recorder loses at most the one that it was filling."""


class BagNode(CellNode):
    def __init__(self, **options: Any) -> None:
        super().__init__("bag", **options)
        folder = str(self.declare_parameter("bag", "").value or "")
        if not folder:
            raise UserError("bag: no folder; pass `--ros-args -p bag:=FOLDER`")
        self._folder = Path(folder)
        self._split_bytes = int(float(self.declare_parameter("split_mb", 1024.0).value or 0) * 1e6)
        if self._split_bytes <= 0:
            raise UserError("bag: split_mb must be > 0")

    def setup(self) -> None:
        try:
            import mcap.writer
        except ImportError:
            raise UserError("bag: the package `mcap` is missing; install vla-post[bags]") from None
        self._mcap: Any = mcap.writer
        self._folder.mkdir(parents=True, exist_ok=True)
        self._topics: dict[str, tuple[Any, str, SequenceCounter]] = {}
        """(subscription, type, counter)"""
        self._refused: set[str] = set()
        self._problem = ""
        self._messages = self._bytes = self._files = 0
        self._file: BinaryIO | None = None
        self._open()
        self._timers_made = [
            self.create_timer(LOOK_S, self._look, clock=STEADY),
            self.create_timer(1.0, self._flush, clock=STEADY),
        ]

    def started(self) -> None:
        self._look()

    def teardown(self) -> None:
        for timer in self.__dict__.pop("_timers_made", []):
            self.destroy_timer(timer)
        topics: dict[str, tuple[Any, str, SequenceCounter]] = self.__dict__.get("_topics", {})
        for subscription, _, _ in topics.values():
            self.destroy_subscription(subscription)
        if self.__dict__.get("_file") is not None:
            self._close()
        self.__dict__.pop("_topics", None)

    def diagnose(self) -> tuple[bytes, str, dict[str, Any]]:
        if not self.live:
            return DiagnosticStatus.STALE, "", {}
        values = {
            "topics": len(self._topics),
            "messages": self._messages,
            "lost": sum(counter.lost for _, _, counter in self._topics.values()),
            "megabytes": round(self._bytes / 1e6, 1),
        }
        level = DiagnosticStatus.ERROR if self._problem else DiagnosticStatus.OK
        return level, self._problem, values

    # Topics

    def _look(self) -> None:
        """Subscribes to what is new in the graph."""
        if not self.live:
            return
        inside = self.get_namespace().rstrip("/") + "/"
        for topic, types in self.get_topic_names_and_types():
            ours = topic.startswith(inside) or topic in GLOBAL_TOPICS
            if not ours or topic in self._topics or topic in self._refused:
                continue
            publishers = self.get_publishers_info_by_topic(topic)
            if not publishers:
                continue
            try:
                text = definition(types[0])
                package, _, name = types[0].split("/")
                kind = getattr(importlib.import_module(f"{package}.msg"), name)
            except (ImportError, AttributeError, OSError, ValueError) as error:
                self._refused.add(topic)
                self.get_logger().warning(f"{topic} is not recorded: {error}")
                continue
            counter = SequenceCounter()
            writer: Any = self._recorder(topic, types[0], text, counter)
            subscription = self.create_subscription(
                kind, topic, writer, _quality(publishers), raw=True
            )
            self._topics[topic] = (subscription, types[0], counter)

    def _recorder(
        self, topic: str, kind: str, text: str, counter: SequenceCounter
    ) -> Callable[[bytes, Any], None]:
        def record(data: bytes, info: Any) -> None:
            sequence = info["publication_sequence_number"]
            counter.push(sequence)
            if self._file is None:
                return
            try:
                self._writer.add_message(
                    self._channel(topic, kind, text),
                    log_time=info["received_timestamp"],
                    data=bytes(data),
                    publish_time=info["source_timestamp"],
                    sequence=sequence % 2**32,
                )
            except OSError as error:
                self._give_up(error)
                return
            self._messages += 1
            self._bytes += len(data)
            self._size += len(data)
            if self._size > self._split_bytes:
                self._close()
                self._open()

        return record

    def _channel(self, topic: str, kind: str, text: str) -> int:
        """Registered in each file when its first message comes."""
        if topic not in self._channels:
            schema = self._writer.register_schema(kind, "ros2msg", text.encode())
            self._channels[topic] = self._writer.register_channel(topic, "cdr", schema)
        return self._channels[topic]

    # Files

    def _open(self) -> None:
        name = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        path = self._folder / f"{name}_{self._files:03d}.mcap"
        while path.exists():
            self._files += 1
            path = self._folder / f"{name}_{self._files:03d}.mcap"
        self._files += 1
        self._file = path.open("xb")
        # JPEG frames do not shrink any further; compressing them would only cost time.
        self._writer: Any = self._mcap.Writer(
            self._file, chunk_size=CHUNK_BYTES, compression=self._mcap.CompressionType.NONE
        )
        self._writer.start(profile="ros2", library="vla_post")
        self._channels: dict[str, int] = {}
        self._size = 0

    def _close(self) -> None:
        file, self._file = self._file, None
        assert file is not None
        try:
            with file:
                lost = {
                    topic: f"{counter.lost} lost, {counter.received} received"
                    for topic, (_, _, counter) in self._topics.items()
                }
                self._writer.add_metadata("loss", lost)
                self._writer.finish()
        except OSError as error:
            self._give_up(error)

    def _flush(self) -> None:
        if self._file is None:
            return
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """The store goes on; this bag ends here, and says so."""
        self._problem = f"recording stopped: {error.strerror or error}"
        self.get_logger().error(self._problem)
        self._file = None


def _quality(publishers: Any) -> QoSProfile:
    """What all of a topic's publishers can give."""
    profiles = [publisher.qos_profile for publisher in publishers]
    reliable = all(p.reliability == ReliabilityPolicy.RELIABLE for p in profiles)
    lasting = all(p.durability == DurabilityPolicy.TRANSIENT_LOCAL for p in profiles)
    return QoSProfile(
        depth=1000,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if lasting else DurabilityPolicy.VOLATILE,
    )


def main(arguments: list[str] | None = None) -> int:
    return run(BagNode, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""rosbag2 recordings in MCAP, in, without ROS: the cell contract says which topic is which feature.

A tick is a message on `arbiter/executed` (what was sent, and by whom); in bags without an arbiter,
one on the command topic. Episodes come from the `events` topic; without one, the bag is one
episode. A file that was cut off is read up to the cut, and the episode that was running becomes
interrupted.
"""

import bisect
import json
import logging
import os
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import NAMESPACE_URL, UUID, uuid5

import numpy as np

from trajectory_store import Contract, Outcome, Source, Store, Tick
from trajectory_store.contract import Align, ObservationFeature
from trajectory_store.writer import StoreWriter
from vla_post.convert.common import ConversionError, Progress, is_whole, quiet

log = logging.getLogger(__name__)
MAGIC = b"\x89MCAP0\r\n"


class _Pictures:
    """Images of the running episode in a temporary file, so that a bag need not fit in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, image: bytes | np.ndarray) -> "_Picture":
        at = self._file.seek(0, os.SEEK_END)
        data = image if isinstance(image, bytes) else image.tobytes()
        self._file.write(data)
        like = None if isinstance(image, bytes) else (image.shape, image.dtype)
        return _Picture(at, len(data), like)

    def get(self, picture: "_Picture") -> bytes | np.ndarray:
        self._file.seek(picture.at)
        data = self._file.read(picture.size)
        if picture.like is None:
            return data
        shape, dtype = picture.like
        return np.frombuffer(data, dtype).reshape(shape)

    def clear(self) -> None:
        self._file.truncate(0)


@dataclass(frozen=True)
class _Picture:
    at: int
    size: int
    like: tuple[tuple[int, ...], np.dtype[Any]] | None
    """Shape and type; None for an encoded image."""


@dataclass
class _Bag:
    """Samples since the running episode began, by feature; ticks; events."""

    pictures: _Pictures
    samples: dict[str, list[tuple[int, Any]]] = field(default_factory=dict[str, list[Any]])
    ticks: list[tuple[int, np.ndarray, Source, int]] = field(default_factory=list[Any])
    """(stamp, command, source, policy version)"""


def from_mcap(
    source: str | Path,
    target: str | Path,
    contract: Contract,
    *,
    task: str = "",
    outcome: Outcome | str = Outcome.SUCCESS,
    progress: Progress = quiet,
) -> list[str]:
    """Reads a bag into a store and returns the uuids written now. A second run goes on.

    Args:
        task: for bags without events; default: the contract's only task.
        outcome: likewise.

    Raises:
        ConversionError: not MCAP, no tick, or no task given where it is needed.
    """
    files = _files(Path(source))
    path = files[0]
    whole = task or (next(iter(contract.tasks)) if len(contract.tasks) == 1 else "")
    written: list[str] = []
    opened = StoreWriter.create_or_open(target, contract, writer="from_mcap")
    with opened as writer, _Pictures() as pictures:
        present = {e.uuid: e for e in Store(target).table}

        def finish(bag: _Bag, start: dict[str, Any], ending: Outcome) -> None:
            name = str(start.get("task") or whole)
            if not bag.ticks:
                return
            if not name:
                raise ConversionError(
                    f"{path}: the bag names no task; give one of {', '.join(contract.tasks)}"
                )
            uuid = _uuid(start.get("episode"), f"{path.absolute()}#{bag.ticks[0][0]}")
            ticks = len({stamp for stamp, *_ in bag.ticks})
            if not is_whole(writer, present.get(uuid), ticks, ending):
                _write(writer, contract, bag, uuid, name, start, ending)
                written.append(uuid)

        def fresh() -> _Bag:
            pictures.clear()
            return _Bag(pictures)

        bag, start, cut = fresh(), dict[str, Any](), False
        has_events = False
        size, before = sum(f.stat().st_size for f in files), 0
        for file in files:
            try:
                for place, topic, kind, message, logged in _messages(file):
                    progress(file.name, before + place, size)
                    _take(contract, bag, topic, kind, message, logged)
                    if topic != f"/{contract.cell}/events":
                        continue
                    event = json.loads(message.data)
                    if event.get("type") == "episode_start":
                        bag, start, has_events = fresh(), event, True
                    elif event.get("type") == "episode_end" and start:
                        finish(bag, start, Outcome(event.get("outcome", "aborted")))
                        bag, start = fresh(), {}
            except _CutOff as error:
                log.warning("%s: read up to the cut (%s)", file, error)
                cut = True
            before += file.stat().st_size
        if start or not has_events:
            finish(bag, start, Outcome.INTERRUPTED if cut or start else Outcome(outcome))
        if not written and not present:
            raise ConversionError(
                f"{path}: no command on /{contract.cell}/arbiter/executed or "
                f"/{contract.cell}/{contract.action.topic}; is this the contract of that cell?"
            )
    progress(path.name, size, size)
    return written


def _files(path: Path) -> list[Path]:
    """The file, or those of a rosbag2 folder in the order of recording.

    Raises:
        ConversionError: none, not readable, or not MCAP.
    """
    # rosbag2 splits into bag_0.mcap, bag_1.mcap, ..., bag_10.mcap.
    split = sorted(path.glob("*.mcap"), key=lambda f: (len(f.name), f.name))
    files = split if path.is_dir() else [path]
    if not files:
        raise ConversionError(f"{path}: no .mcap file in this folder; expected a rosbag2 recording")
    for file in files:
        try:
            with file.open("rb") as opened:
                head = opened.read(len(MAGIC))
        except OSError as error:
            raise ConversionError(f"{file}: cannot read the bag ({error.strerror})") from error
        if head != MAGIC:
            raise ConversionError(f"{file}: starts with {head!r}; expected an MCAP file")
    return files


class _CutOff(Exception):
    """The file ends in the middle of a record."""


def _messages(path: Path) -> Any:
    """(place in the file, topic, type, message, log time) in the order of the file."""
    from mcap.exceptions import McapError
    from mcap.records import Channel, Message, Schema
    from mcap.stream_reader import StreamReader
    from mcap_ros2.decoder import DecoderFactory
    from zstandard import ZstdError

    schemas: dict[int, Schema] = {}
    channels: dict[int, Channel] = {}
    decoders: dict[int, Any] = {}
    factory = DecoderFactory()
    with path.open("rb") as file:
        try:
            for record in StreamReader(file).records:
                if isinstance(record, Schema):
                    schemas[record.id] = record
                elif isinstance(record, Channel):
                    channels[record.id] = record
                elif isinstance(record, Message):
                    channel = channels[record.channel_id]
                    schema = schemas.get(channel.schema_id)
                    if channel.id not in decoders:
                        decoders[channel.id] = factory.decoder_for(channel.message_encoding, schema)
                    decode = decoders[channel.id]
                    if decode is not None and schema is not None:
                        yield (
                            file.tell(),
                            channel.topic,
                            schema.name,
                            decode(record.data),
                            record.log_time,
                        )
        except (McapError, EOFError, OSError, ValueError, struct.error, ZstdError) as error:
            raise _CutOff(str(error)) from error


def _take(contract: Contract, bag: _Bag, topic: str, kind: str, message: Any, logged: int) -> None:
    """Sorts one message into the bag."""
    prefix = f"/{contract.cell}/"
    short = topic.removeprefix(prefix)
    action = contract.action
    if short == "arbiter/executed":
        who, _, rest = str(message.header.frame_id).partition(":")
        source = {"policy": Source.POLICY, "human": Source.HUMAN}.get(who, Source.HOLD)
        version = rest.partition("#")[0]
        command = _ordered(message.name, message.position, action.names)
        if command is not None:
            number = int(version) if source == Source.POLICY and version.isdigit() else 0
            if bag.samples.get("command"):  # this bag has an arbiter: commands are not ticks
                bag.ticks = [t for t in bag.ticks if t[2] != Source.SCRIPTED]
            bag.samples["executed"] = [(0, None)]
            bag.ticks.append((_stamp(message, logged), command, source, number))
    elif short == action.topic and "executed" not in bag.samples:
        if kind.endswith("JointTrajectory"):
            values = message.points[0].positions if message.points else ()
            command = _ordered(message.joint_names, values, action.names)
            stamp = _stamp(message, logged)
        else:
            command, stamp = np.asarray(message.data, np.float32), logged
        if command is not None and command.shape == (action.size,):
            bag.samples["command"] = [(0, None)]
            bag.ticks.append((stamp, command, Source.SCRIPTED, 0))
    for key, feature in contract.observations.items():
        if short == feature.topic or topic == feature.topic:
            value = _value(feature, message)
            if value is not None:
                if feature.is_image:
                    value = bag.pictures.put(value)
                bag.samples.setdefault(key, []).append((_stamp(message, logged), value))


def _stamp(message: Any, logged: int) -> int:
    stamp = message.header.stamp
    return stamp.sec * 10**9 + stamp.nanosec or logged


def _ordered(names: Any, values: Any, wanted: tuple[str, ...]) -> np.ndarray | None:
    """Values in the contract's order; None when a name is missing."""
    found = dict(zip(names, values, strict=False))
    if not all(name in found for name in wanted):
        return None
    return np.array([found[name] for name in wanted], np.float32)


def _value(feature: ObservationFeature, message: Any) -> Any:
    if feature.type == "sensor_msgs/JointState":
        return _ordered(message.name, getattr(message, feature.field), feature.names)
    if feature.type == "sensor_msgs/CompressedImage":
        return bytes(message.data)
    height, width, channels = feature.shape
    depth = message.encoding in ("16UC1", "mono16")
    row = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    pixels = row[:, : width * channels * (2 if depth else 1)].copy()
    if depth:
        return pixels.view("<u2").reshape(height, width, channels)
    image = pixels.reshape(height, width, channels)
    return image[..., ::-1].copy() if message.encoding == "bgr8" else image


def _uuid(text: Any, fallback: str) -> str:
    try:
        return str(UUID(str(text)))
    except ValueError:
        return str(uuid5(NAMESPACE_URL, fallback))


def _write(
    writer: StoreWriter,
    contract: Contract,
    bag: _Bag,
    uuid: str,
    task: str,
    start: dict[str, Any],
    outcome: Outcome,
) -> None:
    series = {k: sorted(bag.samples.get(k, ()), key=lambda s: s[0]) for k in contract.observations}
    stamps = {k: [s for s, _ in v] for k, v in series.items()}
    writer.begin_episode(
        task, str(start.get("instruction", "")), str(start.get("operator", "")), uuid=uuid
    )
    before = -1
    ended = outcome in (Outcome.SUCCESS, Outcome.FAILURE)
    ticks = sorted(bag.ticks, key=lambda t: t[0])
    for i, (stamp, command, source, version) in enumerate(ticks):
        if stamp <= before:
            continue
        before = stamp
        observation: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key, feature in contract.observations.items():
            sample = _aligned(feature, stamps[key], series[key], stamp)
            if sample is not None:
                seen[key], value = sample
                is_picture = isinstance(value, _Picture)
                observation[key] = bag.pictures.get(value) if is_picture else value
        writer.append(
            Tick(
                observation,
                command,
                source,
                stamp,
                stamps=seen,
                policy_version=version,
                terminated=ended and i == len(ticks) - 1,
            )
        )
    writer.end_episode(outcome)


def _aligned(
    feature: ObservationFeature, stamps: list[int], series: list[tuple[int, Any]], tick: int
) -> tuple[int, Any] | None:
    """(stamp, value) at the tick by the contract's rule; None before the first sample."""
    after = bisect.bisect_right(stamps, tick)
    if after == 0:
        return None
    earlier = series[after - 1]
    if feature.align == Align.LATEST or after == len(series):
        return earlier
    later = series[after]
    if feature.align == Align.INTERPOLATE:
        part = (tick - earlier[0]) / (later[0] - earlier[0])
        return tick, ((1 - part) * earlier[1] + part * later[1]).astype(np.float32)
    return earlier if tick - earlier[0] <= later[0] - tick else later

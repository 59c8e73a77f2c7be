"""From ROS messages to the contract's features."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image, JointState

from robot_bridge.core.align import SequenceCounter
from robot_bridge.core.joints import JointReader, NamesError
from robot_bridge.nodes.common import stamp_ns
from trajectory_store.contract import Contract, ObservationFeature

Sample = Callable[[str, int, Any], None]
"""(feature key, stamp, value): vectors (D,) float32, compressed frames as bytes, raw as arrays."""

_CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1, "16UC1": 1, "mono16": 1}


def image_array(message: Image) -> np.ndarray:
    """(height, width, C), RGB for colour; u1, or u2 for depth. A view where the layout allows it.

    Raises:
        ValueError: an encoding or a size that is not understood.
    """
    channels = _CHANNELS.get(message.encoding)
    if channels is None:
        raise ValueError(
            f"image encoding {message.encoding!r}; understood are {', '.join(_CHANNELS)}"
        )
    kind = np.uint16 if message.encoding in ("16UC1", "mono16") else np.uint8
    row = message.width * channels * np.dtype(kind).itemsize
    flat = np.frombuffer(message.data, np.uint8)
    if message.step < row or flat.size < message.step * message.height:
        raise ValueError(
            f"image of {message.width}x{message.height} {message.encoding} with step "
            f"{message.step} and {flat.size} bytes"
        )
    rows = flat[: message.step * message.height].reshape(message.height, message.step)[:, :row]
    image = np.ascontiguousarray(rows).view(kind).reshape(message.height, message.width, channels)
    return image[:, :, ::-1] if message.encoding == "bgr8" else image


def decode(value: Any, feature: ObservationFeature) -> np.ndarray:
    """A sample as the policy gets it: vectors float32, images (height, width, C).

    Raises:
        ValueError: a frame that does not decode or has another shape than the contract's.
    """
    if not feature.is_image:
        return np.asarray(value, dtype=np.float32)
    if isinstance(value, bytes):
        if value[:2] == b"\xff\xd8":
            space = "RGB" if feature.shape[2] == 3 else "GRAY"
            value = simplejpeg.decode_jpeg(value, colorspace=space)
        else:
            from imagecodecs import png_decode

            value = png_decode(value)
            value = value[:, :, None] if value.ndim == 2 else value
    if value.shape != feature.shape:
        raise ValueError(f"frame of shape {list(value.shape)}, contract says {list(feature.shape)}")
    return value


class Streams:
    """Subscriptions for every observation feature of a contract; one per topic.

    Args:
        sample: called for each feature of each message.
        lost: called as (feature key, count) when sequence numbers show a gap.
    """

    def __init__(
        self,
        node: Node,
        contract: Contract,
        sample: Sample,
        *,
        vectors: QoSProfile,
        images: QoSProfile,
        lost: Callable[[str, int], None] | None = None,
    ) -> None:
        self._node, self._sample, self._lost = node, sample, lost
        self.counters: dict[str, SequenceCounter] = {}
        """By topic: received and lost since the subscription matched."""
        self.heard_s: dict[str, float] = {}
        """By topic: when its newest message came, in monotonic seconds."""
        self.problems: dict[str, int] = {}
        """Messages that could not be read, by reason."""
        topics: dict[tuple[str, str], list[tuple[str, ObservationFeature]]] = {}
        for key, feature in contract.observations.items():
            topics.setdefault((feature.topic, feature.type), []).append((key, feature))
        readers = {key: self._reader(*key, features) for key, features in topics.items()}
        self._subscriptions = [
            node.create_subscription(
                {
                    "sensor_msgs/JointState": JointState,
                    "sensor_msgs/CompressedImage": CompressedImage,
                    "sensor_msgs/Image": Image,
                }[kind],
                topic,
                readers[topic, kind],
                vectors if kind == "sensor_msgs/JointState" else images,
            )
            for topic, kind in topics
        ]

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def _reader(self, topic: str, kind: str, features: list[tuple[str, ObservationFeature]]) -> Any:
        counter = self.counters[topic] = SequenceCounter()
        readers = [(key, f, JointReader(f.names)) for key, f in features if not f.is_image]
        keys = [key for key, _ in features]

        def count(info: Any) -> None:
            self.heard_s[topic] = time.monotonic()
            gap = counter.push(info["publication_sequence_number"])
            if gap and self._lost is not None:
                for key in keys:
                    self._lost(key, gap)

        def joints(message: JointState, info: Any) -> None:
            count(info)
            stamp = stamp_ns(message.header.stamp)
            for key, feature, reader in readers:
                try:
                    values = reader.read(message.name, getattr(message, feature.field))
                except NamesError as error:
                    self._complain(key, str(error))
                    continue
                self._sample(key, stamp, values.astype(np.float32))

        def compressed(message: CompressedImage, info: Any) -> None:
            count(info)
            stamp = stamp_ns(message.header.stamp)
            for key in keys:
                self._sample(key, stamp, bytes(message.data))

        def raw(message: Image, info: Any) -> None:
            count(info)
            try:
                image = image_array(message)
            except ValueError as error:
                self._complain(keys[0], str(error))
                return
            for key in keys:
                self._sample(key, stamp_ns(message.header.stamp), image)

        return {
            "sensor_msgs/JointState": joints,
            "sensor_msgs/CompressedImage": compressed,
            "sensor_msgs/Image": raw,
        }[kind]

    def _complain(self, key: str, problem: str) -> None:
        text = f"{key}: {problem}"
        self.problems[text] = self.problems.get(text, 0) + 1
        self._node.get_logger().warning(text, throttle_duration_sec=5.0)

"""What a robot and a policy server say to each other: msgpack maps, checked against a schema.

One binary WebSocket message each. Nothing here can run code: arrays travel as dtype, shape and
bytes; a message with an unknown field, a wrong type or a size that does not add up is refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgpack
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

PROTOCOL = 2
MAX_BYTES = 64 << 20
"""Of one message: twenty raw pictures of 1024x1024."""
TOKEN_VARIABLE = "VLA_POST_TOKEN"
"""Environment variable that holds the shared secret, on both sides."""


class WireError(ValueError):
    """A message that is not one of ours."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Array(_Message):
    dtype: Literal["float32", "uint8"]
    shape: list[Annotated[int, Field(ge=0)]] = Field(max_length=4)
    data: bytes

    @classmethod
    def of(cls, value: np.ndarray) -> Self:
        dtype: Any = "uint8" if value.dtype == np.uint8 else "float32"
        array = np.ascontiguousarray(value, dtype)
        return cls(dtype=dtype, shape=list(array.shape), data=array.tobytes())

    def numpy(self) -> np.ndarray:
        """Read-only; raises WireError where shape and bytes disagree."""
        # As Python integers: a product of sizes could wrap around in numpy's.
        size = np.dtype(self.dtype).itemsize
        for length in self.shape:
            size *= length
        if size != len(self.data):
            raise WireError(f"{len(self.data)} bytes are no {self.dtype} array of {self.shape}")
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


class Hello(_Message):
    """Robot to server, first."""

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL
    contract: str = Field(default="", max_length=1 << 20)
    """Of the robot's cell, as canonical JSON; empty asks without a check."""


class Card(_Message):
    """Server to robot: what it serves."""

    type: Literal["card"] = "card"
    protocol: int = PROTOCOL
    contract_sha256: str
    observations: dict[str, list[int]]
    """Key -> shape, as stored."""
    horizon: int
    action_size: int
    takes_previous: bool


class Act(_Message):
    type: Literal["act"] = "act"
    id: int
    observation: dict[str, Array]
    instruction: str = Field(max_length=4096)
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    previous: Array | None = None
    delay: Annotated[int, Field(ge=0, le=100_000)] = 0


class Chunk(_Message):
    type: Literal["chunk"] = "chunk"
    id: int
    chunk: Array
    inference_s: float
    """Time in the policy, without the wire and without waiting for other robots."""


class Failure(_Message):
    type: Literal["failure"] = "failure"
    id: int
    """Of the request; -1 for none."""
    code: Literal["input", "malformed", "contract", "policy"]
    text: str


Message = Hello | Card | Act | Chunk | Failure
_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def encode(message: Message) -> bytes:
    packed: bytes | None = msgpack.packb(message.model_dump(), use_bin_type=True)
    assert packed is not None
    return packed


def decode(data: object) -> Message:
    """Raises WireError unless `data` is the bytes of one message."""
    if not isinstance(data, bytes):
        raise WireError(f"found {type(data).__name__}; expected binary messages")
    try:
        found: object = msgpack.unpackb(data, raw=False, strict_map_key=True)
        return _ANY.validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"{where}: {first['msg']}") from error
    except (
        Exception
    ) as error:  # msgpack raises several unrelated classes, RecursionError among them
        raise WireError(f"not msgpack ({type(error).__name__}: {str(error)[:100]})") from error


def arrays(observation: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {key: Array.of(value) for key, value in observation.items()}

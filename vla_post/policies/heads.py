"""What the adapter asks of a policy's networks, and which families can answer.

B batch, n samples per observation, N = B * n, H chunk length, A action size, W width of the noise
(A, or more where a model pads actions), F feature size. Everything here is in network units: the
adapter normalises. Flow time is this project's (noise at t = 0, data at t = 1); heads convert.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vla_post.policies.flow_math import euler, flow_loss, interpolate, target_velocity
from vla_post.policies.rtc import Velocity

Guide = Callable[[Velocity], Velocity]
"""Bends a velocity field, so that a chunk continues the one that runs (`rtc.py`)."""


class UnsupportedPolicy(ValueError):
    """A lerobot policy without a chunk head that we know; the message says why."""


class ChunkHead(Protocol):
    """One family of policies. `encode` runs once per observation, whatever is asked afterwards."""

    horizon: int
    """H: actions that one call emits."""
    action_size: int
    """A."""
    noise_size: int
    """W."""
    denoising_steps: int
    """Network calls from noise to chunk; may be lowered for speed."""
    can_continue: bool
    """Whether `sample` takes a guide."""

    def encode(self, inputs: dict[str, Any]) -> Any:
        """Everything that depends on the observation alone; `inputs` are preprocessed."""
        ...

    def sample(
        self, context: Any, noise: Float[Tensor, "B n H W"], guide: Guide | None = None
    ) -> Float[Tensor, "B n H A"]:
        """n chunks per observation; the context stays usable, equal noise gives equal chunks."""
        ...

    def loss(
        self,
        context: Any,
        action: Float[Tensor, "B H A"],
        valid: Bool[Tensor, "B H"],
        noise: Float[Tensor, "B n H W"],
        time: Float[Tensor, "B n"],
    ) -> Float[Tensor, "B n"]:
        """The policy's own training loss per item and draw, over valid steps and real actions."""
        ...

    def sample_time(self, n: int, device: torch.device) -> Float[Tensor, " n"]:
        """Times as the policy's own training draws them."""
        ...

    def features(self, context: Any) -> Float[Tensor, "B F"]: ...


class FlowHead:
    """Sampling and loss that all flow-matching heads share; a family adds the networks."""

    can_continue: bool = True
    horizon: int
    action_size: int
    noise_size: int
    denoising_steps: int

    def repeat(self, context: Any, n: int) -> Any:
        """A context that holds each item n times in a row."""
        raise AssertionError(f"{type(self).__name__} must say how its context is repeated")

    def velocity(
        self, context: Any, x: Float[Tensor, "N H W"], time: Float[Tensor, " N"]
    ) -> Float[Tensor, "N H W"]:
        """dx/dt, which points from noise to data."""
        raise AssertionError(f"{type(self).__name__} must predict a velocity")

    def sample(
        self, context: Any, noise: Float[Tensor, "B n H W"], guide: Guide | None = None
    ) -> Float[Tensor, "B n H A"]:
        size, n = noise.shape[:2]
        if n > 1:
            context = self.repeat(context, n)

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return self.velocity(context, x, time)

        field = velocity if guide is None else guide(velocity)
        x = euler(field, noise.flatten(0, 1), self.denoising_steps)
        return x[..., : self.action_size].unflatten(0, (size, n))

    def loss(
        self,
        context: Any,
        action: Float[Tensor, "B H A"],
        valid: Bool[Tensor, "B H"],
        noise: Float[Tensor, "B n H W"],
        time: Float[Tensor, "B n"],
    ) -> Float[Tensor, "B n"]:
        size, n = noise.shape[:2]
        if n > 1:
            context = self.repeat(context, n)
        padded = nn.functional.pad(action, (0, self.noise_size - self.action_size))
        data = padded.repeat_interleave(n, dim=0)
        noise, time = noise.flatten(0, 1), time.flatten()
        velocity = self.velocity(context, interpolate(noise, data, time), time)
        real = slice(None, self.action_size)
        loss = flow_loss(
            velocity[..., real].float(),
            target_velocity(noise, data)[..., real],
            valid.repeat_interleave(n, dim=0),
        )
        return loss.unflatten(0, (size, n))


FAMILIES = {
    "chunk_flow": "vla_post.policies.flow:ChunkFlowHead",
    "smolvla": "vla_post.policies.smolvla_head:SmolVlaHead",
    "pi0": "vla_post.policies.pi_head:PiHead",
    "pi05": "vla_post.policies.pi_head:PiHead",
    "diffusion": "vla_post.policies.diffusion_head:DiffusionHead",
    "act": "vla_post.policies.act_head:ActHead",
}
"""lerobot's policy type -> module:class of its head."""

_NO_ADAPTER = "it has a chunk head, but nobody has written and tested its adapter here"
REFUSED = {
    "tdmpc": "it plans in a learned world model and has no network that emits a chunk",
    "gaussian_actor": "it emits single actions, not chunks",
    "vqbet": "it picks codes of a learned action dictionary; its loss is not one of a chunk",
    "pi0_fast": "it writes its chunk as a variable number of text tokens; use pi0 or pi05",
    "eo1": _NO_ADAPTER,
    "evo1": _NO_ADAPTER,
    "fastwam": _NO_ADAPTER,
    "groot": _NO_ADAPTER,
    "lingbot_va": _NO_ADAPTER,
    "molmoact2": _NO_ADAPTER,
    "multi_task_dit": _NO_ADAPTER,
    "vla_jepa": _NO_ADAPTER,
    "wall_x": _NO_ADAPTER,
    "xvla": _NO_ADAPTER,
}
"""lerobot's policy type -> why it is refused."""


def check_family(kind: str) -> None:
    """Raises UnsupportedPolicy, with the reason, unless policies of this type have a head."""
    if kind not in FAMILIES:
        reason = REFUSED.get(kind, "this project does not know it")
        raise UnsupportedPolicy(
            f"policy type {kind!r} is not supported: {reason}. Supported are {', '.join(FAMILIES)}"
        )


def make_head(module: Any) -> ChunkHead:
    """The head of a lerobot policy.

    Raises:
        UnsupportedPolicy: a type or a setting that we cannot drive, with the reason.
    """
    kind = str(module.config.type)
    check_family(kind)
    path, name = FAMILIES[kind].split(":")
    return getattr(import_module(path), name)(module)


def repeat_cache(cache: Any, n: int) -> Any:
    """A new transformers key-value cache with each item n times in a row; the old one stays."""
    from transformers import DynamicCache

    layers = [(keys, values) for keys, values, *_ in cache]
    return DynamicCache(
        tuple((k.repeat_interleave(n, dim=0), v.repeat_interleave(n, dim=0)) for k, v in layers)
    )

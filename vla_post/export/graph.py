"""What is exported: modules with tensors at their borders, robot units outside, networks inside.

Inputs are what the store holds, so a runtime binds the aligned observation as it lies in memory:
vectors (B, D) float32 in robot units, pictures (B, height, width, 3) uint8. Outputs are chunks
(B, H, A) in robot units. B batch, H chunk length, A action size, W width of the noise.

A policy with an indicator (RECAP) whose guidance is not 1 runs every network twice in one pass, on
the prompt that asks for positive chunks and on the plain one; beta is a constant of the graph.

Flow policies also take the chunk that is being executed (`previous`, robot units) and how strongly
to follow each of its rows (`follow`, 0 to 1); zeros mean a fresh chunk (`vla_post.policies.rtc`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_post.policies.indicator import extrapolated
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.policies.rtc import RtcConfig, Velocity, guided

PREVIOUS, FOLLOW, NOISE, ACTION = "previous", "follow", "noise", "action"
X, TIME, X_NEXT = "x", "time", "x_next"
"""Borders of the step graph: the chunk on its way from noise to data, and flow time."""


def guidance_beta(policy: LeRobotPolicy) -> float | None:
    """beta of a policy that runs twice, once on each prompt; None where one pass will do."""
    if policy.guidance is None or policy.guidance.beta in (0.0, 1.0):
        return None
    return policy.guidance.beta


def is_flow(policy: LeRobotPolicy) -> bool:
    """Does the policy integrate a velocity, so that one step is a graph of its own?"""
    return bool(policy.head.can_continue)


class Border(nn.Module):
    """Robot units to network units and back, by lerobot's own processors."""

    def __init__(self, policy: LeRobotPolicy, language: Sequence[str]) -> None:
        super().__init__()
        self.keys, self.language = tuple(policy.observation_keys), tuple(language)
        self.twice = guidance_beta(policy) is not None
        self.size = policy.action_size
        self.padding = policy.noise_size - policy.action_size
        for number, key in enumerate(self.keys):
            shift, scale = _normaliser(policy, key)
            self.register_buffer(f"shift{number}", shift)
            self.register_buffer(f"scale{number}", scale)
        zero = torch.zeros(1, 1, policy.action_size, dtype=torch.float64, device=policy.device)
        offset = policy.unnormalise(zero)
        self.register_buffer("action_scale", (policy.unnormalise(zero + 1) - offset).float())
        self.register_buffer("action_offset", offset.float())

    def inputs(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """What a head's `encode` reads, from observation features and then language inputs."""
        inputs: dict[str, Any] = {}
        for number, (key, tensor) in enumerate(zip(self.keys, tensors, strict=False)):
            value = tensor
            if tensor.dtype == torch.uint8:
                value = tensor.to(torch.float32).movedim(-1, -3) / 255.0
            shift, scale = self.get_buffer(f"shift{number}"), self.get_buffer(f"scale{number}")
            value = (value - shift) * scale
            inputs[key] = torch.cat([value, value]) if self.twice else value
        for name, tensor in zip(self.language, tensors[len(self.keys) :], strict=False):
            if self.twice:  # (B, 2, ...): the prompt that asks, and the plain one
                tensor = torch.cat([tensor[:, 0], tensor[:, 1]])
            inputs[name] = tensor != 0 if name.endswith("mask") else tensor.long()
        return inputs

    def to_robot(self, x: Float[Tensor, "B H W"]) -> Float[Tensor, "B H A"]:
        return x[..., : self.size] * self.get_buffer("action_scale") + self.get_buffer(
            "action_offset"
        )

    def to_network(self, action: Float[Tensor, "B H A"]) -> Float[Tensor, "B H W"]:
        x = (action - self.get_buffer("action_offset")) / self.get_buffer("action_scale")
        return nn.functional.pad(x, (0, self.padding)) if self.padding else x

    def weights(self, follow: Float[Tensor, "B H"]) -> Float[Tensor, "B H W"]:
        """Of the guidance; columns that only pad the action are free."""
        real = self.get_buffer("action_scale").shape[-1]
        weights = follow[..., None].expand(-1, -1, real)
        return nn.functional.pad(weights, (0, self.padding)) if self.padding else weights


class WholeGraph(nn.Module):
    """Observation, language, [previous, follow,] noise -> action: all denoising steps unrolled."""

    def __init__(self, policy: LeRobotPolicy, language: Sequence[str]) -> None:
        super().__init__()
        self.module = policy.module
        self.border = Border(policy, language)
        self.head: Any = policy.head
        self.flow, self.beta = is_flow(policy), guidance_beta(policy)

    def forward(self, *tensors: Tensor) -> Tensor:
        context = self.head.encode(self.border.inputs(tensors))
        guide: Any = None
        if self.flow:
            previous, follow = self.border.to_network(tensors[-3]), self.border.weights(tensors[-2])
            guide = _guide(previous, follow, self.beta)
        return self.border.to_robot(self.head.sample(context, tensors[-1][:, None], guide)[:, 0])


class EncoderGraph(nn.Module):
    """Observation and language -> the context's tensors: once per chunk."""

    def __init__(self, policy: LeRobotPolicy, language: Sequence[str]) -> None:
        super().__init__()
        self.module = policy.module
        self.border = Border(policy, language)
        self.head: Any = policy.head

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(self.head.encode(self.border.inputs(tensors)))[0])


class StepGraph(nn.Module):
    """Context, previous, follow, x, time, dt -> x_next and the action that x_next stands for."""

    def __init__(
        self,
        policy: LeRobotPolicy,
        language: Sequence[str],
        rebuild: Callable[[Iterator[Tensor]], Any],
    ) -> None:
        super().__init__()
        self.module = policy.module
        self.border = Border(policy, language)
        self.head: Any = policy.head
        self.rebuild, self.beta = rebuild, guidance_beta(policy)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *context, previous, follow, x, time, dt = tensors
        context = self.rebuild(iter(context))
        previous, follow = self.border.to_network(previous), self.border.weights(follow)
        guide = _guide(previous, follow, self.beta)
        field = guide(lambda x, time: self.head.velocity(context, x, time))
        x = x + field(x, time) * dt[:, None, None]
        return x, self.border.to_robot(x)


def _guide(previous: Tensor, weights: Tensor, beta: float | None) -> Callable[[Velocity], Velocity]:
    """In the form that needs no gradient, which a graph does not have."""
    config = RtcConfig(form="identity")

    def guide(velocity: Velocity) -> Velocity:
        field = velocity if beta is None else extrapolated(velocity, beta)
        return guided(field, previous, weights, config)

    return guide


def flatten(context: Any) -> tuple[list[Tensor], Callable[[Iterator[Tensor]], Any]]:
    """A head's context as a list of tensors, and the way back.

    Knows tensors, tuples, lists, dictionaries and transformers' key-value caches of these; anything
    else (None, numbers) does not depend on the observation and stays inside the graph.
    """
    if isinstance(context, Tensor):
        return [context], next
    if isinstance(context, Mapping):
        tensors, rebuild = flatten(tuple(context.values()))
        keys = tuple(context)
        return tensors, lambda it: dict(zip(keys, rebuild(it), strict=True))
    if isinstance(context, tuple | list):
        parts = [flatten(item) for item in context]
        kind: Any = type(context)
        named = hasattr(kind, "_fields")

        def build(it: Iterator[Tensor]) -> Any:
            items = [rebuild(it) for _, rebuild in parts]
            return kind(*items) if named else kind(items)

        return [tensor for tensors, _ in parts for tensor in tensors], build
    if type(context).__name__ == "DynamicCache":
        kind = type(context)
        tensors, rebuild = flatten([(layer.keys, layer.values) for layer in context.layers])
        return tensors, lambda it: kind(tuple((k, v) for k, v in rebuild(it)))
    return [], lambda _: context


def _normaliser(policy: LeRobotPolicy, key: str) -> tuple[Tensor, Tensor]:
    """(shift, scale) of lerobot's normaliser for one feature, read off the normaliser itself.

    In float64: a mean that is large beside its deviation would lose digits.
    """
    features = policy.config.input_features
    blank: dict[str, Any] = {
        k: torch.zeros(1, *f.shape, dtype=torch.float64, device=policy.device)
        for k, f in features.items()
    }
    text = next(iter(policy.contract.tasks.values())).instruction

    def normalised(value: float) -> Tensor:
        filled = blank | {key: torch.full_like(blank[key], value), "task": [text]}
        return policy.preprocess(filled)[key].double()

    offset = normalised(0.0)
    scale = normalised(1.0) - offset
    shift = -offset / scale
    if len(features[key].shape) == 3:
        # A picture is normalised per channel, if at all: keep one number a channel in the graph.
        shift, scale = shift[..., :1, :1], scale[..., :1, :1]
    return shift.float().clone(), scale.float().clone()

"""A policy's own encoder of an observation, as a module that can be copied and averaged.

The first half of SmolVLA's vision tower (PTR takes 12 of 24 layers), the state's first layer in a
`chunk_flow` without cameras, else everything that the policy computes from an observation alone.
Scorers of transitions look through it, so it does not see the instruction where that can be left
out. B batch, F feature size.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vla_post.batch import Observation
from vla_post.policies.heads import make_head

if TYPE_CHECKING:
    from vla_post.policies.lerobot_adapter import LeRobotPolicy


class ObservationEncoder(nn.Module):
    """`tower` holds the weights, shared with the policy until `clone`; the rest is arithmetic.

    Args:
        prepare: observation and instructions to the tower's inputs, without weights.
        read: features (B, F) from the tower and its inputs.
    """

    def __init__(
        self,
        tower: nn.Module,
        prepare: Callable[[Observation, list[str]], Any],
        read: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        super().__init__()
        self.tower = tower
        self._prepare, self._read = prepare, read

    def forward(self, observation: Observation, instruction: list[str]) -> Float[Tensor, "B F"]:
        return self._read(self.tower, self._prepare(observation, instruction))

    def clone(self) -> Self:
        """The same encoder with weights of its own, which nothing trains."""
        twin = type(self)(deepcopy(self.tower), self._prepare, self._read)
        return twin.requires_grad_(False).eval()


def observation_encoder(policy: "LeRobotPolicy") -> ObservationEncoder:
    """The encoder of a policy of any type that the adapter knows."""
    module: Any = policy.module

    def inputs(observation: Observation, instruction: list[str]) -> dict[str, Any]:
        return policy.preprocess(dict(observation) | {"task": list(instruction)})

    config = module.config
    if policy.kind == "chunk_flow" and config.head == "mlp" and not config.image_features:
        keys: list[str] = module.config.vector_keys

        def vectors(observation: Observation, instruction: list[str]) -> Tensor:
            got = inputs(observation, instruction)
            return torch.cat([got[key].flatten(1) for key in keys], dim=1)

        return ObservationEncoder(module.net.embed, vectors, _first_layer)
    if policy.kind == "smolvla":

        def images(observation: Observation, instruction: list[str]) -> list[Tensor]:
            return module.prepare_images(inputs(observation, instruction))[0]

        vlm = module.model.vlm_with_expert.get_vlm_model()
        return ObservationEncoder(_lower_half(vlm.vision_model), images, _mean_patch)

    def whole(tower: Any, given: dict[str, Any]) -> Tensor:
        head = make_head(tower)
        return head.features(head.encode(given))

    return ObservationEncoder(module, inputs, whole)


def _first_layer(layer: Any, vectors: Tensor) -> Tensor:
    """The part of `chunk_flow`'s first layer that sees the state, without instruction and chunk.

    Half of its units: no unit is special, and so many still tell every state apart.
    """
    units = layer.out_features // 2
    seen = nn.functional.linear(vectors, layer.weight[:units, : vectors.shape[1]])
    return nn.functional.gelu(seen + layer.bias[:units])


def _lower_half(tower: Any) -> Any:
    """The first half of a vision tower's layers, with the tower's own weights."""
    config = deepcopy(tower.config)
    config.num_hidden_layers = max(config.num_hidden_layers // 2, 1)
    with torch.device("meta"):
        half = type(tower)(config)
    half.embeddings, half.post_layernorm = tower.embeddings, tower.post_layernorm
    half.encoder.layers = tower.encoder.layers[: config.num_hidden_layers]
    return half


def _mean_patch(tower: Any, images: list[Tensor]) -> Tensor:
    """Mean over the patches of each camera, cameras side by side."""
    return torch.cat(
        [tower(pixel_values=image).last_hidden_state.mean(dim=1) for image in images], dim=1
    )

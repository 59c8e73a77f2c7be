"""SmolVLA: its own networks, called so that the vision-language prefix runs once per item.

The prefix never attends to the action tokens, so its keys and values serve every noise, time and
denoising step; the loss equals lerobot's, which recomputes the prefix each time. lerobot puts noise
at t = 1 and predicts noise - action.
"""

from typing import Any

import torch
from torch import Tensor

from vla_post.policies.heads import FlowHead, UnsupportedPolicy, repeat_cache

Context = tuple[Tensor, Any, Tensor]
"""Mask of the prefix's tokens, their keys and values, their final hidden states."""


class SmolVlaHead(FlowHead):
    def __init__(self, policy: Any) -> None:
        if policy.config.adapt_to_pi_aloha:
            raise UnsupportedPolicy(
                "this smolvla converts joints to the pi Aloha space (adapt_to_pi_aloha); declare "
                "the robot's own joints in the contract and train without it"
            )
        self.policy: Any = policy
        self.model: Any = policy.model
        self.horizon = int(policy.config.chunk_size)
        self.action_size = int(policy.config.action_feature.shape[0])
        self.noise_size = int(policy.config.max_action_dim)
        self.denoising_steps = int(policy.config.num_steps)

    def encode(self, inputs: dict[str, Any]) -> Context:
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        policy, model = self.policy, self.model
        images, image_masks = policy.prepare_images(inputs)
        embeddings, pad_masks, attention_masks = model.embed_prefix(
            images,
            image_masks,
            inputs["observation.language.tokens"],
            inputs["observation.language.attention_mask"],
            state=policy.prepare_state(inputs),
        )
        (hidden, _), cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad_masks, attention_masks),
            position_ids=torch.cumsum(pad_masks, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        return pad_masks, cache, hidden

    def repeat(self, context: Context, n: int) -> Context:
        pad_masks, cache, hidden = context
        return pad_masks.repeat_interleave(n, dim=0), repeat_cache(cache, n), hidden

    def velocity(self, context: Context, x: Tensor, time: Tensor) -> Tensor:
        pad_masks, cache, _ = context
        return -self.model.denoise_step(pad_masks, cache, x, 1.0 - time)

    def sample_time(self, n: int, device: torch.device) -> Tensor:
        return 1.0 - self.model.sample_time(n, device)

    def features(self, context: Context) -> Tensor:
        pad_masks, _, hidden = context
        mask = pad_masks[..., None].to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

"""pi0 and pi0.5: the PaliGemma prefix runs once per item, the action expert per noise and time.

As in SmolVLA the prefix never attends to the suffix, so its keys and values are computed once;
lerobot's training runs both together. pi0 sees the state as one token of the suffix, pi0.5 as text
inside the prompt (its preprocessor writes it), so a new state means a new prefix anyway. lerobot
puts noise at t = 1 and predicts noise - action. The action tokens attend to each other both ways.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vla_post.policies.heads import FlowHead, UnsupportedPolicy, repeat_cache

log = logging.getLogger(__name__)


class Context(NamedTuple):
    pad_masks: Tensor
    """(B, T) which tokens of the prefix are real."""
    cache: Any
    """Keys and values of the prefix."""
    hidden: Tensor
    """(B, T, width) final hidden states of the prefix."""
    state: Tensor | None
    """(B, S) padded state; None for pi0.5."""


class PiHead(FlowHead):
    def __init__(self, policy: Any) -> None:
        config = policy.config
        if config.use_relative_actions:
            raise UnsupportedPolicy(
                f"this {config.type} emits actions relative to the state of its last observation, "
                "which its processor keeps between calls; several samples of a batch would mix "
                "them up. Train it with use_relative_actions=false"
            )
        self.policy: Any = policy
        self.model: Any = policy.model
        if self.model.gradient_checkpointing_enabled:
            # transformers drops the prefix's keys and values then, which all denoising steps share.
            log.warning("%s: gradient checkpointing is switched off", config.type)
            self.model.gradient_checkpointing_disable()
        self.horizon = int(config.chunk_size)
        self.action_size = int(config.action_feature.shape[0])
        self.noise_size = int(config.max_action_dim)
        self.denoising_steps = int(config.num_inference_steps)

    def encode(self, inputs: dict[str, Any]) -> Context:
        from lerobot.policies.common.vla_utils import (
            make_att_2d_masks,
            prepare_attention_masks_4d,
        )

        policy, model = self.policy, self.model
        images, image_masks = policy._preprocess_images(inputs)
        embeddings, pad_masks, attention_masks = model.embed_prefix(
            images,
            image_masks,
            inputs["observation.language.tokens"],
            inputs["observation.language.attention_mask"],
        )
        language = model.paligemma_with_expert.paligemma.model.language_model
        # The 4-d masks of openpi are additive, which only the eager attention takes.
        language.config._attn_implementation = "eager"
        (hidden, _), cache = model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(
                make_att_2d_masks(pad_masks, attention_masks)
            ),
            position_ids=torch.cumsum(pad_masks, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings.to(language.layers[0].self_attn.q_proj.weight.dtype), None],
            use_cache=True,
        )
        state = policy.prepare_state(inputs) if hasattr(policy, "prepare_state") else None
        return Context(pad_masks, cache, hidden, state)

    def repeat(self, context: Context, n: int) -> Context:
        state = context.state
        return context._replace(
            pad_masks=context.pad_masks.repeat_interleave(n, dim=0),
            cache=repeat_cache(context.cache, n),
            state=None if state is None else state.repeat_interleave(n, dim=0),
        )

    def velocity(self, context: Context, x: Tensor, time: Tensor) -> Tensor:
        state = {} if context.state is None else {"state": context.state}
        return -self.model.denoise_step(
            prefix_pad_masks=context.pad_masks,
            past_key_values=context.cache,
            x_t=x,
            timestep=1.0 - time,
            **state,
        )

    def sample_time(self, n: int, device: torch.device) -> Tensor:
        return 1.0 - self.model.sample_time(n, device)

    def features(self, context: Context) -> Tensor:
        mask = context.pad_masks[..., None]
        # `where`: a padded token attends to nothing and may hold anything.
        hidden = torch.where(mask, context.hidden.float(), 0.0)
        return hidden.sum(dim=1) / mask.sum(dim=1)

"""ACT (arXiv:2304.13705): a conditional variational auto-encoder of chunks, trained with L1.

`encode` runs the image backbone and the input projections, once per observation. The latent is a
token of the transformer behind it, so the transformer runs once per latent.

Samples: the paper acts with the latent at 0, its prior's mean, so by default every sample is that
one chunk whatever the noise. `latent_std = 1` draws the latent from the prior instead (the first
`latent_dim` numbers of the noise), for learners that compare several chunks of one observation.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vla_post.policies.heads import Guide, UnsupportedPolicy


class Context(NamedTuple):
    tokens: Tensor
    """(B, T, D) state, environment state and picture tokens, before the transformer."""
    position: Tensor
    """(1 + T, 1, D), with the latent's first."""
    state: Tensor | None
    """(B, S) normalised, which the latent's encoder sees too."""


class ActHead:
    can_continue: bool = False
    latent_std: float = 0.0
    """0 acts with the prior's mean, as the paper does; 1 samples the prior."""

    def __init__(self, policy: Any) -> None:
        config = policy.config
        if config.temporal_ensemble_coeff is not None:
            raise UnsupportedPolicy(
                "this act averages the chunks of past calls (temporal_ensemble_coeff), which is no "
                "function of one observation; load it with temporal_ensemble_coeff=null"
            )
        self.policy: Any = policy
        self.config: Any = config
        self.model: Any = policy.model
        self.horizon = int(config.chunk_size)
        self.action_size = int(config.action_feature.shape[0])
        self.noise_size = max(self.action_size, math.ceil(config.latent_dim / self.horizon))
        self.denoising_steps = 1

    def encode(self, inputs: dict[str, Any]) -> Context:
        config, model = self.config, self.model
        tokens: list[Tensor] = []
        position: list[Tensor] = [model.encoder_1d_feature_pos_embed.weight[:, None]]
        state = inputs["observation.state"] if config.robot_state_feature else None
        if state is not None:
            tokens.append(model.encoder_robot_state_input_proj(state)[:, None])
        if config.env_state_feature:
            environment = inputs["observation.environment_state"]
            tokens.append(model.encoder_env_state_input_proj(environment)[:, None])
        for key in config.image_features:
            maps = model.backbone(inputs[key])["feature_map"]
            where = model.encoder_cam_feat_pos_embed(maps).to(maps.dtype)
            tokens.append(model.encoder_img_feat_input_proj(maps).flatten(2).transpose(1, 2))
            position.append(where.flatten(2).permute(2, 0, 1))
        return Context(torch.cat(tokens, dim=1), torch.cat(position, dim=0), state)

    def decode(self, context: Context, latent: Tensor) -> Tensor:
        """(N, H, A) from N latents (N, L); N is a multiple of the context's B."""
        model, n = self.model, len(latent) // len(context.tokens)
        first = model.encoder_latent_input_proj(latent)[:, None]
        tokens = torch.cat([first, context.tokens.repeat_interleave(n, dim=0)], dim=1)
        seen = model.encoder(tokens.transpose(0, 1), pos_embed=context.position)
        queries = seen.new_zeros(self.horizon, len(latent), self.config.dim_model)
        out = model.decoder(
            queries,
            seen,
            encoder_pos_embed=context.position,
            decoder_pos_embed=model.decoder_pos_embed.weight[:, None],
        )
        return model.action_head(out.transpose(0, 1))

    def sample(self, context: Context, noise: Tensor, guide: Guide | None = None) -> Tensor:
        assert guide is None
        size, n = noise.shape[:2]
        if self.latent_std == 0.0:
            chunk = self.decode(context, noise.new_zeros(size, self.config.latent_dim))
            return chunk[:, None].expand(-1, n, -1, -1)
        latent = self.latent_std * self._latent_noise(noise)
        return self.decode(context, latent).unflatten(0, (size, n))

    def loss(
        self, context: Context, action: Tensor, valid: Tensor, noise: Tensor, time: Tensor
    ) -> Tensor:
        """L1 plus the weighted divergence of the latent from its prior, as lerobot's.

        The same noise serves the latent's reparametrisation; `time` plays no part.
        """
        size, n = noise.shape[:2]
        latent = noise.new_zeros(size * n, self.config.latent_dim)
        divergence = noise.new_zeros(size)
        if self.config.use_vae and self.policy.training:
            mean, log_variance = self._posterior(context, action, valid)
            divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(dim=-1)
            spread = (log_variance / 2).exp().repeat_interleave(n, dim=0)
            latent = mean.repeat_interleave(n, dim=0) + spread * self._latent_noise(noise)
        chunk = self.decode(context, latent).float().unflatten(0, (size, n))
        # `where` before the absolute value: a padded step may hold anything, NaN included.
        error = torch.where(valid[:, None, :, None], chunk - action[:, None], 0.0).abs()
        steps = valid.sum(dim=1).clamp(min=1)[:, None]
        distance = error.sum(dim=(2, 3)) / (steps * self.action_size)
        divergence = torch.where(valid.any(dim=1), divergence.float(), 0.0)
        return distance + self.config.kl_weight * divergence[:, None]

    def sample_time(self, n: int, device: torch.device) -> Tensor:
        return torch.zeros(n, device=device)

    def features(self, context: Context) -> Tensor:
        """Mean of the transformer encoder's tokens, with the latent at 0."""
        zero = context.tokens.new_zeros(len(context.tokens), self.config.latent_dim)
        first = self.model.encoder_latent_input_proj(zero)[:, None]
        tokens = torch.cat([first, context.tokens], dim=1).transpose(0, 1)
        return self.model.encoder(tokens, pos_embed=context.position).mean(dim=0)

    def _latent_noise(self, noise: Tensor) -> Tensor:
        """(N, L) from noise (B, n, H, W)."""
        return noise.flatten(0, 1).flatten(1)[:, : self.config.latent_dim]

    def _posterior(self, context: Context, action: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, L) of the latent that explains the recorded chunk."""
        model, size = self.model, len(action)
        tokens = [model.vae_encoder_cls_embed.weight.expand(size, 1, -1)]
        if context.state is not None:
            tokens.append(model.vae_encoder_robot_state_input_proj(context.state)[:, None])
        padded = ~valid
        real = torch.zeros(size, len(tokens), dtype=torch.bool, device=padded.device)
        # Attention hides padded steps, but NaN times a weight of 0 is NaN.
        seen = torch.where(valid[..., None], action, 0.0)
        tokens.append(model.vae_encoder_action_input_proj(seen))
        out = model.vae_encoder(
            torch.cat(tokens, dim=1).transpose(0, 1),
            pos_embed=model.vae_encoder_pos_enc.detach().transpose(0, 1),
            key_padding_mask=torch.cat([real, padded], dim=1),
        )[0]
        return model.vae_encoder_latent_output_proj(out).chunk(2, dim=-1)

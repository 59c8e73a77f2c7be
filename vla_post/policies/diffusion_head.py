"""Diffusion Policy (arXiv:2303.04137): one encoder pass, then a U-Net over the noisy chunk.

lerobot counts T discrete steps, step T - 1 the noisiest; this project's time t in [0, 1] is step
floor((1 - t) * T). Training noise and target (noise or data) are lerobot's, with its scheduler.

Sampling is always DDIM without noise (arXiv:2010.02502, eta = 0), so that the first noise decides
the chunk, as on every other policy here and in an exported graph. With a DDIM checkpoint that is
what lerobot does; a DDPM checkpoint was trained alike and is sampled by DDIM at as many steps.
"""

from typing import Any

import torch
from torch import Tensor

from vla_post.policies.flow_math import flow_loss
from vla_post.policies.heads import Guide, UnsupportedPolicy


class DiffusionHead:
    can_continue: bool = False

    def __init__(self, policy: Any) -> None:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        config = policy.config
        if config.n_obs_steps != 1:
            raise UnsupportedPolicy(
                f"this diffusion policy looks at {config.n_obs_steps} observations in a row; a "
                "policy here acts on one. Train it with n_obs_steps=1"
            )
        self.config: Any = config
        self.model: Any = policy.diffusion
        self.horizon = int(config.horizon)
        self.action_size = int(config.action_feature.shape[0])
        self.noise_size = self.action_size
        self.denoising_steps = int(self.model.num_inference_steps)
        self.ddim: Any = DDIMScheduler.from_config(self.model.noise_scheduler.config)
        self._schedule: list[int] = []

    def encode(self, inputs: dict[str, Any]) -> Tensor:
        """(B, C): what the U-Net is conditioned on."""
        batch = {
            key: inputs[key][:, None]
            for key in ("observation.state", "observation.environment_state")
            if key in self.config.input_features
        }
        cameras = list(self.config.image_features)
        if cameras:
            batch["observation.images"] = torch.stack([inputs[k] for k in cameras], dim=1)[:, None]
        return self.model._prepare_global_conditioning(batch)

    def sample(self, context: Tensor, noise: Tensor, guide: Guide | None = None) -> Tensor:
        assert guide is None
        size, n = noise.shape[:2]
        condition = context.repeat_interleave(n, dim=0)
        x = noise.flatten(0, 1)
        if len(self._schedule) != self.denoising_steps:
            # Kept as numbers: read from a tensor while a graph is traced, they would be unknown.
            self.ddim.set_timesteps(self.denoising_steps)
            self._schedule = self.ddim.timesteps.tolist()
        for step in self._schedule:
            steps = torch.full((len(x),), step, dtype=torch.long, device=x.device)
            predicted = self.model.unet(x, steps, global_cond=condition)
            x = self.ddim.step(predicted, step, x).prev_sample
        return x.unflatten(0, (size, n))

    def loss(
        self, context: Tensor, action: Tensor, valid: Tensor, noise: Tensor, time: Tensor
    ) -> Tensor:
        size, n = noise.shape[:2]
        data = action.repeat_interleave(n, dim=0)
        noise = noise.flatten(0, 1)
        scheduler = self.model.noise_scheduler
        total = int(scheduler.config.num_train_timesteps)
        steps = ((1.0 - time.flatten()) * total).long().clamp(0, total - 1)
        predicted = self.model.unet(
            scheduler.add_noise(data, noise, steps),
            steps,
            global_cond=context.repeat_interleave(n, dim=0),
        )
        target = noise if self.config.prediction_type == "epsilon" else data
        # The mean squared error over valid steps is the same formula as the flow loss's.
        loss = flow_loss(predicted.float(), target, valid.repeat_interleave(n, dim=0))
        return loss.unflatten(0, (size, n))

    def sample_time(self, n: int, device: torch.device) -> Tensor:
        return torch.rand(n, device=device)

    def features(self, context: Tensor) -> Tensor:
        return context

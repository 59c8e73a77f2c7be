"""Exponential moving average of weights, which is what is published: steadier than the last."""

import torch
from torch import Tensor, nn

from vla_post.sharding import local


class Ema:
    """Follows a module's weights and buffers, sharded where the module is.

    Args:
        decay: share that stays per update; the first updates decay faster, (1 + n) / (10 + n).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}; expected a share in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in module.state_dict().items():
            new, old = local(tensor), local(self.weights[name])
            if new.is_floating_point():
                old.lerp_(new, 1.0 - keep)
            else:
                old.copy_(new)

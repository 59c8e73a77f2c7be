"""The optimiser that learners share: AdamW with warm-up, clipped gradients, no step into NaN."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vla_post import parallel
from vla_post.batch import Algorithm, Metrics, NonFiniteLoss
from vla_post.sharding import Shards, placed, shorten


@dataclass(frozen=True, kw_only=True)
class GradientAlgorithm(Algorithm):
    """Knobs of an algorithm whose update of the policy is one AdamW step."""

    learning_rate: float = 5e-4
    """Of AdamW, after the warm-up. Constant: nobody knows when an online run ends."""
    warmup_updates: int = 50
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 10.0
    """Longer gradients are scaled down to this length."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.warmup_updates < 0 or self.weight_decay < 0 or self.max_grad_norm <= 0:
            raise ValueError(
                f"warmup_updates {self.warmup_updates}, weight_decay {self.weight_decay}, "
                f"max_grad_norm {self.max_grad_norm}: the first two must not be negative, the last "
                "must be above 0"
            )


class GuardedAdamW:
    """AdamW that checks loss and gradient before it changes anything.

    With several processes it steps along the mean of their gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: GradientAlgorithm) -> None:
        self.parameters = list(parameters)
        self.config = config
        self.updates = 0
        self.adamw = self._over([self.parameters])

    def _over(self, groups: Sequence[Sequence[nn.Parameter]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            [{"params": group} for group in groups],
            lr=self.config.learning_rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )

    def adopt(self, shards: Shards) -> None:
        """Goes on with the parameters of a policy that has been sharded; before the first step."""
        self.parameters = [shards.get(p, p) for p in self.parameters]
        parts = [p for p in self.parameters if isinstance(p, DTensor)]
        rest = [p for p in self.parameters if not isinstance(p, DTensor)]
        # In groups of their own: one kernel does not take both.
        self.adamw = self._over([group for group in (rest, parts) if group])

    def step(self, loss: Float[Tensor, ""], rate_scale: float = 1.0) -> Metrics:
        """One step against the gradient of `loss`.

        Raises:
            NonFiniteLoss: loss or gradient is NaN or infinite; nothing has been changed.
        """
        self.adamw.zero_grad()
        loss.backward()
        parallel.average_gradients(self.parameters)
        loss = parallel.mean(loss)
        norm = self.clip()
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise NonFiniteLoss(
                f"loss {loss.item()} and gradient norm {norm.item()} at update {self.updates}; the "
                "weights are untouched. Look for NaN or huge values in the saved batch"
            )
        self.updates += 1
        rate = min(1.0, self.updates / max(self.config.warmup_updates, 1))
        rate *= self.config.learning_rate * rate_scale
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        return {"loss": float(loss.detach()), "grad_norm": float(norm), "learning_rate": rate}

    def clip(self) -> Float[Tensor, ""]:
        """Shortens the gradient to `max_grad_norm`; returns its length before."""
        return shorten(self.parameters, self.config.max_grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """The same whether sharded or not, but for the tensors."""
        found, order = self.adamw.state_dict(), self._order()
        group = found["param_groups"][0] | {"params": list(range(len(order)))}
        state = {order[number]: entry for number, entry in found["state"].items()}
        return {
            "updates": self.updates,
            "optimizer": {"state": state, "param_groups": [group]},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        saved, order = state["optimizer"], self._order()
        entries = {
            number: {
                # Moments are as their weight is; the number of steps is a number.
                key: placed(value, self.parameters[place]) if value.ndim else value
                for key, value in saved["state"][place].items()
            }
            for number, place in enumerate(order)
            if place in saved["state"]
        }
        groups = [
            saved["param_groups"][0] | {"params": group["params"]}
            for group in self.adamw.state_dict()["param_groups"]
        ]
        self.adamw.load_state_dict({"state": entries, "param_groups": groups})

    def _order(self) -> list[int]:
        """Place among `parameters` of each parameter of AdamW, in its order."""
        places = {id(p): place for place, p in enumerate(self.parameters)}
        return [places[id(p)] for group in self.adamw.param_groups for p in group["params"]]

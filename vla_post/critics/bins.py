"""Values as distributions over bins: the categorical alternative to a squared error.

N values, M bins, whose centres are equally spaced from `low` to `high`, both included; a value
outside counts as the nearer end. Two-hot labels are C51's projection of a scalar
(arXiv:1707.06887), Gaussian ones HL-Gauss (arXiv:2403.03950), which spreads each label over its
neighbours.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

Labels = Literal["one_hot", "two_hot", "hl_gauss"]


@dataclass(frozen=True, kw_only=True)
class Bins:
    """A discretised range of returns."""

    low: float
    high: float
    count: int
    """M."""
    labels: Labels = "hl_gauss"
    spread: float = 0.75
    """Standard deviation of Gaussian labels, in bins."""

    def __post_init__(self) -> None:
        if not self.low < self.high or self.count < 2:
            raise ValueError(
                f"{self.count} bins from {self.low} to {self.high}: at least two are needed, and "
                "the first number must be below the second"
            )

    @property
    def width(self) -> float:
        return (self.high - self.low) / (self.count - 1)

    def centres(self, like: Tensor) -> Float[Tensor, " M"]:
        return torch.linspace(self.low, self.high, self.count, device=like.device)

    def index(self, value: Float[Tensor, "*N"]) -> Integer[Tensor, "*N"]:
        """The bin whose centre is nearest."""
        place = (value.clamp(self.low, self.high) - self.low) / self.width
        return place.round().long()

    def label(self, value: Float[Tensor, "*N"]) -> Float[Tensor, "*N M"]:
        """The distribution that a network should give for a value."""
        value = value.clamp(self.low, self.high)
        if self.labels == "one_hot":
            return torch.nn.functional.one_hot(self.index(value), self.count).float()
        place = (value - self.low) / self.width
        if self.labels == "two_hot":
            return (
                1.0 - (place[..., None] - torch.arange(self.count, device=value.device)).abs()
            ).clamp(min=0.0)
        edges = torch.arange(self.count + 1, device=value.device) - 0.5
        scaled = (edges - place[..., None]) / (self.spread * 2**0.5)
        cumulative = torch.erf(scaled)
        # Divided by the mass inside the range, so that values at the ends keep a whole label.
        return cumulative.diff(dim=-1) / (cumulative[..., -1:] - cumulative[..., :1])

    def mean(self, logits: Float[Tensor, "*N M"]) -> Float[Tensor, "*N"]:
        """Expected value of a distribution."""
        return (logits.softmax(dim=-1) * self.centres(logits)).sum(dim=-1)

    def loss(
        self, logits: Float[Tensor, "*N M"], value: Float[Tensor, "*N"]
    ) -> Float[Tensor, "*N"]:
        """Cross-entropy to the label of `value`."""
        return -(self.label(value) * logits.log_softmax(dim=-1)).sum(dim=-1)

"""Ensembles of policies as stacked networks, each a chain of Gaussian inner steps.

K members, B states, S state size, D numbers of an action chunk in [-1, 1], T inner steps. A chain
(K, B, T + 1, D) runs from x_0 to the action x_T. A Gaussian policy is a chain of one step whose x_0
counts for nothing; a flow policy denoises x_0 ~ N(0, I) in T steps, each with noise of its own, so
that its likelihood is exact (ReinFlow, arXiv:2505.22094; DPPO, arXiv:2409.00588).
"""

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vla_post.critics.networks import EnsembleMlp


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    kind: Literal["gaussian", "flow"] = "gaussian"
    members: int = 4
    """K."""
    width: int = 256
    layers: int = 2
    log_std: tuple[float, float] = (-5.0, 0.0)
    """Soft bounds of a Gaussian's log deviation, in units of half the action range."""
    steps: int = 4
    """T of a flow policy."""
    noise: tuple[float, float] = (0.08, 0.24)
    """Bounds of the deviation that a flow policy learns to add to each inner step."""

    def __post_init__(self) -> None:
        for name in ("members", "width", "layers", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.noise[0] <= self.noise[1] or not self.log_std[0] < self.log_std[1]:
            raise ValueError(
                f"policy: noise {self.noise} and log_std {self.log_std}: give a lower and an upper "
                "bound, those of the noise above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Clone:
    """What cloning needs of one batch."""

    loss: Float[Tensor, "K B"]
    """-log pi_i(a | s) of a Gaussian; the flow-matching loss of a flow policy."""
    divergence: Float[Tensor, "K B"]
    """KL(pi_i || pi_best), pi_best being the *other* member that explains the action best, without
    gradient; half the squared distance of the velocities for flow policies. 0 for one member."""


class Policies(nn.Module):
    """K policies; states are (B, S), equal for all members, or (K, B, S)."""

    def __init__(self, config: PolicyConfig, state_size: int, action_size: int) -> None:
        super().__init__()
        self.config = config
        self.state_size, self.action_size = state_size, action_size

    @property
    def members(self) -> int:
        return self.config.members

    @property
    def inner(self) -> int:
        """T."""
        return 1

    @abstractmethod
    def act(self, state: Tensor, generator: torch.Generator | None) -> Float[Tensor, "K B D"]:
        """mu(s): the action without the noise of the inner steps."""

    def sample(self, state: Tensor, generator: torch.Generator) -> Float[Tensor, "K B U D"]:
        """Chains of U = T + 1 points."""
        return self.sample_scored(state, generator)[0]

    @abstractmethod
    def log_prob(self, state: Tensor, chain: Float[Tensor, "K B U D"]) -> Float[Tensor, "K B T"]:
        """Of each inner step, summed over the D numbers."""

    @abstractmethod
    def sample_scored(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(chain, log_prob): a sample and its `log_prob`, in one pass."""

    @abstractmethod
    def entropy(self, state: Tensor, chain: Float[Tensor, "K B U D"]) -> Float[Tensor, "K B"]:
        """Of the inner steps, averaged over them."""

    @abstractmethod
    def clone(
        self,
        state: Float[Tensor, "B S"],
        action: Float[Tensor, "B D"],
        valid: Bool[Tensor, "B D"],
        generator: torch.Generator,
    ) -> Clone:
        """Terms of U4."""

    def member(self, place: int) -> "Policies":
        """A stack of that one member, with weights of its own."""
        alone = copy.deepcopy(self)
        alone.config = replace(self.config, members=1)
        for module in alone.modules():
            if isinstance(module, EnsembleMlp):
                module.members = 1
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach()[place : place + 1].clone()))
        return alone

    @torch.no_grad()
    def take(self, other: "Policies", chosen: Bool[Tensor, " K"]) -> None:
        """Copies the chosen members of an ensemble of the same sizes into this one."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine[chosen] = theirs[chosen]


class GaussianPolicies(Policies):
    """Gaussians with a tanh mean and a deviation that depends on the state."""

    def __init__(self, config: PolicyConfig, state_size: int, action_size: int) -> None:
        super().__init__(config, state_size, action_size)
        self.net = EnsembleMlp(
            config.members,
            state_size,
            2 * action_size,
            config.width,
            config.layers,
            False,
            activation=nn.Tanh,
        )

    def distribution(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log deviation, (K, B, D) each."""
        mean, log_std = stacked(self.net, state, self.members).chunk(2, dim=-1)
        return mean.tanh(), soft_clamp(log_std, *self.config.log_std)

    def act(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.distribution(state)[0]

    def sample_scored(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mean, log_std = self.distribution(state)
        action = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        log_prob = normal_log_density(action, mean, log_std).sum(dim=-1, keepdim=True)
        return torch.stack([torch.zeros_like(action), action], dim=2), log_prob

    def log_prob(self, state: Tensor, chain: Tensor) -> Tensor:
        mean, log_std = self.distribution(state)
        return normal_log_density(chain[:, :, 1], mean, log_std).sum(dim=-1, keepdim=True)

    def entropy(self, state: Tensor, chain: Tensor) -> Tensor:
        _, log_std = self.distribution(state)
        return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1)

    def clone(
        self, state: Tensor, action: Tensor, valid: Tensor, generator: torch.Generator
    ) -> Clone:
        mean, log_std = self.distribution(state)
        density = normal_log_density(action, mean, log_std)
        loss = -torch.where(valid, density, 0.0).sum(dim=-1)
        if self.members == 1:
            return Clone(loss=loss, divergence=torch.zeros_like(loss))
        other = best_other(loss)
        best_mean, best_log_std = (pick(v.detach(), other) for v in (mean, log_std))
        kl = normal_kl(mean, log_std, best_mean, best_log_std)
        return Clone(loss=loss, divergence=torch.where(valid, kl, 0.0).sum(dim=-1))


class FlowPolicies(Policies):
    """Flow-matching policies, noise at 0 and data at 1, with learned noise on each Euler step.

    The noise is for learning alone: `act` integrates without it.
    """

    FREQUENCIES = 4

    def __init__(self, config: PolicyConfig, state_size: int, action_size: int) -> None:
        super().__init__(config, state_size, action_size)
        inputs = state_size + action_size + 2 * self.FREQUENCIES
        sizes = (config.width, config.layers, False)
        self.velocity_net = EnsembleMlp(
            config.members, inputs, action_size, *sizes, activation=nn.SiLU
        )
        self.noise_net = EnsembleMlp(config.members, inputs, action_size, 32, 1, False)

    @property
    def inner(self) -> int:
        return self.config.steps

    def _inputs(self, state: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """(K, B, *) of x (K, B, D) and time (B,) or ()."""
        size = x.shape[1]
        place = 2.0 ** torch.arange(self.FREQUENCIES) * (math.pi / 2)
        angle = time.expand(size)[:, None] * place
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).expand(len(x), size, -1)
        return torch.cat([state.expand(len(x), size, -1), x, waves], dim=-1)

    def velocity(self, state: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return stacked(self.velocity_net, self._inputs(state, x, time), self.members)

    def log_noise(self, state: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Log deviation of an inner step, (K, B, D)."""
        low, high = (math.log(v) for v in self.config.noise)
        out = stacked(self.noise_net, self._inputs(state, x, time), self.members)
        return low + (high - low) * out.sigmoid()

    def _start(self, state: Tensor, generator: torch.Generator | None) -> Tensor:
        size = state.shape[-2]
        return torch.randn((self.members, size, self.action_size), generator=generator)

    def act(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = self._start(state, generator)
        for step in range(self.inner):
            x = x + self.velocity(state, x, torch.tensor(step / self.inner)) / self.inner
        return x

    def sample_scored(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chain, steps = [self._start(state, generator)], list[Tensor]()
        for step in range(self.inner):
            mean, log_std = self._step(state, chain[-1], step)
            chain.append(mean + log_std.exp() * torch.randn(mean.shape, generator=generator))
            steps.append(normal_log_density(chain[-1], mean, log_std).sum(dim=-1))
        return torch.stack(chain, dim=2), torch.stack(steps, dim=-1)

    def _step(self, state: Tensor, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        time = torch.tensor(step / self.inner)
        mean = x + self.velocity(state, x, time) / self.inner
        return mean, self.log_noise(state, x, time)

    def log_prob(self, state: Tensor, chain: Tensor) -> Tensor:
        steps: list[Tensor] = []
        for step in range(self.inner):
            mean, log_std = self._step(state, chain[:, :, step], step)
            steps.append(normal_log_density(chain[:, :, step + 1], mean, log_std).sum(dim=-1))
        return torch.stack(steps, dim=-1)

    def entropy(self, state: Tensor, chain: Tensor) -> Tensor:
        logs = [self._step(state, chain[:, :, step], step)[1] for step in range(self.inner)]
        return (torch.stack(logs).mean(dim=0) + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=-1)

    def clone(
        self, state: Tensor, action: Tensor, valid: Tensor, generator: torch.Generator
    ) -> Clone:
        # One noise and time for all members, so that their losses on an item compare.
        noise = torch.randn(action.shape, generator=generator)
        time = torch.rand(len(action), generator=generator)
        x = (1.0 - time[:, None]) * noise + time[:, None] * action
        velocity = self.velocity(state, x.expand(self.members, *x.shape), time)
        loss = torch.where(valid, (velocity - (action - noise)).square(), 0.0).sum(dim=-1)
        if self.members == 1:
            return Clone(loss=loss, divergence=torch.zeros_like(loss))
        best = pick(velocity.detach(), best_other(loss))
        apart = torch.where(valid, 0.5 * (velocity - best).square(), 0.0).sum(dim=-1)
        return Clone(loss=loss, divergence=apart)


def build_policies(config: PolicyConfig, state_size: int, action_size: int) -> Policies:
    """An ensemble with random weights."""
    kind = {"gaussian": GaussianPolicies, "flow": FlowPolicies}[config.kind]
    return kind(config, state_size, action_size)


def stacked(net: EnsembleMlp, x: Tensor, members: int) -> Float[Tensor, "K B O"]:
    """A stack's outputs for inputs (B, I) that all members share, or (K, B, I)."""
    return net.blocks(x if x.ndim == 3 else x.expand(members, *x.shape))


def soft_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Smoothly into (low, high), the identity well inside."""
    x = high - nn.functional.softplus(high - x)
    return low + nn.functional.softplus(x - low)


def normal_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Element by element."""
    return -0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)


def normal_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL from one Gaussian to another, element by element."""
    ratio = (2.0 * (log_std - other_log_std)).exp()
    apart = ((mean - other_mean) / other_log_std.exp()).square()
    return 0.5 * (ratio + apart - 1.0) + other_log_std - log_std


def best_other(loss: Float[Tensor, "K B"]) -> Tensor:
    """(K, B) int: for each member and item, the other member with the smallest loss."""
    members = len(loss)
    rivals = loss.detach().expand(members, *loss.shape).clone()
    own = torch.arange(members)
    rivals[own, own] = math.inf
    return rivals.argmin(dim=1)


def pick(value: Float[Tensor, "K B D"], member: Tensor) -> Float[Tensor, "K B D"]:
    """`value` of the given member (K, B), for each member and item."""
    return value.gather(0, member[..., None].expand(*member.shape, value.shape[-1]))

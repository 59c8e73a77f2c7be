"""Stage 3: an ensemble that predicts where an action leads, what it earns, and whether it ends.

E members, of which the best few (elites) are used; N rows, S state size, D numbers of a chunk. Each
member is a Gaussian over (next state - state, reward), after MOPO and PETS (arXiv:1805.12114);
states are normalised and rewards in units of `Scales.reward`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vla_post.batch import Metrics
from vla_post.critics.networks import EnsembleLinear, EnsembleMlp
from vla_post.learners.uni_o4.policies import normal_log_density, soft_clamp, stacked
from vla_post.learners.uni_o4.samples import Samples, draw
from vla_post.learners.uni_o4.stage import adamw

Termination = Callable[[Float[Tensor, "N S"]], Bool[Tensor, " N"]]
"""Whether a state, in the data's units, ends the task."""


class DynamicsDiverged(ValueError):
    """The model of the dynamics is no good for roll-outs; the message says where and what to do."""


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    members: int = 7
    """E."""
    elites: int = 5
    width: int = 200
    layers: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 5e-5
    batch_size: int = 256
    holdout: int = 1000
    """Rows that measure the members; at most a fifth of the data."""
    max_updates: int = 20_000
    check_every: int = 250
    """Updates between two looks at the held-out rows."""
    patience: int = 5
    """Looks without an improvement of 1 % in any member until the stage ends."""
    noise: bool = True
    """Draw from the elite's Gaussian; otherwise take its mean."""

    def __post_init__(self) -> None:
        if not 1 <= self.elites <= self.members:
            raise ValueError(
                f"dynamics: {self.elites} elites of {self.members} members; there must be at least "
                "one and no more than members"
            )
        for name in ("width", "layers", "batch_size", "holdout", "max_updates", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"dynamics: {name} is {getattr(self, name)}; it must be at least 1"
                )


class Dynamics(nn.Module):
    """Stacked members; `elites` are chosen by `DynamicsFit`."""

    def __init__(self, state_size: int, action_size: int, config: DynamicsConfig) -> None:
        super().__init__()
        self.config, self.state_size = config, state_size
        self.net = EnsembleMlp(
            config.members,
            state_size + action_size,
            2 * (state_size + 1) + 1,
            config.width,
            config.layers,
            False,
            activation=nn.SiLU,
        )
        self.register_buffer("mean", torch.zeros(state_size + 1))
        self.register_buffer("std", torch.ones(state_size + 1))
        self.register_buffer("elites", torch.arange(config.elites))

    def outputs(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, log deviation) (E, N, S + 1) of the normalised change, and logits (E, N) of an
        end; inputs are (N, *) or (E, N, *)."""
        out = stacked(self.net, torch.cat([state, action], dim=-1), self.config.members)
        return self._parts(out)

    def _parts(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std, end = out.split([self.state_size + 1, self.state_size + 1, 1], dim=-1)
        return mean, soft_clamp(log_std, -6.0, 1.0), end[..., 0]

    def change(
        self, state: Tensor, next_state: Tensor, reward: Tensor
    ) -> Float[Tensor, "*b S_plus_1"]:
        """What the members predict: the normalised change of state, and the reward."""
        raw = torch.cat([next_state - state, reward[..., None]], dim=-1)
        return (raw - self.get_buffer("mean")) / self.get_buffer("std")

    @torch.no_grad()
    def step(
        self, state: Float[Tensor, "N S"], action: Float[Tensor, "N D"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "N S"], Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Next state, reward, and probability of an end. Each row asks one elite, drawn at random;
        the others' weights are not even read."""
        elites, size = self.get_buffer("elites"), len(state)
        count = len(elites)
        # Rows are dealt out evenly at random, so that each elite's share is one matrix product.
        padded = -(-size // count) * count
        order = torch.randperm(padded, generator=generator) % size
        x = torch.cat([state, action.clamp(-1.0, 1.0)], dim=1)[order].unflatten(0, (count, -1))
        out = self._through(x, elites).flatten(0, 1)
        mean, log_std, end = self._parts(out)
        if self.config.noise:
            mean = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        raw = mean * self.get_buffer("std") + self.get_buffer("mean")
        next_state, reward = torch.empty_like(state), state.new_empty(size)
        probability = state.new_empty(size)
        next_state[order] = state[order] + raw[:, :-1]
        reward[order], probability[order] = raw[:, -1], end.sigmoid()
        return next_state, reward, probability

    def _through(self, x: Float[Tensor, "G M I"], members: Tensor) -> Float[Tensor, "G M O"]:
        for block in self.net.blocks:
            if isinstance(block, EnsembleLinear):
                x = torch.baddbmm(block.bias[members], x, block.weight[members])
            else:
                x = block(x)
        return x


class DynamicsFit:
    """Fits `Dynamics` until held-out rows say so; a stage.

    Raises:
        DynamicsDiverged: when it ends with a model that predicts worse than "nothing changes".
    """

    name = "dynamics"

    def __init__(self, dynamics: Dynamics, samples: Samples, seed: int = 0) -> None:
        self.dynamics, self.samples, self.seed = dynamics, samples, seed
        self.config = dynamics.config
        shuffled = torch.randperm(
            len(samples), generator=torch.Generator().manual_seed(seed + 20_231_103)
        )
        held = min(self.config.holdout, len(samples) // 5)
        self.held, self.train = shuffled[:held], shuffled[held:]
        whole = samples.valid.all(dim=1) | samples.terminated
        self.train = self.train[whole[self.train]]
        if len(self.train) < self.config.batch_size:
            raise DynamicsDiverged(
                f"{len(self.train)} whole chunks for a model with batches of "
                f"{self.config.batch_size}: record more, or shorten the chunk"
            )
        rows = samples.rows(self.train)
        raw = torch.cat([rows.next_state - rows.state, rows.reward[:, None]], dim=1)
        dynamics.get_buffer("mean").copy_(raw.mean(dim=0))
        dynamics.get_buffer("std").copy_(raw.std(dim=0).clamp(min=1e-4))
        self.optimizer = adamw(
            list(dynamics.parameters()), self.config.learning_rate, self.config.weight_decay
        )
        self.best = torch.full((self.config.members,), math.inf)
        """Smallest held-out error of each member."""
        self.kept = {k: v.detach().clone() for k, v in dynamics.named_parameters()}
        """Weights of each member at its best."""
        self.stale = 0
        self.done = False

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    def update(self) -> Metrics:
        config, size = self.config, len(self.train)
        index, _ = draw(size, config.members * config.batch_size, self.seed, self.updates)
        index = index.view(config.members, config.batch_size)
        rows = self.samples.rows(self.train[index])
        mean, log_std, end = self.dynamics.outputs(rows.state, rows.action)
        target = self.dynamics.change(rows.state, rows.next_state, rows.reward)
        density = normal_log_density(target, mean, log_std).mean(dim=2)
        # Where nobody saw what came after an end, stores repeat the last observation.
        unseen = rows.terminated & (rows.next_state == rows.state).all(dim=2)
        likelihood = -torch.where(unseen, 0.0, density).mean(dim=1)
        ending = nn.functional.binary_cross_entropy_with_logits(
            end, rows.terminated.float(), reduction="none"
        ).mean(dim=1)
        metrics = self.optimizer.step((likelihood + ending).sum())
        out = {
            "loss": metrics["loss"] / config.members,
            "dynamics/nll": float(likelihood.mean().detach()),
            "dynamics/end_loss": float(ending.mean().detach()),
        }
        if self.updates % config.check_every == 0 or self.updates >= config.max_updates:
            out |= self._look()
        return out

    @torch.no_grad()
    def errors(self) -> Float[Tensor, "E S_plus_1"]:
        """Mean squared held-out error of each member, in units of the change's variance."""
        rows = self.samples.rows(self.held)
        mean, _, _ = self.dynamics.outputs(rows.state, rows.action)
        target = self.dynamics.change(rows.state, rows.next_state, rows.reward)
        return (mean - target).square().mean(dim=1)

    def _look(self) -> Metrics:
        error = self.errors().mean(dim=1)
        better = error < self.best * 0.99
        for name, parameter in self.dynamics.named_parameters():
            self.kept[name][better] = parameter.detach()[better]
        self.best = torch.where(better, error, self.best)
        self.stale = 0 if bool(better.any()) else self.stale + 1
        if self.stale >= self.config.patience or self.updates >= self.config.max_updates:
            self._finish()
        return {
            "dynamics/held_out_error": float(error.mean()),
            "dynamics/best_error": float(self.best.min()),
        }

    def _finish(self) -> None:
        with torch.no_grad():
            for name, parameter in self.dynamics.named_parameters():
                parameter.copy_(self.kept[name])
        self.dynamics.get_buffer("elites").copy_(self.best.argsort()[: self.config.elites])
        worst = self.errors()[self.dynamics.get_buffer("elites")].mean(dim=0)
        # 1 is what predicting the mean change would score.
        if not bool(torch.isfinite(self.best).any()) or float(worst.mean()) > 1.0:
            number = int(worst.nan_to_num(math.inf).argmax())
            what = "the reward" if number == len(worst) - 1 else f"state number {number}"
            raise DynamicsDiverged(
                f"on held-out transitions the dynamics model is worse than a constant (error "
                f"{float(worst.mean()):.3g} of the variance; worst in {what}). Lower its learning "
                "rate, give it more data, or check that next_observations belong to their rows"
            )
        self.done = True

    def state_dict(self) -> dict[str, Any]:
        return {
            "dynamics": self.dynamics.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "kept": self.kept,
            "stale": self.stale,
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dynamics.load_state_dict(state["dynamics"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.kept = state["best"], dict(state["kept"])
        self.stale, self.done = int(state["stale"]), bool(state["done"])


def hopper_ends(state: Float[Tensor, "N S"]) -> Bool[Tensor, " N"]:
    """Hopper-v5: too low, tipped over, or out of bounds."""
    healthy = (state[:, 0] > 0.7) & (state[:, 1].abs() < 0.2)
    return ~(healthy & (state[:, 1:].abs() < 100.0).all(dim=1))


def walker_ends(state: Float[Tensor, "N S"]) -> Bool[Tensor, " N"]:
    """Walker2d-v5: too low, too high or tipped over."""
    height, angle = state[:, 0], state[:, 1]
    return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))


def never_ends(state: Float[Tensor, "N S"]) -> Bool[Tensor, " N"]:
    """HalfCheetah-v5."""
    return torch.zeros(len(state), dtype=torch.bool)


TERMINATIONS: dict[str, Termination] = {
    "hopper": hopper_ends,
    "walker2d": walker_ends,
    "halfcheetah": never_ends,
}
"""By the environment's name before its version. Elsewhere the model learns where episodes end."""


def termination_of(env: str) -> Termination | None:
    """The known rule of an environment such as `Hopper-v5`; None where it has to be learned."""
    return TERMINATIONS.get(env.split("-")[0].lower())

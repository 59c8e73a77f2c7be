"""SOP's sampler: tasks alike, and within each task as much fresh data as its loss asks for.

arXiv:2601.03044; Eq. S1-S4 of our specification. Fresh data is what robots recorded, static data
the demonstrations. Any algorithm trains on what it draws.

**The trap of the loss's scale.** The paper's Eq. S3 is a softmax over two raw losses. A flow loss
near 0.02 makes both exponentials about 1, so whatever the losses do the sampler draws half and
half (0.5025 at alpha = 1.5), while losses near 1 give 0.62 when they are equal. Here both losses
are first divided by their mean, which leaves their ratio:

    w = sigmoid( (alpha * l_on - l_off) / ((l_on + l_off) / 2) ),  clipped to [0.2, 0.8]

Only the ratio r = l_on / l_off decides, so the behaviour is the same for every policy, unit and
stage of training; alpha keeps its meaning, a boost for fresh data: equal losses give
sigmoid(alpha - 1), and 0.5 at alpha = 1. The exponents lie between -2 and 2 alpha, so nothing
overflows. `scale="raw"` is the paper's own form.

The index is the stores' episode tables, in memory; frames and ticks are read when drawn. An episode
is known by its uuid and drawn only once it is finished, however often and in whatever order its
arrival is announced.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float

from trajectory_store import ChunkBatch, Contract, Filter, FleetView, Part, Source, Store
from vla_post import parallel
from vla_post.batch import DataNeeds
from vla_post.critics.returns import require_outcomes, require_rewards
from vla_post.training.data import require_fitting, sampler_of


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """SOP's mixture of fresh and static data; its paper's numbers, except `boost`, which it does
    not state."""

    boost: float = 1.5
    """alpha: above 1, fresh data is drawn more often than its loss asks for."""
    window: int = 200
    """W: losses that are remembered for each task and source."""
    least: float = 0.2
    """Of fresh data, in a task that has both kinds."""
    most: float = 0.8
    scale: Literal["relative", "raw"] = "relative"
    """Losses divided by their mean, or as they are; see `training/adaptive.py`."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.least <= self.most <= 1.0:
            raise ValueError(f"least {self.least}, most {self.most}: expected 0 to 1, in order")
        if not self.boost > 0 or self.window < 1:
            raise ValueError(f"boost {self.boost} and window {self.window} must be above 0")


def fresh_share(online: float, offline: float, config: AdaptiveConfig) -> float:
    """omega_on of Eq. S3 from the mean losses of fresh and of static data."""
    unit = (online + offline) / 2 if config.scale == "relative" else 1.0
    difference = (config.boost * online - offline) / unit if unit > 0 else config.boost - 1.0
    # The softmax of two numbers, with the larger one subtracted: no exponential overflows.
    large = math.exp(-abs(difference))
    share = 1.0 / (1.0 + large) if difference > 0 else large / (1.0 + large)
    return min(max(share, config.least), config.most)


class LossWindows:
    """The last W losses of each task and source."""

    def __init__(self, config: AdaptiveConfig) -> None:
        self.config = config
        self._kept: dict[tuple[str, bool], deque[float]] = {}

    def push(self, task: str, fresh: bool, losses: Float[np.ndarray, " N"]) -> None:
        """Takes in losses, oldest first."""
        kept = self._kept.setdefault((task, fresh), deque(maxlen=self.config.window))
        kept.extend(losses.tolist())

    def losses(self, task: str, fresh: bool) -> list[float]:
        return list(self._kept.get((task, fresh), ()))

    def share(self, task: str) -> float:
        """omega_on of a task that has both kinds; 0.5 until both have been seen."""
        means = [self.losses(task, fresh) for fresh in (True, False)]
        if not all(means):
            return min(max(0.5, self.config.least), self.config.most)
        online, offline = (sum(m) / len(m) for m in means)
        return fresh_share(online, offline, self.config)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [[task, fresh, list(k)] for (task, fresh), k in self._kept.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        window = self.config.window
        self._kept = {(t, bool(f)): deque(k, maxlen=window) for t, f, k in state["kept"]}


class AdaptiveSampler:
    """An endless iterator of `ChunkBatch` like `ChunkSampler`, whose `part` is 0 for demonstrations
    and 1 for what robots recorded. Tell it the losses of what it drew (`learned`).

    Raises:
        ContractMismatch: a store's actions or observations are not those of the contract.
        Unrewarded: `needs.outcomes` or `needs.rewards`, and the data do not say what was good.
    """

    def __init__(
        self,
        demonstrations: FleetView,
        online: FleetView | None,
        contract: Contract,
        windows: LossWindows,
        *,
        batch_size: int,
        needs: DataNeeds | None = None,
        seed: int = 0,
        keys: Sequence[str] | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        needs = needs or DataNeeds()
        if needs.double_buffer:
            raise ValueError(
                "double-buffer draws by a rule of its own; train it with mixing `fixed`"
            )
        views = {False: demonstrations}
        if online is not None and online.stores:
            views[True] = online
        for view in views.values():
            require_fitting(view, contract)
        every = [e for view in views.values() for e in view.episodes]
        if needs.outcomes:
            require_outcomes(every, needs.backup or contract.chunk_horizon)
        if needs.rewards:
            require_rewards([store for view in views.values() for store in view.stores])
        self.windows = windows
        self.tasks = sorted({e.task for e in every})
        # A part for each task and source; those that have nothing to draw are never drawn.
        self._parts = [(task, fresh) for task in self.tasks for fresh in views]

        def part(task: str, fresh: bool) -> Part:
            sources: Sequence[Source] | None = needs.sources if fresh else None
            keep = Filter(tasks=[task], sources=sources)
            return Part(name=_name(task, fresh), data=views[fresh], filter=keep)

        self._sampler = sampler_of(
            [part(task, fresh) for task, fresh in self._parts],
            contract,
            needs,
            batch_size=batch_size,
            seed=seed,
            keys=keys,
            shard=shard,
        )
        self._there = set(self._sampler.shares)
        self._fresh = np.array([fresh for _, fresh in self._parts])

    @property
    def stores(self) -> list[Store]:
        """Every store that batches are drawn from."""
        return self._sampler.stores

    def shares(self) -> dict[str, float]:
        """Expected share of each task's fresh and static data (Eq. S1, S3), in the next batch."""
        out: dict[str, float] = {}
        tasks = [t for t in self.tasks if self._has(t, True) or self._has(t, False)]
        for task in tasks:
            both = self._has(task, True) and self._has(task, False)
            fresh = self.windows.share(task) if both else float(self._has(task, True))
            for which, share in ((True, fresh), (False, 1.0 - fresh)):
                if self._has(task, which):
                    out[_name(task, which)] = share / len(tasks)
        return out

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ChunkBatch:
        shares = self.shares()
        weights = {_name(*part): shares.get(_name(*part), 0.0) for part in self._parts}
        self._sampler.set_weights(weights)
        chunk = next(self._sampler)
        return dataclasses.replace(chunk, part=self._fresh[chunk.part].astype(np.int64))

    def learned(
        self,
        chunk: ChunkBatch,
        loss: Float[np.ndarray, " B"],
        counted: Bool[np.ndarray, " B"],
    ) -> None:
        """Losses of the items of a batch (S2); with several processes, of the whole batch.

        Args:
            counted: the item had anything to learn from; the others' loss is no loss.
        """
        columns = (chunk.task, chunk.part, loss, counted)
        task, part, loss, counted = (
            parallel.gather(torch.from_numpy(column)).numpy() for column in columns
        )
        for number in np.unique(task).tolist():
            for fresh in (False, True):
                mine = (task == number) & (part == int(fresh)) & counted
                self.windows.push(self._sampler.tasks[number], fresh, loss[mine])

    @property
    def snapshot_ids(self) -> dict[str, str]:
        return self._sampler.snapshot_ids

    @property
    def n_anchors(self) -> int:
        return self._sampler.n_anchors

    def close(self) -> None:
        self._sampler.close()

    def _has(self, task: str, fresh: bool) -> bool:
        return _name(task, fresh) in self._there


def _name(task: str, fresh: bool) -> str:
    return f"{task}/{'online' if fresh else 'offline'}"

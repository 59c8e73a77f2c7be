"""From stores to batches: normalisation statistics, and the mixture that learners draw from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trajectory_store import ChunkSampler, Filter, FleetView, Part, Source
from trajectory_store.contract import Contract, ContractMismatch
from trajectory_store.stats import normalisation
from vla_post.batch import DataNeeds
from vla_post.critics.returns import require_outcomes, require_rewards

DEMONSTRATIONS, ONLINE, INTERVENTIONS = "demonstrations", "online", "interventions"
"""Names of the mixture's parts, in the order of `Batch.part`."""

SMALLEST_STD = 0.01
"""Floor of a state's standard deviation: what stood still in a few demonstrations may move."""
SMALLEST_ACTION_STD = 0.025
"""Floor of an action's, as a share of its range."""
UNLIMITED = 1e6
"""A declared range as wide as this is none: imported data does not say what its robot may do."""


def statistics(view: FleetView, contract: Contract) -> dict[str, dict[str, Any]]:
    """Mean, deviation, range and quantiles of each vector and of the action in a view.

    The store measures them, once per snapshot; the deviations get a floor here. Fixed when a
    policy is first trained and kept in its checkpoint: a policy whose inputs are rescaled under it
    forgets.
    """
    low, high = np.array(contract.action.limits.position, np.float64).T
    floors = {key: np.full(f.shape, SMALLEST_STD) for key, f in contract.vectors.items()}
    limited = high - low < UNLIMITED
    floors["action"] = np.where(limited, SMALLEST_ACTION_STD * (high - low), SMALLEST_STD)
    out: dict[str, dict[str, Any]] = {}
    for key, found in normalisation(view, keys=list(floors)).items():
        entry = {name: np.array(value) for name, value in asdict(found).items() if name != "count"}
        out[key] = entry | {"std": np.maximum(entry["std"], floors[key])}
        for lower, upper in (("min", "max"), ("q01", "q99")):
            # Policies that scale a range to [-1, 1] must not blow up what stood still.
            narrow = np.maximum(floors[key] - (entry[upper] - entry[lower]) / 2, 0.0)
            out[key] |= {lower: entry[lower] - narrow, upper: entry[upper] + narrow}
    return out


def fixed_shares(sampler: ChunkSampler) -> dict[str, float]:
    """`mix/TASK/online` and `offline` of a `mixture`, as the adaptive one tells them."""
    out: dict[str, float] = {}
    for part, tasks in sampler.part_task_shares.items():
        which = "offline" if part == DEMONSTRATIONS else "online"
        for task, share in tasks.items():
            if share > 0:
                out[f"mix/{task}/{which}"] = out.get(f"mix/{task}/{which}", 0.0) + share
    return {name: round(share, 4) for name, share in out.items()}


def mixture(
    demonstrations: FleetView,
    online: FleetView | None,
    contract: Contract,
    *,
    batch_size: int,
    online_share: float,
    needs: DataNeeds | None = None,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> ChunkSampler:
    """Tasks uniform; demonstrations never below 1 - `online_share`, and all until more comes.

    With `needs.double_buffer` that floor holds within the half that people showed; the other half
    is everything that robots recorded.

    Args:
        online: what robots recorded; chunks start where one of `needs.sources` drove.
        keys: observation features to load beside those of `needs`; None loads all.
        shard: (k, n): the k-th of n slices of every batch.

    Raises:
        ContractMismatch: a store's actions or observations are not those of the contract.
        Unrewarded: `needs.outcomes` or `needs.rewards`, and the data do not say what was good.
    """
    needs = needs or DataNeeds()
    views = [demonstrations] if online is None else [demonstrations, online]
    for view in views:
        require_fitting(view, contract)
    if needs.outcomes:
        episodes = [e for view in views for e in view.episodes]
        require_outcomes(episodes, needs.backup or contract.chunk_horizon)
    if needs.rewards:
        require_rewards([store for view in views for store in view.stores])

    def part(name: str, data: FleetView, share: float, sources: Sequence[Source] | None) -> Part:
        keep = Filter(sources=sources)
        return Part(name=name, data=data, weight=share, filter=keep, balance_tasks=True)

    parts = [part(DEMONSTRATIONS, demonstrations, 1.0 - online_share, None)]
    if online is not None and online.stores:
        share = 1.0 if needs.double_buffer else online_share
        parts.append(part(ONLINE, online, share, needs.sources))
        if needs.double_buffer:
            parts.append(part(INTERVENTIONS, online, online_share, (Source.HUMAN,)))
    return sampler_of(
        parts,
        contract,
        needs,
        batch_size=batch_size,
        seed=seed,
        keys=keys,
        shard=shard,
        workers=workers,
    )


def sampler_of(
    parts: Sequence[Part],
    contract: Contract,
    needs: DataNeeds,
    *,
    batch_size: int,
    seed: int,
    keys: Sequence[str] | None,
    shard: tuple[int, int],
    workers: int = 0,
) -> ChunkSampler:
    """What every mixture draws with; the arguments are those of `mixture`."""
    return ChunkSampler(
        parts,
        horizon=contract.chunk_horizon,
        batch_size=batch_size,
        seed=seed,
        keys=None if keys is None else list(dict.fromkeys((*keys, *needs.keys))),
        next_observation=needs.next_observation,
        future=needs.future_steps,
        takeovers=needs.takeovers,
        backup=needs.backup,
        valid_sources=needs.valid_sources,
        shard=shard,
        workers=workers,
        frame_cache_bytes=256 << 20,
    )


def require_fitting(view: FleetView, contract: Contract) -> None:
    """Refuses stores whose numbers mean something else than the contract's.

    Tasks, cameras' rates and safety may differ: those do not change what an action is.

    Raises:
        ContractMismatch: names the store and each field.
    """
    for store in view.stores:
        for found in store.contracts.values():
            problems = [
                f"{name}: {theirs!r} in the store, {ours!r} in the contract"
                for name, theirs, ours in _meaning(found, contract)
                if theirs != ours
            ]
            if problems:
                raise ContractMismatch(
                    f"{store.location}: recorded with cell {found.cell!r}, which differs from "
                    f"{contract.cell!r} in\n  "
                    + "\n  ".join(problems)
                    + "\nTrain on stores of the policy's own cell, or convert them."
                )


def _meaning(a: Contract, b: Contract) -> list[tuple[str, Any, Any]]:
    """(field, of a, of b) of all that gives a number its meaning."""
    pairs = [("control_hz", a.control_hz, b.control_hz)]
    for name in ("names", "unit", "mode"):
        pairs.append((f"action.{name}", getattr(a.action, name), getattr(b.action, name)))
    for key in sorted(a.observations.keys() & b.observations.keys()):
        for name in ("shape", "names", "unit"):
            sides = (getattr(c.observations[key], name) for c in (a, b))
            pairs.append((f"{key}.{name}", *sides))
    return pairs


def rows_by(view: FleetView, sources: Sequence[Source] | None) -> int:
    """Ticks of finished episodes that one of `sources` commanded; None counts all."""
    wanted = tuple(Source) if sources is None else sources
    return sum(e.ticks_by(source) for e in view.episodes for source in wanted)


def recorded_observations(
    view: FleetView, contract: Contract, count: int, *, seed: int = 0
) -> list[tuple[Mapping[str, np.ndarray], str]]:
    """(observation as stored, instruction) pairs spread over a view: probes for exports and checks.

    Raises:
        ValueError: the view has no finished episode.
    """
    places = [(store, e) for store in view.stores for e in store.episodes if len(e)]
    if not places:
        raise ValueError(f"{', '.join(view.prefixes)}: no finished episode to take probes from")
    random = np.random.default_rng(seed)
    probes: list[tuple[Mapping[str, np.ndarray], str]] = []
    for number in range(count):
        store, episode = places[number % len(places)]
        row = episode.first_row + int(random.integers(len(episode)))
        observation = {key: store.read(key, [row])[0] for key in contract.observations}
        probes.append((observation, episode.instruction))
    return probes

"""A trajectory store as transitions in D4RL's layout, for learners of single steps.

The observation of a transition is every vector of the contract, one after the other in the order of
their names. Cameras are left out. A real end is a terminal; an episode that the clock, the operator
or a crash ended has no observation after its last step, so that step is left out and the one before
it is marked as a timeout, whose value goes on from the last stored observation.
"""

from typing import Literal

import numpy as np

from trajectory_store import Episode, FleetView, Outcome, Store
from vla_post.learners.uni_o4.data import BadTransitions, Transitions

Reward = Literal["success", "stored"]


def from_stores(
    view: FleetView, *, task: str | None = None, reward: Reward = "success"
) -> Transitions:
    """Every finished episode of the stores, in the order in which they were recorded.

    The state after a terminal step is never seen, so such a step has its own observation as
    `next_observations`: no value may be taken there, and a dynamics model must not learn from it.

    Args:
        task: only this one; None takes all.
        reward: `success` gives 1 at the last step of a successful episode, which is a terminal, and
            0 elsewhere; `stored` takes what was recorded. Other terminals are recorded ones.

    Raises:
        BadTransitions: nothing to take, no vectors, or stores of cells with other vectors, actions
            or limits.
    """
    episodes = [
        (store, episode)
        for store in view.stores
        for episode in store.episodes
        if task is None or episode.task == task
    ]
    if not episodes:
        known = sorted({episode.task for store in view.stores for episode in store.episodes})
        raise BadTransitions(
            f"no finished episode of {'any task' if task is None else f'task {task!r}'} in "
            f"{len(view.stores)} stores; recorded tasks: {', '.join(known) or 'none'}"
        )
    low, high = _same_spaces([store for store, _ in episodes])
    episodes.sort(key=lambda pair: pair[1].created_ns)
    parts = [part for pair in episodes if (part := _transitions(*pair, reward)) is not None]
    if not parts:
        raise BadTransitions(
            f"all {len(episodes)} episodes are one step long and none was terminated: there is no "
            "next observation anywhere"
        )
    return Transitions(
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        action_low=low,
        action_high=high,
    )


def _transitions(store: Store, episode: Episode, reward: Reward) -> dict[str, np.ndarray] | None:
    def read(key: str) -> np.ndarray:
        return np.asarray(store.read(key, episode))

    observation = np.concatenate(
        [read(key) for key in sorted(store.contract.vectors)], axis=1, dtype=np.float32
    )
    terminated = bool(read("terminated")[-1])
    if reward == "stored":
        rewards = read("reward").astype(np.float32)
    else:
        # People label a success after the fact; no tick of such an episode says `terminated`.
        success = episode.outcome == Outcome.SUCCESS
        terminated = terminated or success
        rewards = np.zeros(len(episode), np.float32)
        rewards[-1] = success
    rows = len(episode) if terminated else len(episode) - 1
    if rows == 0:
        return None
    ends = np.arange(rows) == rows - 1
    return {
        "observations": observation[:rows],
        "actions": read("action")[:rows].astype(np.float32),
        "rewards": rewards[:rows],
        "terminals": ends & terminated,
        "timeouts": ends & (not terminated),
        "next_observations": np.concatenate([observation[1:], observation[-1:]])[:rows],
    }


def _same_spaces(stores: list[Store]) -> tuple[np.ndarray, np.ndarray]:
    """Limits of the actions, and that every store means the same by its numbers."""
    first = stores[0].contract
    if not first.vectors:
        raise BadTransitions(
            f"cell {first.cell!r} records cameras only; transitions need at least one vector"
        )
    for store in stores:
        contract = store.contract
        same = (
            {k: f.names for k, f in contract.vectors.items()}
            == {k: f.names for k, f in first.vectors.items()}
            and contract.action.names == first.action.names
            and contract.action.limits.position == first.action.limits.position
        )
        if not same:
            raise BadTransitions(
                f"{store.location} (cell {contract.cell!r}) and {stores[0].location} (cell "
                f"{first.cell!r}) differ in their vectors, actions or limits; take them one at a "
                "time"
            )
    low, high = np.array(first.action.limits.position, np.float32).T
    return low, high

"""Recorded transitions in the layout of D4RL, and what a learner makes of them.

N transitions in the order in which they happened, S state size, A action size.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

ARRAYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
"""Names in a file, as D4RL writes them."""
LIMITS = ("action_low", "action_high")
"""Optional in a file; -1 and 1 where it has none."""


class BadTransitions(ValueError):
    """Transitions from which the asked model cannot be learned; the message says why and what to
    do."""


def _unset() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """A data set in memory. An episode ends where `terminals` or `timeouts` is set, and at the last
    row.

    Raises:
        BadTransitions: shapes that do not fit together, or values that are not finite.
    """

    observations: np.ndarray
    """(N, S) float32; shapes are checked here, with a message, for these come out of files."""
    actions: np.ndarray
    """(N, A) float32."""
    rewards: np.ndarray
    """(N,) float32."""
    terminals: np.ndarray
    """(N,) bool. A real end: nothing comes after it."""
    timeouts: np.ndarray
    """(N,) bool. The clock ended the episode: the next observation still has a value."""
    next_observations: np.ndarray
    """(N, S) float32. What the step led to, before any reset."""
    action_low: np.ndarray = field(default_factory=_unset)
    """(A,). Limits of each action; left empty, -1."""
    action_high: np.ndarray = field(default_factory=_unset)
    """(A,). Left empty, 1."""

    def __post_init__(self) -> None:
        size, actions = len(self.observations), self.actions.shape[-1] if self.actions.ndim else 0
        for name, value in (("action_low", -1.0), ("action_high", 1.0)):
            if getattr(self, name).size == 0:
                object.__setattr__(self, name, np.full(actions, value, np.float32))
        state = self.observations.shape[1:]
        expected = {
            "observations": (size, *state),
            "actions": (size, actions),
            "rewards": (size,),
            "terminals": (size,),
            "timeouts": (size,),
            "next_observations": (size, *state),
            "action_low": (actions,),
            "action_high": (actions,),
        }
        for name, shape in expected.items():
            found: np.ndarray = getattr(self, name)
            if found.shape != shape or len(state) != 1:
                raise BadTransitions(
                    f"{name} has shape {found.shape}; with {size} observations of shape {state} it "
                    f"should be {shape}, observations being (N, S) and actions (N, A)"
                )
            if not np.isfinite(found).all():
                row = int(np.argwhere(~np.isfinite(found))[0][0])
                raise BadTransitions(
                    f"{name} holds NaN or infinity, first in row {row}; drop that episode, or "
                    "record it again"
                )
        if not (self.action_low < self.action_high).all():
            raise BadTransitions(
                f"action limits {self.action_low} to {self.action_high}: each lower one must be "
                "below its upper one"
            )

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def state_size(self) -> int:
        """S."""
        return self.observations.shape[1]

    @property
    def action_size(self) -> int:
        """A."""
        return self.actions.shape[1]

    @property
    def ends(self) -> Bool[np.ndarray, " N"]:
        """Last transition of each episode."""
        ends = self.terminals | self.timeouts
        ends[-1:] = True
        return ends

    def episode_returns(self) -> Float[np.ndarray, " E"]:
        """Undiscounted return of each episode, the last one whether finished or not."""
        stops = np.flatnonzero(self.ends) + 1
        total = np.concatenate([[0.0], np.cumsum(self.rewards, dtype=np.float64)])
        return np.diff(total[np.concatenate([[0], stops])])

    @classmethod
    def from_arrays(
        cls, arrays: dict[str, np.ndarray], *, name: str = "transitions"
    ) -> "Transitions":
        """From D4RL's arrays. Without `next_observations` the following row is the next state; the
        last row of an episode that the clock ended then has none and is left out.

        Raises:
            BadTransitions: an array is missing, or they do not fit together.
        """
        needed = [key for key in ARRAYS if key not in ("timeouts", "next_observations")]
        missing = [key for key in needed if key not in arrays]
        if missing:
            raise BadTransitions(
                f"{name}: no {', '.join(missing)} among {', '.join(sorted(arrays)) or 'nothing'}; "
                "D4RL's layout has observations, actions, rewards, terminals, timeouts and "
                "next_observations"
            )
        given = {key: np.asarray(arrays[key]) for key in (*ARRAYS, *LIMITS) if key in arrays}
        typed: dict[str, Any] = {
            key: value.astype(np.bool_ if key in ("terminals", "timeouts") else np.float32)
            for key, value in given.items()
        }
        typed["rewards"] = typed["rewards"].reshape(-1)
        typed["terminals"] = typed["terminals"].reshape(-1)
        typed["timeouts"] = typed.get("timeouts", np.zeros_like(typed["terminals"])).reshape(-1)
        if "next_observations" not in typed:
            following = np.roll(typed["observations"], -1, axis=0)
            known = ~typed["timeouts"] | typed["terminals"]
            known[-1:] = typed["terminals"][-1:]
            # What came before a dropped row ends its episode there, by the clock.
            cut = np.append(~known[1:], False) & ~typed["terminals"]
            typed["next_observations"] = following
            typed["timeouts"] = typed["timeouts"] | cut
            rows = {key: value[known] for key, value in typed.items() if key in ARRAYS}
            typed = typed | rows
        return cls(**typed)

    @classmethod
    def load(cls, path: str | Path) -> "Transitions":
        """Reads a `.npz` or `.hdf5` file of D4RL's layout.

        Raises:
            BadTransitions: another kind of file, unreadable, or arrays that do not fit.
            FileNotFoundError: no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of transitions (.npz or .hdf5)")
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    arrays = {key: file[key] for key in (*ARRAYS, *LIMITS) if key in file.files}
            elif path.suffix in (".hdf5", ".h5"):
                import h5py

                with h5py.File(path, "r") as file:
                    arrays = {
                        key: np.asarray(file[key]) for key in (*ARRAYS, *LIMITS) if key in file
                    }
            else:
                raise BadTransitions(f"{path}: expected a file that ends in .npz or .hdf5")
        except BadTransitions:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise BadTransitions(
                f"{path}: this file does not read ({error}); copy it anew"
            ) from error
        return cls.from_arrays(arrays, name=str(path))

    def save(self, path: str | Path) -> Path:
        """Writes `.npz` or `.hdf5`, under a temporary name until it is whole."""
        path = Path(path)
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        if path.suffix == ".npz":
            with unfinished.open("wb") as file:
                np.savez_compressed(file, **arrays)
        elif path.suffix in (".hdf5", ".h5"):
            import h5py

            with h5py.File(unfinished, "w") as file:
                for key, value in arrays.items():
                    file.create_dataset(key, data=value, compression="gzip")
        else:
            raise BadTransitions(f"{path}: name a file that ends in .npz or .hdf5")
        unfinished.replace(path)
        return path


def check(data: Transitions, *, batch_size: int) -> None:
    """Refuses data from which values and a dynamics model cannot be learned.

    Args:
        batch_size: of the largest update.

    Raises:
        BadTransitions: too few rows, constant rewards, no end of any kind, or actions outside
            their limits.
    """
    least = 2 * batch_size
    if len(data) < least:
        raise BadTransitions(
            f"{len(data)} transitions; batches of {batch_size} need at least {least}. Record more, "
            "or make the batches smaller"
        )
    if float(np.ptp(data.rewards)) == 0.0:
        raise BadTransitions(
            f"every reward is {data.rewards[0]:g}, so no action is better than another; check that "
            "rewards (or success labels) were recorded"
        )
    if not (data.terminals | data.timeouts).any():
        raise BadTransitions(
            f"neither `terminals` nor `timeouts` is set in {len(data)} rows: returns would run "
            "from one episode into the next. Mark the last row of each episode"
        )
    # Float32 copies of float64 actions may lie a rounding outside.
    slack = 1e-3 * (data.action_high - data.action_low)
    outside = (data.actions < data.action_low - slack) | (data.actions > data.action_high + slack)
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise BadTransitions(
            f"{int(outside.any(axis=1).sum())} actions lie outside their limits, first action "
            f"{column} of row {row}: {data.actions[row, column]:g}, limits "
            f"{data.action_low[column]:g} to {data.action_high[column]:g}. Give the true limits "
            "(`action_low` and `action_high` in the file), or clip the actions that were sent"
        )


def discounted_returns(
    rewards: Float[np.ndarray, " N"], ends: Bool[np.ndarray, " N"], discount: float
) -> Float[np.ndarray, " N"]:
    """What each transition went on to earn until the end of its episode (the target of U1)."""
    returns = np.zeros(len(rewards), np.float64)
    later = 0.0
    # One pass over the rows, once per run: a scan has no numpy form that stays exact for long
    # episodes.
    for row in range(len(rewards) - 1, -1, -1):
        later = float(rewards[row]) + (0.0 if ends[row] else discount * later)
        returns[row] = later
    return returns.astype(np.float32)


def rows_left(ends: Bool[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Transitions from each row to the end of its episode, its own included."""
    places = np.arange(len(ends))
    stops = np.flatnonzero(ends)
    return stops[np.searchsorted(stops, places)] - places + 1

"""`vla-post critic`: what a chunk critic says of recorded episodes, and whether it came true."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from vla_post.cli.errors import UserError

if TYPE_CHECKING:
    import torch

    from trajectory_store import Episode, Store

STRIP = 10
"""Pictures in a film strip."""
TRACED = ("hand_x", "hand_y", "hand_z", "object1_x", "object1_y", "object1_z")
"""State values that are drawn where there are no cameras, if the cell has them."""


@dataclass(frozen=True, kw_only=True)
class _Critic:
    checkpoint: Path
    """Folder of a version that ALOE published: the policy and its critic."""
    store: Path
    """Trajectory store, or a folder of them."""
    encoder: Path | None = None
    """Checkpoint that the run started from, where the critic sees the policy's features."""
    discount: float = 0.99
    """For the returns that are drawn beside the values."""
    threads: int = 1

    def _load(self) -> "_Judge":
        import torch

        torch.set_num_threads(self.threads)
        return _Judge(self.checkpoint, self.encoder, self.discount)


@dataclass(frozen=True, kw_only=True)
class Show(_Critic):
    """Draw Q and V along one episode, beside its film strip, or its state without a camera."""

    episode: str = ""
    """First characters of its uuid; the newest by default."""
    every: int = 2
    """Judge every n-th tick."""
    out: Path = Path("critic.png")
    """Picture to write (png, svg or pdf)."""

    def run(self) -> None:
        from trajectory_store import FleetView
        from vla_post.evaluation.value_plots import value_trace

        if self.every < 1:
            raise UserError(f"--every is {self.every}; it must be at least 1")
        places = [
            (store, e)
            for store in FleetView(self.store).stores
            for e in store.episodes
            if e.uuid.startswith(self.episode)
        ]
        if not places:
            raise UserError(
                f"{self.store}: no finished episode with uuid {self.episode!r}; "
                "`vla-post store ls` lists them"
            )
        store, episode = max(places, key=lambda place: place[1].created_ns)
        trace = self._load().trace(store, episode, self.every)
        print(value_trace(trace, self.out))


@dataclass(frozen=True, kw_only=True)
class Calibrate(_Critic):
    """Compare the critic's values of the policy with the returns that episodes went on to get.

    Meaningful on episodes of that policy alone, such as those of `--min-version`.
    """

    min_version: int = 0
    """Only episodes of policy versions from this on."""
    episodes: int = 50
    """At most so many, the newest first."""
    every: int = 8
    out: Path | None = None
    """Picture to write, beside the numbers on stdout."""

    def run(self) -> None:
        from trajectory_store import FleetView
        from vla_post.evaluation.value_plots import calibration_plot

        places = [
            (store, e)
            for store in FleetView(self.store).stores
            for e in store.episodes
            if e.policy_version >= self.min_version and e.interventions == 0
        ]
        if not places:
            raise UserError(
                f"{self.store}: no finished episode without help from version "
                f"{self.min_version} on; calibration needs what the policy does alone"
            )
        places = sorted(places, key=lambda place: -place[1].created_ns)[: self.episodes]
        report, bins = self._load().calibration(places, self.every)
        print(json.dumps(report, indent=2))
        if self.out is not None:
            calibration_plot(bins, self.out)


class _Judge:
    """A checkpoint's policy and critic."""

    def __init__(self, checkpoint: Path, encoder: Path | None, discount: float) -> None:
        from vla_post.critics.returns import RewardConfig
        from vla_post.critics.saved import load_critic
        from vla_post.policies.lerobot_adapter import LeRobotPolicy

        self.policy = LeRobotPolicy.load(checkpoint)
        through = self.policy if encoder is None else LeRobotPolicy.load(encoder)
        self.critic, self.encoder = load_critic(
            checkpoint, self.policy.contract, encoder_policy=through
        )
        self.rewards = RewardConfig(discount=discount)

    def values(
        self, store: "Store", episode: "Episode", ticks: np.ndarray
    ) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """(Q (n, K) of the recorded chunks, V (n,) of the policy's, return (n,) that followed)."""
        import torch

        from vla_post.batch import observation_from_numpy
        from vla_post.critics.ensemble import aggregate
        from vla_post.critics.returns import monte_carlo_return

        rows = episode.first_row + ticks
        keys = self.policy.contract.observations
        seen = observation_from_numpy({key: store.read(key, rows) for key in keys})
        steps = np.arange(self.policy.horizon)
        chunk_rows = np.minimum(rows[:, None] + steps, episode.end_row - 1)
        action = store.read("action", chunk_rows.reshape(-1)).reshape(*chunk_rows.shape, -1)
        sign = {"success": 1, "failure": -1}.get(str(episode.outcome), 0)
        torch.manual_seed(0)
        with torch.no_grad():
            inputs = self.encoder(seen, [episode.instruction] * len(ticks))
            q = self.critic(inputs, torch.from_numpy(action)[:, None])[:, 0]
            own = self.policy.act(seen, [episode.instruction] * len(ticks), 4)
            value = aggregate(self.critic(inputs, own), "minimum").mean(dim=1)
        left = torch.from_numpy(len(episode) - ticks)
        outcome = torch.full((len(ticks),), sign)
        return q, value, monte_carlo_return(left, outcome, self.rewards)

    def trace(self, store: "Store", episode: "Episode", every: int) -> Any:
        from vla_post.evaluation.value_plots import ValueTrace

        contract = self.policy.contract
        ticks = np.arange(0, len(episode), every)
        q, value, realised = self.values(store, episode, ticks)
        frames: list[np.ndarray] = []
        states, names = None, []
        if contract.images:
            key = next(iter(contract.images))
            shown = np.linspace(0, len(episode) - 1, STRIP).round().astype(int)
            frames = list(store.read(key, episode.first_row + shown))
        else:
            columns = {
                name: (key, place)
                for key, feature in contract.vectors.items()
                for place, name in enumerate(feature.names)
            }
            names = [n for n in TRACED if n in columns] or list(columns)[:6]
            states = np.stack(
                [store.read(columns[n][0], episode)[:, columns[n][1]] for n in names], axis=1
            )
        return ValueTrace(
            title=f"{episode.task}, {episode.outcome}, version {episode.policy_version}, "
            f"{episode.uuid[:8]}",
            tick=ticks,
            q=q.numpy(),
            value=value.numpy(),
            realised=realised.numpy(),
            source=store.read("source", episode),
            control_hz=contract.control_hz,
            frames=frames,
            states=states,
            state_names=names,
        )

    def calibration(
        self, places: list[tuple["Store", "Episode"]], every: int
    ) -> tuple[dict[str, Any], list[tuple[float, float, int]]]:
        import torch

        from vla_post.critics.diagnostics import calibration, correlation

        found = [self.values(s, e, np.arange(0, len(e), every)) for s, e in places]
        value, got = torch.cat([f[1] for f in found]), torch.cat([f[2] for f in found])
        bins = calibration(value, got)
        report = {
            "episodes": len(places),
            "states": len(value),
            "value_mean": float(value.mean()),
            "return_mean": float(got.mean()),
            "mean_absolute_error": float((value - got).abs().mean()),
            "correlation": correlation(value, got),
            "bins": [dict(zip(("value", "return", "count"), b, strict=True)) for b in bins],
        }
        return report, bins


critic_command = (
    Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibration")]
)

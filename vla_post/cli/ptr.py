"""`vla-post ptr`: which chunks PTR trusts, which it does not, and what they look like."""

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from vla_post.cli.errors import UserError
from vla_post.learners.transition_math import TransitionConfig

WEIGHTS = "transition.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Scored:
    checkpoint: Path
    """A version that `vla-post train ptr` published; it holds the scorer."""
    store: Path
    chunks: int = 2048
    """How many chunks of the store are scored, drawn at random."""
    seed: int = 0
    transition: TransitionConfig = field(default_factory=TransitionConfig)
    """As in training; sizes that differ are refused."""

    def score(self) -> list[dict[str, Any]]:
        """One row for each scored chunk whose future is known, the lowest score first."""
        if not self.checkpoint.is_dir():
            raise UserError(f"{self.checkpoint}: no such folder; expected one REGISTRY/vNNNNNN")
        if not (self.checkpoint / WEIGHTS).is_file():
            raise UserError(
                f"{self.checkpoint}: no {WEIGHTS}; publish a version with `vla-post train ptr`"
            )
        import torch
        from safetensors.torch import load_file

        from trajectory_store import ChunkSampler, FleetView
        from vla_post.batch import Batch
        from vla_post.learners.transition import TransitionScorer
        from vla_post.policies.lerobot_adapter import LeRobotPolicy

        policy = LeRobotPolicy.load(self.checkpoint)
        scorer = TransitionScorer(policy, policy.contract, self.transition)
        try:
            scorer.load_state_dict(load_file(self.checkpoint / WEIGHTS))
        except RuntimeError as error:
            raise UserError(
                f"{self.checkpoint / WEIGHTS}: made with other sizes than --transition.* say "
                f"({str(error).splitlines()[-1].strip()})"
            ) from error
        scorer.eval()
        torch.manual_seed(self.seed)
        contract, config = policy.contract, self.transition
        steps = config.future_steps(contract.control_hz, contract.chunk_horizon)
        view = FleetView(self.store)
        episodes = {e.uuid: e for e in view.episodes}
        size = 128
        sampler = ChunkSampler(
            view,
            horizon=contract.chunk_horizon,
            batch_size=size,
            seed=self.seed,
            keys=policy.observation_keys,
            next_observation=False,
            future=steps,
            replacement=False,
        )
        rows: list[dict[str, Any]] = []
        wanted = min(self.chunks, sampler.n_anchors)
        for first in range(0, wanted, size):
            chunk = next(sampler)
            got = scorer.scores(Batch.from_numpy(chunk, policy.device))
            place = chunk.provenance
            for k in range(min(size, wanted - first)):
                if not bool(got.has_future[k]):
                    continue
                store, uuid, row = place[k]
                alone = int(got.pool[k]) == 1
                told = "no rival" if alone else "first" if got.recognised[k] else "beaten"
                rows.append(
                    {
                        "score": float(got.score[k]),
                        "weight": float(got.weight[k]),
                        "best": float(np.log(int(got.pool[k]))),
                        "reason": told,
                        "task": episodes[uuid].task,
                        "operator": episodes[uuid].operator,
                        "episode": uuid,
                        "tick": int(place.tick[k]),
                        "row": row,
                        "store": store,
                        "steps": steps,
                    }
                )
        if not rows:
            raise UserError(
                f"{self.store}: no episode reaches the future that the scorer looks at; record "
                "longer ones, or train with a smaller --train.algorithm.transition.future-s"
            )
        return sorted(rows, key=lambda row: row["score"])


@dataclass(frozen=True, kw_only=True)
class Show(_Scored):
    """List the highest and lowest weighted chunks of a store, with film strips or state traces."""

    out: Path = Path("ptr")
    """Folder of the page, index.html, and its pictures."""
    count: int = 8
    """Of the highest, and of the lowest."""

    def run(self) -> None:
        rows = self.score()
        count = min(self.count, (len(rows) + 1) // 2)
        chosen = rows[-count:][::-1] + rows[:count]
        self.out.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(chosen):
            row["picture"] = f"{number:02d}.png"
            self.draw(row, self.out / row["picture"])
            print(
                f"{row['weight']:.2f}  T {row['score']:+.2f} of {row['best']:.2f}  {row['reason']}"
                f"  {row['task']}  {row['episode']} tick {row['tick']}  {row['operator']}"
            )
        (self.out / "index.html").write_text(_page(chosen, len(rows)), encoding="utf-8")
        print(self.out / "index.html")

    def draw(self, row: dict[str, Any], path: Path) -> None:
        """Six frames from the chunk's start to its future, or the state's traces without camera."""
        import matplotlib.pyplot as plt

        from trajectory_store import Store

        store = Store(row["store"])
        rows = range(row["row"], row["row"] + row["steps"] + 1)
        cameras = list(store.contract.images)
        picked = list(rows) if not cameras else np.linspace(rows[0], rows[-1], 6).astype(int)
        if cameras:
            frames = store.read(cameras[0], list(picked))
            plt.imsave(path, np.concatenate(list(frames), axis=1))
            return
        figure, axes = plt.subplots(1, 2, figsize=(8, 2.2), layout="constrained")
        for axis, key in zip(axes, (next(iter(store.contract.vectors)), "action"), strict=True):
            axis.plot(store.read(key, list(picked)))
            axis.set_title(key, fontsize=8)
            axis.set_xlabel("tick", fontsize=8)
            axis.tick_params(labelsize=7)
        figure.savefig(path, dpi=90)
        plt.close(figure)


@dataclass(frozen=True, kw_only=True)
class Weights(_Scored):
    """Print every scored chunk as one JSON line, the lowest weight first."""

    def run(self) -> None:
        for row in self.score():
            print(json.dumps(row))


def _page(rows: list[dict[str, Any]], scored: int) -> str:
    parts = [
        "<!doctype html><meta charset=utf-8><title>PTR weights</title>",
        "<style>body{font:15px sans-serif;margin:2em;max-width:60em}img{max-width:100%}"
        "figure{margin:1em 0}</style>",
        f"<h1>Chunks by weight</h1><p>{scored} scored; the highest first, then the lowest.</p>",
    ]
    for row in rows:
        told = (
            f"weight {row['weight']:.2f}, T {row['score']:+.2f} of at most {row['best']:.2f} "
            f"({row['reason']} in its pool): {row['task']}, {row['operator']}, episode "
            f"{row['episode']}, tick {row['tick']}"
        )
        caption = html.escape(told)
        parts.append(
            f'<figure><img src="{row["picture"]}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "\n".join(parts) + "\n"


ptr_command = (
    Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Weights, tyro.conf.subcommand("weights")]
)

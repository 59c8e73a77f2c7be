"""The demonstration runs: a weak policy, a robot that works, a person who corrects, a learner."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import sim
from sim.operator import OperatorConfig
from trajectory_store.contract import Contract, load_contract
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.recipes.pretrain import PretrainConfig
from vla_post.training.trainer import TrainConfig

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """Everything that a demonstration run needs to know."""

    name: str
    contract: Path
    tasks: tuple[str, ...]
    """Played in turn."""
    episodes: int
    """How many the robot works through while the learner learns."""
    pretrain: PretrainConfig
    """How the starting policy is made."""
    train: TrainConfig
    online_share: float = 0.5
    publish_s: float = 10.0
    publish_updates: int = 50
    max_reuse: float = 40.0
    operator: OperatorConfig = field(default_factory=OperatorConfig)
    reset_s: float = 0.0
    """Wall time between episodes, as a person needs to put the scene back; the learner's gain."""
    evaluation_episodes: int = 45
    """Paired scenes, spread evenly over the tasks, that the first and the last version play."""
    evaluation_seed: int = 50_000
    online_seed: int = 200_000

    @property
    def shipped_start(self) -> Path | None:
        """The starting checkpoint in the repository, where making it takes longer than a minute."""
        folder = ASSETS / self.name
        return folder if (folder / "model.safetensors").exists() else None

    def load_contract(self) -> Contract:
        return load_contract(self.contract)


def demo_pixels() -> DemoRecipe:
    """Three tasks from one small camera, told apart by language, with a tiny SmolVLA."""
    return DemoRecipe(
        name="demo_pixels",
        contract=sim.CONTRACTS / "metaworld_pixels.yaml",
        tasks=("drawer-open", "button-press-topdown", "window-open"),
        episodes=110,
        pretrain=PretrainConfig(
            kind="smolvla_tiny",
            updates=300,
            demonstrations=2,
            noise=0.05,
            train=TrainConfig(algorithm=HgDaggerConfig(learning_rate=5e-4)),
        ),
        train=TrainConfig(algorithm=HgDaggerConfig(learning_rate=5e-4), ema_decay=0.99),
        reset_s=1.5,
    )


def demo_state() -> DemoRecipe:
    """Pick and place from the scene's state, with the small flow policy; trains in seconds."""
    train = TrainConfig(
        algorithm=HgDaggerConfig(learning_rate=1e-3), batch_size=256, ema_decay=0.99
    )
    return DemoRecipe(
        name="demo_state",
        contract=sim.CONTRACTS / "metaworld_state.yaml",
        tasks=("pick-place",),
        episodes=40,
        pretrain=PretrainConfig(
            kind="chunk_flow",
            updates=1500,
            tasks=("pick-place",),
            demonstrations=3,
            train=train,
        ),
        train=train,
        max_reuse=400.0,
    )


DEMOS: dict[str, Callable[[], DemoRecipe]] = {"demo_pixels": demo_pixels, "demo_state": demo_state}


def recipe(name: str) -> DemoRecipe:
    """A recipe by name.

    Raises:
        ValueError: no such recipe; the message lists them.
    """
    if name not in DEMOS:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(DEMOS)}")
    return DEMOS[name]()

"""An algorithm of its own: what trainer and learner process do for anything that plugs in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trajectory_store import Contract, FleetView, Source, StoreWriter, load_contract
from vla_post.batch import Algorithm, Batch, DataNeeds, Learner, Metrics, Policy
from vla_post.export.registry import Registry
from vla_post.policies.build import build_policy
from vla_post.training.algorithms import ALGORITHMS, algorithms
from vla_post.training.data import mixture, statistics
from vla_post.training.learner import LearnerConfig, LearnerProcess
from vla_post.training.trainer import TrainConfig

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"


@dataclass(frozen=True, kw_only=True)
class CountingConfig(Algorithm):
    """A critic that counts its batches, beside a policy that stays as it is."""

    step: float = 1.0

    def data(self, contract: Contract) -> DataNeeds:
        return DataNeeds(next_observation=True)

    def build(
        self, policy: Policy, parameters: Sequence[nn.Parameter], contract: Contract
    ) -> "Counting":
        return Counting(self.step)


class Counting:
    def __init__(self, step: float) -> None:
        self.step, self.updates, self.rate_scale = step, 0, 1.0
        self.critic = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.critic.weight)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"critic": self.critic}

    def update(self, batch: Batch) -> Metrics:
        assert self.critic.training
        assert batch.next_observation
        self.updates += 1
        with torch.no_grad():
            self.critic.weight += self.step
        return {"loss": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])


def record(folder: Path, sources: Sequence[Source]) -> None:
    """One episode of random states, driven as told."""
    contract = load_contract(CONTRACT)
    random = torch.Generator().manual_seed(0)
    length = len(sources)
    with StoreWriter.create_or_open(folder, contract, writer=folder.name) as writer:
        writer.write_episode(
            "reach",
            {
                key: torch.randn(length, *f.shape, generator=random).numpy()
                for key, f in contract.vectors.items()
            },
            torch.zeros(length, 4).numpy(),
            outcome="success",
            source=np.array(sources),
        )


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    contract = load_contract(CONTRACT)
    record(tmp_path / "demos", [Source.SCRIPTED] * 20)
    numbers = statistics(FleetView(tmp_path / "demos"), contract)
    build_policy("chunk_flow", contract, numbers).save(tmp_path / "start")
    return tmp_path


def config(folders: Path, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {
        "start": folders / "start",
        "demonstrations": folders / "demos",
        "registry": folders / "registry",
        "run": folders / "run",
        "train": TrainConfig(algorithm=CountingConfig(step=2.0), batch_size=4),
        "mirror": False,
    }
    return LearnerConfig(**(settings | changes))


def test_a_learners_networks_are_saved_published_and_resumed(folders: Path):
    # No online stores: it learns from the demonstrations alone, without waiting for a robot.
    assert LearnerProcess(config(folders, max_updates=3)).run() == 3
    registry = Registry(folders / "registry")
    version = registry.versions()[-1]
    published = load_file(registry.path(version.number) / "critic.safetensors")
    assert published["weight"].item() == 6.0
    assert "critic.safetensors" in version.files

    again = LearnerProcess(config(folders, max_updates=4, resume=True))
    critic = again.trainer.learner.modules["critic"]
    assert isinstance(critic, nn.Linear)
    assert critic.weight.item() == 6.0
    assert again.run() == 4
    assert critic.weight.item() == 8.0


def test_a_learner_gets_the_data_that_it_asks_for(folders: Path):
    contract = load_contract(CONTRACT)
    needs = DataNeeds(
        valid_sources=(Source.HUMAN,),
        next_observation=True,
        keys=("observation.environment_state",),
    )
    sampler = mixture(
        FleetView(folders / "demos"),
        None,
        contract,
        batch_size=5,
        online_share=0.5,
        needs=needs,
        keys=("observation.state",),
    )
    chunk = next(sampler)
    keys = {"observation.state", "observation.environment_state"}
    assert set(chunk.observation) == set(chunk.next_observation) == keys
    assert not chunk.valid.any(), "the script drove, not a person"


def test_double_buffers_hg6(folders: Path):
    """A person's step enters both buffers, a robot's only the one of everything."""
    contract = load_contract(CONTRACT)
    record(folders / "online" / "robot", [Source.POLICY] * 30 + [Source.HUMAN] * 10)
    sampler = mixture(
        FleetView(folders / "demos"),
        FleetView(folders / "online"),
        contract,
        batch_size=1000,
        online_share=0.5,
        needs=DataNeeds(double_buffer=True),
    )
    assert sampler.n_anchors == 20 + 40 + 10
    assert sampler.shares == {"demonstrations": 0.25, "online": 0.5, "interventions": 0.25}
    chunk = next(sampler)
    assert (chunk.source[chunk.part == 2][:, 0] == Source.HUMAN).all()
    assert set(chunk.source[chunk.part == 1][:, 0]) == {Source.POLICY, Source.HUMAN}
    record(folders / "online" / "robot", [Source.POLICY] * 7)
    sampler.refresh()
    assert sampler.n_anchors == 20 + 47 + 10
    record(folders / "online" / "robot", [Source.HUMAN] * 3)
    sampler.refresh()
    assert sampler.n_anchors == 20 + 50 + 13


def test_the_learners_that_ship_keep_the_protocol(folders: Path):
    contract = load_contract(CONTRACT)
    policy = build_policy(
        "chunk_flow", contract, statistics(FleetView(folders / "demos"), contract)
    )
    assert algorithms().keys() == ALGORITHMS.keys()
    for kind in algorithms().values():
        assert kind.__doc__
        learner = kind().build(policy, list(policy.parameters()), contract)
        assert isinstance(learner, Learner)
        assert learner.updates == 0


def test_an_algorithm_whose_file_was_deleted_is_not_offered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ALGORITHMS, "gone", "vla_post.learners.gone:GoneConfig")
    assert "gone" not in algorithms()

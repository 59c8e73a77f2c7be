"""The learner process: waits, learns from corrections, publishes, stops in order, resumes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from trajectory_store import FleetView, Outcome, Source, StoreWriter, Tick
from trajectory_store.contract import Contract, ContractMismatch, load_contract
from trajectory_store.maintenance import relabel
from vla_post.batch import DataNeeds, NonFiniteLoss
from vla_post.critics.returns import Unrewarded
from vla_post.export.registry import Registry
from vla_post.export.runtime import load_policy
from vla_post.learners.aloe import AloeConfig
from vla_post.learners.hg_dagger import HgDaggerConfig
from vla_post.policies.build import build_policy
from vla_post.training.data import mixture, recorded_observations, rows_by, statistics
from vla_post.training.ema import Ema
from vla_post.training.gate import NoJudge
from vla_post.training.learner import LearnerConfig, LearnerProcess
from vla_post.training.metrics import MetricsLog, read_metrics
from vla_post.training.state import load_state, save_state
from vla_post.training.trainer import TrainConfig, Trainer

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract(CONTRACT)


def record(folder: Path, contract: Contract, sources: list[Source], episodes: int = 1) -> None:
    """Episodes whose action is +0.5 where a person or script drives and -0.5 where not."""
    random = np.random.default_rng(0)
    with StoreWriter.create_or_open(folder, contract, writer=folder.name) as writer:
        for _ in range(episodes):
            writer.begin_episode("reach", contract.tasks["reach"].instruction, "", 1)
            for k, source in enumerate(sources):
                good = source in (Source.HUMAN, Source.SCRIPTED)
                writer.append(
                    Tick(
                        observation={
                            key: random.normal(size=f.shape).astype(np.float32)
                            for key, f in contract.vectors.items()
                        },
                        action=np.full(4, 0.5 if good else -0.5, np.float32),
                        source=source,
                        stamp_ns=k * contract.dt_ns,
                    )
                )
            writer.end_episode(Outcome.SUCCESS)


@pytest.fixture
def folders(tmp_path: Path, contract: Contract) -> Path:
    """A run folder with demonstrations, and a starting checkpoint."""
    record(tmp_path / "demonstrations", contract, [Source.SCRIPTED] * 30)
    (tmp_path / "online").mkdir()
    torch.manual_seed(0)
    numbers = statistics(FleetView(tmp_path / "demonstrations"), contract)
    policy = build_policy("chunk_flow", contract, numbers)
    policy.save(tmp_path / "start")
    return tmp_path


def config(folders: Path, **changes: object) -> LearnerConfig:
    settings: dict[str, object] = {
        "start": folders / "start",
        "demonstrations": folders / "demonstrations",
        "online": folders / "online",
        "registry": folders / "registry",
        "run": folders / "run",
        "train": TrainConfig(
            algorithm=HgDaggerConfig(learning_rate=1e-3), batch_size=32, ema_decay=0.9
        ),
        "publish_s": 0.0,
        "publish_updates": 20,
        "refresh_s": 0.05,
        "max_reuse": 1000.0,
        "mirror": False,
    }
    return LearnerConfig(**(settings | changes))  # pyright: ignore[reportArgumentType]


def test_learns_from_corrections_publishes_and_resumes(folders: Path, contract: Contract):
    record(folders / "online" / "robot", contract, [Source.POLICY] * 20 + [Source.HUMAN] * 20)
    assert LearnerProcess(config(folders, max_updates=50)).run() == 50
    registry = Registry(folders / "registry")
    versions = registry.versions()
    assert [v.learner_step for v in versions] == [0, 20, 40, 50]
    assert [v.parent for v in versions] == [None, 1, 2, 3]
    assert registry.active() == versions[-1]
    assert versions[-1].snapshots.keys() == {
        str(folders / "demonstrations"),
        str(folders / "online" / "robot"),
    }
    everything = read_metrics(folders / "run" / "metrics.jsonl")
    (told,) = [r for r in everything if "mixing" in r]
    shares = [value for name, value in told.items() if name.startswith("mix/")]
    assert (told["mixing"], shares) == ("fixed", [0.5, 0.5])
    rows = [r for r in everything if "loss" in r]
    assert [r["update"] for r in rows] == list(range(1, 51))
    assert np.mean([r["online_share"] for r in rows]) == pytest.approx(0.5, abs=0.05)
    assert rows[-1]["loss"] < rows[0]["loss"]

    again = LearnerProcess(config(folders, max_updates=60, resume=True))
    assert again.trainer.updates == 50
    assert again.run() == 60
    assert registry.versions()[-1].parent == 4


def test_waits_for_the_first_correction_and_for_more_after_reuse(folders: Path, contract: Contract):
    stop = threading.Event()
    process = LearnerProcess(config(folders, max_reuse=4.0), stop)
    thread = threading.Thread(target=process.run)
    thread.start()
    registry = Registry(folders / "registry")
    try:
        _until(lambda: registry.active() is not None)
        record(folders / "online" / "robot", contract, [Source.POLICY] * 30)
        looked = process.looks
        _until(lambda: process.looks > looked + 2)
        assert process.trainer.updates == 0
        record(folders / "online" / "robot", contract, [Source.HUMAN] * 16)
        _until(lambda: process.trainer.updates > 0)
        looked = process.looks
        _until(lambda: process.looks > looked + 20)
        # 4 uses of 16 rows, half of each batch of 32: about four updates, then it waits again.
        assert 2 <= process.trainer.updates <= 8
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()


def test_batch_mode_waits_for_a_round_of_episodes_then_trains_and_publishes(
    folders: Path, contract: Contract
):
    stop = threading.Event()
    process = LearnerProcess(config(folders, round_episodes=2, round_updates=30), stop)
    thread = threading.Thread(target=process.run)
    thread.start()
    registry = Registry(folders / "registry")
    robot = folders / "online" / "robot"
    try:
        record(robot, contract, [Source.POLICY] * 10 + [Source.HUMAN] * 10)
        _until(lambda: registry.active() is not None)
        looked = process.looks
        _until(lambda: process.looks > looked + 3)
        assert process.trainer.updates == 0, "one episode is no round"
        record(robot, contract, [Source.HUMAN] * 10)
        _until(lambda: len(registry.versions()) == 2)
        looked = process.looks
        _until(lambda: process.looks > looked + 3)
        assert process.trainer.updates == 30
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert [v.learner_step for v in registry.versions()] == [0, 30]
    told = [r for r in read_metrics(folders / "run" / "metrics.jsonl") if "operation_of" in r]
    assert told[-1]["operation_of"] == 1
    assert told[-1]["episodes"] == 2
    assert told[-1]["takeovers"] == 1
    with pytest.raises(ValueError, match="give --online"):
        config(folders, round_episodes=2, online=None)


def _until(condition: object, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # pyright: ignore[reportCallIssue]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_sigterm_ends_in_order(folders: Path, contract: Contract):
    record(folders / "online" / "robot", contract, [Source.HUMAN] * 30)
    names = ("start", "demonstrations", "online", "registry", "run")
    words = [w for name in names for w in (f"--{name}", str(folders / name))]
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_post.cli.main", "train", "hg-dagger", *words, "--no-mirror"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folders / "run" / "metrics.jsonl"
    try:
        _until(lambda: metrics.exists() and '"loss"' in metrics.read_text(), 280)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    last = Registry(folders / "registry").versions()[-1]
    assert last.learner_step > 0
    assert (folders / "run" / "learner" / "state.json").exists()


def test_a_kill_while_the_state_is_saved_leaves_the_one_before(
    folders: Path, contract: Contract, monkeypatch: pytest.MonkeyPatch
):
    record(folders / "online" / "robot", contract, [Source.HUMAN] * 30)
    LearnerProcess(config(folders, max_updates=20)).run()
    rename = Path.rename

    class Killed(BaseException):
        pass

    def die(self: Path, target: Path) -> Path:
        if self.name == "learner.new":
            raise Killed
        return rename(self, target)

    killed = LearnerProcess(config(folders, max_updates=40, resume=True))
    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(Killed):
        killed.run()
    monkeypatch.setattr(Path, "rename", rename)
    assert not (folders / "run" / "learner").exists()
    again = LearnerProcess(config(folders, max_updates=25, resume=True))
    assert again.trainer.updates == 20
    assert again.run() == 25


@pytest.mark.parametrize("moment", ["_take_in", "_published"])
def test_a_kill_between_saving_and_publishing_makes_up_for_it_once(
    folders: Path, contract: Contract, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """Before the version is there, and when it is and nothing points to it."""
    record(folders / "online" / "robot", contract, [Source.HUMAN] * 30)
    LearnerProcess(config(folders, max_updates=2, publish_updates=2)).run()

    class Killed(BaseException):
        pass

    def die(self: Registry, *_: object) -> None:
        raise Killed

    killed = LearnerProcess(config(folders, max_updates=4, publish_updates=2, resume=True))
    with monkeypatch.context() as patched:
        patched.setattr(Registry, moment, die)
        with pytest.raises(Killed):
            killed.run()
    registry = Registry(folders / "registry")
    assert registry.active() == registry.version(2)
    again = LearnerProcess(config(folders, max_updates=4, publish_updates=2, resume=True))
    assert again.trainer.updates == 4
    assert again.run() == 4
    assert [(v.learner_step, v.parent) for v in registry.versions()] == [(0, None), (2, 1), (4, 2)]
    assert registry.active() == registry.version(3)
    assert [e["version"] for e in registry.history() if e["action"] == "publish"] == [1, 2, 3]
    saved = killed.trainer.save_policy(folders / "saved") / "model.safetensors"
    assert saved.read_bytes() == (registry.path(3) / "model.safetensors").read_bytes()
    last = LearnerProcess(config(folders, max_updates=6, publish_updates=2, resume=True))
    assert last.run() == 6
    assert [v.learner_step for v in registry.versions()] == [0, 2, 4, 6]


def test_an_outage_of_the_object_storage_is_waited_out(s3, folders: Path, contract: Contract):
    from trajectory_store import copying
    from vla_post.export.registry import open_registry

    record(folders / "online" / "robot", contract, [Source.HUMAN] * 30)
    copying.merge([folders / "online" / "robot"], "s3://fleet/online/robot")
    stop = threading.Event()
    places = {"online": "s3://fleet/online", "registry": "s3://fleet/registry"}
    process = LearnerProcess(config(folders, **places), stop)
    thread = threading.Thread(target=process.run)
    thread.start()
    registry = open_registry("s3://fleet/registry")
    try:
        _until(lambda: len(registry.numbers()) > 1)
        s3.mode = "cut"
        _until(lambda: "did not answer" in process._away)
        updates = process.trainer.updates
        _until(lambda: process.trainer.updates > updates)  # from what it has read already
        assert thread.is_alive()
        s3.mode = "open"
        before = len(registry.numbers())
        _until(lambda: len(registry.numbers()) > before)
    finally:
        s3.mode = "open"
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert registry.version(registry.numbers()[-1]).learner_step == process.trainer.updates


def test_a_bad_batch_is_saved_and_the_weights_stay(folders: Path, contract: Contract):
    from safetensors.numpy import load_file

    from vla_post.policies.lerobot_adapter import LeRobotPolicy

    trainer = Trainer(
        LeRobotPolicy.load(folders / "start"), TrainConfig(algorithm=HgDaggerConfig(), batch_size=8)
    )
    before = {k: v.clone() for k, v in trainer.policy.module.state_dict().items()}
    view = FleetView(folders / "demonstrations")
    chunk = next(mixture(view, None, contract, batch_size=8, online_share=0.5))
    chunk.action[0, 0, 0] = np.nan
    with pytest.raises(NonFiniteLoss, match="bad"):
        trainer.step(chunk, save_bad_batch=folders / "bad.safetensors")
    np.testing.assert_array_equal(load_file(folders / "bad.safetensors")["action"], chunk.action)
    for name, value in trainer.policy.module.state_dict().items():
        assert torch.equal(value, before[name])


def test_mixture_draws_only_what_people_did_from_online_stores(folders: Path, contract: Contract):
    record(folders / "online" / "robot", contract, [Source.POLICY] * 90 + [Source.HUMAN] * 10)
    online = FleetView(folders / "online")
    assert rows_by(online, [Source.HUMAN]) == 10
    sampler = mixture(
        FleetView(folders / "demonstrations"),
        online,
        contract,
        batch_size=400,
        online_share=0.25,
        needs=DataNeeds(sources=(Source.HUMAN,)),
    )
    chunk = next(sampler)
    assert (chunk.source[chunk.part == 1][:, 0] == Source.HUMAN).all()
    assert (chunk.part == 1).mean() == pytest.approx(0.25, abs=0.07)


def test_a_learner_that_never_looks_at_people_is_refused(folders: Path):
    with pytest.raises(ValueError, match="online_share is 0"):
        config(folders, online_share=0.0)


def test_probes_are_recorded_observations(folders: Path, contract: Contract):
    view = FleetView(folders / "demonstrations")
    probes = recorded_observations(view, contract, 5)
    policy = load_policy(folders / "start")
    chunks = [policy.act(observation, text) for observation, text in probes]
    assert all(c.shape == (contract.chunk_horizon, 4) and np.isfinite(c).all() for c in chunks)


def test_average_of_weights_against_its_formula():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    ema, expected = Ema(module, 0.5), 1.0
    for n, value in enumerate((2.0, 4.0, -1.0), start=1):
        torch.nn.init.constant_(module.weight, value)
        ema.update(module)
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
    assert ema.weights["weight"].item() == pytest.approx(expected)


def test_state_round_trips(tmp_path: Path):
    state = {"a": {0: torch.arange(3), "x": [1, None, 2.5]}, "b": "text", "e": {}}
    save_state(tmp_path, "state", state)
    back = load_state(tmp_path, "state")
    assert torch.equal(back["a"].pop(0), state["a"].pop(0))
    assert back == state


def test_metrics_are_whole_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as metrics:
        metrics.write({"loss": 1.0})
        metrics.write({"loss": 0.5})
    with path.open("a") as file:
        file.write('{"loss": 0.')  # another process is writing
    assert [row["loss"] for row in read_metrics(path)] == [1.0, 0.5]
    assert all(json.loads(line)["stamp_s"] > 0 for line in path.read_text().splitlines()[:2])


def test_a_critics_encoder_runs_once_per_frame(folders: Path, contract: Contract):
    """And the critic learns what it would have learned without the cache."""
    robot = folders / "online" / "robot"
    record(robot, contract, [Source.POLICY] * 30)
    relabel(robot, [e.uuid for e in FleetView(robot).episodes], outcome=Outcome.FAILURE)
    train = TrainConfig(algorithm=AloeConfig(encoder="policy", critic_warmup=4), batch_size=16)
    losses: dict[bool, list[float]] = {}
    for cached in (False, True):
        run = folders / f"run{cached}"
        process = LearnerProcess(
            config(folders, run=run, train=train, feature_cache=cached, max_updates=6)
        )
        process.run()
        rows = read_metrics(run / "metrics.jsonl")
        losses[cached] = [row["critic/loss"] for row in rows if "critic/loss" in row]
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.02)  # kept in half precision
    assert process._features
    assert process._features.counts.encoded == 60
    assert len(list((folders / "runTrue" / "features").iterdir())) == 2
    again = LearnerProcess(config(folders, run=run, train=train, resume=True, max_updates=8))
    again.run()
    assert again._features
    assert (again._features.counts.encoded, again._features.counts.ticks > 0) == (0, True)


def test_a_learner_of_values_refuses_what_says_nothing_of_value(folders: Path, contract: Contract):
    """Only successes: alone that is refused before the first update; behind robots it waits."""
    train = TrainConfig(algorithm=AloeConfig(critic_warmup=1), batch_size=8)
    with pytest.raises(Unrewarded, match="1 successes and 0 failures"):
        LearnerProcess(config(folders, train=train, online=None, max_updates=3)).run()
    record(folders / "online" / "robot", contract, [Source.POLICY] * 30)
    stop = threading.Event()
    process = LearnerProcess(config(folders, train=train, max_updates=3), stop)
    thread = threading.Thread(target=process.run)
    thread.start()
    try:
        _until(lambda: process.looks > 2)
        assert process.trainer.updates == 0
        with StoreWriter.create_or_open(folders / "online" / "robot", contract) as writer:
            shapes = {key: (20, *f.shape) for key, f in contract.vectors.items()}
            zeros = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
            writer.write_episode("reach", zeros, np.zeros((20, 4)), outcome=Outcome.FAILURE)
        _until(lambda: process.trainer.updates == 3)
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def test_stores_of_another_cell_are_refused(folders: Path, contract: Contract):
    other = contract.model_copy(update={"control_hz": contract.control_hz / 2})
    with pytest.raises(ContractMismatch, match="control_hz"):
        mixture(FleetView(folders / "demonstrations"), None, other, batch_size=8, online_share=0.5)


def test_versions_that_the_critic_does_not_value_higher_are_held(folders: Path, contract: Contract):
    with pytest.raises(NoJudge, match="HgDagger has no critic"):
        LearnerProcess(config(folders, gate_margin=0.0))
    with StoreWriter.create_or_open(folders / "demonstrations", contract) as writer:
        shapes = {key: (20, *f.shape) for key, f in contract.vectors.items()}
        zeros = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        writer.write_episode("reach", zeros, np.zeros((20, 4)), outcome=Outcome.FAILURE)
    train = TrainConfig(algorithm=AloeConfig(critic_warmup=1), batch_size=8)
    settings = config(
        folders, train=train, online=None, max_updates=4, publish_updates=2, gate_margin=1e6
    )
    LearnerProcess(settings).run()
    registry = Registry(folders / "registry")
    versions = registry.versions()
    assert len(versions) == 3
    active = registry.active()
    assert active is not None
    assert active.number == 1
    for version in versions[1:]:
        assert version.metrics["gate/against"] == 1
        assert "the gate asks for a value" in (registry.held(version) or "")

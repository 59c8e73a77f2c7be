"""The real runner with a real flow policy through PyTorch: real-time chunking, doubt and value."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from robot_bridge.core.chunking import Question, ask
from robot_bridge.core.takeovers import Takeovers
from robot_bridge.nodes.insight import Insight
from robot_bridge.nodes.versions import Loaded
from trajectory_store.contract import Contract

from .cells import arm, one_axis
from .graph import DEADLINE_S, Cell
from .test_real_time import LiveArm

STD = 0.2
"""Of the actions that the flow policy is told it was trained on, in rad."""


def looking(*, every: int, samples: int, file: Path | str = "") -> Insight:
    return Insight(
        every=every, samples=samples, steps=4, takeovers=Takeovers(arm(), str(file or ""))
    )


class Wavering:
    """A policy whose samples differ by `spread`."""

    spread = 0.5

    def act_batch(self, observation: Any, instructions: Any, seeds: Any) -> np.ndarray:
        assert observation["observation.state"].shape == (len(seeds), 2)
        signs = np.where(np.arange(len(seeds)) % 2, 1.0, -1.0)
        return np.broadcast_to(self.spread * signs[:, None, None], (len(seeds), 8, 2))


class TestInsight:
    question = Question(0, {"observation.state": np.zeros(2, np.float32)}, "reach", seed=7)
    chunk = np.zeros((8, 2))

    def loaded(self) -> Loaded:
        policy: Any = Wavering()
        return Loaded(policy, 3, {})

    def test_it_looks_at_every_k_th_chunk(self):
        insight, loaded = looking(every=3, samples=4), self.loaded()
        seen = []
        for _ in range(6):
            insight.look(loaded, self.question, self.chunk, math.inf)
            seen.append("doubt" in insight.diagnose())
        assert seen == [False, False, True, True, True, True]
        # The variance of +-0.5 is 0.25, in each of two joints.
        assert float(insight.diagnose()["doubt"]) == pytest.approx(0.25 * math.sqrt(2), abs=1e-5)

    def test_off_it_says_nothing(self):
        insight = looking(every=0, samples=4)
        insight.look(self.loaded(), self.question, self.chunk, math.inf)
        assert insight.diagnose() == {}

    def test_it_leaves_out_what_there_is_no_time_for(self, monkeypatch: pytest.MonkeyPatch):
        now = [0.0]
        monkeypatch.setattr("robot_bridge.nodes.insight.monotonic_s", lambda: now[0])
        insight, loaded = looking(every=1, samples=2), self.loaded()

        def slowly(*arguments: Any) -> np.ndarray:
            now[0] += 0.3
            return Wavering.act_batch(loaded.policy, *arguments)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(loaded.policy, "act_batch", slowly, raising=False)
        insight.look(loaded, self.question, self.chunk, 0.2)  # what it costs is not known yet
        assert insight.diagnose()["insight_ms"] == "300.0"
        for _ in range(3):
            insight.look(loaded, self.question, self.chunk, 0.2)
        assert (now[0], insight.diagnose()["insight_skipped"]) == (0.3, 3)
        insight.look(loaded, self.question, self.chunk, 0.25)  # it may be cheaper by now
        assert now[0] == 0.6

    def test_a_policy_that_cannot_be_asked_for_samples_is_no_failure(self):
        insight = looking(every=1, samples=2)
        policy: Any = object()
        insight.look(Loaded(policy, 1, {}), self.question, self.chunk, math.inf)
        assert "act_batch" in insight.diagnose()["insight_problem"]
        insight.took_over(0)
        assert "doubt_threshold" not in insight.diagnose()

    def test_only_a_doubt_of_the_stretch_that_a_person_ended_is_learned_from(self):
        insight, loaded = looking(every=2, samples=2), self.loaded()

        def at(stamp_ns: int) -> None:
            question = Question(stamp_ns, self.question.observation, "reach", seed=7)
            insight.look(loaded, question, self.chunk, math.inf)

        insight.took_over(0)
        at(100)
        at(200)
        insight.took_over(201)  # the policy resumed after it
        assert "doubt_threshold" not in insight.diagnose()
        insight.took_over(200)
        said = insight.diagnose()
        assert said["doubt_threshold"] == said["doubt"]
        assert said["doubt_takeovers"] == 1
        assert not insight.unsure(200)  # as much as people let pass
        Wavering.spread, before = 0.6, Wavering.spread
        try:
            at(300)
            at(400)
            assert insight.unsure(200)
            assert not insight.unsure(401)
            loaded.policy.act_batch = None  # pyright: ignore[reportAttributeAccessIssue]
            for stamp in range(500, 1000, 100):  # two looks fail, and one chunk more
                at(stamp)
                assert insight.unsure(200)
            at(1000)
            assert not insight.unsure(200)  # too long ago
        finally:
            Wavering.spread = before


@pytest.mark.ros
def test_the_hint_is_learned_and_outlives_the_runner_and_the_version(tmp_path: Path):
    """Flow policies through PyTorch, whose samples differ by the spread of the actions."""
    import torch

    from vla_post.export import load_policy

    contract = arm()
    question = Question(5, {"observation.state": np.zeros(2, np.float32)}, "reach", seed=7)
    chunk, file = np.zeros((8, 2)), tmp_path / "doubt.json"

    def look(insight: Insight, std: float, version: int) -> float:
        torch.manual_seed(0)  # the same weights; only the actions' spread differs
        folder = flow_checkpoint(tmp_path / str(version), contract, std)
        policy = load_policy(folder)
        insight.look(Loaded(policy, version, {}, folder), question, chunk, math.inf)
        policy.close()
        said = insight.diagnose()
        assert "insight_problem" not in said
        return float(said["doubt"])

    insight = looking(every=1, samples=4, file=file)
    usual = look(insight, STD, 1)
    insight.took_over(0)
    assert not insight.unsure(0)
    wide = look(insight, 2 * STD, 2)
    assert wide == pytest.approx(4 * usual, rel=1e-3)
    assert insight.unsure(0)

    restarted = looking(every=1, samples=4, file=file)
    assert float(restarted.diagnose()["doubt_threshold"]) == pytest.approx(usual, rel=1e-5)
    look(restarted, STD / 2, 3)
    assert not restarted.unsure(0)
    look(restarted, 2 * STD, 4)
    assert restarted.unsure(0)


def flow_checkpoint(folder: Path, contract: Contract, std: float = STD) -> Path:
    """Random weights: what it does is its noise. Its critic's heads say 2.5 and 1.5, always."""
    size = contract.action.size
    from safetensors.torch import save_file

    from vla_post.critics.build import build_critic, build_encoder
    from vla_post.critics.networks import CriticConfig
    from vla_post.critics.saved import FILE, card_of
    from vla_post.policies.build import build_policy

    statistics = {
        key: {
            "mean": np.zeros(size, np.float32),
            "std": np.full(size, std, np.float32),
            "min": -np.ones(size, np.float32),
            "max": np.ones(size, np.float32),
        }
        for key in ("observation.state", "action")
    }
    policy = build_policy("chunk_flow", contract, statistics)
    policy.save(folder)
    encoder = build_encoder("state", policy, contract)
    critic = build_critic(
        CriticConfig(heads=2, width=8, layers=1), encoder, contract, policy,
        chunk=contract.chunk_horizon, returns=(0.0, 1.0),
    )  # fmt: skip
    weights = {key: tensor.clone() for key, tensor in critic.state_dict().items()}
    last = max(key for key in weights if key.startswith("members") and key.endswith("bias"))
    weights[last.replace("bias", "weight")].zero_()
    weights[last].view(-1).copy_(weights[last].new_tensor([2.5, 1.5]))
    save_file(weights, folder / FILE, metadata=card_of(critic, encoder))
    return folder


@pytest.mark.ros
def test_a_flow_policy_continues_its_chunks_and_says_how_sure_it_is(tmp_path: Path):
    contract = arm(
        cell="flow_cell",
        chunk_horizon=64,
        execute_steps=16,
        tasks={"reach": {"instruction": "Reach the goal", "time_limit_s": 1000.0}},
        # A busy test machine pauses processes for longer than a robot computer may.
        safety={
            "joint_state_max_age_ms": 5000,
            "chunk_max_age_ms": 5000,
            "overrun_ticks": 100_000,
        },
    )
    policy = flow_checkpoint(tmp_path / "policy", contract)
    with LiveArm(
        contract,
        tmp_path,
        policy=policy,
        runner={"insight_every": 2, "inference_timeout_s": 60.0, "chunking": "rtc"},
        runner_module="robot_bridge.nodes.runner",
    ) as cell:
        cell.up(4 * DEADLINE_S)  # PyTorch and lerobot are loaded
        cell.start_episode()
        name = "/flow_cell/runner"
        cell.until(lambda: "value" in cell.said(name), "the doubt and the value")
        said = cell.said(name)
        assert float(said["value"]) == pytest.approx(1.5)  # the smaller one of two heads
        assert float(said["q"]) == pytest.approx(1.5)
        # Samples of noise: of the order of the variance of the actions.
        assert 0.1 < float(said["doubt"]) / (STD**2 * math.sqrt(2)) < 10.0
        assert "insight_problem" not in said

        def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
            """(what was still to come of the chunk before, the chunk that followed it)"""
            found = []
            for (t0, _, old), (t1, _, new) in zip(cell.chunks, cell.chunks[1:], strict=False):
                step = round((t1 - t0) / contract.dt_ns)
                if 1 <= step <= 40 and len(old) == len(new) == 64:
                    found.append((old[step:], new))
            return found

        cell.until(lambda: len(pairs()) >= 8, "chunks that follow chunks")
        first = np.array([np.abs(new[0] - old[0]).mean() for old, new in pairs()])
        last = np.array([np.abs(new[63] - old[-1]).mean() for old, new in pairs()])
        # Where it is guided it does as it said; where it is free it is a new draw. Blended chunks
        # would begin with the very number.
        assert np.median(first) < 0.3 * np.median(last)
        assert (first > 1e-6).all()
        cell.call("supervisor/cancel_episode")


@pytest.mark.ros
def test_recap_asks_for_good_chunks_on_a_cell(tmp_path: Path):
    """From a registry, in lockstep: each chunk is the guided one (Eq. R10), number for number."""
    import torch

    from vla_post.export import load_policy
    from vla_post.export.registry import Registry
    from vla_post.policies.build import build_policy
    from vla_post.policies.indicator import Guidance

    contract = one_axis().model_copy(update={"cell": "recap_cell"})
    numbers = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
    statistics = {
        key: {name: np.full(1, value, np.float32) for name, value in numbers.items()}
        for key in ("observation.state", "action")
    }
    torch.manual_seed(0)
    policy = build_policy("chunk_flow", contract, statistics)
    policy.add_indicator(Guidance(beta=2.0))
    torch.nn.init.normal_(policy.module.get_parameter("indicator.weight"))
    policy.save(tmp_path / "checkpoint")
    registry = Registry(tmp_path / "registry")
    version = registry.publish(tmp_path / "checkpoint", contract=contract)
    with Cell(
        contract,
        tmp_path,
        registry=registry.root,
        runner={"inference_timeout_s": 60.0},
        runner_module="robot_bridge.nodes.runner",
    ) as cell:
        cell.position = [0.3]
        cell.up(4 * DEADLINE_S)  # PyTorch and lerobot are loaded
        cell.start_episode("push")
        cell.until(lambda: sum(len(c) > 0 for _, _, c in cell.chunks) >= 3, "chunks")
        start = next(e for e in cell.events if e["type"] == "episode_start")
        chunks = [c for c in cell.chunks if len(c[2])]
        cell.call("supervisor/cancel_episode")
    here: Any = load_policy(registry.path(version.number))

    def differs(beta: float) -> float:
        here.policy.guidance = Guidance(beta=beta)
        return max(
            float(np.abs(ask(here, question(stamp), contract, guide=True) - chunk).max())
            for stamp, _, chunk in chunks
        )

    def question(stamp: int) -> Question:
        steps = (stamp - start["start_stamp_ns"]) // contract.dt_ns
        seed = (start["seed"] * 100_003 + steps) % 2**31
        state = np.array([0.3], np.float32)
        instruction = contract.task("push").instruction
        return Question(stamp, {"observation.state": state}, instruction, seed)

    assert {label.partition("#")[0] for _, label, _ in chunks} == {str(version.number)}
    assert differs(2.0) < 1e-5
    assert differs(1.0) > 1e-2
    assert differs(0.0) > 1e-2
    here.close()

"""The improvement indicator: as text, as vectors, and as guidance (RECAP-7, RECAP-8)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_post.cli.errors import UserError
from vla_post.cli.policy import SetGuidance
from vla_post.export.onnx import ExportConfig, export_policy
from vla_post.export.runtime import TorchPolicy, load_policy
from vla_post.policies.heads import UnsupportedPolicy
from vla_post.policies.indicator import (
    Guidance,
    Indicator,
    extrapolated,
    split_indicator,
    with_indicator,
)
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.policies.rtc import RtcConfig

from .cells import build, draw, sample


def test_text_and_back():
    for indicator in Indicator:
        assert split_indicator(with_indicator("push it", indicator)) == ("push it", indicator)
    assert split_indicator("say: Advantage: positive") == (
        "say: Advantage: positive",
        Indicator.NONE,
    )


def test_recap7_the_guided_field():
    asked, plain = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x, time = torch.randn(2, 3, 4), torch.rand(2)

    def velocity(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(time) == 4
        return torch.cat([asked, plain])

    fields = {beta: extrapolated(velocity, beta)(x, time) for beta in (0.0, 1.0, 2.0)}
    torch.testing.assert_close(fields[0.0], plain)
    torch.testing.assert_close(fields[1.0], asked)
    torch.testing.assert_close(fields[2.0] - fields[1.0], asked - plain)


def trained(kind: str = "chunk_flow") -> LeRobotPolicy:
    """With an indicator that means something."""
    policy = build(kind)
    policy.add_indicator(Guidance())
    if kind == "chunk_flow":
        torch.manual_seed(1)
        torch.nn.init.normal_(policy.module.get_parameter("indicator.weight")[1:])
    return policy


def test_a_fresh_indicator_changes_nothing():
    policy = build("chunk_flow")
    batch = sample(policy.contract, 2)
    noise, _ = draw(policy, batch, 1)
    before = policy.act(batch.observation, batch.instruction, noise=noise)
    policy.add_indicator(Guidance(beta=2.0))
    torch.testing.assert_close(
        policy.act(batch.observation, batch.instruction, noise=noise), before, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", ["chunk_flow", "smolvla_tiny"])
def test_recap7_acting(kind: str, tmp_path: Path):
    """beta 1 is the policy that is asked, 0 the plain one, and one Euler step at 2 lies as far
    beyond; several samples, a running chunk and a checkpoint keep to it."""
    policy = trained(kind)
    policy.head.denoising_steps = 1
    batch = sample(policy.contract, 2)
    noise, _ = draw(policy, batch, 3)

    def act(beta: float | None, prompts: list[str]) -> torch.Tensor:
        policy.guidance = None if beta is None else Guidance(beta=beta)
        return policy.act(batch.observation, prompts, 3, noise=noise)

    plain = batch.instruction
    asked = [with_indicator(text, Indicator.POSITIVE) for text in plain]
    chunk = {beta: act(beta, plain) for beta in (0.0, 1.0, 2.0)}
    torch.testing.assert_close(chunk[0.0], act(None, plain))
    torch.testing.assert_close(chunk[1.0], act(None, asked))
    assert not torch.allclose(chunk[0.0], chunk[1.0])
    torch.testing.assert_close(chunk[2.0], 2 * chunk[1.0] - chunk[0.0], atol=1e-4, rtol=1e-4)
    if kind == "chunk_flow":
        policy.guidance = Guidance(beta=2.0)
        rows = torch.zeros(2, 3, policy.action_size)
        for form in ("identity", "jacobian"):
            led = policy.act(
                batch.observation, plain, 3, noise=noise, previous=rows, rtc=RtcConfig(form=form)
            )
            assert led.shape == chunk[2.0].shape
        policy.save(tmp_path)
        again = LeRobotPolicy.load(tmp_path)
        again.head.denoising_steps = 1
        torch.testing.assert_close(again.act(batch.observation, plain, 3, noise=noise), chunk[2.0])


def test_the_instruction_still_counts_beside_the_indicator():
    policy = trained()
    assert len(policy.contract.tasks) > 1
    batch = sample(policy.contract, 2)
    same = {key: value[:1].expand(2, *value.shape[1:]) for key, value in batch.observation.items()}
    noise = torch.zeros(2, 1, policy.horizon, policy.noise_size)
    first, second = policy.act(same, batch.instruction, noise=noise)
    assert batch.instruction[0] != batch.instruction[1]
    assert not torch.equal(first, second)


def test_policies_that_cannot_be_told_are_refused():
    with pytest.raises(UnsupportedPolicy, match="reads no instruction"):
        build("act_tiny").add_indicator(Guidance())
    short = build("smolvla_tiny", tokenizer_max_length=4)
    with pytest.raises(UnsupportedPolicy, match="longer than this smolvla reads"):
        short.add_indicator(Guidance())


def test_guidance_of_a_checkpoint_is_changed_in_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trained().save(tmp_path / "a")
    SetGuidance(checkpoint=tmp_path / "a", out=tmp_path / "b", beta=2.0).run()
    assert capsys.readouterr().out.strip() == str(tmp_path / "b")
    found = [LeRobotPolicy.load(tmp_path / name).guidance for name in "ab"]
    assert found == [Guidance(beta=1.0), Guidance(beta=2.0)]
    build("chunk_flow").save(tmp_path / "c")
    with pytest.raises(UserError, match="without an indicator"):
        SetGuidance(checkpoint=tmp_path / "c", out=tmp_path / "d", beta=2.0).run()


def test_a_robot_that_runs_adopts_a_version_with_indicator(tmp_path: Path):
    """And back: the architecture differs, so the policy is loaded anew."""
    policy = build("chunk_flow")
    policy.save(tmp_path / "v1")
    policy = trained()
    policy.guidance = Guidance(beta=1.5)
    policy.save(tmp_path / "v2")
    policy.guidance = Guidance(beta=2.5)
    policy.save(tmp_path / "v3")
    runtime = TorchPolicy(tmp_path / "v1")
    for name, beta in (("v2", 1.5), ("v3", 2.5), ("v1", None)):
        runtime.reload(tmp_path / name)
        found = runtime.policy.guidance
        assert (None if found is None else found.beta) == beta


@pytest.mark.parametrize(("beta", "layout"), [(1.0, "unrolled"), (2.0, "unrolled"), (2.0, "steps")])
def test_an_export_asks_and_extrapolates(tmp_path: Path, beta: float, layout: str):
    """`export_policy` proves parity with PyTorch on recorded observations, or raises."""
    policy = trained()
    policy.guidance = Guidance(beta=beta)
    policy.save(tmp_path / "policy")
    batch = sample(policy.contract, 3)
    probes = [
        ({key: value[i].numpy() for key, value in batch.observation.items()}, batch.instruction[i])
        for i in range(3)
    ]
    config = ExportConfig(layout=layout, dynamic_batch=layout == "unrolled" and beta == 2.0)  # pyright: ignore[reportArgumentType]
    report = export_policy(tmp_path / "policy", tmp_path / "onnx", probes, config)
    assert report.parity.ok
    exported = load_policy(tmp_path / "onnx")
    policy.guidance = Guidance(beta=0.0)
    policy.save(tmp_path / "plain")
    plain = load_policy(tmp_path / "plain").act(*probes[0])
    assert np.abs(exported.act(*probes[0]) - plain).max() > 0.01

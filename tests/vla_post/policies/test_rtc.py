"""Real-time chunking: the paper's numbers, lerobot's own, and what it is for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trajectory_store.contract import parse_contract
from vla_post.policies.flow_math import euler
from vla_post.policies.rtc import RtcConfig, guided, prefix_weights

from .cells import build, draw, sample

IDENTITY, JACOBIAN = RtcConfig(form="identity"), RtcConfig(form="jacobian")


def test_the_weights_are_the_papers():
    """H 8, d 2, s 3, so an overlap of 5."""
    got = prefix_weights(2, 5, 8)
    want = [1.0, 1.0, 0.4876, 0.1888, 0.0413, 0.0, 0.0, 0.0]
    torch.testing.assert_close(got, torch.tensor(want), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("delay", "overlap"), [(0, 0), (0, 5), (3, 5), (5, 5), (9, 5), (2, 8)])
@pytest.mark.parametrize("schedule", ["exp", "linear"])
def test_the_weights_are_lerobots(delay: int, overlap: int, schedule: str):
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc import RTCConfig, RTCProcessor

    kind = RTCAttentionSchedule.EXP if schedule == "exp" else RTCAttentionSchedule.LINEAR
    theirs = RTCProcessor(RTCConfig(prefix_attention_schedule=kind))
    torch.testing.assert_close(
        prefix_weights(delay, overlap, 8, schedule), theirs.get_prefix_weights(delay, overlap, 8)
    )


def test_an_overlap_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="overlap 9 of a horizon of 8"):
        prefix_weights(0, 9, 8)


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 6))


def field(net: torch.nn.Module):
    return lambda x, time: net(x.flatten(1) * (1.0 + time[:, None])).view_as(x)


@pytest.mark.parametrize("config", [IDENTITY, JACOBIAN], ids=lambda c: c.form)
def test_nothing_is_pulled_without_weight_or_without_a_difference(config: RtcConfig):
    v, x, t = field(network()), torch.randn(4, 3, 2), torch.full((4,), 0.4)
    plain = v(x, t).detach()
    follow = guided(v, torch.randn(4, 3, 2), torch.zeros(3, 2), config)
    torch.testing.assert_close(follow(x, t).detach(), plain)
    heading = x + 0.6 * plain
    follow = guided(v, heading, torch.ones(3, 2), config)
    torch.testing.assert_close(follow(x, t).detach(), plain)


@pytest.mark.parametrize("time", [0.0, 0.2, 0.6, 0.8])
def test_the_identity_form_is_lerobots_guidance(time: float):
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc import RTCConfig, RTCProcessor

    v, x, previous = field(network()), torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    config = RTCConfig(
        prefix_attention_schedule=RTCAttentionSchedule.EXP,
        max_guidance_weight=5.0,
        execution_horizon=2,
    )
    theirs = RTCProcessor(config).denoise_step(
        x, previous, 1, 1.0 - time, lambda x: -v(x, torch.full((2,), time))
    )
    weights = prefix_weights(1, 2, 3)[:, None].expand(3, 2)
    ours = guided(v, previous, weights, IDENTITY)(x, torch.full((2,), time))
    torch.testing.assert_close(ours, -theirs, atol=1e-5, rtol=1e-5)


def test_the_jacobian_form_is_the_papers_by_finite_differences():
    net = network().double()
    v, t = field(net), 0.4
    time = torch.full((1,), t, dtype=torch.float64)
    torch.manual_seed(1)
    x, previous = torch.randn(2, 1, 3, 2, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)[:, None].expand(3, 2)

    def heading(x: Tensor) -> Tensor:
        return x + (1.0 - t) * v(x, time)

    error = (weights * (previous - heading(x))).flatten()
    jacobian = torch.empty(6, 6, dtype=torch.float64)
    for i in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[i] = 1e-6
        bump = step.view_as(x)
        jacobian[:, i] = (heading(x + bump) - heading(x - bump)).flatten() / 2e-6
    gain = (t**2 + (1 - t) ** 2) / (t * (1 - t))
    want = v(x, time) + gain * (jacobian.T @ error).view_as(x)
    got = guided(v, previous, weights, JACOBIAN)(x, time)
    torch.testing.assert_close(got, want.detach(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", ["smolvla_tiny", "pi0_tiny", "pi05_tiny"])
def test_a_chunk_is_continued_as_lerobot_does(kind: str):
    """Same noise, same previous chunk: equal to the policy with lerobot's `rtc_config`."""
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc import RTCConfig

    # Without padding of the action: lerobot would pull that towards 0, which nobody decided.
    policy = build(kind, max_action_dim=4)
    batch = sample(policy.contract, 2)
    noise, _ = draw(policy, batch, 1)
    previous = batch.action[:, 4:]
    ours = policy.act(
        batch.observation, batch.instruction, noise=noise, previous=previous, delay=2
    )[:, 0]
    inputs = policy.preprocess(
        dict(batch.observation) | {"task": batch.instruction, "action": previous}
    )
    module = policy.module
    module.config.rtc_config = RTCConfig(
        prefix_attention_schedule=RTCAttentionSchedule.EXP, max_guidance_weight=5.0
    )
    module.init_rtc_processor()
    theirs = module.predict_action_chunk(
        {k: v for k, v in inputs.items() if k != "action"},
        noise=noise[:, 0],
        inference_delay=2,
        prev_chunk_left_over=inputs["action"],
        execution_horizon=previous.shape[1],
    )
    torch.testing.assert_close(ours, policy.postprocess(theirs.detach()), atol=1e-4, rtol=1e-4)
    free = policy.act(batch.observation, batch.instruction, noise=noise)[:, 0]
    assert (ours - free).abs().max() > 0.1


@pytest.fixture(scope="module")
def two_minded():
    """A small policy that has learnt to go either way round: chunks near +1 or near -1."""
    from vla_post.batch import Batch
    from vla_post.policies.build import build_policy

    contract = parse_contract("""
schema: vla_post/cell/1
cell: fork
robot: arm
control_hz: 20
chunk_horizon: 8
execute_steps: 3
observations:
  observation.state:
    {topic: joint_states, type: sensor_msgs/JointState, names: [x], shape: [1], unit: m}
actions:
  action: {names: [y], unit: m, mode: absolute, limits: {position: [[-2, 2]]}}
tasks:
  pass: {instruction: Pass the post, time_limit_s: 5}
""")
    plain = {"mean": [0.0], "std": [1.0]}
    torch.manual_seed(0)
    policy = build_policy("chunk_flow", contract, {"observation.state": plain, "action": plain})
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    size = 128
    for _ in range(500):
        side = torch.where(torch.rand(size, 1, 1) < 0.5, -1.0, 1.0)
        batch = Batch(
            observation={"observation.state": torch.zeros(size, 1)},
            action=side + 0.05 * torch.randn(size, 8, 1),
            valid=torch.ones(size, 8, dtype=torch.bool),
            reward=torch.zeros(size, 8),
            source=torch.zeros(size, 8, dtype=torch.uint8),
            next_observation={},
            n=torch.full((size,), 8),
            terminated=torch.zeros(size, dtype=torch.bool),
            task=torch.zeros(size, dtype=torch.int64),
            instruction=["Pass the post"] * size,
            weight=torch.ones(size),
        )
        optimiser.zero_grad()
        policy.chunk_loss(batch).mean().backward()
        optimiser.step()
    policy.module.eval()
    return policy


@pytest.mark.parametrize("config", [IDENTITY, JACOBIAN], ids=lambda c: c.form)
def test_a_chunk_stays_on_the_side_that_the_robot_has_chosen(two_minded, config: RtcConfig):
    size = 64
    observation, text = {"observation.state": torch.zeros(size, 1)}, ["Pass the post"] * size
    noise = torch.randn(size, 1, 8, 1, generator=torch.Generator().manual_seed(3))
    free = two_minded.act(observation, text, noise=noise)[:, 0, :, 0]
    assert 0.2 < (free.mean(dim=1) < 0).float().mean() < 0.8, "without RTC it goes either way"
    previous = torch.ones(size, 5, 1)
    rtc = two_minded.act(observation, text, noise=noise, previous=previous, delay=2, rtc=config)[
        :, 0, :, 0
    ]
    assert (rtc.mean(dim=1) > 0).float().mean() > 0.95
    seam = (rtc[:, 1:3] - 1.0).abs().mean()
    assert seam < 0.05
    assert (free[:, 1:3] - 1.0).abs().mean() > 0.5


def test_one_noise_gives_one_chunk_whatever_the_batch(two_minded):
    noise = torch.randn(4, 1, 8, 1, generator=torch.Generator().manual_seed(5))
    previous = torch.linspace(-1, 1, 4)[:, None, None].repeat(1, 5, 1)
    observation, text = {"observation.state": torch.zeros(4, 1)}, ["Pass the post"] * 4
    together = two_minded.act(observation, text, noise=noise, previous=previous, delay=1)
    for i in range(4):
        one = two_minded.act(
            {"observation.state": torch.zeros(1, 1)},
            text[:1],
            noise=noise[i : i + 1],
            previous=previous[i : i + 1],
            delay=1,
        )
        torch.testing.assert_close(one, together[i : i + 1], atol=1e-5, rtol=1e-5)


def test_euler_takes_the_guided_field():
    v = field(network())
    previous = torch.full((1, 3, 2), 0.5)
    x = euler(guided(v, previous, torch.ones(3, 2), IDENTITY), torch.zeros(1, 3, 2), 20)
    assert (x - previous).abs().max() < 0.05
    assert np.isfinite(x.detach().numpy()).all()


def test_policies_without_a_flow_refuse_to_continue_a_chunk():
    policy = build("act_tiny")
    batch = sample(policy.contract, 2)
    assert not policy.can_continue
    with pytest.raises(ValueError, match="blend"):
        policy.act(batch.observation, batch.instruction, previous=batch.action, delay=1)

"""The flow convention: checks F1 to F4 of the specification."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vla_post.policies.flow_math import (
    euler,
    flow_loss,
    interpolate,
    target_velocity,
    to_lerobot,
)


def test_f1_one_euler_step_of_a_perfect_model_reaches_the_data():
    data = torch.tensor([[[0.3, -0.7], [1.0, 2.0]]])
    noise = torch.randn(1, 2, 2)
    for steps in (1, 5):
        reached = euler(lambda x, t: (data - x) / (1 - t[:, None, None]), noise, steps)
        torch.testing.assert_close(reached, data)


def test_f2_the_opposite_sign_costs_four_times_the_distance():
    noise, data = torch.randn(2, 3, 4, 2)
    valid = torch.ones(3, 4, dtype=torch.bool)
    target = target_velocity(noise, data)
    assert flow_loss(target, target, valid).abs().max() == 0
    expected = 4 * (data - noise).square().mean(dim=(1, 2))
    torch.testing.assert_close(flow_loss(-target, target, valid), expected)


@given(time=st.floats(0, 1, width=32))
def test_f3_there_and_back_between_conventions(time: float):
    t, velocity = torch.tensor([time]), torch.randn(1, 2, 3)
    noise, data = torch.randn(2, 1, 2, 3)
    theirs_t, theirs_v = to_lerobot(t, velocity)
    back_t, back_v = to_lerobot(theirs_t, theirs_v)
    torch.testing.assert_close(back_t, t)
    torch.testing.assert_close(back_v, velocity)
    # lerobot: x = t * noise + (1 - t) * action
    s = theirs_t[:, None, None]
    torch.testing.assert_close(interpolate(noise, data, t), s * noise + (1 - s) * data)


def test_f4_padding_weighs_nothing_whatever_it_holds():
    velocity = torch.randn(2, 4, 3, requires_grad=True)
    target = torch.randn(2, 4, 3)
    target[0, 2:] = float("nan")
    valid = torch.tensor([[True, True, False, False], [False] * 4])
    loss = flow_loss(velocity, target, valid)
    torch.testing.assert_close(loss[0], (velocity[0, :2] - target[0, :2]).square().mean())
    assert loss[1] == 0
    loss.sum().backward()
    assert velocity.grad is not None
    assert (velocity.grad[0, 2:] == 0).all()
    assert (velocity.grad[1] == 0).all()
    assert (velocity.grad[0, :2] != 0).all()

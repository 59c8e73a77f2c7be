"""IQL as a baseline: weights of the cloning, and what is collected joins the data."""

import torch

from vla_post.learners.uni_o4.iql import IqlPolicy, IqlPolicyConfig, append, as_samples
from vla_post.learners.uni_o4.online import Rollout
from vla_post.learners.uni_o4.policies import GaussianPolicies, PolicyConfig
from vla_post.learners.uni_o4.samples import Scales
from vla_post.learners.uni_o4.values import ValueConfig, Values

SCALES = Scales(
    state_mean=(0.0,), state_std=(1.0,), action_low=(-1.0,), action_high=(1.0,), reward=1.0,
    discount=0.9, horizon=1,
)  # fmt: skip


def rollout(steps: int, envs: int) -> Rollout:
    """The state counts the rows of time; the second environment ends at its second step."""
    place = torch.arange(steps).float()[:, None, None].expand(steps, envs, 1)
    ended = torch.zeros(steps, envs, dtype=torch.bool)
    ended[1, 1] = True
    return Rollout(
        state=place,
        chain=torch.zeros(steps, envs, 2, 1),
        reward=place[..., 0],
        next_state=place + 1,
        terminated=ended,
        ended=ended,
    )


def test_collected_rows_are_in_order_and_keep_their_own_followers():
    rows = as_samples(rollout(3, 2), SCALES)
    assert rows.state[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert rows.following.tolist() == [1, 2, -1, 4, -1, -1]
    assert rows.terminated.tolist() == [False] * 4 + [True, False]
    both = append(rows, rows)
    assert both.following.tolist() == [1, 2, -1, 4, -1, -1, 7, 8, -1, 10, -1, -1]
    assert len(both) == 12


def test_without_temperature_it_is_cloning_and_advantages_change_it():
    samples = as_samples(rollout(3, 2), SCALES)

    class Known(Values):
        """A = 0 in state 0, and much above the cap of the weight elsewhere."""

        def advantage(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            return 50.0 * (state != 0.0).float().expand(-1, action.shape[1])

    values = Known(1, 1, ValueConfig(kind="iql", width=8, layers=1))
    policy = GaussianPolicies(PolicyConfig(members=1, width=8, layers=1), 1, 1)
    stage = IqlPolicy(policy, values, samples, IqlPolicyConfig(beta=3.0, batch_size=64), unit=1.0)
    # Weights are exp(0) = 1 in state 0 and the cap of 100 elsewhere, two thirds of the rows.
    assert 50.0 < stage.update()["iql/weight_mean"] < 85.0
    calm = IqlPolicy(policy, values, samples, IqlPolicyConfig(beta=0.0), unit=1.0)
    assert calm.update()["iql/weight_mean"] == 1.0

"""Ensembles, distributions over returns, and what is made of them."""

import pytest
import torch
from torch import Tensor

from vla_post.critics.bins import Bins
from vla_post.critics.ensemble import aggregate, polyak_
from vla_post.critics.networks import (
    ChunkCritic,
    CriticConfig,
    CriticInput,
    EnsembleMlp,
    InputSize,
    ValueNet,
    expectile_loss,
)

SIZE = InputSize(tokens=2, features=3, proprioception=4)


def seen(n: int) -> CriticInput:
    return CriticInput(features=torch.randn(n, 2, 3), proprioception=torch.randn(n, 4))


def critic(chunk: int = 5, **config: object) -> ChunkCritic:
    torch.manual_seed(0)
    settings = CriticConfig(**{"heads": 3, "width": 16, "layers": 2} | config)  # pyright: ignore
    bins = None
    if settings.output != "scalar":
        bins = Bins(low=-1.0, high=1.0, count=settings.bins, labels=settings.output)
    mean, std = torch.zeros(2), torch.ones(2)
    return ChunkCritic(settings, SIZE, chunk=chunk, action_mean=mean, action_std=std, bins=bins)


KINDS = [
    {"trunk": trunk, "output": output}
    for trunk in ("mlp", "transformer")
    for output in ("scalar", "two_hot", "hl_gauss")
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_critic_learns_one_batch(kind: dict[str, str]):
    q = critic(**kind)
    inputs, chunk, target = seen(8), torch.randn(8, 5, 2), torch.rand(8)
    values = q(inputs, chunk[:, None])
    assert values.shape == (8, 1, 3)
    optimizer = torch.optim.Adam(q.parameters(), lr=1e-2)
    for _ in range(150):
        loss, _ = q.loss(inputs, chunk, target)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    _, after = q.loss(inputs, chunk, target)
    assert (after - target[:, None]).abs().max() < 0.1


@pytest.mark.parametrize("trunk", ["mlp", "transformer"])
def test_many_chunks_at_once_are_the_same_as_one_by_one(trunk: str):
    q, inputs, chunks = critic(trunk=trunk), seen(4), torch.randn(4, 6, 5, 2)
    alone = torch.stack([q(inputs, chunks[:, i : i + 1])[:, 0] for i in range(6)], dim=1)
    torch.testing.assert_close(q(inputs, chunks), alone)


def test_a_critic_of_short_chunks_reads_no_further():
    q, inputs, chunk = critic(chunk=2), seen(4), torch.randn(4, 1, 5, 2)
    other = chunk.clone()
    other[:, :, 2:] = 99.0
    assert torch.equal(q(inputs, chunk), q(inputs, other))


def test_members_of_an_ensemble_are_separate_networks():
    torch.manual_seed(0)
    net = EnsembleMlp(4, 6, 2, 8, 2, True)
    out = net(torch.randn(5, 6))
    assert out.shape == (5, 4, 2)
    out[:, 1].sum().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert (parameter.grad[[0, 2, 3]] == 0).all()
        assert (parameter.grad[1] != 0).any()
    # The batched product is what each member would compute alone.
    x = torch.randn(5, 6)
    single = EnsembleMlp(1, 6, 2, 8, 2, True)
    for name, parameter in single.named_parameters():
        parameter.data = dict(net.named_parameters())[name].data[2:3]
    torch.testing.assert_close(net(x)[:, 2], single(x)[:, 0])


def test_aloe4_the_minimum_is_pessimistic_and_a_head_more_never_raises_it():
    torch.manual_seed(0)
    q = torch.randn(50, 5)
    assert torch.equal(aggregate(q[:, :1], "minimum"), q[:, 0])
    assert (aggregate(q, "minimum") <= aggregate(q, "mean")).all()
    for heads in range(1, 5):
        assert (aggregate(q[:, : heads + 1], "minimum") <= aggregate(q[:, :heads], "minimum")).all()
    assert (aggregate(q, "lower_bound") <= aggregate(q, "mean")).all()
    assert torch.equal(aggregate(q, "subset", subset=5), aggregate(q, "minimum"))
    draws = {float(aggregate(q, "subset", subset=2)[0]) for _ in range(40)}
    assert len(draws) > 1


def test_polyak_moves_by_its_rate():
    target, online = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = target.weight.detach().clone()
    polyak_(target, online, 0.25)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * online.weight)


def test_recap2_bins_round_trip_and_ends_take_what_lies_outside():
    bins = Bins(low=-1.0, high=0.0, count=201, labels="one_hot")
    centres = bins.centres(torch.empty(0))
    assert torch.equal(bins.index(centres), torch.arange(201))
    value = torch.linspace(-1.0, 0.0, 997)
    back = bins.label(value) @ centres
    assert (back - value).abs().max() <= bins.width / 2 + 1e-6
    assert bins.index(torch.tensor([-7.0, 3.0])).tolist() == [0, 200]


@pytest.mark.parametrize("labels", ["two_hot", "hl_gauss"])
def test_labels_are_distributions_with_the_right_mean(labels: str):
    bins = Bins(low=0.0, high=1.0, count=51, labels=labels)  # pyright: ignore
    value = torch.linspace(0.1, 0.9, 33)
    label = bins.label(value)
    torch.testing.assert_close(label.sum(dim=-1), torch.ones(33))
    torch.testing.assert_close(label @ bins.centres(label), value, atol=1e-3, rtol=0)
    torch.testing.assert_close(bins.mean(label.clamp(min=1e-9).log()), value, atol=1e-3, rtol=0)
    assert bins.label(torch.tensor([5.0])).argmax() == 50


@pytest.mark.parametrize("bins", [None, Bins(low=0.0, high=1.0, count=256)])
def test_a_value_is_the_mean_of_what_the_data_got(bins: Bins | None):
    torch.manual_seed(0)
    value, inputs = ValueNet(SIZE, bins, width=16, layers=2), seen(1)
    target = torch.tensor([0.0] * 3 + [0.8])
    many = CriticInput(
        features=inputs.features.expand(4, -1, -1),
        proprioception=inputs.proprioception.expand(4, -1),
    )
    optimizer = torch.optim.Adam(value.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        value.loss(many, target).mean().backward()
        optimizer.step()
    assert value(inputs).item() == pytest.approx(0.2, abs=0.02)


def fit(tau: float, samples: Tensor) -> float:
    value = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([value], lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        expectile_loss(samples - value, tau).mean().backward()
        optimizer.step()
    return value.item()


def test_iql_expectiles_run_from_the_mean_to_the_maximum():
    samples = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert expectile_loss(samples, 0.5).tolist() == [0.0, 0.5, 2.0, 12.5]
    assert fit(0.5, samples) == pytest.approx(2.0, abs=0.02)
    assert fit(0.5, samples) < fit(0.9, samples) < fit(0.99, samples) < 5.0
    assert fit(0.99, samples) > 4.5

"""lerobot's policies as our noun: equal losses, equal chunks, checkpoints that round-trip."""

from pathlib import Path

import numpy as np
import pytest
import torch

from trajectory_store.contract import Contract, load_contract
from vla_post.batch import Batch
from vla_post.policies.build import build_policy
from vla_post.policies.checkpoint import CheckpointError, read_card
from vla_post.policies.lerobot_adapter import LeRobotPolicy

SHIPPED = Path(__file__).parents[3] / "sim" / "contracts"
CONTRACTS = {"smolvla_tiny": "metaworld_pixels.yaml", "chunk_flow": "metaworld_state.yaml"}


def make(kind: str) -> LeRobotPolicy:
    contract = load_contract(SHIPPED / CONTRACTS[kind])
    random = np.random.default_rng(0)
    sizes = {key: f.shape[0] for key, f in contract.vectors.items()} | {"action": 4}
    statistics = {
        key: {"mean": random.normal(size=n), "std": random.uniform(0.5, 2.0, size=n)}
        for key, n in sizes.items()
    }
    torch.manual_seed(0)
    policy = build_policy(kind, contract, statistics)
    policy.module.eval()
    return policy


@pytest.fixture(scope="module", params=list(CONTRACTS))
def policy(request: pytest.FixtureRequest) -> LeRobotPolicy:
    return make(request.param)


def sample(contract: Contract, size: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    horizon, width = contract.chunk_horizon, contract.action.size
    observation = {
        key: torch.rand(size, f.shape[2], *f.shape[:2], generator=draw)
        if f.is_image
        else torch.randn(size, *f.shape, generator=draw)
        for key, f in contract.observations.items()
    }
    valid = torch.arange(horizon) < torch.tensor([[horizon - 3 * i] for i in range(size)])
    texts = [task.instruction for task in contract.tasks.values()]
    return Batch(
        observation=observation,
        action=torch.randn(size, horizon, width, generator=draw),
        valid=valid,
        reward=torch.zeros(size, horizon),
        source=torch.ones(size, horizon, dtype=torch.uint8),
        next_observation={},
        n=valid.sum(dim=1),
        terminated=torch.zeros(size, dtype=torch.bool),
        task=torch.zeros(size, dtype=torch.int64),
        instruction=[texts[i % len(texts)] for i in range(size)],
        weight=torch.ones(size),
    )


def draw(policy: LeRobotPolicy, batch: Batch, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(batch), n, policy.horizon, policy.noise_size)
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator), torch.rand(shape[:2], generator=generator)


def test_loss_is_lerobots_own_on_the_same_noise_and_time(policy: LeRobotPolicy):
    batch = sample(policy.contract, 3)
    noise, time = draw(policy, batch, 1)
    ours = policy.chunk_loss(batch, noise=noise[:, 0], time=time[:, 0])
    inputs = policy.preprocess(
        dict(batch.observation) | {"task": batch.instruction, "action": batch.action}
    )
    inputs["action_is_pad"] = ~batch.valid
    # lerobot counts time the other way round: 1 is noise.
    theirs, _ = policy.module(inputs, noise=noise[:, 0], time=1 - time[:, 0], reduction="none")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_samples_that_share_the_encoder_pass_equal_samples_that_do_not(policy: LeRobotPolicy):
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 3)
    together = policy.chunk_loss(batch, noise=noise, time=time)
    alone = [policy.chunk_loss(batch, noise=noise[:, i], time=time[:, i]) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0), atol=1e-5, rtol=1e-5)
    chunks = policy.act(batch.observation, batch.instruction, 3, noise=noise)
    for i in range(3):
        one = policy.act(batch.observation, batch.instruction, noise=noise[:, i : i + 1])
        torch.testing.assert_close(chunks[:, i : i + 1], one, atol=1e-5, rtol=1e-4)


def test_chunks_are_lerobots_own_on_the_same_noise(policy: LeRobotPolicy):
    batch = sample(policy.contract, 2)
    noise, _ = draw(policy, batch, 1)
    ours = policy.act(batch.observation, batch.instruction, noise=noise)[:, 0]
    inputs = policy.preprocess(dict(batch.observation) | {"task": batch.instruction})
    module: object = policy.module
    normalised = module.predict_action_chunk(inputs, noise=noise[:, 0])  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(ours, policy.postprocess(normalised), atol=1e-5, rtol=1e-4)


def test_padding_has_no_gradient(policy: LeRobotPolicy):
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 1)
    wild = torch.where(batch.valid[..., None], batch.action, 1e6)
    # SmolVLA's action tokens attend to earlier ones only, so a padded tail cannot be felt; the
    # small policy sees the whole noisy chunk, as lerobot's diffusion does, so only its loss is cut.
    if policy.kind == "smolvla":
        batch = batch.replace(action=wild)
    loss = policy.chunk_loss(batch, noise=noise, time=time)
    same = policy.chunk_loss(sample(policy.contract, 2), noise=noise, time=time)
    torch.testing.assert_close(loss, same, atol=1e-4, rtol=1e-4)
    nothing = batch.replace(valid=torch.zeros_like(batch.valid))
    policy.module.zero_grad()
    policy.chunk_loss(nothing, noise=noise, time=time).sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert all((g == 0).all() for g in gradients)


def test_a_checkpoint_comes_back_and_moves(policy: LeRobotPolicy, tmp_path: Path):
    policy.save(tmp_path / "written")
    (tmp_path / "written").rename(tmp_path / "moved")
    again = LeRobotPolicy.load(tmp_path / "moved")
    batch = sample(policy.contract, 2)
    noise, _ = draw(policy, batch, 1)
    ours, theirs = (
        p.act(batch.observation, batch.instruction, noise=noise) for p in (policy, again)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    card = read_card(tmp_path / "moved")
    assert card["contract_sha256"] == policy.contract.sha256
    assert again.contract == policy.contract
    assert not [p for p in (tmp_path / "moved").rglob("*") if p.suffix in {".pkl", ".bin", ".pt"}]


def test_the_instruction_matters(policy: LeRobotPolicy):
    batch = sample(policy.contract, 1)
    noise, _ = draw(policy, batch, 1)
    texts = [task.instruction for task in policy.contract.tasks.values()][:2]
    one, other = (policy.act(batch.observation, [t], noise=noise) for t in texts)
    assert not torch.equal(one, other)


def test_features_and_wrong_noise(policy: LeRobotPolicy):
    batch = sample(policy.contract, 2)
    features = policy.features(batch.observation, batch.instruction)
    assert features.ndim == 2
    assert torch.isfinite(features).all()
    with pytest.raises(ValueError, match="noise has shape"):
        policy.act(batch.observation, batch.instruction, noise=torch.zeros(2, 1, 1, 4))


def test_what_is_no_checkpoint_is_refused(policy: LeRobotPolicy, tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        LeRobotPolicy.load(tmp_path / "nowhere")
    folder = policy.save(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LeRobotPolicy.load(folder)


def test_lerobots_factory_knows_our_policy(tmp_path: Path):
    from lerobot.policies.factory import get_policy_class

    policy = make("chunk_flow")
    policy.save(tmp_path)
    again = get_policy_class("chunk_flow").from_pretrained(tmp_path)
    for name, weight in policy.module.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])

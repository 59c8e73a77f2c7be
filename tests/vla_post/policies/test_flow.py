"""Our own flow policy: what it sees, how it reads instructions, what older checkpoints meant."""

import json
from pathlib import Path

import pytest
import torch

from vla_post.policies import language
from vla_post.policies.flow_nets import keypoints
from vla_post.policies.lerobot_adapter import LeRobotPolicy

from .cells import build, draw, sample

needs_encoder = pytest.mark.skipif(not language.available(), reason="extra `language`")


@pytest.mark.parametrize("head", ["mlp", "transformer"])
def test_every_vector_and_camera_is_seen(head: str):
    policy = build("chunk_flow_transformer", "franka_joint.yaml", head=head)
    contract = policy.contract
    assert len(contract.images) == 3
    assert policy.observation_keys == list(contract.observations)
    assert (policy.horizon, policy.action_size) == (contract.chunk_horizon, contract.action.size)
    batch = sample(contract, 1)
    noise, _ = draw(policy, batch, 1)
    before = policy.act(batch.observation, batch.instruction, noise=noise)
    for key, value in batch.observation.items():
        changed = batch.observation | {key: value + 0.5}
        assert not torch.equal(policy.act(changed, batch.instruction, noise=noise), before), key
    policy.chunk_loss(batch).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("head", ["mlp", "transformer"])
def test_fifty_updates_on_one_batch_end_far_below_where_they_began(head: str):
    policy = build("chunk_flow_transformer", head=head)
    batch = sample(policy.contract, 4)
    noise, time = draw(policy, batch, 4)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    losses: list[float] = []
    for _ in range(50):
        loss = policy.chunk_loss(batch, noise=noise, time=time).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_keypoints_are_where_a_feature_is_bright():
    grid = torch.full((1, 2, 5, 5), -50.0)
    grid[0, 0, 0, 4] = grid[0, 1, 2, 2] = 50.0  # top right; centre
    torch.testing.assert_close(keypoints(grid), torch.tensor([[-1.0, 0.0, 1.0, 0.0]]))


@needs_encoder
def test_like_instructions_are_near_and_unlike_ones_are_not():
    drawer = language.embed("Open a drawer")
    assert drawer.norm() == pytest.approx(1.0, abs=1e-5)
    assert float(drawer @ language.embed("  pull the DRAWER open ")) > 0.8
    assert float(drawer @ language.embed("hammer a screw on the wall")) < 0.5
    assert torch.equal(drawer, language.embed("open a drawer "))


@needs_encoder
def test_the_robot_needs_no_encoder_for_its_own_tasks(tmp_path: Path, monkeypatch):
    trained = build("chunk_flow")
    trained.module.embed_instructions()
    trained.save(tmp_path)
    batch = sample(trained.contract, 2)
    noise, _ = draw(trained, batch, 1)
    expected = trained.act(batch.observation, batch.instruction, noise=noise)

    def missing(text: str) -> torch.Tensor:
        raise language.NoSentenceEncoder(f"no encoder for {text!r}")

    monkeypatch.setattr(language, "embed", missing)
    robot = LeRobotPolicy.load(tmp_path)
    loud = [text.upper() + " " for text in batch.instruction]
    assert torch.equal(robot.act(batch.observation, loud, noise=noise), expected)
    with pytest.raises(language.NoSentenceEncoder, match="no encoder for 'juggle'"):
        robot.act(batch.observation, ["Juggle", "Juggle"], noise=noise)


@needs_encoder
def test_an_instruction_beside_the_contracts_is_embedded_where_the_encoder_is():
    policy = build("chunk_flow")
    batch = sample(policy.contract, 1)
    noise, _ = draw(policy, batch, 1)
    known = len(policy.contract.tasks)
    new, newer = policy.module.slot("Juggle three balls"), policy.module.slot("Sing")
    assert (new, newer) == (known, known + 1)
    chunks = [
        policy.act(batch.observation, [t], noise=noise) for t in ("juggle three balls", "sing")
    ]
    assert not torch.equal(*chunks)
    assert len(policy.module.state_dict()["sentences"]) == known


def test_without_the_encoder_instructions_are_told_apart_by_their_hash(monkeypatch):
    monkeypatch.setattr(language, "available", lambda: False)
    policy = build("chunk_flow")
    assert policy.config.language == "hash"
    batch = sample(policy.contract, 1)
    noise, _ = draw(policy, batch, 1)
    one, other = (policy.act(batch.observation, [t], noise=noise) for t in ("juggle", "sing"))
    assert not torch.equal(one, other)
    assert torch.equal(one, policy.act(batch.observation, [" JUGGLE"], noise=noise))


def test_a_checkpoint_from_before_cameras_and_sentences_means_what_it_meant(tmp_path: Path):
    """Files as the first version wrote them: no new field, one-hot of the hash, MLP."""
    policy = build("chunk_flow", language="hash", instructions=[])
    policy.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for new in ("head", "attention_heads", "image_size", "eye_width", "language", "instructions",
                "language_width"):  # fmt: skip
        del config[new]
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = set(policy.module.state_dict())
    assert names == {"net.frequencies", "net.embed.weight", "net.embed.bias"} | {
        f"net.{part}.{kind}"
        for part in ("out", *(f"blocks.{i}.{j}" for i in range(3) for j in (0, 1)))
        for kind in ("weight", "bias")
    }
    old = LeRobotPolicy.load(tmp_path)
    batch = sample(policy.contract, 1)
    noise, _ = draw(policy, batch, 1)
    # The first version's network, written out.
    inputs = policy.preprocess(dict(batch.observation))
    net, slot = policy.module.net, policy.module.slot(batch.instruction[0])
    hot = torch.zeros(1, 64)
    hot[0, slot] = 1.0
    state = [inputs[k] for k in ("observation.environment_state", "observation.state")]
    x = noise[:, 0]
    with torch.no_grad():
        for step in range(5):
            angle = torch.tensor([[step / 5]]) * net.frequencies
            joined = torch.cat([*state, hot, x.flatten(1), angle.sin(), angle.cos()], dim=1)
            hidden = torch.nn.functional.gelu(net.embed(joined))
            for block in net.blocks:
                hidden = hidden + block(hidden)
            x = x + net.out(hidden).view_as(x) / 5
    got = old.act(batch.observation, batch.instruction, noise=noise)[:, 0]
    torch.testing.assert_close(got, policy.postprocess(x), atol=1e-5, rtol=1e-5)


def test_nothing_to_see_and_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="head 'cnn'"):
        build("chunk_flow", head="cnn")
    with pytest.raises(ValueError, match="vector or a camera"):
        build("chunk_flow", input_features={})

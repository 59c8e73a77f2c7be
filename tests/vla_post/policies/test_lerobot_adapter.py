"""lerobot's policies as our noun: equal losses, equal chunks, checkpoints that round-trip.

Real classes of lerobot at tiny sizes, without a hub; one of each for the whole module.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_post.policies.checkpoint import CheckpointError, read_card
from vla_post.policies.heads import FAMILIES, REFUSED, UnsupportedPolicy, check_family
from vla_post.policies.lerobot_adapter import LeRobotPolicy
from vla_post.policies.lora import LoraConfig

from .cells import CONTRACTS, build, draw, sample

FLOW = ("smolvla_tiny", "pi0_tiny", "pi05_tiny", "chunk_flow", "chunk_flow_transformer")


@pytest.fixture(scope="module")
def policies() -> Callable[[str], LeRobotPolicy]:
    made: dict[str, LeRobotPolicy] = {}

    def get(kind: str) -> LeRobotPolicy:
        if kind not in made:
            made[kind] = build(kind)
        made[kind].module.eval()
        return made[kind]

    return get


@pytest.fixture(params=list(CONTRACTS))
def policy(
    request: pytest.FixtureRequest, policies: Callable[[str], LeRobotPolicy]
) -> LeRobotPolicy:
    return policies(request.param)


def inputs_of(policy: LeRobotPolicy, batch: Any) -> dict[str, Any]:
    raw = dict(batch.observation) | {"task": batch.instruction, "action": batch.action}
    return policy.preprocess(raw) | {"action_is_pad": ~batch.valid}


def lerobots_loss(
    policy: LeRobotPolicy, batch: Any, noise: torch.Tensor, time: torch.Tensor, monkeypatch: Any
) -> torch.Tensor:
    """(B,) of lerobot's own training code on the given noise (B, H, W) and time (B,)."""
    module: Any = policy.module
    losses: list[torch.Tensor] = []
    for i in range(len(batch)):  # its reductions run over the batch, so one item at a time
        one = inputs_of(policy, pick(batch, i))
        if policy.kind in ("smolvla", "chunk_flow"):
            theirs = module(one, noise=noise[i : i + 1], time=1 - time[i : i + 1], reduction="none")
            losses.append(theirs[0][0])
        elif policy.kind in ("pi0", "pi05"):
            images, masks = module._preprocess_images(one)
            tokens = [one[f"observation.language.{k}"] for k in ("tokens", "attention_mask")]
            state = [module.prepare_state(one)] if policy.kind == "pi0" else []
            error = module.model.forward(
                images, masks, *tokens, *state, module.prepare_action(one),
                noise[i : i + 1], 1 - time[i : i + 1],
            )  # fmt: skip
            losses.append(error[0, batch.valid[i], : policy.action_size].mean())
        elif policy.kind == "diffusion":
            total = module.diffusion.noise_scheduler.config.num_train_timesteps
            step = ((1 - time[i : i + 1]) * total).long()
            monkeypatch.setattr(torch, "randn", lambda *_, i=i, **__: noise[i : i + 1])
            monkeypatch.setattr(torch, "randint", lambda *_, step=step, **__: step)
            one["observation.state"] = one["observation.state"][:, None]
            losses.append(module(one)[0])
            monkeypatch.undo()
        else:
            latent = noise[i].flatten()[: module.config.latent_dim][None]
            monkeypatch.setattr(torch, "randn_like", lambda *_, latent=latent: latent)
            losses.append(module(one)[0])
            monkeypatch.undo()
    return torch.stack(losses)


def pick(batch: Any, i: int) -> Any:
    return batch.replace(
        observation={k: v[i : i + 1] for k, v in batch.observation.items()},
        instruction=batch.instruction[i : i + 1],
        action=batch.action[i : i + 1],
        valid=batch.valid[i : i + 1],
        n=batch.n[i : i + 1],
    )


def test_loss_is_lerobots_own_on_the_same_noise_and_time(policy, monkeypatch):
    batch = sample(policy.contract, 3)
    noise, time = draw(policy, batch, 1)
    # lerobot's act reports its training loss only while training; it has no dropout at this size.
    policy.module.train(policy.kind == "act")
    ours = policy.chunk_loss(batch, noise=noise[:, 0], time=time[:, 0])
    theirs = lerobots_loss(policy, batch, noise[:, 0], time[:, 0], monkeypatch)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_chunks_are_lerobots_own_on_the_same_noise(policy):
    batch = sample(policy.contract, 2)
    noise, _ = draw(policy, batch, 1)
    ours = policy.act(batch.observation, batch.instruction, noise=noise)[:, 0]
    inputs = policy.preprocess(dict(batch.observation) | {"task": batch.instruction})
    extra = {} if policy.kind == "act" else {"noise": noise[:, 0]}
    if policy.kind == "diffusion":
        inputs["observation.state"] = inputs["observation.state"][:, None]
    theirs = policy.postprocess(policy.module.predict_action_chunk(inputs, **extra))
    # lerobot's diffusion hands out the steps to execute, a head the whole chunk.
    torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs, atol=1e-5, rtol=1e-4)


def test_samples_that_share_the_encoder_pass_equal_samples_that_do_not(policy):
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 3)
    together = policy.chunk_loss(batch, noise=noise, time=time)
    alone = [policy.chunk_loss(batch, noise=noise[:, i], time=time[:, i]) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).mean(dim=0), atol=1e-5, rtol=1e-4)
    context = policy.encode(batch.observation, batch.instruction)
    for _ in range(2):  # a context may be used again
        chunks = policy.sample(context, 2, 3, noise=noise)
        for i in range(3):
            one = policy.act(batch.observation, batch.instruction, noise=noise[:, i : i + 1])
            torch.testing.assert_close(chunks[:, i : i + 1], one, atol=1e-5, rtol=1e-4)


ENCODERS = {
    "smolvla": ["model.vlm_with_expert.vlm.model.vision_model"],
    "pi0": [
        "model.paligemma_with_expert.paligemma.model.vision_tower",
        "model.paligemma_with_expert.paligemma.model.language_model.layers.0",
    ],
    "diffusion": ["diffusion.rgb_encoder.0"],
    "act": ["model.backbone"],
}
ENCODERS["pi05"] = ENCODERS["pi0"]


def test_one_encoder_pass_serves_all_samples_and_steps(policy, monkeypatch):
    calls: list[str] = []
    hooks: list[Any] = []
    if policy.kind == "chunk_flow":
        encode = policy.module.encode
        monkeypatch.setattr(policy.module, "encode", lambda x: calls.append("encode") or encode(x))
    for name in ENCODERS.get(policy.kind, []):
        module = policy.module.get_submodule(name)
        hooks.append(module.register_forward_hook(lambda *_, name=name: calls.append(name)))
    expected = ENCODERS.get(policy.kind, ["encode"])
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 4)
    policy.act(batch.observation, batch.instruction, 4, noise=noise)
    assert calls == expected
    policy.chunk_loss(batch, noise=noise, time=time)
    assert calls == 2 * expected
    for hook in hooks:
        hook.remove()


def test_several_samples_differ_where_the_policy_is_stochastic(policy):
    batch = sample(policy.contract, 2)
    one, other = policy.act(batch.observation, batch.instruction, 2).unbind(dim=1)
    # ACT acts with its latent at 0, as its paper does; its prior can be sampled on request.
    assert torch.equal(one, other) == (policy.kind == "act")
    if policy.kind == "act":
        policy.head.latent_std = 1.0
        one, other = policy.act(batch.observation, batch.instruction, 2).unbind(dim=1)
        policy.head.latent_std = 0.0
        assert not torch.equal(one, other)


def gradients(policy: LeRobotPolicy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.module.zero_grad()
    loss.sum().backward()
    return {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}


def test_f4_an_item_without_valid_steps_has_no_loss_and_no_gradient(policy):
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 1)
    policy.module.train(policy.kind == "act")
    nothing = batch.replace(valid=torch.zeros_like(batch.valid))
    loss = policy.chunk_loss(nothing, noise=noise, time=time)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in gradients(policy, loss).values())


def test_f4_padded_steps_may_hold_anything(policy):
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 1)
    hidden = ~batch.valid[..., None]
    loss = policy.chunk_loss(batch, noise=noise, time=time)
    # In SmolVLA earlier action tokens do not attend to later ones, and ACT's encoder hides padded
    # steps, so even their content cannot be felt; the other networks see the whole noisy chunk, as
    # they do in lerobot, and only the loss is cut.
    for junk in (float("nan"), 1e6) if policy.kind in ("smolvla", "act") else (float("nan"),):
        action = torch.where(hidden, junk, batch.action)
        dirty = policy.chunk_loss(batch.replace(action=action), noise=noise, time=time)
        assert torch.isfinite(dirty).all()
        grads = gradients(policy, dirty)
        assert all(torch.isfinite(g).all() for g in grads.values())
        if policy.kind in ("smolvla", "act"):
            torch.testing.assert_close(dirty, loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pi0_tiny", "pi05_tiny"])
def test_f4_padding_action_dimensions_have_exactly_no_gradient(policies, kind):
    policy = policies(kind)
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 1)
    assert policy.noise_size == policy.action_size + 2
    grads = gradients(policy, policy.chunk_loss(batch, noise=noise, time=time))
    for name in ("model.action_out_proj.weight", "model.action_out_proj.bias"):
        assert (grads[name][policy.action_size :] == 0).all()
        assert (grads[name][: policy.action_size] != 0).any()


@pytest.mark.parametrize("kind", FLOW)
def test_signs_and_times_of_each_flow_policy(policies, kind, monkeypatch):
    """F1 and F2 through the adapter: a network that knows the data, in lerobot's own convention."""
    policy = policies(kind)
    batch = sample(policy.contract, 2).replace(
        valid=torch.ones(2, policy.horizon, dtype=torch.bool)
    )
    noise, time = draw(policy, batch, 1)
    data = inputs_of(policy, batch)["action"]
    data = torch.nn.functional.pad(data, (0, policy.noise_size - policy.action_size))
    sign = 1.0

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """data - noise, when x = (1 - t) noise + t data."""
        return sign * (data - x) / (1 - t[:, None, None])

    if policy.kind == "chunk_flow":
        monkeypatch.setattr(policy.module.net, "forward", lambda _, x, t: velocity(x, t))
    else:
        name = {"smolvla_tiny": "timestep"}.get(kind, "timestep")

        def denoise_step(*args: Any, **kw: Any) -> torch.Tensor:
            x, s = (kw["x_t"], kw[name]) if kw else args[-2:]
            return -velocity(x, 1 - s)  # lerobot: time 1 is noise, noise - action

        monkeypatch.setattr(policy.module.model, "denoise_step", denoise_step)
    monkeypatch.setattr(policy.head, "denoising_steps", 1)
    reached = policy.act(batch.observation, batch.instruction, noise=noise)[:, 0]
    torch.testing.assert_close(reached, batch.action, atol=1e-4, rtol=1e-4)
    time = time * 0.9
    right = policy.chunk_loss(batch, noise=noise, time=time)
    torch.testing.assert_close(right, torch.zeros(2), atol=1e-6, rtol=0)
    sign = -1.0
    wrong = policy.chunk_loss(batch, noise=noise, time=time)
    distance = (data - noise[:, 0])[..., : policy.action_size].square().mean(dim=(1, 2))
    torch.testing.assert_close(wrong, 4 * distance, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_comes_back_and_moves(policy, tmp_path: Path):
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
    assert again.contract.to_dict() == policy.contract.to_dict()
    assert not [p for p in (tmp_path / "moved").rglob("*") if p.suffix in {".pkl", ".bin", ".pt"}]


@pytest.mark.parametrize("kind", [*FLOW])
def test_the_instruction_matters(policies, kind):
    policy = policies(kind)
    batch = sample(policy.contract, 1)
    noise, _ = draw(policy, batch, 1)
    texts = [task.instruction for task in policy.contract.tasks.values()][:2]
    one, other = (policy.act(batch.observation, [t], noise=noise) for t in texts)
    assert not torch.equal(one, other)


def test_features_and_wrong_noise(policy):
    batch = sample(policy.contract, 2)
    features = policy.features(batch.observation, batch.instruction)
    assert features.ndim == 2
    assert torch.isfinite(features).all()
    assert not torch.equal(features[0], features[1])
    with pytest.raises(ValueError, match="noise has shape"):
        policy.act(batch.observation, batch.instruction, noise=torch.zeros(2, 1, 1, 4))


@pytest.mark.parametrize("kind", ["smolvla_tiny", "pi0_tiny", "act_tiny"])
def test_bfloat16_is_close_trains_and_is_kept(policies, kind, tmp_path: Path):
    policy = policies(kind)
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 1)
    exact = policy.act(batch.observation, batch.instruction, noise=noise)
    policy.precision = "bfloat16"
    close = policy.act(batch.observation, batch.instruction, noise=noise)
    loss = policy.chunk_loss(batch, noise=noise, time=time)
    grads = gradients(policy, loss)
    policy.save(tmp_path)
    policy.precision = "float32"
    assert close.dtype == loss.dtype == torch.float32
    assert 0 < (close - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads.values())
    assert LeRobotPolicy.load(tmp_path).precision == "bfloat16"


def test_frozen_parts_do_not_train_and_stay_frozen(tmp_path: Path):
    policy = build("smolvla_tiny")
    total = sum(p.numel() for p in policy.parameters())
    count = policy.freeze(["model.vlm_with_expert.vlm.*"])
    left = sum(p.numel() for p in policy.parameters())
    assert 0 < left == total - count < total
    batch = sample(policy.contract, 2)
    grads = gradients(policy, policy.chunk_loss(batch))
    assert grads
    assert not any(name.startswith("model.vlm_with_expert.vlm.") for name in grads)
    again = LeRobotPolicy.load(policy.save(tmp_path))
    assert sum(p.numel() for p in again.parameters()) == left
    with pytest.raises(
        ValueError, match=r"no parameter.*matches 'vision\*'.*model\.vlm_with_expert"
    ):
        policy.freeze(["vision*"])
    with pytest.raises(ValueError, match="nothing to train"):
        policy.freeze(["*"])


@pytest.mark.parametrize("kind", ["smolvla_tiny", "pi0_tiny"])
def test_lora_trains_little_round_trips_and_merges(kind, tmp_path: Path):
    pytest.importorskip("peft")
    policy = build(kind)
    policy.module.eval()
    batch = sample(policy.contract, 2)
    noise, time = draw(policy, batch, 1)
    before = policy.act(batch.observation, batch.instruction, noise=noise)
    total = sum(p.numel() for p in policy.parameters())
    small = policy.add_lora(LoraConfig(rank=4, alpha=8))
    assert 0 < small < 0.1 * total
    start = policy.act(batch.observation, batch.instruction, noise=noise)
    torch.testing.assert_close(start, before, atol=1e-5, rtol=1e-5)  # adapters begin at zero
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        policy.chunk_loss(batch, noise=noise, time=time).mean().backward()
        optimizer.step()
    moved = policy.act(batch.observation, batch.instruction, noise=noise)
    assert not torch.allclose(moved, before, atol=1e-4)
    again = LeRobotPolicy.load(policy.save(tmp_path))
    assert sum(p.numel() for p in again.parameters()) == small
    same = again.act(batch.observation, batch.instruction, noise=noise)
    torch.testing.assert_close(same, moved, rtol=0, atol=0)
    again.merge_lora()
    merged = again.act(batch.observation, batch.instruction, noise=noise)
    torch.testing.assert_close(merged, moved, atol=1e-4, rtol=1e-4)
    plain = LeRobotPolicy.load(again.save(tmp_path / "plain"))
    assert not any("lora" in name for name in plain.module.state_dict())


def test_every_type_of_lerobot_is_adapted_or_refused_with_a_reason():
    import lerobot.policies  # noqa: F401
    from lerobot.configs.policies import PreTrainedConfig

    known = set(PreTrainedConfig.get_known_choices())
    assert known - {"chunk_flow"} == (set(FAMILIES) - {"chunk_flow"}) | set(REFUSED)
    for kind in FAMILIES:
        check_family(kind)
    with pytest.raises(UnsupportedPolicy, match=r"'vqbet'.*dictionary.*Supported are .*smolvla"):
        check_family("vqbet")


def test_settings_that_no_single_observation_decides_are_refused():
    for kind, change, why in (
        ("pi0_tiny", {"use_relative_actions": True}, "relative"),
        ("act_tiny", {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}, "past calls"),
        ("diffusion_tiny", {"n_obs_steps": 2}, "observations in a row"),
    ):
        with pytest.raises(UnsupportedPolicy, match=why):
            build(kind, **change)


def test_what_is_no_checkpoint_is_refused(policies, tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        LeRobotPolicy.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no"):
        LeRobotPolicy.load(tmp_path)
    policies("chunk_flow").save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LeRobotPolicy.load(tmp_path)


def test_lerobots_factory_knows_our_policy(policies, tmp_path: Path):
    from lerobot.policies.factory import get_policy_class

    policy = policies("chunk_flow")
    policy.save(tmp_path)
    again = get_policy_class("chunk_flow").from_pretrained(tmp_path)
    for name, weight in policy.module.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])

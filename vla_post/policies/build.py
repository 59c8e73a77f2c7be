"""Fresh policies for a cell: sizes and processors from its contract."""

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from trajectory_store.contract import Contract
from vla_post.policies.lerobot_adapter import LeRobotPolicy, Statistics, parse_features
from vla_post.policies.pi_tiny import TinyPiConfig, write_pi_folder
from vla_post.policies.smolvla_tiny import TinyVlmConfig, write_vlm_folder


def build_policy(
    kind: str, contract: Contract, statistics: Statistics, *, device: str = "cpu"
) -> LeRobotPolicy:
    """A policy with random weights, small enough for a CPU.

    Args:
        kind: one of `KINDS`.
        statistics: of the training data, from `vla_post.training.data.statistics`.

    Raises:
        ValueError: no such kind, or the contract lacks what the kind needs to see.
    """
    if kind not in KINDS:
        raise ValueError(f"no policy kind {kind!r}; there are {', '.join(KINDS)}")
    config, vlm_folder = KINDS[kind](contract, device)
    policy = LeRobotPolicy.build(config, contract, statistics, vlm_folder=vlm_folder)
    if config.type == "chunk_flow":
        module: Any = policy.module
        module.embed_instructions()
    return policy


def _common(contract: Contract, device: str, *, sees: tuple[str, ...] = ()) -> dict[str, Any]:
    """What all lerobot configurations share; `sees` names the vectors that the type can take."""
    inputs, output = parse_features(contract)
    return {
        "input_features": {
            k: f for k, f in inputs.items() if k not in contract.vectors or k in sees
        },
        "output_features": output,
        "device": device,
        "push_to_hub": False,
        "n_action_steps": contract.execute_steps,
    }


def _needs(contract: Contract, kind: str, *, camera: bool) -> None:
    lacking = [] if "observation.state" in contract.vectors else ["observation.state"]
    if camera and not contract.images:
        lacking.append("a camera")
    if (
        not camera
        and not contract.images
        and "observation.environment_state" not in contract.vectors
    ):
        lacking.append("a camera or observation.environment_state")
    if lacking:
        raise ValueError(
            f"cell {contract.cell!r} lacks {' and '.join(lacking)}, which {kind} needs to see; "
            "chunk_flow_transformer works from any vectors and cameras"
        )


def _smolvla_tiny(contract: Contract, device: str) -> tuple[Any, Path]:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    _needs(contract, "smolvla_tiny", camera=True)
    size = TinyVlmConfig()
    folder = write_vlm_folder(Path(mkdtemp(prefix="tiny_smolvlm_")), size)
    config = SmolVLAConfig(
        **_common(contract, device, sees=("observation.state",)),
        vlm_model_name=str(folder),
        load_vlm_weights=False,
        num_vlm_layers=size.text_layers,
        freeze_vision_encoder=False,
        train_expert_only=False,
        chunk_size=contract.chunk_horizon,
        num_steps=5,
        max_state_dim=contract.vectors["observation.state"].shape[0],
        max_action_dim=contract.action.size,
        resize_imgs_with_padding=(size.image_size, size.image_size),
        tokenizer_max_length=32,
        pad_language_to="longest",
    )
    return config, folder


def _pi_tiny(kind: str) -> Callable[[Contract, str], tuple[Any, Path]]:
    def make(contract: Contract, device: str) -> tuple[Any, Path]:
        from lerobot.policies.pi0.configuration_pi0 import PI0Config
        from lerobot.policies.pi05.configuration_pi05 import PI05Config

        _needs(contract, f"{kind}_tiny", camera=True)
        size = TinyPiConfig()
        state = contract.vectors["observation.state"].shape[0]
        config = {"pi0": PI0Config, "pi05": PI05Config}[kind](
            **_common(contract, device, sees=("observation.state",)),
            chunk_size=contract.chunk_horizon,
            num_inference_steps=5,
            max_state_dim=state,
            max_action_dim=contract.action.size + 2,
            image_resolution=(size.image_size, size.image_size),
            # pi0.5 writes the state into the prompt, up to four tokens a number.
            tokenizer_max_length=32 if kind == "pi0" else 48 + 4 * state,
        )
        return config, write_pi_folder(Path(mkdtemp(prefix=f"tiny_{kind}_")), size)

    return make


def _diffusion_tiny(contract: Contract, device: str) -> tuple[Any, None]:
    from lerobot.configs.types import NormalizationMode
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    _needs(contract, "diffusion_tiny", camera=False)
    if contract.chunk_horizon % 4:
        raise ValueError(
            f"chunk_horizon is {contract.chunk_horizon}; diffusion_tiny halves the chunk twice and "
            "needs a multiple of 4"
        )
    config = DiffusionConfig(
        **_common(contract, device, sees=("observation.state", "observation.environment_state")),
        n_obs_steps=1,
        horizon=contract.chunk_horizon,
        drop_n_last_frames=0,
        pretrained_backbone_weights=None,
        use_group_norm=True,
        down_dims=(64, 128),
        n_groups=8,
        diffusion_step_embed_dim=64,
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
        do_mask_loss_for_padding=True,
        normalization_mapping=_modes(NormalizationMode.MIN_MAX),
    )
    return config, None


def _act_tiny(contract: Contract, device: str) -> tuple[Any, None]:
    from lerobot.configs.types import NormalizationMode
    from lerobot.policies.act.configuration_act import ACTConfig

    _needs(contract, "act_tiny", camera=False)
    config = ACTConfig(
        **_common(contract, device, sees=("observation.state", "observation.environment_state")),
        chunk_size=contract.chunk_horizon,
        pretrained_backbone_weights=None,
        dim_model=64,
        n_heads=4,
        dim_feedforward=128,
        n_encoder_layers=2,
        n_vae_encoder_layers=2,
        latent_dim=8,
        normalization_mapping=_modes(NormalizationMode.MEAN_STD),
    )
    return config, None


def _modes(vectors: Any) -> dict[str, Any]:
    from lerobot.configs.types import NormalizationMode

    return {"VISUAL": NormalizationMode.MEAN_STD} | dict.fromkeys(
        ("STATE", "ENV", "ACTION"), vectors
    )


def _chunk_flow(contract: Contract, device: str) -> tuple[Any, None]:
    """Vectors only, MLP head: for tiny problems, where it learns in seconds."""
    if not contract.vectors:
        raise ValueError(
            f"cell {contract.cell!r} declares no vector; chunk_flow_transformer works from cameras"
        )
    return _own_flow(contract, device, list(contract.vectors)), None


def _chunk_flow_transformer(contract: Contract, device: str) -> tuple[Any, None]:
    """Everything that the cell declares, transformer head."""
    keys = list(contract.observations)
    return _own_flow(contract, device, keys, head="transformer", width=128, layers=4), None


def _own_flow(contract: Contract, device: str, keys: list[str], **sizes: Any) -> Any:
    from vla_post.policies import language
    from vla_post.policies.flow import ChunkFlowConfig

    common = _common(contract, device, sees=tuple(contract.vectors))
    common["input_features"] = {key: common["input_features"][key] for key in keys}
    return ChunkFlowConfig(
        **common,
        chunk_size=contract.chunk_horizon,
        language="sentence" if language.available() else "hash",
        instructions=list(dict.fromkeys(task.instruction for task in contract.tasks.values())),
        **sizes,
    )


KINDS: dict[str, Callable[[Contract, str], tuple[Any, Path | None]]] = {
    "smolvla_tiny": _smolvla_tiny,
    "pi0_tiny": _pi_tiny("pi0"),
    "pi05_tiny": _pi_tiny("pi05"),
    "diffusion_tiny": _diffusion_tiny,
    "act_tiny": _act_tiny,
    "chunk_flow": _chunk_flow,
    "chunk_flow_transformer": _chunk_flow_transformer,
}
"""Name -> (lerobot's configuration, folder of its vision-language model) for a cell and device."""

"""Fresh policies for a cell: sizes and processors from its contract."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from trajectory_store.contract import Contract
from vla_post.policies.lerobot_adapter import LeRobotPolicy, Statistics, parse_features
from vla_post.policies.smolvla_tiny import TinyVlmConfig, write_vlm_folder


def build_policy(
    kind: str, contract: Contract, statistics: Statistics, *, device: str = "cpu"
) -> LeRobotPolicy:
    """A policy with random weights.

    Args:
        kind: `smolvla_tiny` sees images, state and the instruction; `chunk_flow` vectors and the
            instruction.
        statistics: of the training data, from `vla_post.training.statistics`.

    Raises:
        ValueError: the contract lacks what the kind needs to see.
    """
    if kind not in ("smolvla_tiny", "chunk_flow"):
        raise ValueError(f"no policy kind {kind!r}; there are smolvla_tiny and chunk_flow")
    build = {"smolvla_tiny": _smolvla_tiny, "chunk_flow": _chunk_flow}[kind]
    return LeRobotPolicy.build(build(contract, device), contract, statistics)


def _smolvla_tiny(contract: Contract, device: str) -> Any:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    if not contract.images or "observation.state" not in contract.vectors:
        raise ValueError(
            f"cell {contract.cell!r} has no camera or no observation.state; smolvla_tiny "
            "sees both. "
            "Use chunk_flow for cells without cameras."
        )
    size = TinyVlmConfig()
    inputs, output = parse_features(contract)
    inputs = {k: f for k, f in inputs.items() if k != "observation.environment_state"}
    square = (size.image_size, size.image_size)
    return SmolVLAConfig(
        input_features=inputs,
        output_features=output,
        device=device,
        push_to_hub=False,
        vlm_model_name=str(write_vlm_folder(Path(mkdtemp(prefix="tiny_smolvlm_")), size)),
        load_vlm_weights=False,
        num_vlm_layers=size.text_layers,
        freeze_vision_encoder=False,
        train_expert_only=False,
        chunk_size=contract.chunk_horizon,
        n_action_steps=contract.execute_steps,
        num_steps=5,
        max_state_dim=contract.vectors["observation.state"].shape[0],
        max_action_dim=contract.action.size,
        resize_imgs_with_padding=square,
        tokenizer_max_length=32,
        pad_language_to="longest",
    )


def _chunk_flow(contract: Contract, device: str) -> Any:
    from vla_post.policies.flow import ChunkFlowConfig

    inputs, output = parse_features(contract)
    return ChunkFlowConfig(
        input_features={k: f for k, f in inputs.items() if k in contract.vectors},
        output_features=output,
        device=device,
        push_to_hub=False,
        chunk_size=contract.chunk_horizon,
        n_action_steps=contract.execute_steps,
    )

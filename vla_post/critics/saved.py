"""A critic on disk: weights as safetensors, with a card that says how to build it again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from trajectory_store import Contract
from vla_post.batch import Policy
from vla_post.critics.bins import Bins
from vla_post.critics.build import build_encoder
from vla_post.critics.encoders import Encoder
from vla_post.critics.networks import ChunkCritic, CriticConfig, InputSize

FILE = "critic.safetensors"
"""Beside the weights of the policy that it judged."""
CARD = "vla_post/critic/1"


class CriticMissing(ValueError):
    """No critic where one was expected, or not one for this policy; the message says what to do."""


def card_of(critic: ChunkCritic, encoder: Encoder) -> dict[str, str]:
    """Metadata for the weights' file: everything that `load_critic` needs."""
    card = {
        "format": CARD,
        "config": asdict(critic.config),
        "inputs": asdict(encoder.size),
        "chunk": critic.chunk,
        "actions": len(critic.get_buffer("action_mean")),
        "bins": None if critic.bins is None else asdict(critic.bins),
        "encoder": {"kind": encoder.kind, "hash": encoder.hash},
    }
    return {"card": json.dumps(card)}


def load_critic(
    folder: str | Path, contract: Contract, *, encoder_policy: Policy
) -> tuple[ChunkCritic, Encoder]:
    """The critic that was published with a checkpoint, and what it sees through.

    Args:
        folder: the checkpoint.
        encoder_policy: whose features it sees; with vectors, any version of the run.

    Raises:
        CriticMissing: none in the folder, unreadable, or made with another encoder.
    """
    file = Path(folder) / FILE
    if not file.exists():
        raise CriticMissing(
            f"{file}: no critic; `vla-post train aloe` publishes one with each version"
        )
    try:
        with safe_open(file, "pt") as opened:
            card: dict[str, Any] = json.loads((opened.metadata() or {}).get("card", "{}"))
        if card.get("format") != CARD:
            raise CriticMissing(f"{file}: format {card.get('format')!r}; expected {CARD!r}")
        bins = None if card["bins"] is None else Bins(**card["bins"])
        blank = torch.zeros(card["actions"])
        critic = ChunkCritic(
            CriticConfig(**card["config"]),
            InputSize(**card["inputs"]),
            chunk=card["chunk"],
            action_mean=blank,
            action_std=blank,
            bins=bins,
        )
        critic.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise CriticMissing(f"{file}: this critic does not load ({error})") from error
    encoder = build_encoder(card["encoder"]["kind"], encoder_policy, contract)
    if encoder.hash != card["encoder"]["hash"]:
        raise CriticMissing(
            f"{file}: the critic sees through another encoder than this policy's. Name the "
            "checkpoint that its run started from (--encoder)"
        )
    module = getattr(encoder_policy, "module", None)
    if isinstance(module, torch.nn.Module):
        critic.to(next(module.parameters()).device)
    return critic.eval(), encoder

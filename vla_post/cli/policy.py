"""`vla-post policy`: bring lerobot's policies in, and look at checkpoints."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vla_post.cli.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Import:
    """A lerobot policy directory becomes a checkpoint for a cell.

    Weights, processors and statistics stay lerobot's; features take the contract's names.
    """

    folder: tyro.conf.Positional[Path]
    """Written by lerobot-train (`.../pretrained_model`) or downloaded from a hub."""
    contract: Path
    """Of the cell that it shall drive."""
    out: Path
    """Checkpoint folder to write."""
    rename: tuple[str, ...] = ()
    """POLICY_FEATURE=CELL_FEATURE, such as observation.images.top=observation.images.corner."""
    vlm: Path | None = None
    """Folder with the tokenizer of its vision-language model, where it is not on this machine."""
    freeze: tuple[str, ...] = ()
    """Parameters that shall not train, such as 'model.vlm_with_expert.vlm.*' (* and ? match)."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank instead of the weights (extra `lora`)."""
    lora_targets: str = ""
    """Regular expression over module names; lerobot's own choice if empty."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """In which the networks compute."""

    def run(self) -> None:
        from trajectory_store.contract import load_contract
        from vla_post.policies.importing import import_lerobot, is_ours

        pairs = [entry.partition("=") for entry in self.rename]
        for entry, (before, _, after) in zip(self.rename, pairs, strict=True):
            if not before or not after:
                raise UserError(f"--rename {entry!r}: expected POLICY_FEATURE=CELL_FEATURE")
        if self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"--out {self.out}: the folder is not empty")
        if is_ours(self.folder):
            raise UserError(f"{self.folder} already is a checkpoint; use it as it is")
        policy = import_lerobot(
            self.folder,
            load_contract(self.contract),
            rename={before: after for before, _, after in pairs},
            vlm_folder=self.vlm,
            device="cpu",
        )
        if self.lora_rank:
            from vla_post.policies.lora import LoraConfig

            policy.add_lora(
                LoraConfig(
                    rank=self.lora_rank, alpha=float(self.lora_rank), targets=self.lora_targets
                )
            )
        policy.freeze(self.freeze)
        policy.precision = self.precision
        policy.save(self.out)
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class New:
    """A policy with random weights for the cell of a store, to be trained from scratch.

    `vla-post train hg-dagger --start OUT --demonstrations STORE` then clones the store. A large
    pretrained policy comes in with `vla-post policy import` instead.
    """

    kind: tyro.conf.Positional[str]
    """Its networks: chunk_flow (vectors), chunk_flow_transformer (and cameras), act_tiny, ..."""
    store: Path
    """A store of the cell, or a folder of them; its statistics scale what the policy sees and does,
    for good."""
    out: Path
    """Checkpoint folder to write."""
    seed: int = 0

    def run(self) -> None:
        from vla_post.policies.build import KINDS

        if self.kind not in KINDS:
            raise UserError(f"no policy kind {self.kind!r}; there are {', '.join(KINDS)}")
        if self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"--out {self.out}: the folder is not empty")
        import torch

        from trajectory_store import FleetView
        from vla_post.policies.build import build_policy
        from vla_post.training.data import statistics

        view = FleetView(self.store)
        if not view.episodes:
            raise UserError(f"--store {self.store}: no finished episodes in there to measure")
        contract = view.stores[0].contract
        torch.manual_seed(self.seed)
        try:
            policy = build_policy(self.kind, contract, statistics(view, contract))
        except ValueError as error:
            raise UserError(f"{self.kind}: {error}") from error
        policy.save(self.out)
        print(self.out)


@dataclass(frozen=True, kw_only=True)
class Show:
    """What a checkpoint is, sees and emits, and what of it trains."""

    checkpoint: tyro.conf.Positional[Path]

    def run(self) -> None:
        from vla_post.policies.lerobot_adapter import LeRobotPolicy

        policy = LeRobotPolicy.load(self.checkpoint, device="cpu")
        total = sum(p.numel() for p in policy.module.parameters())
        trains = sum(p.numel() for p in policy.parameters())
        lora = "none" if policy.lora is None else f"rank {policy.lora.rank}"
        lines = {
            "kind": policy.kind,
            "cell": f"{policy.contract.cell} ({policy.contract.sha256[:12]})",
            "sees": ", ".join(policy.observation_keys),
            "emits": f"chunks of {policy.horizon} x {policy.action_size}, in "
            f"{policy.head.denoising_steps} steps",
            "parameters": f"{total:,}, of which {trains:,} train",
            "frozen": ", ".join(policy.frozen) or "none",
            "lora": lora,
            "precision": policy.precision,
            "guidance": "none (trained without an indicator)"
            if policy.guidance is None
            else f"beta {policy.guidance.beta:g}",
        }
        for name, value in lines.items():
            print(f"{name:<11} {value}")


@dataclass(frozen=True, kw_only=True)
class SetGuidance:
    """A copy of a RECAP checkpoint that is asked for good actions more or less strongly."""

    checkpoint: tyro.conf.Positional[Path]
    out: Path
    """Checkpoint folder to write; published versions never change."""
    beta: float
    """1 asks for positive chunks; 1.5 to 2.5 moves further from the unasked policy, at twice the
    network calls; 0 does not ask."""

    def run(self) -> None:
        from vla_post.policies.checkpoint import CARD, read_card
        from vla_post.policies.indicator import Guidance

        card = read_card(self.checkpoint)
        if card.get("guidance") is None:
            raise UserError(
                f"{self.checkpoint}: trained without an indicator, so there is nothing to ask it "
                "for; `vla-post train recap` trains with one"
            )
        if self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"--out {self.out}: the folder is not empty")
        card["guidance"] = asdict(Guidance(beta=self.beta))
        shutil.copytree(self.checkpoint, self.out, dirs_exist_ok=True)
        (self.out / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
        print(self.out)


policy_command = (
    Annotated[New, tyro.conf.subcommand("new")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[SetGuidance, tyro.conf.subcommand("guidance")]
)

"""Low-rank adapters (arXiv:2106.09685) inside a lerobot policy, by peft.

The adapters are injected in place, so the policy keeps its class, its names and its head. The extra
`lora` installs peft.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: str = ""
    """Regular expression over module names; lerobot's own choice for the policy type if empty."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: rank must be at "
                "least 1, alpha above 0, dropout in [0, 1)"
            )


def add_lora(module: Any, config: LoraConfig) -> None:
    """Freezes the module and injects adapters.

    Raises:
        ValueError: peft is missing, the type has no default targets, or nothing matches them.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs the package peft: pip install 'vla-post[lora]'") from None

    defaults = getattr(module, "_get_default_peft_targets", lambda: None)() or {}
    targets = config.targets or defaults.get("target_modules")
    if not targets:
        raise ValueError(
            f"lerobot names no LoRA targets for policy type {module.config.type!r}; give a regular "
            "expression over module names"
        )
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    # Raises ValueError where nothing matches, and names the expression.
    peft.inject_adapter_in_model(settings, module)


def merge_lora(module: nn.Module) -> None:
    """Folds the adapters into the weights and removes them; everything trains again."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            parent, _, last = name.rpartition(".")
            layer.merge(safe_merge=True)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            setattr(module.get_submodule(parent), last, layer.get_base_layer())
    for parameter in module.parameters():
        parameter.requires_grad_(True)

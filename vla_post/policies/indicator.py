"""The improvement indicator of RECAP (arXiv:2511.14759): what a policy is told about its action.

A policy that was trained with it reads "Advantage: positive" or "Advantage: negative" after the
instruction, or neither, and is asked for positive chunks. It is text for every policy here:
language-conditioned ones read it, `chunk_flow` takes it off the instruction and adds a learned
vector instead. N items, H chunk length, W action width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from vla_post.policies.rtc import Velocity


class Indicator(IntEnum):
    """Was the action better than expected?"""

    NONE = 0
    """Not said: the indicator was dropped."""
    POSITIVE = 1
    NEGATIVE = 2


_TEXT = {Indicator.POSITIVE: "Advantage: positive", Indicator.NEGATIVE: "Advantage: negative"}


def with_indicator(instruction: str, indicator: Indicator) -> str:
    """The prompt; without an indicator it is the instruction itself, character for character."""
    return instruction if indicator is Indicator.NONE else f"{instruction}\n{_TEXT[indicator]}"


def split_indicator(prompt: str) -> tuple[str, Indicator]:
    """(instruction, indicator) of a prompt."""
    instruction, separator, last = prompt.rpartition("\n")
    for indicator, text in _TEXT.items():
        if separator and last.strip().lower() == text.lower():
            return instruction, indicator
    return prompt, Indicator.NONE


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a policy with an indicator acts. Kept in the checkpoint's card."""

    beta: float = 1.0
    """1 asks for positive chunks, 0 asks for nothing, above 1 moves further from what the policy
    would do unasked (Eq. R10), at two network calls a step; large values make motions jerky."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 10.0:
            raise ValueError(
                f"beta is {self.beta}; expected 1 (ask for positive chunks) up to about 2.5"
            )

    def prompts(self, instruction: Sequence[str]) -> list[list[str]]:
        """The prompts of one pass, or of the two passes that `extrapolated` wants, in its order.

        A prompt that has an indicator keeps it.
        """
        plain = list(instruction)
        if any(split_indicator(text)[1] for text in plain) or self.beta == 0.0:
            return [plain]
        asked = [with_indicator(text, Indicator.POSITIVE) for text in plain]
        return [asked] if self.beta == 1.0 else [asked, plain]


def extrapolated(velocity: Velocity, beta: float) -> Velocity:
    """Classifier-free guidance, f = f_plain + beta (f_asked - f_plain) (Eq. R10).

    Args:
        velocity: of 2 N items: N that were asked for positive chunks, then the same N that were
            not.

    Returns:
        A field of N items.
    """

    def field(x: Tensor, time: Tensor) -> Tensor:
        both = velocity(torch.cat([x, x]), torch.cat([time, time]))
        # `chunk(2)` would make the batch size a constant of an exported graph.
        asked, plain = both.unflatten(0, (2, -1)).unbind(0)
        return plain + beta * (asked - plain)

    return field

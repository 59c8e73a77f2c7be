"""Observation -> what a critic sees. Frozen: a critic whose inputs move under it must start again.

B batch, M feature tokens of size F, P proprioception.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from trajectory_store import Contract
from vla_post.batch import Observation, Policy
from vla_post.critics.networks import CriticInput, InputSize

PROPRIOCEPTION = "observation.state"
CACHED_FEATURES, CACHED_PROPRIOCEPTION = "critic.features", "critic.proprioception"
"""Keys of an observation that brings what the encoder would say of it; see `FeatureCache`."""


@runtime_checkable
class Encoder(Protocol):
    """Maps observations to critic inputs; never trained with the critic."""

    size: InputSize
    kind: Literal["state", "policy"]

    def __call__(self, observation: Observation, instruction: Sequence[str]) -> CriticInput: ...

    def proprioception(self, observation: Observation) -> Float[Tensor, "B P"]:
        """The part that changes at every tick, frames or not."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run must see through again; {} where the checkpoint says it all."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...

    @property
    def hash(self) -> str:
        """Of everything that the output depends on beside the input."""
        ...


class StateEncoder:
    """Vectors of the observation, normalised once and for all, and a one-hot of the instruction.

    Args:
        statistics: {key: {"mean", "std"}} of the vectors; the policy's checkpoint has them.
        instructions: that occur; others share the last slot.
    """

    kind: Literal["state", "policy"] = "state"

    def __init__(
        self,
        statistics: Mapping[str, Mapping[str, Any]],
        instructions: Sequence[str],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.keys = sorted(k for k in statistics if k != "action")
        self.instructions = list(instructions)
        self._scale = {
            key: tuple(
                torch.as_tensor(np.asarray(statistics[key][name], np.float32), device=device)
                for name in ("mean", "std")
            )
            for key in self.keys
        }
        others = [k for k in self.keys if k != PROPRIOCEPTION]
        lengths = {k: len(self._scale[k][0]) for k in self.keys}
        self.size = InputSize(
            tokens=1,
            features=sum(lengths[k] for k in others) + len(self.instructions) + 1,
            proprioception=lengths.get(PROPRIOCEPTION, 0),
        )

    def __call__(self, observation: Observation, instruction: Sequence[str]) -> CriticInput:
        scaled = {
            key: (observation[key].flatten(1) - mean) / std
            for key, (mean, std) in self._scale.items()
        }
        first = next(iter(scaled.values()))
        slots = [
            self.instructions.index(text) if text in self.instructions else len(self.instructions)
            for text in instruction
        ]
        hot = nn.functional.one_hot(
            torch.tensor(slots, device=first.device), len(self.instructions) + 1
        )
        others = [value for key, value in scaled.items() if key != PROPRIOCEPTION]
        return CriticInput(
            features=torch.cat([*others, hot.to(first)], dim=1)[:, None],
            proprioception=scaled.get(PROPRIOCEPTION, first[:, :0]),
        )

    def proprioception(self, observation: Observation) -> Float[Tensor, "B P"]:
        if PROPRIOCEPTION not in self._scale:
            return next(iter(observation.values())).flatten(1)[:, :0]
        mean, std = self._scale[PROPRIOCEPTION]
        return (observation[PROPRIOCEPTION].flatten(1) - mean) / std

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass

    @property
    def hash(self) -> str:
        digest = hashlib.sha256(repr((self.keys, self.instructions)).encode())
        for mean, std in self._scale.values():
            digest.update(mean.cpu().numpy().tobytes() + std.cpu().numpy().tobytes())
        return digest.hexdigest()


class PolicyEncoder:
    """The policy's own features, from a frozen copy taken when the critic begins.

    Training the policy does not move the critic's inputs. One zero observation tells its size.
    """

    kind: Literal["state", "policy"] = "policy"

    def __init__(self, policy: Policy, contract: Contract) -> None:
        self._policy = copy.deepcopy(policy)
        module = getattr(self._policy, "module", None)
        self.module: nn.Module = module if isinstance(module, nn.Module) else nn.Module()
        self.module.requires_grad_(False).eval()
        state = contract.vectors.get(PROPRIOCEPTION)
        zero = {
            key: torch.zeros(1, *self._network_shape(contract, key))
            for key in contract.observations
        }
        first = next(iter(contract.tasks.values())).instruction
        device = next(self.module.parameters(), torch.empty(0)).device
        with torch.no_grad():
            zero = {key: value.to(device) for key, value in zero.items()}
            features = self._policy.features(zero, [first])
        known = getattr(policy, "statistics", {}).get(PROPRIOCEPTION, {"mean": 0.0, "std": 1.0})
        self._mean, self._std = (
            torch.as_tensor(np.asarray(known[name], np.float32), device=device)
            for name in ("mean", "std")
        )
        self.size = InputSize(
            tokens=1,
            features=features.shape[1],
            proprioception=0 if state is None else state.shape[0],
        )

    @staticmethod
    def _network_shape(contract: Contract, key: str) -> tuple[int, ...]:
        shape = contract.observations[key].shape
        return shape if key in contract.vectors else (shape[2], shape[0], shape[1])

    @property
    def device(self) -> torch.device:
        return self._mean.device

    @torch.no_grad()
    def __call__(self, observation: Observation, instruction: Sequence[str]) -> CriticInput:
        if CACHED_FEATURES in observation:
            return CriticInput(
                features=observation[CACHED_FEATURES],
                proprioception=observation[CACHED_PROPRIOCEPTION],
            )
        features = self._policy.features(observation, list(instruction))
        return CriticInput(
            features=features[:, None].float(), proprioception=self.proprioception(observation)
        )

    def proprioception(self, observation: Observation) -> Float[Tensor, "B P"]:
        if PROPRIOCEPTION not in observation:
            return next(iter(observation.values())).flatten(1)[:, :0]
        return (observation[PROPRIOCEPTION].flatten(1).float() - self._mean) / self._std

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(state)

    @property
    def hash(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(name.encode() + plain.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

"""What the critic that was published with a version says of that version's chunks.

A hint for people, as `doubt` is. The critic needs PyTorch; other backends have none. n chunks,
H chunk length, A action size.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vla_post.export.runtime import ChunkPolicy, StoredObservation, TorchPolicy

CriticOfChunks = Callable[
    [StoredObservation, str, Float[np.ndarray, "n H A"]], Float[np.ndarray, " n"]
]
"""(one observation, instruction, chunks in robot units) -> the smallest value of the heads."""
FILE = "critic.safetensors"


def load_critic_of(policy: ChunkPolicy, folder: Path | None) -> CriticOfChunks | None:
    """The critic in a checkpoint's folder; None where there is none, or the backend has no torch.

    Raises:
        vla_post.critics.saved.CriticMissing: it does not load, or sees through another encoder.
    """
    if folder is None or not isinstance(policy, TorchPolicy) or not (folder / FILE).exists():
        return None
    import torch

    from vla_post.batch import observation_from_numpy
    from vla_post.critics.ensemble import aggregate
    from vla_post.critics.saved import load_critic

    inner = policy.policy
    critic, encoder = load_critic(folder, inner.contract, encoder_policy=inner)

    def value(
        observation: StoredObservation, instruction: str, chunks: Float[np.ndarray, "n H A"]
    ) -> Float[np.ndarray, " n"]:
        keys = [key for key in inner.contract.observations if key in observation]
        batch = {key: observation[key][None] for key in keys}
        with torch.no_grad():
            seen = encoder(observation_from_numpy(batch, inner.device), [instruction])
            q = critic(seen, torch.from_numpy(chunks)[None].to(inner.device))[0]
            return aggregate(q, "minimum").cpu().numpy()

    return value

"""Changes to observations between the store and the network, while learning.

What a robot needs too (layout, scale, normalisation) is elsewhere, once for both:
`batch.observation_from_numpy` and the policy's own processors.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vla_post import parallel
from vla_post.batch import Observation


def random_shift(
    image: Float[Tensor, "B C height width"], pixels: int, generator: torch.Generator | None = None
) -> Float[Tensor, "B C height width"]:
    """Each image moved by up to `pixels` in both directions; borders repeat (arXiv:2004.13649)."""
    if pixels == 0:
        return image
    size, _, height, width = image.shape
    padded = torch.nn.functional.pad(image, (pixels,) * 4, mode="replicate")

    def draw(rows: int) -> Tensor:
        return torch.randint(0, 2 * pixels + 1, (2, rows), generator=generator).T

    down, right = parallel.share(draw, size).T
    rows = (down[:, None] + torch.arange(height)).to(image.device)
    columns = (right[:, None] + torch.arange(width)).to(image.device)
    item = torch.arange(size, device=image.device)[:, None, None]
    return padded[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def shift_images(
    observation: Observation, pixels: int, generator: torch.Generator | None = None
) -> Observation:
    """`random_shift` of every image of an observation; vectors stay."""
    return {
        key: random_shift(value, pixels, generator) if value.ndim == 4 else value
        for key, value in observation.items()
    }

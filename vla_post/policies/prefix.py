"""How strongly a new chunk follows the running one, row by row; numpy only, for the robot."""

import numpy as np
from jaxtyping import Float


def prefix_weights(
    delay: int, overlap: int, horizon: int, schedule: str = "exp"
) -> Float[np.ndarray, " H"]:
    """W of real-time chunking: 1 before `delay`, falling until `overlap`, 0 from there on.

    Raises:
        ValueError: unless 0 <= delay and 0 <= overlap <= horizon.
    """
    if delay < 0 or not 0 <= overlap <= horizon:
        raise ValueError(
            f"delay is {delay} and the overlap {overlap} of a horizon of {horizon}; expected "
            "delay >= 0 and an overlap within the horizon"
        )
    rows = np.arange(horizon, dtype=np.float32)
    delay = min(delay, overlap)
    left = np.clip((overlap - rows) / (overlap - delay + 1), 0.0, 1.0)
    if schedule == "exp":
        left = left * np.expm1(left) / (np.e - 1.0)
    return np.where(rows < delay, 1.0, left).astype(np.float32)

"""A candidate that would hurt a robot is refused before it moves one."""

from collections.abc import Mapping

import numpy as np
import pytest

from trajectory_store.contract import ActionFeature
from vla_post.export.adoption import AdoptionRefused, require_fit

ACTION = ActionFeature.model_validate(
    {
        "names": ["a", "b"],
        "unit": "rad",
        "mode": "absolute",
        "limits": {"position": [[-1, 1], [0, 4]]},
    }
)
PROBES = [({"observation.state": np.zeros(2, np.float32)}, "wave")] * 3


class Constant:
    """Always the same chunk; a stand-in for a network, which is not under test here."""

    def __init__(self, *rows: list[float]) -> None:
        self.chunk = np.array(rows, np.float32)

    def act(
        self, observation: Mapping[str, np.ndarray], instruction: str, seed: int = 0
    ) -> np.ndarray:
        return self.chunk


def test_a_sane_candidate_passes():
    require_fit(Constant([0, 2], [1.2, 4.1]), PROBES, ACTION)
    require_fit(Constant([0, 2]), PROBES, ACTION, running=Constant([0.1, 2.2]), max_jump=0.1)


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (Constant([0, np.nan]), "NaN or infinity"),
        (Constant([0, 1, 2]), r"expected \(H, 2\)"),
        (Constant([0, 2], [0, 9]), "b reaches 125% of its range beyond its limits"),
    ],
)
def test_an_unfit_candidate_is_refused(candidate: Constant, reason: str):
    with pytest.raises(AdoptionRefused, match=reason):
        require_fit(candidate, PROBES, ACTION)


def test_a_jump_from_the_running_version_is_refused():
    with pytest.raises(AdoptionRefused, match="a would jump by 45%"):
        require_fit(Constant([0.9, 2]), PROBES, ACTION, running=Constant([0, 2]), max_jump=0.3)

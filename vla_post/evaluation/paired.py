"""Is the new version better? Success rates and their paired difference, with honest intervals.

Two policies play the same cases (task and seed), so each case is a pair. Intervals of one rate are
Wilson's score intervals; the interval of the difference is Newcombe's square-and-add of two of them
with the pairs' correlation (method 10 of Newcombe, Statistics in Medicine 17, 1998, 2635-2650),
which keeps its coverage near 0 and 1 where the textbook one collapses; the test is McNemar's, exact
(binomial on the discordant pairs).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Self


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a success rate; (0, 1) without any episode.

    Raises:
        ValueError: `successes` outside 0..episodes, or `confidence` outside (0, 1).
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes cannot be")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; expected a share such as 0.95")
    if episodes == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    rate = successes / episodes
    centre = (rate + z2 / (2 * episodes)) / (1 + z2 / episodes)
    width = math.sqrt(z2 * rate * (1 - rate) / episodes + (z2 / (2 * episodes)) ** 2)
    width /= 1 + z2 / episodes
    low = 0.0 if successes == 0 else max(0.0, centre - width)
    return low, 1.0 if successes == episodes else min(1.0, centre + width)


@dataclass(frozen=True, kw_only=True)
class PairedResult:
    """Outcome counts of two policies on the same cases."""

    both: int
    only_first: int
    only_last: int
    neither: int

    @classmethod
    def from_outcomes(cls, first: Sequence[bool], last: Sequence[bool]) -> Self:
        """Counts the pairs; `first[i]` and `last[i]` are the same case.

        Raises:
            ValueError: unequal lengths, so these are no pairs.
        """
        if len(first) != len(last):
            raise ValueError(
                f"{len(first)} outcomes against {len(last)}: a paired comparison needs the same "
                "cases on both sides"
            )
        pairs = list(zip(map(bool, first), map(bool, last), strict=True))
        return cls(
            both=pairs.count((True, True)),
            only_first=pairs.count((True, False)),
            only_last=pairs.count((False, True)),
            neither=pairs.count((False, False)),
        )

    @property
    def episodes(self) -> int:
        return self.both + self.only_first + self.only_last + self.neither

    @property
    def first_successes(self) -> int:
        return self.both + self.only_first

    @property
    def last_successes(self) -> int:
        return self.both + self.only_last

    @property
    def difference(self) -> float:
        """Rate of the last minus rate of the first; 0 without episodes."""
        return (self.only_last - self.only_first) / max(self.episodes, 1)

    @property
    def p_value(self) -> float:
        """Two-sided exact McNemar test of "both are equally good"; 1 without discordant pairs."""
        from scipy.stats import binomtest  # heavy, and a robot computer has none

        discordant = self.only_first + self.only_last
        return float(binomtest(self.only_last, discordant).pvalue) if discordant else 1.0

    def difference_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Newcombe's interval of `difference`, inside [-1, 1]."""
        n = self.episodes
        if n == 0:
            return -1.0, 1.0
        p1, p2 = self.first_successes / n, self.last_successes / n
        low1, high1 = wilson_interval(self.first_successes, n, confidence)
        low2, high2 = wilson_interval(self.last_successes, n, confidence)
        phi = self._correlation()

        def width(a: float, b: float) -> float:
            return math.sqrt(max(a * a - 2.0 * phi * a * b + b * b, 0.0))

        low = self.difference - width(p2 - low2, high1 - p1)
        high = self.difference + width(high2 - p2, p1 - low1)
        return max(low, -1.0), min(high, 1.0)

    def _correlation(self) -> float:
        """Phi of the 2 x 2 table, its numerator reduced by n/2 where it is positive."""
        a, b, c, d = self.both, self.only_first, self.only_last, self.neither
        scale = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
        if scale == 0.0:
            return 0.0
        numerator = float(a * d - b * c)
        if numerator > 0:
            numerator = max(numerator - self.episodes / 2, 0.0)
        return numerator / scale

    def to_dict(self) -> dict[str, Any]:
        """Everything a table or a JSON file wants."""
        return asdict(self) | {
            "episodes": self.episodes,
            "first": self.first_successes,
            "first_interval": wilson_interval(self.first_successes, self.episodes),
            "last": self.last_successes,
            "last_interval": wilson_interval(self.last_successes, self.episodes),
            "difference": self.difference,
            "difference_interval": self.difference_interval(),
            "p_value": self.p_value,
        }

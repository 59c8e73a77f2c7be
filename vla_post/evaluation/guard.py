"""The guard: takes a version back when people have to help, or tasks fail, more than before.

Two rates of a version's episodes are watched: failures, and episodes in which somebody took over.
For each, from episodes before it (the baseline, k bad of n) and its own (s bad, f good):

    bound = U(k, n) + margin          U: Clopper-Pearson upper limit of the rate       (G1)
    E     = mean over p ~ Uniform(bound, 1) of (p/bound)^s ((1-p)/(1-bound))^f         (G2)
    alarm when E >= 1 / level                                                          (G3)

While the true rate is at most the bound, E is a non-negative supermartingale that starts at 1, so
by Ville's inequality it ever reaches 1/level with probability at most `level`: one may look after
every episode and stop at any time. U errs with probability `level` too. With level =
false_alarm / 4, both rates and both errors together raise a false alarm about a version whose rates
rose by no more than `margin` with probability at most `false_alarm`, per judged version, under one
assumption: episodes of a version are independent with constant rates.

A slow decline, each version a little worse than the one before by less than the bound shows, is not
seen; compare with an old version by `vla-post eval`.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from scipy.special import betaincc, betaln
from scipy.stats import beta

from trajectory_store import Episode, FleetView, Outcome, Source
from vla_post.export.registry import Registry

log = logging.getLogger(__name__)
_SURE = 0.999
"""A bound at or above it can never be exceeded: nothing is left to raise an alarm."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """How much worse is too much, and how sure one wants to be."""

    margin: float = 0.1
    """A rate may rise by so much above the baseline's upper confidence limit."""
    false_alarm: float = 0.05
    """Probability of taking back a version that did not exceed that, at most."""
    baseline_least: int = 10
    """Episodes that the baseline needs before anything is judged."""
    baseline_most: int = 100
    """The newest so many count."""
    accept_after: int = 30
    """Episodes without an alarm after which a version counts as good."""
    canary_share: float = 0.0
    """Above 0: every new version runs on this share of the cells first, and is promoted when it
    counts as good. 0: judges what others promote or send out as a canary."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.margin < 1.0 or not 0.0 < self.false_alarm < 1.0:
            raise ValueError(
                f"margin is {self.margin} and false_alarm {self.false_alarm}; expected 0 to 1, "
                "the latter above 0"
            )
        if self.baseline_least < 1 or self.baseline_most < self.baseline_least:
            raise ValueError(
                f"baseline_least is {self.baseline_least} and baseline_most {self.baseline_most}; "
                "expected 1 or more, and the latter not below the former"
            )
        if self.accept_after < 1 or not 0.0 <= self.canary_share <= 1.0:
            raise ValueError("expected accept_after of 1 or more and canary_share of 0 to 1")


@dataclass(frozen=True)
class Rates:
    """Of some episodes."""

    episodes: int = 0
    failures: int = 0
    intervened: int = 0

    @classmethod
    def of(cls, episodes: Iterable[Episode]) -> "Rates":
        found = [e for e in episodes if judged(e)]
        return cls(
            len(found),
            sum(e.outcome is Outcome.FAILURE for e in found),
            sum(e.interventions > 0 for e in found),
        )


def judged(e: Episode) -> bool:
    """The policy drove in it and it came to an end: aborted and interrupted ones say nothing."""
    return e.outcome in (Outcome.SUCCESS, Outcome.FAILURE) and e.ticks_by(Source.POLICY) > 0


def upper_bound(bad: int, n: int, level: float) -> float:
    """Clopper-Pearson: the rate exceeds this with probability at most `level` (G1)."""
    return 1.0 if bad >= n else float(beta.ppf(1.0 - level, bad + 1, n - bad))


def log_evidence(bad: int, n: int, bound: float) -> float:
    """ln E of (G2): evidence that the rate is above `bound`; 0 before the first episode."""
    if not 0.0 < bound < 1.0:
        raise ValueError(f"bound is {bound}; expected between 0 and 1")
    good = n - bad
    tail = float(betaincc(bad + 1, good + 1, bound))
    if tail <= 0.0:
        return -math.inf
    return (
        float(betaln(bad + 1, good + 1))
        + math.log(tail)
        - math.log1p(-bound)
        - bad * math.log(bound)
        - good * math.log1p(-bound)
    )


def alarm(baseline: Rates, now: Rates, config: GuardConfig) -> str:
    """Why this is worse than the baseline by more than chance and margin allow; empty if not."""
    level = config.false_alarm / 4.0
    for what, before, bad in (
        ("failures", baseline.failures, now.failures),
        ("interventions", baseline.intervened, now.intervened),
    ):
        bound = upper_bound(before, baseline.episodes, level) + config.margin
        if bound >= _SURE or not now.episodes:
            continue
        if log_evidence(bad, now.episodes, bound) >= -math.log(level):
            return (
                f"{what} in {bad} of {now.episodes} episodes, {before} of {baseline.episodes} "
                f"before; the bound is {bound:.2f}"
            )
    return ""


Action = Literal["waits", "watches", "accepted", "canary", "promoted", "withdrew", "rolled back"]


@dataclass(frozen=True)
class Verdict:
    """What the guard saw and did."""

    action: Action
    version: int
    """The one that was judged, or that it went back from."""
    reason: str
    baseline: Rates
    now: Rates


class Guard:
    """Judges the canary if there is one, else what has been active since the last acceptance.

    Args:
        view: the fleet's stores; `look` refreshes it.
    """

    def __init__(self, registry: Registry, view: FleetView, config: GuardConfig) -> None:
        self.registry, self.view, self.config = registry, view, config
        active = registry.active()
        self._good = None if active is None else active.number
        """Where a rollback leads."""
        self._since_ns = max((e.created_ns for e in view.episodes), default=0) + 1
        """Episodes begun from here on are judged while no canary is out."""

    def look(self) -> Verdict:
        """Judges what has come since, and acts on the registry.

        Raises:
            RegistryError: it cannot be read or changed; look again later.
        """
        self.view.refresh()
        active = self.registry.active()
        if active is None:
            return Verdict("waits", 0, "no version is active yet", Rates(), Rates())
        if self._good is None:
            self._good = active.number
        canary = self.registry.canary
        if canary is not None:
            return self._judge_canary(canary.version, canary.since_ns)
        if self.config.canary_share > 0:
            return self._send_canary(active.number)
        return self._judge_active(active.number)

    def _judge_canary(self, version: int, since_ns: int) -> Verdict:
        # Other cells go on with the active version, but only what is older is a fixed baseline.
        baseline = self._baseline(since_ns, {version})
        now = Rates.of(
            e for e in self.view.episodes if e.policy_version == version and e.created_ns > since_ns
        )
        verdict = self._judge(version, baseline, now)
        if verdict.action == "rolled back":
            self.registry.end_canary(reason=verdict.reason)
            return Verdict("withdrew", version, verdict.reason, baseline, now)
        if verdict.action == "accepted" and self.config.canary_share > 0:
            self.registry.promote(version, reason=verdict.reason, pin=True, force=True)
            self._good = version
            return Verdict("promoted", version, verdict.reason, baseline, now)
        return verdict

    def _send_canary(self, active: int) -> Verdict:
        refused = set(self.registry.rejected)
        newer = [n for n in self.registry.numbers() if n > active and n not in refused]
        if not self.registry.pinned:
            self.registry.promote(active, reason="the guard decides what follows", pin=True)
        before = self._baseline(math.inf, set(newer))
        if not newer or before.episodes < self.config.baseline_least:
            reason = "nothing new" if not newer else "the baseline is still short"
            return Verdict("waits", active, reason, before, Rates())
        share = self.config.canary_share
        self.registry.start_canary(newer[-1], share=share, reason="newest")
        return Verdict("canary", newer[-1], f"on {share:.0%} of the cells", before, Rates())

    def _judge_active(self, active: int) -> Verdict:
        if active == self._good:
            self._begin(active)  # its newest episodes are the baseline of what comes next
            baseline = self._baseline(self._since_ns, set())
            return Verdict("watches", active, "the good version is active", baseline, Rates())
        begun = [e for e in self.view.episodes if e.created_ns >= self._since_ns]
        changed = {e.policy_version for e in begun} - {self._good}
        now = Rates.of(e for e in begun if e.policy_version in changed)
        baseline = self._baseline(self._since_ns, changed)
        verdict = self._judge(active, baseline, now)
        if verdict.action == "rolled back":
            self.registry.rollback(to=self._good, reason=verdict.reason)
            self._begin(self._good)
            return verdict
        if verdict.action == "accepted":
            self._begin(active)
        return verdict

    def _begin(self, good: int | None) -> None:
        self._good = good
        self._since_ns = max((e.created_ns for e in self.view.episodes), default=0) + 1

    def _baseline(self, before_ns: float, without: set[int]) -> Rates:
        without = without | set(self.registry.rejected)
        found = [
            e
            for e in self.view.episodes
            if e.created_ns < before_ns and e.policy_version not in without and judged(e)
        ]
        found.sort(key=lambda e: e.created_ns)
        return Rates.of(found[-self.config.baseline_most :])

    def _judge(self, version: int, baseline: Rates, now: Rates) -> Verdict:
        if baseline.episodes < self.config.baseline_least:
            least = self.config.baseline_least
            reason = f"the baseline has {baseline.episodes} of {least} episodes"
            return Verdict("waits", version, reason, baseline, now)
        if why := alarm(baseline, now, self.config):
            return Verdict("rolled back", version, why, baseline, now)
        if now.episodes >= self.config.accept_after:
            reason = f"no alarm in {now.episodes} episodes"
            return Verdict("accepted", version, reason, baseline, now)
        return Verdict("watches", version, f"{now.episodes} episodes", baseline, now)

"""What the policy, and the critic that came with it, think of what they just proposed.

Numbers for the console's traces: `doubt`, how much several samples of the policy disagree; `value`
and `q`, of the critic in the version's folder. Every k-th chunk, after it was sent, and only while
there is time for it before the next one is due. Doubt beyond what people let pass so far
(`doubt_threshold`, learned from their takeovers) is a hint for people: it moves nothing. No ROS.
"""

from typing import Any

import numpy as np

from robot_bridge.core.chunking import Question, Rows
from robot_bridge.core.takeovers import Takeovers
from robot_bridge.nodes.common import monotonic_s
from robot_bridge.nodes.versions import Loaded
from vla_post.export.critic import load_critic_of
from vla_post.export.doubt import chunk_doubt, sample_chunks

FORGET = 0.9
"""What became too dear is tried again, after some chunks: the machine may be less busy then."""
STALE = 3
"""A doubt counts until so many looks were due after it without a newer one."""


class Insight:
    """`look` is for one caller, who also asks the policy: policies are not thread-safe. All the
    rest is for one other thread.

    Args:
        every: look at every k-th chunk; 0 switches it off.
        samples: of the policy, in one batch.
        steps: of a chunk that are executed.
        takeovers: the threshold's memory.
    """

    def __init__(self, *, every: int, samples: int, steps: int, takeovers: Takeovers) -> None:
        if every < 0 or samples < 2:
            raise ValueError(
                f"insight_every is {every} and insight_samples {samples}; expected at least 0 and 2"
            )
        self._every, self._samples, self._steps = every, samples, steps
        self._seen = self._skipped = 0
        self._cost_s = 0.0
        self._loaded: Loaded | None = None
        self._critic: Any = None
        self._values: dict[str, float] = {}
        self._problem = ""
        self._takeovers = takeovers
        self._doubt: tuple[int, int, int, float] | None = None
        """(stamp of the observation, which chunk it was, version, doubt) of the last look."""

    def look(self, loaded: Loaded, question: Question, chunk: Rows, left_s: float) -> None:
        """Never raises.

        Args:
            chunk: (H, A), as it was sent.
            left_s: until the next inference is due.
        """
        self._seen += 1
        if not self._every or self._seen % self._every:
            return
        if self._cost_s > left_s:
            self._skipped += 1
            self._cost_s *= FORGET
            return
        started = monotonic_s()
        try:
            if loaded is not self._loaded:
                self._loaded, self._critic, self._values = loaded, None, {}
                self._critic = load_critic_of(loaded.policy, loaded.folder)
                started = monotonic_s()  # loading happens once
            self._values, self._problem = self._judge(loaded, question, chunk), ""
            if "doubt" in self._values:
                doubt = self._values["doubt"]
                self._doubt = (question.stamp_ns, self._seen, loaded.version, doubt)
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"
        self._cost_s = monotonic_s() - started

    def took_over(self, since_ns: int) -> None:
        """A person took control from the policy, which had driven since then.

        A doubt of before says nothing about why; then there is nothing to learn.
        """
        current = self._current(since_ns)
        if current is not None:
            version, doubt = current
            self._takeovers.add(doubt, version)

    def unsure(self, since_ns: int) -> bool:
        """Whether the doubt of the policy that drives since then exceeds the threshold."""
        current = self._current(since_ns)
        return current is not None and self._takeovers.exceeded(current[1])

    def diagnose(self) -> dict[str, Any]:
        if not self._every:
            return {}
        out: dict[str, Any] = {name: f"{value:.6g}" for name, value in self._values.items()}
        threshold = self._takeovers.threshold
        if threshold is not None:
            out |= {"doubt_threshold": f"{threshold:.6g}", "doubt_takeovers": len(self._takeovers)}
        if self._takeovers.problem:
            out["doubt_problem"] = self._takeovers.problem
        out |= {"insight_ms": f"{self._cost_s * 1e3:.1f}", "insight_skipped": self._skipped}
        return out | ({"insight_problem": self._problem} if self._problem else {})

    def _current(self, since_ns: int) -> tuple[int, float] | None:
        """(version, doubt); None if nothing was measured since, or too long ago."""
        last = self._doubt
        if last is None or last[0] < since_ns or self._seen - last[1] >= STALE * self._every:
            return None
        return last[2:]

    def _judge(self, loaded: Loaded, question: Question, chunk: Rows) -> dict[str, float]:
        q = question
        chunks = sample_chunks(
            loaded.policy, q.observation, q.instruction, samples=self._samples, seed=q.seed
        )
        found = {"doubt": chunk_doubt(chunks, steps=self._steps)}
        if self._critic is not None:
            every = np.concatenate([chunk[None].astype(np.float32), chunks])
            sent, *others = self._critic(q.observation, q.instruction, every)
            found |= {"q": float(sent), "value": float(np.mean(others))}
        return {name: value for name, value in found.items() if np.isfinite(value)}

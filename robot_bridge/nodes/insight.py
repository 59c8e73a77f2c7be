"""What the policy, and the critic that came with it, think of what they just proposed.

Numbers for the console's traces: `doubt`, how much several samples of the policy disagree; `value`
and `q`, of the critic in the version's folder. Every k-th chunk, after it was sent, and only while
there is time for it before the next one is due. A hint for people: it moves nothing. No ROS.
"""

from typing import Any

import numpy as np

from robot_bridge.core.chunking import Question, Rows
from robot_bridge.nodes.common import monotonic_s
from robot_bridge.nodes.versions import Loaded
from vla_post.export.critic import load_critic_of
from vla_post.export.doubt import chunk_doubt, sample_chunks

FORGET = 0.9
"""What became too dear is tried again, after some chunks: the machine may be less busy then."""


class Insight:
    """For one caller, who also asks the policy: policies are not thread-safe.

    Args:
        every: look at every k-th chunk; 0 switches it off.
        samples: of the policy, in one batch.
        steps: of a chunk that are executed.
    """

    def __init__(self, *, every: int, samples: int, steps: int) -> None:
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
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"
        self._cost_s = monotonic_s() - started

    def diagnose(self) -> dict[str, Any]:
        if not self._every:
            return {}
        out: dict[str, Any] = {name: f"{value:.6g}" for name, value in self._values.items()}
        out |= {"insight_ms": f"{self._cost_s * 1e3:.1f}", "insight_skipped": self._skipped}
        return out | ({"insight_problem": self._problem} if self._problem else {})

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

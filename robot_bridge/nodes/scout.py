"""Looks for the policies that may come next, beside the one that runs: the registry's active
version, and the shadow.

Loading and checking take seconds, so a thread of its own does both. Nothing here changes what runs:
the runner takes `candidate` when the contract allows. No ROS.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robot_bridge.core.chunking import Rows
from robot_bridge.nodes.shadow import Proposal, Shadow
from robot_bridge.nodes.versions import Loaded, Versions
from trajectory_store.contract import Contract
from vla_post.export.adoption import require_fit

PERIOD_S = 1.0

Probe = tuple[dict[str, np.ndarray], str]
"""An observation and its instruction, on which a candidate is tried."""


class Scout:
    """Owns the thread, from `start` to `close`.

    Args:
        running: the policy of this moment.
        probes: what it saw last.
        ready: called from the thread when a candidate is there.
        say_shadow: see `Shadow`.
        complain: called with every refusal.
        shadow: a folder, a version or `newest`; empty for none.
        max_jump: see `vla_post.export.require_fit`; 0 switches that check off.
    """

    def __init__(
        self,
        contract: Contract,
        versions: Versions,
        *,
        running: Callable[[], Loaded],
        probes: Callable[[], Sequence[Probe]],
        ready: Callable[[], object],
        say_shadow: Callable[[Proposal, int, Rows, str], None],
        complain: Callable[[str], object],
        shadow: str = "",
        shadow_log: Path | None = None,
        max_jump: float = 0.0,
    ) -> None:
        self.candidate: Loaded | None = None
        """Passed its checks and waits to be adopted; whoever adopts it sets this to None."""
        self.shadow: Shadow | None = None
        self.refusal = self.shadow_refusal = ""
        self._contract, self._versions = contract, versions
        self._running, self._probes, self._ready = running, probes, ready
        self._say_shadow, self._complain = say_shadow, complain
        self._shadow_wanted, self._shadow_log = shadow, shadow_log
        self._max_jump = max_jump
        self._refused: int | None = None
        self._shadow_refused: int | None = None
        self._stop, self._look_now = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="scout", daemon=True)

    def start(self) -> None:
        if self._versions.registry is not None or self._shadow_wanted:
            self._thread.start()

    def want_shadow(self, wanted: str) -> None:
        """From now on this one is the shadow.

        Args:
            wanted: a version, `newest`, or empty for none.

        Raises:
            ValueError: it is none of these, or there is no registry that could have it.
        """
        if self._versions.registry is None:
            raise ValueError("a fixed policy is running, no registry that has other versions")
        if wanted not in ("", "newest") and not wanted.removeprefix("v").isdecimal():
            raise ValueError(f"the shadow is {wanted!r}; expected a version, `newest` or nothing")
        self._shadow_wanted, self._shadow_refused, self.shadow_refusal = wanted, None, ""
        self._look_now.set()

    def look_now(self) -> None:
        """Also at what was refused before."""
        self._refused = self._shadow_refused = None
        self._look_now.set()

    def close(self, patience_s: float = 5.0) -> None:
        self._stop.set()
        self._look_now.set()
        if self._thread.is_alive():
            self._thread.join(timeout=patience_s)
        shadow, self.shadow = self.shadow, None
        if shadow is not None:
            shadow.close()

    def diagnose(self) -> dict[str, Any]:
        shadow = self.shadow
        values: dict[str, Any] = {}
        if shadow is not None:
            values["shadow_version"] = shadow.version
            values |= {f"shadow_{k}": v for k, v in shadow.record.summary().items()}
        return values | ({"shadow_refused": self.shadow_refusal} if self.shadow_refusal else {})

    def _watch(self) -> None:
        while not self._stop.is_set():
            if self._versions.registry is not None:
                self._look_for_active()
            if not self._stop.is_set():
                self._look_for_shadow()
            self._look_now.wait(PERIOD_S)
            self._look_now.clear()

    def _look_for_active(self) -> None:
        assert self._versions.registry is not None
        number: int | None = None
        try:
            wanted = self._versions.wanted()
            candidate, running = self.candidate, self._running()
            known = {running.version, self._refused}
            if candidate is not None:
                known.add(candidate.version)
            if wanted == running.version:
                self.candidate = None  # taken back before this cell came to adopt it
            if wanted is None:
                raise FileNotFoundError(
                    f"{self._versions.registry.location} has no active version any more; is it "
                    "there?"
                )
            if wanted in known:
                if self._refused is None:
                    self.refusal = ""  # of a registry that could not be read, and can again
                return
            number = wanted
            loaded = self._versions.version(number)
            jump = self._max_jump or None
            require_fit(
                loaded.policy,
                self._probes(),
                self._contract.action,
                running=running.policy if jump else None,
                max_jump=jump,
            )
        except Exception as error:
            # Whatever a version on disk does, the running one goes on.
            self._refused = number
            what = "the registry cannot be read" if number is None else f"version {number} refused"
            refusal = f"{what}: {error}"
            if refusal != self.refusal:
                self._complain(refusal)
            self.refusal = refusal
            return
        self.refusal, self.candidate = "", loaded
        self._ready()

    def _look_for_shadow(self) -> None:
        """Loads the shadow that is asked for, follows `newest`, ends what nobody asks for."""
        wanted, before, number = self._shadow_wanted, self.shadow, None
        if not wanted:
            self._use_shadow(None)
            return
        try:
            number = self._versions.resolve(wanted)
            known = (self._shadow_refused, before.version if before else None)
            if number is None or number in known:
                return
            loaded = self._versions.load(wanted, number)
        except Exception as error:
            if wanted != self._shadow_wanted:
                return  # another one was asked for meanwhile
            self._shadow_refused = number
            refusal = f"shadow {wanted!r} refused: {error}"
            if refusal != self.shadow_refusal:
                self._complain(refusal)
            self.shadow_refusal = refusal
            return
        self.shadow_refusal = ""
        self._use_shadow(Shadow(self._contract, loaded, self._say_shadow, self._shadow_log))

    def _use_shadow(self, shadow: Shadow | None) -> None:
        before, self.shadow = self.shadow, shadow
        if before is not None:
            before.close()

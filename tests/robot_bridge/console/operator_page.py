"""A person at a page of the console, in real headless Chromium."""

from typing import Any

from playwright.sync_api import TimeoutError as PlaywrightTimeout

from .testbed import DEADLINE_S, until

CELL = "franka_sim"
PLAN = ".banner[data-mode=POLICY] ~ * canvas[data-chunk]:not([data-chunk='0'])"
STATE = "() => window.vlaConsole.live.state"
MEASURED = "() => window.vlaConsole.live.plan.rows.at(-1).measured"


class Operator:
    """A person at a page."""

    def __init__(self, page: Any, link: Any) -> None:
        self.page, self.errors = page, []
        page.set_default_timeout(DEADLINE_S * 1e3)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(link)

    def ready(self, cell: Any = CELL):
        self.page.wait_for_selector(".banner[data-mode]:not([data-mode=OFF])")
        if self.page.evaluate("() => window.vlaConsole.cell.cell") != cell:
            self.page.select_option("[data-do=cell]", cell)
        self.page.wait_for_function(
            "(cell) => window.vlaConsole.live.state?.cell === cell"
            " && window.vlaConsole.live.state.online"
            " && (window.vlaConsole.cell.lockstep || window.vlaConsole.live.plan.rows.length)",
            arg=cell,
        )
        return self

    def take(self):
        self.do("lease")
        self.page.wait_for_function("() => window.vlaConsole.mine")
        return self

    def leave(self) -> None:
        """Gives the cell back, so that nobody waits for the lease to lapse."""
        self.page.evaluate("() => window.vlaConsole?.mine && window.vlaConsole.toggleLease()")

    def do(self, name: Any):
        self.page.click(f"[data-do={name}]:enabled")

    def mode(self, mode: Any) -> None:
        self.page.wait_for_selector(f".banner[data-mode={mode}]")

    def state(self):
        return self.page.evaluate(STATE)

    def joint(self, index: Any = 0) -> float:
        return self.page.evaluate(MEASURED)[index]

    def rest(self, index: Any = 0) -> float:
        """Where the joint is once it has come to rest."""

        def still() -> bool:
            before = self.joint(index)
            self.page.wait_for_timeout(300)
            return abs(self.joint(index) - before) < 0.002

        until(still, "the arm to come to rest")
        return self.joint(index)

    def start(self, policy: Any = True):
        self.do("start")
        self.page.wait_for_function(
            "() => window.vlaConsole.live.state.episode?.running && window.vlaConsole.mine"
        )
        if policy:
            # Until a plan is drawn: on a very busy machine the first one may have run out.
            self.insist(lambda: self.page.keyboard.press("p"), PLAN)
        return self

    def hold(self, key: Any = "Space") -> None:
        """Holds the key until the arbiter gave control."""

        def press() -> None:
            self.page.keyboard.up(key)
            self.page.keyboard.down(key)

        self.insist(press, ".banner[data-mode=HUMAN]")

    def insist(self, act: Any, selector: Any) -> None:
        """Again, as a person would: on a very busy machine a command may come too late."""
        self.page.evaluate("() => document.activeElement.blur()")

        def there() -> bool:
            act()
            try:
                self.page.wait_for_selector(selector, timeout=5000, state="attached")
            except PlaywrightTimeout:
                return False
            return True

        until(there, selector)

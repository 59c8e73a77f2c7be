"""An operator in a real browser (headless Chromium) at real cells."""

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("playwright")

from playwright.sync_api import TimeoutError as PlaywrightTimeout

from .testbed import DEADLINE_S, until

pytestmark = [pytest.mark.ros, pytest.mark.timeout(600)]
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


@pytest.fixture
def person(site: Any, chrome: Any):
    """Makes operators; no page may have thrown anything."""
    opened, people = [], []

    def make(link: Any = None, script: Any = None, **options: Any):
        context = chrome.new_context(viewport={"width": 1440, "height": 900}, **options)
        opened.append(context)
        if script is not None:
            context.add_init_script(script)
        people.append(Operator(context.new_page(), link or site.operator_link))
        return people[-1]

    yield make
    for someone in people:
        someone.leave()
    for context in opened:
        context.close()
    assert [error for someone in people for error in someone.errors] == []


def test_take_over_jog_blur_and_release(person: Any):
    ann = person().ready().take().start()
    before = ann.joint()
    ann.hold()
    ann.page.keyboard.down("q")
    ann.page.wait_for_function(
        "([from]) => window.vlaConsole.live.plan.rows.at(-1).measured[0] > from + 0.1",
        arg=[before],
    )
    assert ann.page.text_content(".clutch").startswith("Clutch closed")
    assert ann.page.get_attribute("[data-do=hold]", "aria-pressed") == "true"
    # The window loses focus with both keys still down.
    ann.page.evaluate("() => window.dispatchEvent(new Event('blur'))")
    ann.mode("HOLD")
    # Blur lets go of the deadman and hands back; either may be heard first.
    assert any(word in ann.state()["reason"] for word in ("deadman", "handed back"))
    stopped = ann.rest()
    ann.page.keyboard.down("Space")  # an old press that repeats
    assert ann.page.evaluate("() => window.vlaConsole.driver.held") is False
    ann.page.wait_for_timeout(300)
    assert ann.joint() == pytest.approx(stopped, abs=0.02)
    ann.page.keyboard.up("Space")
    ann.page.keyboard.up("q")
    ann.hold()
    ann.page.keyboard.up("Space")
    ann.mode("HOLD")
    # Never straight back to the policy: that takes a word.
    assert ann.state()["mode"] == "HOLD"
    ann.page.click("[data-do=resume]")
    ann.mode("POLICY")
    assert ann.page.evaluate("() => window.vlaConsole.live.cameras.stats.drawn") > 0
    ann.do("cancel")


def test_jog_on_the_pad_and_stop_with_one_key_wherever_one_is(person: Any, site: Any):
    ann = person().ready().take().start(policy=False)
    before = ann.joint(1)
    ann.page.locator("[data-axis='+joint2']").scroll_into_view_if_needed()
    box = ann.page.locator("[data-axis='+joint2']").bounding_box()
    ann.page.mouse.move(box["x"] + 10, box["y"] + 10)
    ann.page.mouse.down()
    ann.mode("HUMAN")
    ann.page.wait_for_function(
        "([from]) => window.vlaConsole.live.plan.rows.at(-1).measured[1] > from + 0.05",
        arg=[before],
    )
    ann.page.mouse.up()
    ann.mode("HOLD")
    vic = person(site.viewer_link).ready()
    assert vic.page.is_disabled("[data-do=hold]")
    assert vic.page.is_disabled("[data-do=lease]")
    vic.page.click("[data-page=keys]")
    vic.page.keyboard.press("Escape")
    ann.mode("FAULT")
    assert "emergency stop" in ann.page.text_content(".mode-reason")
    ann.do("reset_stop")
    ann.mode("HOLD")
    ann.do("cancel")


GAMEPAD = """
window.standIn = {
  id: "Stand-in pad", index: 0, connected: true, mapping: "standard", timestamp: 0,
  axes: [0, 0, 0, 0],
  buttons: Array.from({length: 17}, () => ({pressed: false, touched: false, value: 0})),
};
window.standInThere = false;
navigator.getGamepads = () => [null, window.standInThere ? window.standIn : null];
"""


def test_a_gamepad_drives_changes_its_axes_and_stops(person: Any):
    """The gamepad alone is a stand-in, where the browser's API hands it to the page."""
    ann = person(script=GAMEPAD).ready().take().start(policy=False)

    def press(button: Any, down: Any = True):
        ann.page.evaluate(
            "([b, down]) => { window.standIn.buttons[b].pressed = down; }", [button, down]
        )

    def push(*sticks: float):
        ann.page.evaluate("(axes) => { window.standIn.axes = axes; }", list(sticks))

    assert "No gamepad" in ann.page.text_content(".live-side")
    ann.page.evaluate("() => { window.standInThere = true; }")
    ann.page.wait_for_selector("text=Gamepad: Stand-in pad")
    push(1, 0, 0, 0)  # sticks alone move nothing
    before = ann.rest()
    assert ann.state()["mode"] == "HOLD"

    def held():  # a busy machine may miss the deadman's time-out: let go and press again
        press(5, False)
        ann.page.wait_for_function("() => !window.vlaConsole.driver.held")
        press(5)

    ann.insist(held, ".banner[data-mode=HUMAN]")
    ann.page.wait_for_function(
        "([from]) => window.vlaConsole.live.plan.rows.at(-1).measured[0] > from + 0.1",
        arg=[before],
    )
    assert ann.page.evaluate("() => window.vlaConsole.driver.sum()") == {"joint1": 1}
    press(5, False)
    ann.mode("HOLD")
    stopped = ann.rest()
    press(15)  # the D-pad: the sticks' next four axes
    ann.page.wait_for_selector("text=Gamepad moves joint5, joint6, joint7, gripper")
    press(15, False)
    push(0.05, -0.5, 0, 0)  # a tremor within the dead zone, and half of a stick that is up
    ann.insist(held, ".banner[data-mode=HUMAN]")
    sum_now = ann.page.evaluate("() => window.vlaConsole.driver.sum()")
    assert sum_now == {"joint6": pytest.approx(((0.5 - 0.12) / 0.88) ** 2)}
    # It is pulled out while it drives.
    ann.page.evaluate("() => { window.standInThere = false; }")
    ann.mode("HOLD")
    assert ann.joint() == pytest.approx(stopped, abs=0.02)
    ann.page.evaluate("() => { window.standInThere = true; }")
    press(5, False)
    press(1)
    ann.mode("FAULT")
    press(1, False)
    ann.do("reset_stop")
    ann.mode("HOLD")
    ann.do("cancel")


def test_the_plan_is_drawn_over_the_picture_while_the_policy_drives(person: Any):
    ann = person().ready().take().start()
    over = ".camera .plan-over[data-points]"
    ann.insist(lambda: ann.page.keyboard.press("p"), over)
    paths = ann.page.evaluate("() => window.vlaConsole.live.paths")
    assert list(paths) == ["0"]
    assert all(0 < x < 1 and 0 < y < 1 for x, y in paths["0"])  # the tool is in the picture
    drawn = """() => {
        const canvas = document.querySelector('.camera .plan-over');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return data.reduce((n, value, i) => n + (i % 4 === 3 && value > 0 ? 1 : 0), 0);
    }"""
    assert ann.page.evaluate(drawn) > 20
    ann.hold()
    ann.page.wait_for_function("() => !document.querySelector('.camera .plan-over[data-points]')")
    assert ann.page.evaluate(drawn) == 0
    ann.page.keyboard.up("Space")
    ann.mode("HOLD")
    ann.do("cancel")


def test_every_stream_has_rate_age_and_losses(person: Any):
    ann = person().ready()
    for stream in ("joint_states", "observation.images.front"):
        cells = f"tr[data-stream='{stream}'] td"
        ann.page.wait_for_function(
            "(cells) => [...document.querySelectorAll(cells)].length === 3"
            " && [...document.querySelectorAll(cells)].every((c) => /^[0-9]/.test(c.textContent))",
            arg=cells,
        )
    text = ann.page.text_content("tr[data-stream=joint_states]")
    assert "/ 25 Hz" in text


def test_label_relabel_undo_and_notes_while_the_recorder_records(person: Any, site: Any):
    ann = person().ready().take().start()
    ann.hold()
    ann.page.keyboard.up("Space")
    ann.mode("HOLD")
    uuid = ann.state()["episode"]["uuid"]
    ann.page.keyboard.press("1")
    ann.page.wait_for_function("() => !window.vlaConsole.live.state.episode")
    with site.client() as client:

        def stored():
            answer = client.get(f"/api/episodes/{uuid}")
            return answer.status_code == 200 and answer.json()

        episode = until(stored, "the stored episode")
        assert episode["outcome"] == "success"
        assert episode["interventions"] == 1
        assert episode["cameras"] == ["observation.images.front"]
        ann.page.click("[data-page=episodes]")
        row = ann.page.locator(f"tr[data-uuid='{uuid}']")
        until(lambda: row.count() or ann.page.evaluate(
            "() => window.vlaConsole.pages.episodes.load()"), "its row")  # fmt: skip
        row.click()
        ann.page.wait_for_function("() => document.querySelector('.replay')?.naturalWidth === 128")
        assert ann.page.locator(".thumb img").count() == 12
        ann.do("label-failure")
        ann.page.wait_for_selector(".detail .outcome[data-outcome=failure]")
        assert client.get(f"/api/episodes/{uuid}").json()["outcome"] == "failure"
        ann.page.click("[data-do=undo]")
        ann.page.wait_for_selector(".detail .outcome[data-outcome=success]")
        assert client.get(f"/api/episodes/{uuid}").json()["outcome"] == "success"
        ann.page.fill("[data-do=notes]", "<b>wiggled</b>")
        ann.do("save-notes")
        until(lambda: client.get(f"/api/episodes/{uuid}").json()["notes"] == "<b>wiggled</b>",
              "the notes")  # fmt: skip
        ann.page.wait_for_selector("td.remarks:has-text('<b>wiggled</b>')")
        assert ann.page.locator("td.remarks b").count() == 0


def test_roll_back_says_what_will_happen_and_the_robot_follows(person: Any, site: Any):
    ann = person().ready()
    ann.page.click("[data-page=learner]")
    ann.page.wait_for_selector("tr[data-version='3'][aria-current=true]")
    shares = ann.page.text_content("tr[data-task='lift-cube']")
    assert "20.0 %" in shares
    assert "30.0 %" in shares
    assert "a version to its first episode: 21 s" in ann.page.text_content(".tiles")
    ann.do("rollback")
    text = ann.page.text_content("dialog")
    assert "Roll back to v2" in text
    assert "v3 is active now" in text
    assert f"{CELL} changes before its next episode" in text
    assert "stays active" in text
    ann.do("plan-no")
    assert site.registry.active().number == 3
    ann.do("rollback")
    ann.page.fill("[data-do=reason]", "v3 drops the cube")
    ann.do("plan-yes")
    ann.page.wait_for_selector("tr[data-version='2'][aria-current=true]")
    assert site.registry.active().number == 2
    assert site.registry.pinned
    assert site.registry.history()[-1]["reason"].endswith("v3 drops the cube")
    ann.page.click("[data-page=live]")
    ann.page.wait_for_function("() => window.vlaConsole.live.state.policy.version === 2")
    ann.page.click("[data-page=learner]")
    ann.do("activate-3")
    ann.page.uncheck("[data-do=pin]")
    assert "become active by themselves" in ann.page.text_content("dialog")
    ann.do("plan-yes")
    ann.page.wait_for_selector("tr[data-version='3'][aria-current=true]")
    assert not site.registry.pinned


def test_some_cells_try_a_version_and_it_is_taken_back(person: Any, site: Any):
    ann = person().ready()
    ann.page.click("[data-page=learner]")
    ann.page.wait_for_selector("tr[data-version='3'][aria-current=true]")
    ann.do("canary-2")
    ann.page.fill("[data-do=percent]", "0")
    ann.page.press("[data-do=percent]", "Tab")
    ann.page.wait_for_selector("dialog:has-text('None of the cells here')")
    assert ann.page.is_disabled("[data-do=plan-yes]")
    ann.page.check(f"[data-do=try-{CELL}]")
    ann.page.wait_for_selector(f"dialog:has-text('Of the cells here: {CELL}.')")
    text = ann.page.text_content("dialog")
    assert "All others stay with v3" in text
    assert f"{CELL} changes before its next episode" in text
    assert "sawyer_state changes" not in text
    ann.do("plan-yes")
    ann.page.wait_for_selector(f"tr[data-version='2'] .badge:has-text('tried by {CELL}')")
    assert site.registry.active().number == 3
    assert (site.registry.canary.version, site.registry.canary.cells) == (2, (CELL,))
    ann.page.click("[data-page=live]")
    ann.page.wait_for_function("() => window.vlaConsole.live.state.policy.version === 2")
    ann.page.click("[data-page=learner]")
    ann.do("withdraw-2")
    text = ann.page.text_content("dialog")
    assert "The cells that try v2 go back to v3" in text
    assert "v2 counts as rejected" in text
    ann.do("plan-yes")
    ann.page.wait_for_selector("tr[data-version='2'] .badge:has-text('rejected')")
    assert site.registry.canary is None
    ann.page.click("[data-page=live]")
    ann.page.wait_for_function("() => window.vlaConsole.live.state.policy.version === 3")
    for number in (2, 3):  # as it was
        site.registry.promote(number)
    with site.client() as client:
        base = f"/api/cells/{CELL}"
        for body, words in [
            ({"version": 2, "share": 2}, "0 to 1"),
            ({"version": 2, "cells": "all"}, "list of at most"),
            ({"version": 2}, "a canary needs"),
            ({"share": 0.5}, "whole number"),
        ]:
            answer = client.post(f"{base}/canary", json=body)
            assert answer.status_code == 400
            assert words in answer.text
        assert "no canary" in client.post(f"{base}/withdraw", json={}).text
        assert client.get("/api/versions/plan?action=canary&version=3").status_code == 400


def test_two_browsers_contend_for_one_cell(person: Any):
    ann, bob = person(), person()
    ann.ready().take()
    bob.ready()
    bob.page.wait_for_selector(".lease-text:has-text('operates this cell')")
    assert bob.page.is_disabled("[data-do=hold]")
    bob.do("lease")
    bob.page.wait_for_selector(".message.bad:has-text('is this cell')")
    ann.page.wait_for_selector(".lease-text:has-text('would like to have this cell')")
    ann.hold()
    bob.page.keyboard.down("Space")
    bob.page.wait_for_timeout(100)
    assert bob.page.evaluate("() => window.vlaConsole.driver.held") is False
    bob.page.keyboard.up("Space")
    ann.page.keyboard.up("Space")
    ann.mode("HOLD")
    ann.do("lease")
    bob.page.wait_for_selector(".lease-text:has-text('Nobody operates')")
    bob.take().hold()
    bob.page.keyboard.up("Space")
    bob.mode("HOLD")


def test_a_page_that_freezes_while_driving_loses_control(person: Any):
    ann = person().ready().take()
    bob = person().ready()
    ann.hold()
    ann.page.evaluate(
        "() => setTimeout(() => { const end = Date.now() + 4000; while (Date.now() < end); }, 0)"
    )
    bob.mode("HOLD")  # seen while the page of the driver stands still
    ann.page.wait_for_function("() => window.vlaConsole.live.state.mode === 'HOLD'")
    assert ann.page.evaluate("() => window.vlaConsole.driver.held") is False
    ann.page.keyboard.up("Space")
    ann.hold()
    ann.page.keyboard.up("Space")
    ann.mode("HOLD")


class Wire:
    """A network between browser and server that can be cut without saying goodbye."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.2", port))
        self.port, self.cut, self.pairs = port, threading.Event(), []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if self.cut.is_set():
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.port))
            self.pairs += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    def _copy(self, source: Any, target: Any) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.cut.is_set():
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()
        for end in self.pairs:
            end.close()


def test_a_cut_network_stops_the_robot_and_the_page_says_so(person: Any, site: Any):
    wire = Wire(site.port)
    try:
        link = site.operator_link.replace("127.0.0.1", "127.0.0.2")
        ann, bob = person(link), person().ready()
        ann.ready().take().hold()
        wire.cut.set()
        bob.mode("HOLD")
        for end in wire.pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        ann.mode("OFF")
        ann.page.wait_for_selector(".link:not([data-on]):has-text('No connection')")
        assert ann.page.evaluate("() => window.vlaConsole.driver.held") is False
        wire.cut.clear()
        ann.page.keyboard.up("Space")
        ann.ready()  # comes back by itself
    finally:
        wire.close()


def test_a_wrong_token_is_told_in_words_and_the_right_one_leaves_no_trace(person: Any, site: Any):
    ann = person(f"{site.address}/#token=wrong")
    ann.page.wait_for_selector(".error:has-text('not a token of this console')")
    ann.page.fill("input[name=token]", site.token())
    ann.page.fill("input[name=name]", "Ann")
    ann.page.click("button[type=submit]")
    ann.ready()
    assert "Ann" in ann.page.text_content(".who-am-i")
    other = person().ready()
    assert "token" not in other.page.url
    kept = other.page.evaluate("() => JSON.stringify(localStorage) + document.cookie")
    assert site.token() not in kept
    other.do("logout")
    other.page.wait_for_selector("input[name=token]")


def test_the_fleet_page_leads_to_a_lockstep_cell_that_is_driven_in_its_real_time(
    person: Any, site: Any
):
    ann = person().ready()
    ann.page.click("[data-page=fleet]")
    ann.page.click("[data-do=attend-sawyer_state]:enabled")
    ann.page.wait_for_function("() => window.vlaConsole.mine && location.hash === '#live'")
    ann.ready("sawyer_state").start(policy=False)
    ann.page.wait_for_function("() => window.vlaConsole.live.plan.rows.length")
    before = ann.page.evaluate("() => window.vlaConsole.live.plan.rows.at(-1).joints.ee_x")
    ann.hold()
    ann.page.keyboard.down("ArrowUp")
    ann.page.wait_for_function(
        "([from]) => Math.abs(window.vlaConsole.live.plan.rows.at(-1).joints.ee_x - from) > 0.02",
        arg=[before],
    )
    ann.page.keyboard.up("ArrowUp")
    ann.page.keyboard.up("Space")
    ann.mode("HOLD")
    ann.do("cancel")
    ann.page.wait_for_function("() => !window.vlaConsole.live.state.episode")


def test_keys_are_shown_remapped_and_change_places(person: Any):
    ann = person().ready().take()
    ann.page.click("[data-page=keys]")
    ann.page.click("[data-key='hold']")
    ann.page.keyboard.press("q")
    assert ann.page.text_content("[data-key='hold']") == "Q"
    assert ann.page.text_content("[data-key='+joint1']") == "Space"
    ann.page.click("[data-page=live]")
    assert "Q" in ann.page.text_content("[data-do=hold] kbd")
    ann.hold("q")
    ann.page.keyboard.up("q")
    ann.mode("HOLD")
    ann.page.click("[data-page=keys]")
    ann.page.click("[data-do=keys-reset]")
    assert ann.page.text_content("[data-key='hold']") == "Space"


def test_every_control_has_a_name_and_the_mode_is_said(person: Any):
    ann = person().ready().take()
    for page in ("live", "episodes", "learner", "fleet", "keys"):
        ann.page.click(f"[data-page={page}]")
        ann.page.wait_for_timeout(200)
        nameless = ann.page.evaluate(
            """() => [...document.querySelectorAll('button, select, input, textarea, canvas')]
                .filter((e) => e.offsetParent !== null && !e.closest('[aria-hidden=true]'))
                .filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim()
                    || e.labels?.length || e.title))
                .map((e) => e.outerHTML)"""
        )
        assert nameless == [], page
    ann.page.click("[data-page=live]")
    assert ann.page.text_content("[aria-live=assertive]").startswith("HOLD.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_of_every_page(person: Any, tmp_path: Path, scheme: Any):
    """Look at them: VLA_POST_SCREENSHOTS=docs/images keeps them there."""
    folder = Path(os.environ.get("VLA_POST_SCREENSHOTS") or tmp_path)
    ann = person(color_scheme=scheme).ready().take().start()
    ann.page.wait_for_function("() => window.vlaConsole.live.plan.rows.length > 60")
    ann.insist(lambda: ann.page.keyboard.press("p"), ".camera .plan-over[data-points]")
    ann.page.screenshot(path=folder / f"console_plan_{scheme}.png")
    ann.hold()
    ann.page.keyboard.down("q")
    ann.page.wait_for_timeout(700)
    ann.page.screenshot(path=folder / f"console_live_{scheme}.png")
    ann.page.keyboard.up("q")
    ann.page.keyboard.up("Space")
    ann.mode("HOLD")
    ann.page.keyboard.press("1")
    ann.page.wait_for_function("() => !window.vlaConsole.live.state.episode")
    for page in ("episodes", "learner", "fleet", "keys"):
        ann.page.click(f"[data-page={page}]")
        if page == "episodes":
            until(lambda: ann.page.locator("tr[data-uuid]").count() or ann.page.evaluate(
                "() => window.vlaConsole.pages.episodes.load()"), "an episode")  # fmt: skip
            ann.page.click("tr[data-uuid] >> nth=0")
            ann.page.wait_for_function("() => document.querySelector('.replay')?.naturalWidth")
            ann.page.wait_for_function(
                "() => [...document.querySelectorAll('.thumb img')].every((i) => i.naturalWidth)"
            )
        elif page == "learner":
            ann.page.wait_for_selector("tr[data-version]")
        ann.page.screenshot(path=folder / f"console_{page}_{scheme}.png")
    colours = ann.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert colours == {"light": "rgb(243, 244, 246)", "dark": "rgb(15, 19, 24)"}[scheme]
    ann.page.set_viewport_size({"width": 820, "height": 1180})
    ann.page.click("[data-page=live]")
    wide = ann.page.evaluate("() => document.documentElement.scrollWidth")
    assert wide <= 820
    ann.page.screenshot(path=folder / f"console_tablet_{scheme}.png")

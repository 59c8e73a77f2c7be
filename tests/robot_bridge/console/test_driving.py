"""An operator drives real cells from a real browser, and what makes a robot hold still."""

import contextlib
import socket
import threading
from typing import Any

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("playwright")

pytestmark = [pytest.mark.ros, pytest.mark.timeout(600)]


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

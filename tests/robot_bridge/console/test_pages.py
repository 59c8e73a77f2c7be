"""What the console's pages show of real cells, in a real browser."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("playwright")

from playwright.sync_api import TimeoutError as PlaywrightTimeout

from .operator_page import CELL
from .testbed import until

pytestmark = [pytest.mark.ros, pytest.mark.timeout(600)]


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
    # While a new key is awaited the stop key stops, and stays what it is.
    ann.page.click("[data-key='hold']")
    ann.page.keyboard.press("Escape")
    ann.page.wait_for_function("() => window.vlaConsole.live.state.mode === 'FAULT'")
    assert ann.page.text_content("[data-key='stop']") == "Esc"
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


def test_pictures_of_every_page_in_both_themes(person: Any, tmp_path: Path):
    """Look at them: VLA_POST_SCREENSHOTS=docs/images keeps them there."""
    folder = Path(os.environ.get("VLA_POST_SCREENSHOTS") or tmp_path)
    ann = person(color_scheme="light").ready().take().start()
    ground = "() => getComputedStyle(document.body).backgroundColor"
    expected = {"light": "rgb(243, 244, 246)", "dark": "rgb(15, 19, 24)"}

    def picture(name: str) -> None:
        for scheme, colour in expected.items():
            ann.page.emulate_media(color_scheme=scheme)
            assert ann.page.evaluate(ground) == colour
            ann.page.screenshot(path=folder / f"console_{name}_{scheme}.png")

    ann.page.wait_for_function("() => window.vlaConsole.live.plan.rows.length > 60")
    ann.insist(lambda: ann.page.keyboard.press("p"), ".camera .plan-over[data-points]")
    picture("plan")
    ann.hold()
    ann.page.keyboard.down("q")
    ann.page.wait_for_timeout(700)
    picture("live")
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
        picture(page)
    ann.page.set_viewport_size({"width": 820, "height": 1180})
    for page in ("live", "episodes", "learner", "fleet", "keys"):
        ann.page.click(f"[data-page={page}]")
        assert ann.page.evaluate("() => document.documentElement.scrollWidth") <= 820, page
    ann.page.click("[data-page=live]")
    picture("tablet")


def test_a_policy_that_doubts_more_than_people_let_pass_is_a_hint(
    person: Any, site: Any, tmp_path: Path
):
    folder = Path(os.environ.get("VLA_POST_SCREENSHOTS") or tmp_path)
    kept = site.folder / "stores" / f".{CELL}.doubt.json"
    ann = person(color_scheme="light").ready().take().start()
    hint = "() => window.vlaConsole.live.state.hint"

    def doubts() -> list[float]:
        if not kept.exists():
            return []
        return [row["doubt"] for row in json.loads(kept.read_text())["takeovers"]]

    def taken_over(least: float) -> bool:
        ann.insist(lambda: ann.page.keyboard.press("p"), ".banner[data-mode=POLICY]")
        ann.page.wait_for_function("() => 'doubt' in window.vlaConsole.live.state.traces")
        ann.hold()
        ann.page.keyboard.up("Space")
        ann.mode("HOLD")
        return max(doubts(), default=0.0) > least

    until(lambda: taken_over(0.0), "a takeover while the policy drove")
    ann.page.wait_for_function(f"{hint} !== null")  # a function: the page forbids eval
    ann.do("cancel")
    ann.page.wait_for_function("() => !window.vlaConsole.live.state.episode")
    usual = ann.page.evaluate(hint)["threshold"]
    assert usual == pytest.approx(max(doubts()), rel=1e-3)

    ann.page.fill("[data-do=instruction]", "A doubtful thing")
    ann.start()

    def unsure(page: str, look: str) -> Any:
        """One look while the hint is on; a busy machine may stop the policy in between."""
        ann.page.click("[data-page=live]")
        ann.insist(lambda: ann.page.keyboard.press("p"), ".hint[data-on]")
        ann.page.click(f"[data-page={page}]")
        try:
            return ann.page.wait_for_function(look, arg=CELL, timeout=5000).json_value()
        except PlaywrightTimeout:
            return None

    look = """() => {
        const { hint, unsure, unsureWhy, thresholdText, state } = window.vlaConsole.live;
        const word = hint.querySelector('[role=status][aria-live=polite]').textContent;
        return hint.dataset.on === '' && word === unsure.textContent && {
            word, why: unsureWhy.textContent, mode: state.mode, doubt: state.traces.doubt,
            line: thresholdText.isConnected && thresholdText.textContent,
        };
    }"""
    found = until(lambda: unsure("live", look), "the hint on the live page")
    assert found["word"] == "The policy is unsure."
    told = re.fullmatch(r"Doubt (.+); people took over at (.+)\.", found["why"])
    assert told is not None
    doubt, threshold = told.groups()
    assert float(doubt) == pytest.approx(found["doubt"], rel=0.05)
    assert float(threshold) == pytest.approx(usual, rel=0.05)
    assert found["line"] == f"dashed: people took over at {threshold}"
    assert found["mode"] == "POLICY"  # a hint drives nothing
    for scheme in ("light", "dark"):
        ann.page.emulate_media(color_scheme=scheme)
        ann.page.screenshot(path=folder / f"console_hint_{scheme}.png", full_page=True)
    look = """(cell) => {
        const card = document.querySelector('.fleet-card:first-child[data-unsure]');
        const said = document.querySelector('.page > [role=status][aria-live=polite]').textContent;
        return card?.dataset.cell === cell && [said, card.textContent];
    }"""
    said, card = until(lambda: unsure("fleet", look), "the hint on the fleet page")
    ann.page.screenshot(path=folder / "console_hint_fleet_dark.png")
    assert said == f"Unsure: {CELL}."
    assert "works by itself, but is unsure" in card
    ann.page.click("[data-page=live]")
    until(lambda: taken_over(10 * usual), "a takeover of the unsure policy")
    ann.page.wait_for_selector(".hint:not([data-on])", state="attached")
    assert ann.page.text_content(".hint") == ""
    assert ann.page.evaluate(hint)["threshold"] > usual
    ann.do("cancel")


def test_charts_follow_the_theme(person: Any):
    ann = person(color_scheme="light").ready()
    ann.page.click("[data-page=learner]")
    ann.page.wait_for_selector("tr[data-version]")
    ann.page.evaluate("() => { window.vlaConsole.pages.learner.load = () => {}; }")  # no new data
    # The chart's numbers: dark on white, then light on dark.
    brightness = """(least) => {
        const canvas = document.querySelector('canvas.chart');
        const { data } = canvas.getContext('2d').getImageData(0, 0, 40, canvas.height);
        let sum = 0, count = 0;
        for (let i = 0; i < data.length; i += 4) {
            if (data[i + 3] > 200) { sum += data[i]; count += 1; }
        }
        return least === null ? sum / count : sum / count > least;
    }"""
    light = ann.page.evaluate(brightness, None)
    ann.page.emulate_media(color_scheme="dark")
    ann.page.wait_for_function(brightness, arg=light + 30)  # of 255

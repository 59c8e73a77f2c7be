"""The console before a cell with a real runner, flow policy and critic: shadow, gate, doubt."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("playwright")

from ..test_flow_runner import flow_checkpoint
from .operator_page import CELL
from .testbed import DEADLINE_S, Testbed, arm, stepping, until

pytestmark = [pytest.mark.ros, pytest.mark.long, pytest.mark.timeout(600)]
PAINTED = """(label) => {
    const canvas = document.querySelector(`canvas[aria-label="${label}"]`);
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return data.some((value, i) => i % 4 === 3 && value > 0);
}"""


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: Any):
    """One cell that runs, one that does not answer."""
    import torch

    torch.manual_seed(0)

    def make(folder: Path, contract: Any, _: float) -> Path:
        return flow_checkpoint(folder, contract)  # other random weights each time

    runner = {"insight_every": 1, "inference_timeout_s": 60.0}
    folder = tmp_path_factory.mktemp("versions")
    with Testbed(folder, [arm(), stepping()], make=make, up=1, runner=runner) as running:
        with running.client() as client:

            def version() -> int | None:
                return client.get(f"/api/cells/{CELL}").json().get("policy", {}).get("version")

            until(lambda: version() == 3, "PyTorch and the policy", 4 * DEADLINE_S)
        yield running


def pictured(page: Any, folder: Path, name: str) -> None:
    """In both themes, for the documentation; VLA_POST_SCREENSHOTS keeps them."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=folder / f"console_{name}_{scheme}.png")


def test_a_held_version_runs_as_a_shadow_and_is_compared_and_doubt_and_value_are_drawn(
    person: Any, site: Any, tmp_path: Path
):
    folder = Path(os.environ.get("VLA_POST_SCREENSHOTS") or tmp_path)
    ann = person().ready().take().start()
    site.registry.set_gate(0.05)
    site.registry.publish(
        flow_checkpoint(tmp_path / "next", site.contracts[0]),
        contract=site.contracts[0],
        parent=3,
        learner_step=300,
        metrics={"gate/candidate": 0.51, "gate/running": 0.5, "gate/against": 3},
    )
    assert site.registry.active().number == 3
    traces = "() => window.vlaConsole.live.state.traces"
    ann.page.wait_for_function("() => 'value' in window.vlaConsole.live.state.traces")
    found = ann.page.evaluate(traces)
    assert (found["value"], found["q"]) == (1.5, 1.5)  # of the smaller one of its two heads
    assert found["doubt"] > 0
    for label in ("policy's doubt", "critic's value", "critic's Q"):
        ann.page.wait_for_function(PAINTED, arg=label)

    ann.page.click("[data-page=learner]")
    row = "tr[data-version='4']"
    ann.page.wait_for_selector(f"{row} .badge:has-text('held')")
    why = "the gate asks for a value 5% above that of v000003: 0.51 against 0.5"
    assert f"Not adopted: {why}" in ann.page.text_content(row)
    assert "5 % above the active one's" in ann.page.text_content(".table-card")
    ann.do("activate-4")
    ann.page.wait_for_selector(f".message.bad:has-text('{why}')")
    with site.client() as client:
        answer = client.post(f"/api/cells/{CELL}/activate", json={"version": 4})
        assert answer.status_code == 400
        assert why in answer.text
    assert site.registry.active().number == 3

    ann.do("shadow-4")
    text = ann.page.text_content("dialog")
    assert f"{CELL}: v4 sees what the active policy sees and moves nothing." not in text
    assert "sawyer_state runs no version of this registry" in text
    assert ann.page.is_disabled("[data-do=shadow-in-sawyer_state]")
    ann.page.check(f"[data-do=shadow-in-{CELL}]")
    text = ann.page.text_content("dialog")
    assert f"{CELL}: v4 sees what the active policy sees and moves nothing." in text
    ann.do("plan-yes")
    ann.page.wait_for_selector(f"{row} .badge:has-text('shadow in {CELL}')")
    ann.page.wait_for_selector(f"{row} .remarks:has-text('beside the policy of {CELL}')")
    shadow = ann.state()["shadow"]
    assert shadow["version"] == 4
    assert shadow["chunks"] >= 1
    assert 0 < shadow["mean"] <= shadow["worst"]
    assert ann.state()["policy"]["version"] == 3  # it moves nothing
    pictured(ann.page, folder, "versions")
    ann.page.click("[data-page=live]")
    ann.page.wait_for_selector(".facts dd:has-text('shadow v4 differs by')")
    ann.page.locator('canvas[aria-label="critic\'s Q"]').scroll_into_view_if_needed()
    pictured(ann.page, folder, "doubt")

    ann.page.click("[data-page=learner]")
    ann.do("shadow-4")
    ann.page.uncheck(f"[data-do=shadow-in-{CELL}]")
    assert f"{CELL}: v4 is no shadow any more" in ann.page.text_content("dialog")
    ann.do("plan-yes")
    ann.page.wait_for_function("() => window.vlaConsole.live.state.shadow === null")
    ann.page.click("[data-page=live]")
    ann.do("cancel")
    site.registry.set_gate(None)
    with site.client() as client:
        base = f"/api/cells/{CELL}"
        assert client.post(f"{base}/shadow", json={"version": "../v4"}).status_code == 400
        assert "active version" in client.get("/api/versions/plan?action=shadow&version=3").text
        assert client.post(f"{base}/shadow", json={"version": 99}).status_code == 200
        # The runner cannot load it, and says so.
        until(lambda: "v000099" in str(client.get(base).json()["shadow"]), "the refusal")
        assert client.post(f"{base}/shadow", json={"version": None}).status_code == 200
    with site.client("viewer") as client:
        assert client.post(f"{base}/shadow", json={"version": 4}).status_code == 403

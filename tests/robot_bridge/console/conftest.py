"""One testbed for each file of tests: two real cells and the real server."""

from typing import Any

import pytest

pytest.importorskip("rclpy")
pytest.importorskip("starlette")

from .testbed import CHROMIUM_FLAGS, Testbed, arm, chromium, stepping


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: Any):
    folder = tmp_path_factory.mktemp("console")
    with Testbed(folder, [arm(), stepping()]) as running:
        yield running


@pytest.fixture
def site(testbed: Any):
    """The testbed, quiet: no episode, no stop, nobody's lease."""
    yield testbed
    testbed.poll()
    testbed.quiet()


@pytest.fixture(scope="module")
def chrome():
    path = chromium()
    if path is None:
        pytest.skip("no Chromium: `apt-get install -y chromium` (scripts/bootstrap does, as root)")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def person(site: Any, chrome: Any):
    """Makes operators; no page may have thrown anything."""
    from .operator_page import Operator

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

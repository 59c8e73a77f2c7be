"""The page's colours: readable in both themes, and told apart by people who see fewer of them."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import robot_bridge.console

CSS = (Path(robot_bridge.console.__file__).parent / "static/css/console.css").read_text()
SEEN = {
    "all colours": np.eye(3),
    # Severity 1.0 of Machado, Oliveira and Fernandes (2009), in linear RGB.
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip


def theme(selector: str) -> dict[str, np.ndarray]:
    """Name -> linear RGB; what the dark theme leaves out is as in the light one."""
    found: dict[str, np.ndarray] = {}
    for name in (":root {", selector):
        block = CSS[CSS.index(name) :]
        for key, value in re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block[: block.index("}")]):
            srgb = np.array([int(value[i : i + 2], 16) for i in (1, 3, 5)]) / 255
            found[key] = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return found


def luminance(colour: np.ndarray) -> float:
    return float(colour @ [0.2126, 0.7152, 0.0722])


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    """As WCAG 2 defines it."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lab(colour: np.ndarray) -> np.ndarray:
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ colour.clip(0, 1) / [0.9505, 1.0, 1.089]  # fmt: skip
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.fixture(params=[":root {", ':root[data-theme="dark"] {'], ids=["light", "dark"])
def colours(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return theme(request.param)


def test_text_is_readable(colours: dict[str, np.ndarray]):
    for text, ground in itertools.product(("ink", "muted"), ("bg", "card", "sunken")):
        assert contrast(colours[text], colours[ground]) > 4.5, (text, ground)
    for text in ("accent", "good", "bad"):
        assert contrast(colours[text], colours["card"]) > 4.5, text
    for mode in ("policy", "human", "hold", "fault"):
        assert contrast(colours["ink"], colours[f"mode-{mode}"]) > 4.5, mode
    assert contrast(colours["accent-ink"], colours["accent"]) > 4.5
    assert contrast(colours["warn-ink"], colours["warn-bg"]) > 4.5
    assert contrast(colours["stop-ink"], colours["stop"]) > 4.5


@pytest.mark.parametrize("sight", SEEN)
def test_who_drives_is_told_apart(colours: dict[str, np.ndarray], sight: str):
    drivers = ("who-policy", "who-human", "who-hold")
    for a, b in itertools.combinations(drivers, 2):
        distance = np.linalg.norm(lab(SEEN[sight] @ colours[a]) - lab(SEEN[sight] @ colours[b]))
        assert distance > 20, (a, b, distance)  # 2.3 is just noticeable

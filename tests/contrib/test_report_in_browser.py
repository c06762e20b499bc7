"""The report as a person sees it, in a real Chromium. Where there is none, this is skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_run import make_up

from agentloop import MetricsRecorder, Status
from agentloop.contrib.report import write_report

pytestmark = pytest.mark.long

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SCREENS = [("light", 1100), ("dark", 1100), ("light", 360)]

# Each bar that is drawn, and by how much the page is wider than the window.
LOOK = """() => ({
    bars: [...document.querySelectorAll("rect.bar")].map(bar => bar.getBoundingClientRect())
        .filter(box => box.width).map(box => [box.left, box.right, box.height]),
    hidden: [...document.querySelectorAll(".chart")].filter(chart => !chart.offsetWidth).length,
    excess: document.documentElement.scrollWidth - innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    bar: getComputedStyle(document.querySelector("rect.bar")).fill,
    scripts: document.scripts.length,
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e .[browser]"
    )
    if CHROMIUM is None:
        pytest.skip(f"there is no Chromium: none of {', '.join(NAMES)} is on the PATH")

    with api.sync_playwright() as playwright:
        # Where tests run as root, as in a container, Chromium refuses to start with its sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False)
        yield browser
        browser.close()


def brightness(colour: str) -> float:
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3 / 255


@pytest.mark.parametrize("count", [8, 3000])
def test_report_shows_the_run_on_every_screen(browser: Any, count: int, tmp_path: Path) -> None:
    recorder = make_up(tmp_path / "run.json", count)
    write_report(tmp_path / "run.html", recorder.snapshot(), tmp_path / "run.json", title=f"{count} agents")
    snapshot = recorder.snapshot()
    for scheme, width in SCREENS:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        page = context.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message, complaints=complaints: complaints.append(message.text))
        page.on("pageerror", lambda error, complaints=complaints: complaints.append(str(error)))
        page.on("request", lambda request, requests=requests: requests.append(request.url))
        page.goto((tmp_path / "run.html").as_uri())
        seen = page.evaluate(LOOK)

        assert page.title() == f"{count} agents"
        text = page.inner_text("body")
        assert f"{count:,}" in page.inner_text(".card:first-child b")
        assert f"{snapshot.counts[Status.SUCCESS]:,} success" in text
        assert "StatusError 429" in text
        assert page.locator("#failures tbody tr").count() == (1 if count == 8 else 4)
        # What is hostile is shown, and does nothing.
        assert ("<script>" in text) is (count > 8)
        assert seen["scripts"] == 0
        assert not complaints
        assert requests == [(tmp_path / "run.html").as_uri()]

        assert len(seen["bars"]) > 5
        assert all(0 <= left < right <= width and height >= 0.5 for left, right, height in seen["bars"])
        # Each chart is there for wide screens and for narrow ones.
        assert seen["hidden"] == 3
        assert seen["excess"] <= 0
        dark = brightness(seen["background"])
        assert dark < 0.2 if scheme == "dark" else dark > 0.9
        assert abs(brightness(seen["ink"]) - dark) > 0.6
        assert abs(brightness(seen["bar"]) - dark) > 0.2
        if "SCREENSHOTS" in os.environ:
            name = f"{count}-{scheme}-{width}.png"
            page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / name, full_page=True)

        context.close()


def test_report_of_nothing_is_a_page_too(browser: Any, tmp_path: Path) -> None:
    write_report(tmp_path / "run.html", MetricsRecorder().snapshot())
    page = browser.new_page()
    page.goto((tmp_path / "run.html").as_uri())
    assert "Nothing was measured." in page.inner_text("body")
    page.close()

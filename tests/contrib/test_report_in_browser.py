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
        "playwright.sync_api", reason="playwright is not installed: pip install -e . --group browser"
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


# What shows trouble in the chart of the limit, and all that is written in it.
TROUBLE = """() => {
    const boxes = (selector) => [...document.querySelectorAll("#concurrency " + selector)]
        .map(part => part.getBoundingClientRect()).filter(box => box.width)
        .map(box => [box.left, box.right, box.top, box.bottom]);
    return {bands: boxes(".band"), strips: boxes(".strip"), texts: boxes("text"), dots: boxes(".legend .dot"),
        excess: document.documentElement.scrollWidth - innerWidth}
}"""


def overlap(one: list[float], other: list[float]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]


@pytest.mark.parametrize(("scheme", "width"), SCREENS)
def test_trouble_is_seen_above_and_in_the_chart_and_covers_no_text(
    browser: Any, scheme: str, width: int, tmp_path: Path
) -> None:
    recorder = make_up(tmp_path / "run.json", 3000, trouble=True)
    write_report(tmp_path / "run.html", recorder.snapshot(), tmp_path / "run.json")
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    page.goto((tmp_path / "run.html").as_uri())
    assert "; calls were held for 3 s in total." in page.inner_text(".trouble")
    seen = page.evaluate(TROUBLE)
    (held, outage), strips = seen["bands"], seen["strips"]
    # A second of both, of three and two.
    assert held[0] < outage[0] < held[1] < outage[1]
    assert [strip[:2] for strip in strips] == [held[:2], outage[:2]]
    assert all(strip[3] - strip[2] > 1 for strip in strips)
    assert not overlap(*strips)
    assert not [text for text in seen["texts"] for strip in strips if overlap(text, strip)]
    assert len(seen["dots"]) == 6
    assert seen["excess"] <= 0
    if "SCREENSHOTS" in os.environ:
        name = f"trouble-{scheme}-{width}.png"
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / name, full_page=True)

    page.close()


def test_report_of_nothing_is_a_page_too(browser: Any, tmp_path: Path) -> None:
    write_report(tmp_path / "run.html", MetricsRecorder().snapshot())
    page = browser.new_page()
    page.goto((tmp_path / "run.html").as_uri())
    assert "Nothing was measured." in page.inner_text("body")
    page.close()

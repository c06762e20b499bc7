"""The report of a run: what it says, that it says it harmlessly, and that it stays small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_run import HOSTILE, make_up

from agentloop import InvocationResult, MetricsRecorder, Status
from agentloop._metrics.recorder import meters_of
from agentloop.contrib.report import render_report, write_report

VOID = {"meta", "i"}


class Page(HTMLParser):
    """Collects the elements and the text of a page, and checks that what is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self._open else ""


def recorded(*latencies_ms: float, **fields: Any) -> MetricsRecorder:
    recorder = MetricsRecorder()
    for latency_ms in latencies_ms:
        recorder.record(InvocationResult[Any]("a", Status.SUCCESS, latency_ms=latency_ms, **fields))

    return recorder


def trace(path: Path, *events: object) -> Path:
    path.write_text("[\n" + ",\n".join(json.dumps(event) for event in events))
    return path


def test_report_tells_the_numbers_of_the_run(tmp_path: Path) -> None:
    recorder = make_up(tmp_path / "run.json", 300)
    page = Page(render_report(recorder.snapshot(), tmp_path / "run.json", title="Night run"))
    snapshot = recorder.snapshot()
    assert "Night run" in page.text
    assert f"{snapshot.counts[Status.ERROR]} error" in page.text
    assert f"{snapshot.counts[Status.TIMEOUT]} timeout" in page.text
    assert "Stopped: a batch of 300 had enough" in page.text
    for reason in "StatusError 429", "StatusError 500", "ConnectionError", "InvocationTimeout":
        assert reason in page.text

    assert "waiting to be retried" in page.text
    assert sum(tag == "svg" for tag, _ in page.elements) == 6


def test_report_is_written_to_a_file(tmp_path: Path) -> None:
    snapshot = recorded(1.0, 2.0).snapshot()
    write_report(tmp_path / "run.html", snapshot)
    assert (tmp_path / "run.html").read_text("utf-8") == render_report(snapshot)


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    recorder = make_up(tmp_path / "run.json", 100)
    html = render_report(recorder.snapshot(), tmp_path / "run.json", title=HOSTILE)
    page = Page(html)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "a"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert "<script>" in page.text
    assert not re.search("[\u202e\ud800]", html)


def test_size_depends_on_no_number_of_invocations(tmp_path: Path) -> None:
    sizes = []
    for count in 100, 1500:
        recorder = make_up(tmp_path / "run.json", count)
        sizes.append(len(render_report(recorder.snapshot(), tmp_path / "run.json")))

    assert max(sizes) < 100_000


def test_timeline_that_lacks_its_end_or_holds_something_else_is_read_as_far_as_it_goes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.json"
    recorder = make_up(path, 100)
    whole = render_report(recorder.snapshot(), path)
    text = path.read_text()
    path.write_text(text.removesuffix("\n]\n") + ',\n{"ph":"B","pi')
    assert render_report(recorder.snapshot(), path) == whole
    path.write_text('[\n7,\nnull,\n{"ph":"E"},\n{"ph":"X","pid":1,"ts":"soon"},\n' + text.removeprefix("[\n"))
    assert render_report(recorder.snapshot(), path) == whole


def test_reasons_are_bounded_and_the_most_frequent_come_first(tmp_path: Path) -> None:
    def failed(number: int) -> list[dict[str, Any]]:
        args = {"status": "error", "reason": f"Error{number}", "error": f"Error{number}: boom"}
        common: dict[str, Any] = {"pid": 1, "tid": 1, "ts": number}
        return [{"ph": "B", "name": "a", **common}, {"ph": "E", **common, "args": args}]

    events = [event for number in [*range(1500), 7] for event in failed(number)]
    instant = {"status": "timeout", "reason": "InvocationTimeout", "error": "late", "agent": "b"}
    events.append({"ph": "i", "s": "p", "pid": 1, "ts": 1501, "args": instant})
    events += [{"ph": "i", "s": "g", "pid": 1, "ts": 1502, "args": {"reason": f"stop {n}"}} for n in range(9)]
    page = Page(render_report(MetricsRecorder().snapshot(), trace(tmp_path / "run.json", *events)))
    assert page.text.index("other reasons") < page.text.index("Error7") < page.text.index("Error0")
    assert "And 981 other reasons." in page.text
    assert "stop 4" in page.text
    assert "stop 5" not in page.text
    assert "none finished" in page.text


def test_levels_of_all_groups_add_up_over_time(tmp_path: Path) -> None:
    def counter(pid: int, ts: float, **args: float) -> dict[str, Any]:
        return {"ph": "C", "name": "n", "pid": pid, "ts": ts, "args": args}

    path = trace(
        tmp_path / "run.json",
        counter(1, 0, slots=10),
        counter(1, 0, running=3),
        counter(2, 5e8, running=4),
        counter(1, 1e9, running=0),
        counter(2, 1e9, running=0),
    )
    page = render_report(recorded(1.0).snapshot(), path)
    assert "at most 7 running" in page
    assert "over 16 min 40 s" in page


def test_report_without_a_timeline_says_what_is_missing() -> None:
    recorder = recorded(5.0)
    recorder.record(InvocationResult("a", Status.ERROR, latency_ms=1.0))
    meters_of(recorder).tell_in_flight(1)
    text = Page(render_report(recorder.snapshot())).text
    assert "Why they failed is told by a timeline" in text
    assert "50 % succeeded" in text
    assert "still running" in text


def test_empty_run_has_a_report(tmp_path: Path) -> None:
    empty = trace(tmp_path / "run.json")
    for timeline in None, empty:
        text = Page(render_report(MetricsRecorder().snapshot(), timeline)).text
        assert "Nothing was measured." in text
        assert "Nothing failed." in text

    failed = MetricsRecorder()
    failed.record(InvocationResult("a", Status.ERROR, latency_ms=1.0))
    assert "Unknown." in render_report(failed.snapshot(), empty)


def test_durations_of_any_size_are_drawn() -> None:
    assert "All 2 took less than a nanosecond." in render_report(recorded(0, 0).snapshot())
    mixed = render_report(recorded(*[0] * 9, 1e-5, 999.7, 3e4, 3e5, 3.72e6, 3e11).snapshot())
    assert "9 took less than a nanosecond and are not drawn" in mixed
    one = Page(render_report(recorded(123.0).snapshot()))
    assert sum(attrs.get("class") == "bar running" for _, attrs in one.elements) == 2


@pytest.mark.parametrize(
    ("latency_ms", "shown"),
    [
        (0.25, "0.25 ms"),
        (999.7, "1 s"),
        (1500, "1.5 s"),
        (3e5, "5 min"),
        (301e3, "5 min 1 s"),
        (3.72e6, "1 h 2 min"),
        (7.2e6, "2 h"),
    ],
)
def test_durations_are_shown_in_the_unit_that_suits_them(latency_ms: float, shown: str) -> None:
    assert f"<td>{shown}</td>" in render_report(recorded(latency_ms).snapshot())


@pytest.mark.parametrize(("count", "shown"), [(7, "8<"), (3000, "3k<"), (2_000_000, "2M<")])
def test_counts_are_shown_short(count: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(1.0)
    meters = meters_of(recorder)
    meters.count()
    for index in meters.latency.buckets:
        meters.latency.buckets[index] = count

    assert shown in render_report(recorder.snapshot())

"""The report of a run: what it says, that it says it harmlessly, and that it stays small."""

from __future__ import annotations

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_run import HOSTILE, make_up

from agentloop import InvocationResult, MetricsRecorder, Status
from agentloop._metrics.recorder import measurements_of
from agentloop.contrib.report import render_report, write_report
from agentloop.contrib.report._history import RunHistory

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


# --- a provider in trouble


def metadata(pid: int, name: str, /, **args: str) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "args": args}


def span(kind: str, begin: float, end: float | None, pid: int = 1) -> list[dict[str, Any]]:
    common = {"name": kind, "cat": kind, "pid": pid, "id": f"{pid}.{kind}"}
    begun: dict[str, Any] = {"ph": "b", "ts": begin * 1e6, **common}
    return [begun] if end is None else [begun, {"ph": "e", "ts": end * 1e6, **common}]


def told_until(seconds: float) -> dict[str, Any]:
    return {"ph": "C", "name": "limit", "pid": 1, "ts": seconds * 1e6, "args": {"slots": 5}}


def sentences(path: Path) -> list[str]:
    html = render_report(recorded(1.0).snapshot(), path)
    return re.findall('<p class="trouble">(.*?)</p>', html)


def test_trouble_of_the_provider_is_told_by_the_time_of_day(tmp_path: Path) -> None:
    path = trace(
        tmp_path / "run.json",
        metadata(1, "process_labels", labels="began 2026-11-27T21:00:50+01:00"),
        *span("held", 10, 110),
        *span("held", 200, 300),
        *span("outage", 22, 350),
        told_until(400),
    )
    assert sentences(path) == [
        "The provider was out from 21:01:12 to 21:06:40; calls were held for 3 min 20 s in total."
    ]
    assert "Began 2026-11-27 21:00:50 UTC+01:00." in render_report(recorded(1.0).snapshot(), path)


def test_trouble_in_a_timeline_of_several_days_has_dates(tmp_path: Path) -> None:
    path = trace(
        tmp_path / "run.json",
        metadata(1, "process_labels", labels="began 2026-11-27T23:59:00+01:00"),
        *span("outage", 30, 90),
        told_until(100),
    )
    assert sentences(path) == ["The provider was out from 2026-11-27 23:59:30 to 2026-11-28 00:00:30."]


@pytest.mark.parametrize(
    ("outages", "shown"),
    [
        ([(1, 2), (3, 4)], "from 1 s to 2 s and from 3 s to 4 s"),
        ([(1, 2), (3, 4), (5, 6)], "from 1 s to 2 s, from 3 s to 4 s and from 5 s to 6 s"),
        ([(1, 2), (3, 4), (5, 6), (7, 8)], "4 times, for 4 s in total, the first time from 1 s to 2 s"),
        ([(1, None)], "from 1 s to the end"),
    ],
)
def test_every_number_of_outages_is_one_sentence(
    outages: list[tuple[float, float | None]], shown: str, tmp_path: Path
) -> None:
    records = [record for outage in outages for record in span("outage", *outage)]
    path = trace(tmp_path / "run.json", *records, told_until(9))
    assert sentences(path) == [f"The provider was out {shown}."]


def test_trouble_of_several_limiters_is_told_of_each(tmp_path: Path) -> None:
    path = trace(
        tmp_path / "run.json",
        *[metadata(pid, "process_name", name=name) for pid, name in enumerate(["<b>", "chat", "embed"])],
        *span("held", 1, 2, pid=1),
        *span("outage", 1, 3, pid=0),
        told_until(9),
    )
    assert sentences(path) == [
        "&lt;b&gt;: the provider was out from 1 s to 3 s.",
        "chat: calls were held for 1 s in total.",
    ]


def bands(path: Path) -> list[tuple[str, list[float]]]:
    """Return the class of each band of the first chart that has some, and where it begins and ends."""
    html = render_report(recorded(1.0).snapshot(), path)
    chart = next((part for part in html.split("<svg") if 'class="band' in part), "")
    return [
        (kind, [float(x) for x in re.findall(r"[MH]([\d.]+)", shape)[:-1]])
        for kind, shape in re.findall('class="(?:band) (.*?)" d="(.*?)"', chart)
    ]


def test_cool_offs_and_outages_are_bands_in_the_chart(tmp_path: Path) -> None:
    running = {**told_until(0), "args": {"running": 5}}
    path = trace(
        tmp_path / "run.json", running, *span("held", 25, 50), *span("outage", 50, None), told_until(100)
    )
    width = 900 - 48 - 14
    assert bands(path) == [
        ("held", pytest.approx([48 + width / 4, 48 + width / 2], abs=4)),
        ("outage", pytest.approx([48 + width / 2, 48 + width], abs=4)),
    ]
    text = Page(render_report(recorded(1.0).snapshot(), path)).text
    assert "calls held" in text
    assert "provider out" in text
    assert "at most 5 running" in text


def test_run_without_trouble_says_nothing_of_it(tmp_path: Path) -> None:
    path = trace(tmp_path / "run.json", told_until(100))
    assert not sentences(path)
    assert not bands(path)
    text = Page(render_report(recorded(1.0).snapshot(), path)).text
    assert "calls held" not in text
    assert "Began" not in text


def test_records_of_impossible_times_are_left_out(tmp_path: Path) -> None:
    path = trace(
        tmp_path / "run.json",
        metadata(1, "process_labels", labels="began 9999-12-31T00:00:00+01:00"),
        metadata(1, "process_labels", labels="began yesterday"),
        *span("outage", 1, float("inf")),
        *span("outage", 5, 3),
        {"ph": "C", "name": "limit", "pid": 1, "ts": 10**400, "args": {"slots": 5}},
        told_until(9),
    )
    assert sentences(path) == ["The provider was out from 5 s to 5 s."]


ODD = [
    0,
    -1,
    2,
    1e308,
    10**400,
    math.inf,
    math.nan,
    1e-320,
    "running",
    "held",
    None,
    True,
    [],
    {},
    [1],
    "\ud800",
]
FIELDS = ("running", "slots", "status", "error", "reason", "agent", "name", "labels", "delay_seconds")


@pytest.mark.parametrize("seed", range(30))
def test_what_somebody_else_has_written_is_drawn_or_left_out(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)

    def record() -> dict[str, Any]:
        fields: dict[str, Any] = {
            "ph": rng.choice("BECibeMX"),
            "pid": rng.choice([1, 2]),
            "ts": rng.choice([0, 1, 5, 1e6, 1e15]),
            "name": rng.choice(["process_name", "process_labels"]),
            "cat": rng.choice(["held", "outage"]),
            "s": rng.choice("pgt"),
            "args": {name: rng.choice(ODD) for name in rng.sample(FIELDS, rng.randint(0, 9))},
        }
        return {**fields, **{name: rng.choice(ODD) for name in fields if rng.random() < 0.06}}

    path = trace(tmp_path / "run.json", *[record() for _ in range(rng.randint(1, 60))])
    page = Page(render_report(recorded(1.0).snapshot(), path))
    drawn = [
        value or ""
        for _, attrs in page.elements
        for name, value in attrs.items()
        if name in ("d", "x", "width", "style")
    ]
    assert not [value for value in drawn if re.search("nan|inf", value)]


@pytest.mark.parametrize(
    "line",
    ["[" * 50_000 + "]" * 50_000, '{"a":' * 20_000 + "1" + "}" * 20_000, "9" * 50_000, '"' + "x" * 3_000_000],
)
def test_line_of_any_depth_and_length_is_left_out(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    recorder = make_up(path, 20)
    whole = render_report(recorder.snapshot(), path)
    path.write_text(path.read_text().replace("[\n", f"[\n{line},\n", 1))
    assert render_report(recorder.snapshot(), path) == whole


def test_memory_is_bounded_however_much_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lines(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            assert size is not None
            assert 0 < size <= 1 << 17
            return super().readline(size)

    monkeypatch.setattr("agentloop.contrib.report._history._MAX_KNOWN", 5)
    fields = '"name":"process_name","cat":"held","args":{"name":"n","running":1}'
    history = RunHistory()
    history.read(
        Lines("".join(f'{{"ph":"{kind}","pid":{pid},{fields}}},\n' for pid in range(9) for kind in "BCbM"))
    )
    assert len(history.groups) == 5


def test_cool_off_that_a_killed_run_began_last_is_drawn(tmp_path: Path) -> None:
    path = trace(tmp_path / "run.json", span("held", 5, 6)[0])
    assert "Concurrency" in Page(render_report(recorded(1.0).snapshot(), path)).text


@pytest.mark.parametrize(
    "text",
    [
        "東京\u3000支店",
        "\u0646\u0645\u06cc\u200c\u062a",
        "क्\u200dष",
        "👨\u200d👩\u200d👧",
        "🏴\U000e0067\U000e007f",
        "10\u202f000",
    ],
)
def test_text_of_any_script_is_shown_unchanged(text: str) -> None:
    assert Page(render_report(recorded(1.0).snapshot(), title=text)).text.count(text) == 2


@pytest.mark.parametrize("mark", ["\u202e", "\u2066", "\u200f", "\u061c", "\u2028", "\x1b", "\0", "\ue000"])
def test_what_reorders_or_controls_is_replaced(mark: str) -> None:
    html = render_report(recorded(1.0).snapshot(), title=f"a{mark}b")
    assert mark not in html
    assert "a\ufffdb" in html


def test_size_depends_on_no_number_of_cool_offs(tmp_path: Path) -> None:
    records = [
        record for n in range(3000) for kind in ("held", "outage") for record in span(kind, 4 * n, 4 * n + 2)
    ]
    path = trace(tmp_path / "run.json", told_until(0), *records, told_until(12000))
    assert len(render_report(recorded(1.0).snapshot(), path)) < 100_000


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
    measurements_of(recorder).report_in_flight(1)
    text = Page(render_report(recorder.snapshot())).text
    assert "A timeline has the reasons" in text
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
    measurements = measurements_of(recorder)
    measurements.count()
    for index in measurements.latency.buckets:
        measurements.latency.buckets[index] = count

    assert shown in render_report(recorder.snapshot())

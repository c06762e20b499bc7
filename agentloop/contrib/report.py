"""
A report of a run: one HTML file that needs no network, no script and nothing else.

What it shows of durations comes from a snapshot; what happened when, and why, comes from the file of a
:class:`agentloop.contrib.timeline.Timeline`. Its size depends on neither.
"""

from __future__ import annotations

__all__ = ["render_report", "write_report"]

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from html import escape
from itertools import groupby
from typing import Any, TypeAlias

from agentloop import Distribution, MetricsSnapshot, Status

_BINS = 240
_BARS = 48
_MAX_REASONS = 1000
_SHOWN_REASONS = 20
_SHOWN_OUTAGES = 3
_LEVELS = ("running", "retrying", "waiting")
_TROUBLES: Sequence[str] = ("held", "outage")
_WIDTHS = {"wide": 900, "narrow": 340}
_MICROSECOND, _LONGEST = timedelta(microseconds=1), timedelta(days=36500)
_Key: TypeAlias = tuple[str, str]
_Path: TypeAlias = str | os.PathLike[str]


def write_report(
    path: _Path, snapshot: MetricsSnapshot, timeline: _Path | None = None, *, title: str = "A run of agents"
) -> None:
    """
    Write a report.

    :param path: the file, which is overwritten
    :param snapshot: what a recorder has recorded
    :param timeline: the file of a timeline, which may lack its end
    :param title: what it is called
    :raises OSError: if a file cannot be read or written
    """
    page = render_report(snapshot, timeline, title=title)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def render_report(
    snapshot: MetricsSnapshot, timeline: _Path | None = None, *, title: str = "A run of agents"
) -> str:
    """
    Return a report as HTML.

    :param snapshot: what a recorder has recorded
    :param timeline: the file of a timeline, which may lack its end
    :param title: what it is called
    :raises OSError: if the timeline cannot be read
    """
    story = _Story()
    if timeline is not None:
        with open(timeline, encoding="utf-8", errors="replace") as file:
            story.read(file)

    sections = [_headline(snapshot, story), _latency(snapshot.latency)]
    if story.bins.end:
        sections += [_concurrency(story), _throughput(story)]

    sections += [_failures(snapshot, story, timeline is not None), _durations(snapshot)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Should any text get past the escaping, it can still do nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_text(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


# --- what a timeline tells


class _Bins:
    """Levels and counts over time, in a bounded number of bins, which get wider as time goes on."""

    def __init__(self) -> None:
        self.width = 1.0
        self.end = 0.0
        self.rows: list[dict[str, float]] = []

    def add(self, levels: Mapping[str, float], begin: float, end: float) -> None:
        """Add levels that lasted from one time to another, in microseconds."""
        self._reach(end)
        for index in range(int(begin / self.width), int(end / self.width) + 1):
            part = min(end, (index + 1) * self.width) - max(begin, index * self.width)
            row = self.rows[index]
            for name, level in levels.items():
                row[name] = row.get(name, 0.0) + level * part

    def count(self, name: str, at: float) -> None:
        """Count something that happened at a time."""
        self._reach(at)
        row = self.rows[int(at / self.width)]
        row[name] = row.get(name, 0.0) + 1

    def mean(self, row: Mapping[str, float], name: str) -> float:
        return row.get(name, 0.0) / (row.get("time") or math.inf)

    def merged(self, most: int) -> list[dict[str, float]]:
        """Return the counts in fewer bins."""
        size = -(-len(self.rows) // most) or 1
        return [_sum(self.rows[start : start + size]) for start in range(0, len(self.rows), size)]

    def _reach(self, end: float) -> None:
        self.end = max(self.end, end)
        while end >= self.width * _BINS:
            self.rows = self.merged(-(-len(self.rows) // 2) or 1)
            self.width *= 2

        while len(self.rows) <= end / self.width:
            self.rows.append({})


class _Reason:
    """Failures of one kind."""

    def __init__(self, agent: str, error: str) -> None:
        self.final = self.retried = 0
        self.agent = agent
        self.error = error


class _Group:
    """What the loops that share a limiter have seen of their provider."""

    def __init__(self) -> None:
        self.name = ""
        self.outages: list[tuple[float, float]] = []
        """Begin and end of the first few, in microseconds."""
        self.counts = dict.fromkeys(_TROUBLES, 0)
        self.totals_us = dict.fromkeys(_TROUBLES, 0.0)

    def add(self, kind: str, begin: float, end: float) -> None:
        """Add a cool-off or an outage."""
        self.counts[kind] += 1
        self.totals_us[kind] += end - begin
        if kind == "outage" and len(self.outages) < _SHOWN_OUTAGES:
            self.outages.append((begin, end))


class _Story:
    """What a timeline tells, in bounded memory however long it is."""

    def __init__(self) -> None:
        self.bins = _Bins()
        self.reasons: dict[_Key, _Reason] = {}
        self.stops: list[str] = []
        self.began: datetime | None = None
        self.groups: dict[str, _Group] = {}
        self._troubles: dict[_Key, float] = {}
        self._levels: dict[_Key, float] = {}
        self._held_since = 0.0
        self._agents: dict[tuple[Any, Any], str] = {}

    def read(self, lines: Iterable[str]) -> None:
        """Read the lines of a file, each of which is a record."""
        for line in lines:
            try:
                self._tell(json.loads(line.strip().rstrip(",")))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                pass  # a bracket, half a line at the end of a killed run, or somebody else's record

        self._hold(self.bins.end)
        for key, begin in self._troubles.items():
            self._add_trouble(key, begin, max(begin, self.bins.end))

    def moment(self, at: float) -> str:
        """Return a time, in microseconds, as people say it."""
        if at >= self.bins.end:
            return "the end"

        if self.began is None:
            return _ms(at / 1000)

        last = self.began + self.bins.end * _MICROSECOND
        date = "" if self.began.date() == last.date() else "%Y-%m-%d "
        return f"{self.began + at * _MICROSECOND:{date}%H:%M:%S}"

    def _tell(self, record: dict[str, Any]) -> None:
        phase, lane = record["ph"], (record["pid"], record.get("tid"))
        at = max(0.0, float(record.get("ts", 0.0)))
        if at > _LONGEST / _MICROSECOND:
            raise ValueError("nothing takes so long")

        if phase == "B":
            self._agents[lane] = str(record["name"])
        elif phase == "E":
            self._ended(record["args"], self._agents.pop(lane), at)
        elif phase == "C":
            self._hold(at)
            for name, level in record["args"].items():
                self._levels[str(record["pid"]), name] = float(level)
        elif phase == "i" and record["s"] == "p":
            self._ended(record["args"], record["args"]["agent"], at)
        elif phase == "i" and record["s"] == "g" and len(self.stops) < 5:
            self.stops.append(str(record["args"]["reason"]))
        elif phase == "b" and record["cat"] in _TROUBLES:
            self._troubles[str(record["pid"]), record["cat"]] = at
        elif phase == "e" and record["cat"] in _TROUBLES:
            key = str(record["pid"]), record["cat"]
            begin = self._troubles.pop(key)
            self._add_trouble(key, begin, max(begin, at))
        elif phase == "M" and record["name"] == "process_name":
            self._group(str(record["pid"])).name = str(record["args"]["name"])
        elif phase == "M" and record["name"] == "process_labels":
            began = datetime.fromisoformat(record["args"]["labels"].removeprefix("began "))
            # Raises where later moments would be beyond the end of the calendar.
            self.began = began + _LONGEST - _LONGEST

    def _group(self, pid: str) -> _Group:
        return self.groups.setdefault(pid, _Group())

    def _add_trouble(self, key: _Key, begin: float, end: float) -> None:
        pid, kind = key
        self._group(pid).add(kind, begin, end)
        self.bins.add({kind: 1.0}, begin, end)

    def _ended(self, args: dict[str, Any], agent: str, at: float) -> None:
        status = str(args["status"])
        self.bins.count("succeeded" if status == Status.SUCCESS else "failed", at)
        if "error" not in args:
            return

        key = (str(args["reason"]), status)
        if key not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            key = ("other reasons", "")

        reason = self.reasons.setdefault(key, _Reason(agent, str(args["error"])))
        if "delay_seconds" in args:
            reason.retried += 1
        else:
            reason.final += 1

    def _hold(self, at: float) -> None:
        if at > self._held_since:
            names = {name for _, name in self._levels}
            totals = {name: sum(v for (_, n), v in self._levels.items() if n == name) for name in names}
            self.bins.add({"time": 1.0, **totals}, self._held_since, at)
            self._held_since = at


def _sum(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value

    return total


# --- sections


def _headline(snapshot: MetricsSnapshot, story: _Story) -> str:
    total = sum(snapshot.counts.values())
    finished = total - snapshot.counts[Status.SKIPPED] - snapshot.counts[Status.CANCELLED]
    share = (
        f"{_percent(snapshot.counts[Status.SUCCESS], finished)} succeeded" if finished else "none finished"
    )
    figures = [
        ("invocations", f"{total:,}", share),
        ("failed", f"{snapshot.failures:,}", f"{snapshot.counts[Status.TIMEOUT]:,} by time-out"),
        ("retries", f"{snapshot.retries:,}", f"{snapshot.overloads:,} overloads"),
        ("median latency", _ms(snapshot.latency.p50_ms), f"95 % within {_ms(snapshot.latency.p95_ms)}"),
    ]
    if story.bins.end:
        seconds = story.bins.end / 1e6
        figures.append(("took", _ms(seconds * 1000), f"{total / seconds:,.3g} a second"))

    if snapshot.in_flight:
        figures.append(("still running", f"{snapshot.in_flight:,}", "when this was written"))

    cards = "".join(
        f'<div class="card"><dt>{name}</dt><dd><b>{value}</b><span>{note}</span></dd></div>'
        for name, value, note in figures
    )
    parts = [(status, snapshot.counts[status]) for status in Status if snapshot.counts[status]]
    bar = "".join(f'<i class="{status}" style="flex-grow:{count}"></i>' for status, count in parts)
    legend = _legend([(status, f"{count:,} {status}") for status, count in parts])
    began = f'<p class="note">Began {story.began:%Y-%m-%d %H:%M:%S %Z}.</p>\n' if story.began else ""
    stops = "".join(f'<p class="stop">Stopped: {_text(reason)}</p>' for reason in story.stops)
    troubles = "".join(f'<p class="trouble">{_text(sentence)}</p>' for sentence in _troubles(story))
    return (
        f'{began}<dl class="cards">{cards}</dl>\n'
        f'<div class="outcomes" aria-hidden="true">{bar}</div>{legend}{stops}{troubles}'
    )


def _troubles(story: _Story) -> Iterator[str]:
    """Yield a sentence for each provider that was in trouble."""
    concerned = [group for group in story.groups.values() if any(group.counts.values())]
    for group in concerned[:5]:
        facts: list[str] = []
        if group.outages:
            times = [f"from {story.moment(begin)} to {story.moment(end)}" for begin, end in group.outages]
            count, total = group.counts["outage"], _ms(group.totals_us["outage"] / 1000)
            when = " and ".join(filter(None, [", ".join(times[:-1]), times[-1]]))
            if count > len(times):
                when = f"{count:,} times, for {total} in total, the first time {times[0]}"

            facts.append(f"the provider was out {when}")

        if group.counts["held"]:
            facts.append(f"calls were held for {_ms(group.totals_us['held'] / 1000)} in total")

        sentence = "; ".join(facts)
        # Of whom that is said, where there are several.
        several = len(story.groups) > 1
        yield f"{group.name}: {sentence}." if several else f"{sentence[0].upper()}{sentence[1:]}."


def _latency(latency: Distribution) -> str:
    if not latency.count:
        return _section("Latency", "<p>Nothing was measured.</p>")

    if not latency.buckets:
        return _section("Latency", f"<p>All {latency.count:,} took less than a nanosecond.</p>")

    # Neighbouring buckets are put together, two by two, until they are few enough.
    shift = 0
    low, high = min(latency.buckets), max(latency.buckets)
    while (high >> shift) - (low >> shift) >= _BARS:
        shift += 1

    # A few more bars at either side, lest a single value be one wall.
    first, last = (low >> shift) - 1, (high >> shift) + 1
    heights = [0] * (last - first + 1)
    for index, count in latency.buckets.items():
        heights[(index >> shift) - first] += count

    per_octave = math.exp2(latency.scale - shift)

    def place(value: float) -> float:
        """Return where a duration is, from 0 at the left to 1 at the right."""
        return (math.log2(value) * per_octave - first) / len(heights)

    bounds = [math.exp2((first + i) / per_octave) for i in range(len(heights) + 1)]
    marks = [
        (label, value, place(value))
        for label, value in (("p50", latency.p50_ms), ("p95", latency.p95_ms), ("p99", latency.p99_ms))
        if value >= bounds[0]
    ]

    def draw(chart: _Chart) -> None:
        chart.y_axis(max(heights), "invocations")
        ticks = [(place(value), _ms(value)) for value in _decades(bounds[0], bounds[-1])]
        chart.x_axis(ticks or [(place(value), _ms(value)) for value in (bounds[0], bounds[-1])])
        for i, height in enumerate(heights):
            tip = f"{_ms(bounds[i])} to {_ms(bounds[i + 1])}: {height:,}"
            chart.bar(i / len(heights), (i + 1) / len(heights), 0, height, "running", tip)

        for row, (label, value, x) in enumerate(marks):
            chart.mark(x, row, f"{label} {_ms(value)}")

    zeros = f" {latency.zeros:,} took less than a nanosecond and are not drawn." if latency.zeros else ""
    note = f"From the first start to the end, with retries and waits; the scale is logarithmic.{zeros}"
    spoken = ", ".join(f"{label} {_ms(value)}" for label, value, _ in marks)
    return _section("Latency", _charts(f"Histogram of {latency.count:,} latencies: {spoken}", draw), note)


def _concurrency(story: _Story) -> str:
    bins = story.bins
    # The last bin may have been entered by an instant only.
    rows = [row for row in bins.rows if row.get("time")]
    stacked = [[bins.mean(row, name) for name in _LEVELS] for row in rows]
    limits = [bins.mean(row, "slots") for row in rows]
    top = max([*map(sum, stacked), *limits, 1.0])
    troubles = [kind for kind in _TROUBLES if any(row.get(kind) for row in rows)]

    def draw(chart: _Chart) -> None:
        chart.y_axis(top, "invocations")
        chart.time_axis(bins.end)
        span = bins.end / bins.width
        edges = [min(index / span, 1.0) for index in range(len(rows) + 1)]
        for level in reversed(range(len(_LEVELS))):
            chart.area(edges, [sum(row[: level + 1]) for row in stacked], _LEVELS[level])

        for place, kind in enumerate(troubles):
            chart.bands(edges, [row.get(kind, 0.0) for row in rows], place, kind)

        chart.steps(edges, limits, "limit")

    peak = max((row[0] for row in stacked), default=0.0)
    spoken = f"Running, waiting and the limit over {_ms(bins.end / 1000)}; at most {peak:,.3g} running"
    legend = _legend(
        [
            ("running", "running"),
            ("retrying", "waiting to be retried"),
            ("waiting", "waiting for a slot"),
            ("limit", "limit"),
            *((kind, {"held": "calls held", "outage": "provider out"}[kind]) for kind in troubles),
        ]
    )
    note = f"Means of {_ms(bins.width / 1000)} each."
    return _section("Concurrency", _charts(spoken, draw) + legend, note)


def _throughput(story: _Story) -> str:
    rows = story.bins.merged(_BARS)
    counts = [(row.get("succeeded", 0.0), row.get("failed", 0.0)) for row in rows]
    width = story.bins.width * -(-len(story.bins.rows) // _BARS)
    top = max(map(sum, counts))

    def draw(chart: _Chart) -> None:
        chart.y_axis(top or 1.0, "attempts")
        chart.time_axis(story.bins.end)
        span = max(story.bins.end / width, 1e-9)
        for i, (good, bad) in enumerate(counts):
            begin, end = min(i / span, 1.0), min((i + 1) / span, 1.0)
            tip = f"from {_ms(i * width / 1000)}: {good:,.0f} succeeded, {bad:,.0f} failed"
            chart.bar(begin, end, 0, good, "success", tip)
            chart.bar(begin, end, good, bad, "error", tip)

    legend = _legend([("success", "succeeded"), ("error", "failed")])
    good, bad = sum(good for good, _ in counts), sum(bad for _, bad in counts)
    spoken = f"Attempts that ended over time: {good:,.0f} succeeded, {bad:,.0f} failed"
    return _section(
        "Attempts", _charts(spoken, draw) + legend, f"Those that ended in {_ms(width / 1000)} each."
    )


def _failures(snapshot: MetricsSnapshot, story: _Story, has_timeline: bool) -> str:
    if not story.reasons:
        if snapshot.failures and not has_timeline:
            return _section("Failures", "<p>Why they failed is told by a timeline; this report has none.</p>")

        return _section("Failures", "<p>Nothing failed.</p>" if not snapshot.failures else "<p>Unknown.</p>")

    ranked = sorted(story.reasons.items(), key=lambda item: -(item[1].final + item[1].retried))
    most = ranked[0][1].final + ranked[0][1].retried
    rows = "".join(
        f'<tr><th scope="row"><span class="dot {_class(status)}"></span>{_text(kind)}'
        f'<i class="share" style="width:{100 * (reason.final + reason.retried) / most:.1f}%"></i></th>'
        f"<td>{reason.retried:,}</td><td>{reason.final:,}</td>"
        f'<td class="example"><b>{_text(reason.agent)}</b> {_text(reason.error)}</td></tr>'
        for (kind, status), reason in ranked[:_SHOWN_REASONS]
    )
    rest = len(ranked) - _SHOWN_REASONS
    more = f"<p>And {rest:,} other reasons.</p>" if rest > 0 else ""
    head = "<tr><th>reason</th><th>retried</th><th>final</th><th>for example</th></tr>"
    table = f'<table class="failures"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    table = f'<div class="scroll">{table}</div>'
    return _section(
        "Failures", table + more, "Failed attempts by reason: those that were retried, and the others."
    )


def _durations(snapshot: MetricsSnapshot) -> str:
    named = [
        ("latency", snapshot.latency),
        ("attempt", snapshot.attempt),
        ("queue", snapshot.queue),
        ("backoff", snapshot.backoff),
        ("first chunk", snapshot.first_chunk),
        ("between chunks", snapshot.chunk_gap),
    ]
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{d.count:,}</td>'
        + "".join(f"<td>{_ms(v)}</td>" for v in (d.min_ms, d.mean_ms, d.p50_ms, d.p95_ms, d.p99_ms, d.max_ms))
        + "</tr>"
        for name, d in named
        if d.count
    )
    titles = ("", "count", "min", "mean", "p50", "p95", "p99", "max")
    head = "".join(f"<th>{title}</th>" for title in titles)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section("Durations", table, "Percentiles are within 1 %.")


# --- drawing


class _Chart:
    """An SVG with axes. Places are from 0 at the left to 1 at the right, heights are values."""

    # Above are a unit, and up to three marks.
    TOP, BOTTOM, LEFT, RIGHT, HEIGHT = 54.0, 26.0, 48.0, 14.0, 240.0

    def __init__(self, width: float, spoken: str) -> None:
        self.width = width
        self.top_value = 1.0
        self.parts = [
            f'<svg viewBox="0 0 {width:g} {self.HEIGHT:g}" role="img" aria-label="{_text(spoken)}">'
            f"<title>{_text(spoken)}</title>"
        ]

    def x(self, place: float) -> float:
        return self.LEFT + min(max(place, 0.0), 1.0) * (self.width - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        return self.HEIGHT - self.BOTTOM - value / self.top_value * (self.HEIGHT - self.TOP - self.BOTTOM)

    def label(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>')

    def y_axis(self, top: float, unit: str) -> None:
        step = max(_step(top), 1.0)  # there are no halves of invocations
        self.top_value = step * math.ceil(top / step)
        for number in range(round(self.top_value / step) + 1):
            y = self.y(number * step)
            self.parts.append(f'<path class="grid" d="M{self.LEFT:g} {y:.1f}H{self.width - self.RIGHT:g}"/>')
            self.label(self.LEFT - 6, y + 4, _short(number * step), "end")

        self.label(6, 14, unit, "start")

    def x_axis(self, ticks: Sequence[tuple[float, str]]) -> None:
        # No more labels than there is room for.
        every = -(-len(ticks) // max(2, int(self.width / 90)))
        for place, text in ticks[::every]:
            anchor = "start" if place < 0.03 else "end" if place > 0.95 else "middle"
            self.label(self.x(place), self.HEIGHT - 8, text, anchor)

    def time_axis(self, end_us: float) -> None:
        step = _step(end_us / 1000)
        numbers = range(int(end_us / 1000 / step) + 1)
        self.x_axis([(number * step * 1000 / end_us, _ms(number * step)) for number in numbers])

    def bar(self, begin: float, end: float, base: float, height: float, kind: str, tip: str) -> None:
        if height:
            x, y = self.x(begin), self.y(base + height)
            wide, high = max(self.x(end) - x - 1, 0.8), max(self.y(base) - y, 1.0)
            place = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"'
            self.parts.append(f'<rect class="bar {kind}" {place}><title>{_text(tip)}</title></rect>')

    def area(self, edges: Sequence[float], values: Sequence[float], kind: str) -> None:
        base = self.y(0)
        path = f"M{self.x(edges[0]):.1f} {base:.1f}" + self._path(edges, values) + f"V{base:.1f}Z"
        self.parts.append(f'<path class="area {kind}" d="{path}"/>')

    def steps(self, edges: Sequence[float], values: Sequence[float], kind: str) -> None:
        start = f"M{self.x(edges[0]):.1f} {self.y(values[0]):.1f}"
        self.parts.append(f'<path class="line {kind}" d="{start}{self._path(edges, values)}"/>')

    def bands(self, edges: Sequence[float], shares: Sequence[float], row: int, kind: str) -> None:
        """Tint the times in which there was something, and mark them above the chart, in one of two rows."""
        spans: list[tuple[float, float]] = []
        index = 0
        for is_there, neighbours in groupby(shares, bool):
            begin, index = index, index + len(list(neighbours))
            if is_there:
                spans.append((self.x(edges[begin]), self.x(edges[index])))

        above, base = self.TOP - 4 - 6 * row, self.HEIGHT - self.BOTTOM
        for name, y, bottom in ("band", self.TOP, base), ("strip", above - 4, above):
            path = "".join(f"M{x:.1f} {y:g}H{end:.1f}V{bottom:g}H{x:.1f}Z" for x, end in spans)
            self.parts.append(f'<path class="{name} {kind}" d="{path}"/>')

    def mark(self, place: float, row: int, text: str) -> None:
        x, y = self.x(place), 14.0 + 14 * row
        self.parts.append(f'<path class="mark" d="M{x:.1f} {y + 3:.1f}V{self.HEIGHT - self.BOTTOM:g}"/>')
        # The label goes where there is more room.
        self.label(x + (4 if place < 0.6 else -4), y + 4, text, "start" if place < 0.6 else "end")

    def _path(self, edges: Sequence[float], values: Sequence[float]) -> str:
        return "".join(f"V{self.y(v):.1f}H{self.x(e):.1f}" for v, e in zip(values, edges[1:], strict=True))


def _charts(spoken: str, draw: Callable[[_Chart], None]) -> str:
    """Draw a chart for wide screens and one for narrow ones, whose letters are of the same size."""
    drawn: list[str] = []
    for name, width in _WIDTHS.items():
        chart = _Chart(width, spoken)
        draw(chart)
        drawn.append(f'<div class="chart {name}">{"".join(chart.parts)}</svg></div>')

    return "".join(drawn)


def _section(title: str, body: str, note: str = "") -> str:
    noted = f'<p class="note">{_text(note)}</p>' if note else ""
    return f'<section id="{title.lower()}">\n<h2>{title}</h2>{noted}\n{body}\n</section>'


def _legend(items: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f'<li><span class="dot {kind}"></span>{text}</li>' for kind, text in items)
    return f'<ul class="legend">{shown}</ul>'


# --- text


def _text(text: str) -> str:
    """Return a text that is safe in HTML, and that neither reorders nor hides what stands around it."""
    return escape("".join(char if char.isprintable() else "\ufffd" for char in text[:500]))


def _class(status: str) -> str:
    return status if status in list(Status) else "cancelled"


def _percent(part: int, whole: int) -> str:
    # 99.99 % is not all of it.
    percent = math.floor(1000 * part / whole) / 10
    return f"{percent:g} %"


def _ms(value: float) -> str:
    """Return a duration in the unit that suits it."""
    if not value:
        return "0"

    if value < 1000:
        return f"{value:.3g} ms" if value < 999.5 else "1 s"

    seconds = value / 1000
    if seconds < 99.95:
        return f"{seconds:.3g} s"

    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"

    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def _short(value: float) -> str:
    for factor, unit in (1e9, "G"), (1e6, "M"), (1e3, "k"):
        if value >= factor:
            return f"{value / factor:g}{unit}"

    return f"{value:g}"


def _step(top: float) -> float:
    """Return a round step, of which four or five reach the top."""
    power: float = 10.0 ** math.floor(math.log10(top / 4))
    return power * next(digit for digit in (1.0, 2.0, 2.5, 5.0, 10.0) if power * digit * 5 >= top)


def _decades(low: float, high: float) -> Iterator[float]:
    """Yield 1, 2 and 5 times the powers of ten, or only these where there are many."""
    digits = (1, 2, 5) if high / low < 1000 else (1,)
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in digits:
            if low <= digit * 10.0**power <= high:
                yield digit * 10.0**power


_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2430;--soft:#626b79;--line:#e4e6ea;
--success:#2b9a78;--error:#cf3f4f;--timeout:#de9a26;--cancelled:#8b93a1;--skipped:#c3c8d0;
--running:#3f73d6;--retrying:#e3a23a;--waiting:#c9cfd9;--limit:#1d2430;--held:#8a5bd0;--outage:#cf3f4f}
@media(prefers-color-scheme:dark){:root{--bg:#12161d;--card:#1a2029;--ink:#e7eaf0;--soft:#9aa4b2;
--line:#2b3340;
--success:#43b893;--error:#ef6b78;--timeout:#f0b44c;--cancelled:#78818f;--skipped:#4a5362;
--running:#6a98f0;--retrying:#f0b44c;--waiting:#4a5362;--limit:#e7eaf0;--held:#ab8af2;--outage:#ef6b78}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 20px 56px}
h1{font-size:26px;line-height:1.25;margin:0 0 18px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:18px 20px;margin-top:18px}
.note{color:var(--soft);margin:2px 0 10px;font-size:13.5px}
h1+.note{margin:-12px 0 18px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:0 0 16px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 16px}
dt{color:var(--soft);font-size:13.5px}
dd{margin:0}
dd b{display:block;font-size:25px;line-height:1.3;font-weight:650}
dd span{color:var(--soft);font-size:13px}
.outcomes{display:flex;gap:2px;height:12px;border-radius:6px;overflow:hidden}
.outcomes i{min-width:3px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;padding:0;font-size:13.5px}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.dot.limit{height:0;border-top:2px dashed var(--limit);border-radius:0;width:16px;vertical-align:4px}
.stop,.trouble{border-left:4px solid var(--error);padding-left:10px;margin:12px 0 0;overflow-wrap:anywhere}
.trouble{border-color:var(--held)}
.band{fill-opacity:.2}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px;paint-order:stroke;stroke:var(--card);stroke-width:4px}
.grid{stroke:var(--line)}
.mark{stroke:var(--ink);stroke-dasharray:3 3}
.line{fill:none;stroke-width:2}
.line.limit{stroke:var(--limit);stroke-dasharray:6 4}
.narrow{display:none}
@media(max-width:600px){.wide{display:none}
.narrow{display:block}
main{padding:18px 12px 40px}
section{padding:14px}}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:right;
padding:6px 10px;border-bottom:1px solid var(--line);white-space:nowrap;font-weight:400}
thead th{color:var(--soft);font-size:13px}
th:first-child,.failures th:last-child,.example{text-align:left}
tbody tr:last-child>*{border-bottom:0}
.failures tbody th{min-width:170px}
td.example{white-space:normal;overflow-wrap:anywhere;min-width:240px;font-size:13px;color:var(--soft)}
.example b{color:var(--ink);font-weight:600}
.share{display:block;height:4px;border-radius:2px;background:var(--error);margin-top:3px;opacity:.55}
@media(max-width:600px){.failures thead th:last-child{display:none}
.failures tr{display:grid;grid-template-columns:1fr 68px 56px}
.failures th,.failures td{border-bottom:0}.failures tbody tr{border-bottom:1px solid var(--line)}
.failures td.example{grid-column:1/-1;padding-top:0}}
""" + "".join(
    f".{kind}{{background:var(--{kind})}}svg .{kind}{{fill:var(--{kind});background:none}}\n"
    for kind in (*Status, *_LEVELS, *_TROUBLES)
)

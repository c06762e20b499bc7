"""Renders each section of a report as HTML."""

from __future__ import annotations

__all__ = ["concurrency", "durations", "failures", "headline", "latency_section", "throughput"]

import math
from collections.abc import Iterator, Sequence

from agentloop import Distribution, MetricsSnapshot, Status

from ._chart import Chart, decades, draw_charts
from ._history import LEVELS, TROUBLES, RunHistory
from ._text import class_of, duration, percent, safe

_BARS = 48
_SHOWN_REASONS = 20


def headline(snapshot: MetricsSnapshot, history: RunHistory) -> str:
    total = sum(snapshot.counts.values())
    finished = total - snapshot.counts[Status.SKIPPED] - snapshot.counts[Status.CANCELLED]
    share = f"{percent(snapshot.counts[Status.SUCCESS], finished)} succeeded" if finished else "none finished"
    figures = [
        ("invocations", f"{total:,}", share),
        ("failed", f"{snapshot.failures:,}", f"{snapshot.counts[Status.TIMEOUT]:,} by time-out"),
        ("retries", f"{snapshot.retries:,}", f"{snapshot.overloads:,} overloads"),
        (
            "median latency",
            duration(snapshot.latency.p50_ms),
            f"95 % within {duration(snapshot.latency.p95_ms)}",
        ),
    ]
    if history.bins.end:
        seconds = history.bins.end / 1e6
        figures.append(("took", duration(seconds * 1000), f"{total / seconds:,.3g} a second"))

    if snapshot.in_flight:
        figures.append(("still running", f"{snapshot.in_flight:,}", "when this was written"))

    cards = "".join(
        f'<div class="card"><dt>{name}</dt><dd><b>{value}</b><span>{note}</span></dd></div>'
        for name, value, note in figures
    )
    parts = [(status, snapshot.counts[status]) for status in Status if snapshot.counts[status]]
    bar = "".join(f'<i class="{status}" style="flex-grow:{count}"></i>' for status, count in parts)
    legend = _legend([(status, f"{count:,} {status}") for status, count in parts])
    began = f'<p class="note">Began {history.began:%Y-%m-%d %H:%M:%S %Z}.</p>\n' if history.began else ""
    stops = "".join(f'<p class="stop">Stopped: {safe(reason)}</p>' for reason in history.stops)
    troubles = "".join(f'<p class="trouble">{safe(sentence)}</p>' for sentence in _troubles(history))
    return (
        f'{began}<dl class="cards">{cards}</dl>\n'
        f'<div class="outcomes" aria-hidden="true">{bar}</div>{legend}{stops}{troubles}'
    )


def _troubles(history: RunHistory) -> Iterator[str]:
    """Yield a sentence for each provider that was in trouble."""
    concerned = [group for group in history.groups.values() if any(group.counts.values())]
    for group in concerned[:5]:
        facts: list[str] = []
        if group.outages:
            times = [f"from {history.moment(begin)} to {history.moment(end)}" for begin, end in group.outages]
            count, total = group.counts["outage"], duration(group.totals_us["outage"] / 1000)
            when = " and ".join(filter(None, [", ".join(times[:-1]), times[-1]]))
            if count > len(times):
                when = f"{count:,} times, for {total} in total, the first time {times[0]}"

            facts.append(f"the provider was out {when}")

        if group.counts["held"]:
            facts.append(f"calls were held for {duration(group.totals_us['held'] / 1000)} in total")

        sentence = "; ".join(facts)
        # With several limiters, the sentence names its own.
        several = len(history.groups) > 1
        yield f"{group.name}: {sentence}." if several else f"{sentence[0].upper()}{sentence[1:]}."


def latency_section(latency: Distribution) -> str:
    if not latency.count:
        return _section("Latency", "<p>Nothing was measured.</p>")

    if not latency.buckets:
        return _section("Latency", f"<p>All {latency.count:,} took less than a nanosecond.</p>")

    # Merge neighbouring buckets in pairs until there are fewer than _BARS.
    shift = 0
    low, high = min(latency.buckets), max(latency.buckets)
    while (high >> shift) - (low >> shift) >= _BARS:
        shift += 1

    # One more bar at either side, so that a single value does not fill the whole width.
    first, last = (low >> shift) - 1, (high >> shift) + 1
    heights = [0] * (last - first + 1)
    for index, count in latency.buckets.items():
        heights[(index >> shift) - first] += count

    per_octave = math.exp2(latency.scale - shift)

    def place(value: float) -> float:
        """Return the place of a duration, from 0 at the left to 1 at the right."""
        return (math.log2(value) * per_octave - first) / len(heights)

    bounds = [math.exp2((first + i) / per_octave) for i in range(len(heights) + 1)]
    marks = [
        (label, value, place(value))
        for label, value in (("p50", latency.p50_ms), ("p95", latency.p95_ms), ("p99", latency.p99_ms))
        if value >= bounds[0]
    ]

    def draw(chart: Chart) -> None:
        chart.y_axis(max(heights), "invocations")
        ticks = [(place(value), duration(value)) for value in decades(bounds[0], bounds[-1])]
        chart.x_axis(ticks or [(place(value), duration(value)) for value in (bounds[0], bounds[-1])])
        for i, height in enumerate(heights):
            tip = f"{duration(bounds[i])} to {duration(bounds[i + 1])}: {height:,}"
            chart.bar(i / len(heights), (i + 1) / len(heights), 0, height, "running", tip)

        for row, (label, value, x) in enumerate(marks):
            chart.mark(x, row, f"{label} {duration(value)}")

    zeros = f" {latency.zeros:,} took less than a nanosecond and are not drawn." if latency.zeros else ""
    note = f"From the first start to the end, with retries and waits; the scale is logarithmic.{zeros}"
    spoken = ", ".join(f"{label} {duration(value)}" for label, value, _ in marks)
    return _section("Latency", draw_charts(f"Histogram of {latency.count:,} latencies: {spoken}", draw), note)


def concurrency(history: RunHistory) -> str:
    bins = history.bins
    # The last bin may have been entered by an instant only.
    rows = [row for row in bins.rows if row.get("time")]
    stacked = [[bins.mean(row, name) for name in LEVELS] for row in rows]
    limits = [bins.mean(row, "slots") for row in rows]
    top = max([*map(sum, stacked), *limits, 1.0])
    troubles = [kind for kind in TROUBLES if any(row.get(kind) for row in rows)]

    def draw(chart: Chart) -> None:
        chart.y_axis(top, "invocations")
        chart.time_axis(bins.end)
        span = bins.end / bins.width
        edges = [min(index / span, 1.0) for index in range(len(rows) + 1)]
        for level in reversed(range(len(LEVELS))):
            chart.area(edges, [sum(row[: level + 1]) for row in stacked], LEVELS[level])

        for place, kind in enumerate(troubles):
            chart.bands(edges, [row.get(kind, 0.0) for row in rows], place, kind)

        chart.steps(edges, limits, "limit")

    peak = max((row[0] for row in stacked), default=0.0)
    spoken = f"Running, waiting and the limit over {duration(bins.end / 1000)}; at most {peak:,.3g} running"
    legend = _legend(
        [
            ("running", "running"),
            ("retrying", "waiting to be retried"),
            ("waiting", "waiting for a slot"),
            ("limit", "limit"),
            *((kind, {"held": "calls held", "outage": "provider out"}[kind]) for kind in troubles),
        ]
    )
    note = f"Means of {duration(bins.width / 1000)} each."
    return _section("Concurrency", draw_charts(spoken, draw) + legend, note)


def throughput(history: RunHistory) -> str:
    rows = history.bins.merged(_BARS)
    counts = [(row.get("succeeded", 0.0), row.get("failed", 0.0)) for row in rows]
    width = history.bins.width * -(-len(history.bins.rows) // _BARS)
    top = max(map(sum, counts))

    def draw(chart: Chart) -> None:
        chart.y_axis(top or 1.0, "attempts")
        chart.time_axis(history.bins.end)
        span = max(history.bins.end / width, 1e-9)
        for i, (good, bad) in enumerate(counts):
            begin, end = min(i / span, 1.0), min((i + 1) / span, 1.0)
            tip = f"from {duration(i * width / 1000)}: {good:,.0f} succeeded, {bad:,.0f} failed"
            chart.bar(begin, end, 0, good, "success", tip)
            chart.bar(begin, end, good, bad, "error", tip)

    legend = _legend([("success", "succeeded"), ("error", "failed")])
    good, bad = sum(good for good, _ in counts), sum(bad for _, bad in counts)
    spoken = f"Attempts that ended over time: {good:,.0f} succeeded, {bad:,.0f} failed"
    return _section(
        "Attempts", draw_charts(spoken, draw) + legend, f"Those that ended in {duration(width / 1000)} each."
    )


def failures(snapshot: MetricsSnapshot, history: RunHistory, has_timeline: bool) -> str:
    if not history.reasons:
        if snapshot.failures and not has_timeline:
            return _section("Failures", "<p>A timeline has the reasons; this report has no timeline.</p>")

        return _section("Failures", "<p>Nothing failed.</p>" if not snapshot.failures else "<p>Unknown.</p>")

    ranked = sorted(history.reasons.items(), key=lambda item: -(item[1].final + item[1].retried))
    most = ranked[0][1].final + ranked[0][1].retried
    rows = "".join(
        f'<tr><th scope="row"><span class="dot {class_of(status)}"></span>{safe(kind)}'
        f'<i class="share" style="width:{100 * (reason.final + reason.retried) / most:.1f}%"></i></th>'
        f"<td>{reason.retried:,}</td><td>{reason.final:,}</td>"
        f'<td class="example"><b>{safe(reason.agent)}</b> {safe(reason.error)}</td></tr>'
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


def durations(snapshot: MetricsSnapshot) -> str:
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
        + "".join(
            f"<td>{duration(v)}</td>" for v in (d.min_ms, d.mean_ms, d.p50_ms, d.p95_ms, d.p99_ms, d.max_ms)
        )
        + "</tr>"
        for name, d in named
        if d.count
    )
    titles = ("", "count", "min", "mean", "p50", "p95", "p99", "max")
    head = "".join(f"<th>{title}</th>" for title in titles)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section("Durations", table, "Percentiles are within 1 %.")


def _section(title: str, body: str, note: str = "") -> str:
    noted = f'<p class="note">{safe(note)}</p>' if note else ""
    return f'<section id="{title.lower()}">\n<h2>{title}</h2>{noted}\n{body}\n</section>'


def _legend(items: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f'<li><span class="dot {kind}"></span>{text}</li>' for kind, text in items)
    return f'<ul class="legend">{shown}</ul>'

"""
Metrics for Prometheus. Needs the extra ``prometheus``::

    from prometheus_client import REGISTRY

    REGISTRY.register(LoopCollector({"chat": loop}))
"""

from __future__ import annotations

__all__ = ["LoopCollector"]

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from agentloop import AgentLoop, Distribution, MetricsRecorder

# The bounds of the buckets are 1, 2, 4 and so on to 2 ** 20 milliseconds, which is 17 minutes. Powers of two
# are bounds of the recorder's own buckets at every scale, so all counts are exact.
OCTAVES = range(21)


class LoopCollector:
    """
    Reads the metrics of loops when Prometheus scrapes them, in any thread. It does nothing between scrapes,
    so it costs an invocation nothing. Register one collector for all sources: a registry takes only one.

    :param sources: the loops and recorders to read, by the value of the label ``loop``. A loop gives the
        metrics of its recorder and its present state, a recorder only the metrics. Sources that share a
        recorder give the same counts
    :raises TypeError: if a source is neither a loop nor a recorder
    """

    def __init__(self, sources: Mapping[str, AgentLoop | MetricsRecorder]) -> None:
        for name, source in sources.items():
            if not isinstance(source, AgentLoop | MetricsRecorder):
                raise TypeError(f"source {name!r} must be an AgentLoop or a MetricsRecorder, got {source!r}")

        self._sources = dict(sources)

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without values, so that a registry can refuse a second collector."""
        return _collect({})

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        return _collect(self._sources)


def _collect(sources: Mapping[str, AgentLoop | MetricsRecorder]) -> Iterator[Metric]:
    counts = CounterMetricFamily(
        "agentloop_invocations", "Invocations that have ended, by status.", labels=["loop", "status"]
    )
    counters = {
        name: CounterMetricFamily(f"agentloop_{name}", text, labels=["loop"])
        for name, text in (
            ("retries", "Retries of invocations that have ended."),
            ("overloads", "Attempts that failed with an overload."),
        )
    }
    gauges = {
        name: GaugeMetricFamily(f"agentloop_{name}", text, labels=["loop"])
        for name, text in (
            ("in_flight", "Invocations that were started and have not ended."),
            ("running", "Slots in use."),
            ("waiting", "Invocations that wait for a slot or for their next retry."),
            ("limit", "Slots of the limiter at this moment."),
            ("limiter_held", "1 in a cool-off (only probes start) or a pause; else 0."),
            ("limiter_outage", "1 while the provider is out; else 0."),
        )
    }
    histograms = {
        name: HistogramMetricFamily(f"agentloop_{name}_seconds", text, labels=["loop"])
        for name, text in (
            ("latency", "How long invocations took, with retries and waits."),
            ("queue", "How long invocations waited for their first slot."),
            ("first_chunk", "How long streams took to their first chunk."),
        )
    }
    for label, source in sources.items():
        if isinstance(source, AgentLoop):
            _add_state(gauges, label, source)

        so_far = (source.metrics if isinstance(source, AgentLoop) else source).snapshot()
        for status, count in so_far.counts.items():
            counts.add_metric([label, status.value], count)

        counters["retries"].add_metric([label], so_far.retries)
        counters["overloads"].add_metric([label], so_far.overloads)
        gauges["in_flight"].add_metric([label], so_far.in_flight)
        for name, histogram in histograms.items():
            distribution: Distribution = getattr(so_far, name)
            histogram.add_metric([label], _buckets(distribution), distribution.sum_ms / 1000)

    yield counts
    yield from counters.values()
    yield from gauges.values()
    yield from histograms.values()


def _add_state(gauges: Mapping[str, GaugeMetricFamily], label: str, loop: AgentLoop) -> None:
    now, limiter = loop.statistics(), loop.limiter.statistics()
    gauges["running"].add_metric([label], now.running)
    gauges["waiting"].add_metric([label], now.waiting)
    gauges["limit"].add_metric([label], now.max_concurrency)
    # No duration: these times are on the event loop's clock, which other threads cannot read.
    gauges["limiter_held"].add_metric([label], limiter.paused_until is not None)
    gauges["limiter_outage"].add_metric([label], limiter.outage_since is not None)


def _buckets(distribution: Distribution) -> list[tuple[str, float]]:
    """Return the number of durations up to each bound; bounds are in seconds."""
    counts = dict.fromkeys(OCTAVES, 0)
    for index, count in distribution.buckets.items():
        # The bucket ends at 2 ** ((index + 1) / 2 ** scale) ms: the next power of two, rounded up.
        octave = max(OCTAVES[0], -(-(index + 1) >> distribution.scale))
        if octave in counts:
            counts[octave] += count

    seen = distribution.zeros
    buckets: list[tuple[str, float]] = []
    for octave, count in counts.items():
        seen += count
        buckets.append((str(2**octave / 1000), seen))

    return [*buckets, ("+Inf", distribution.count)]

"""What Prometheus reads, as its own parsers understand it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from anyio import to_thread
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from agentloop import AgentLoop, Backoff, Invocation, InvocationResult, LoopConfig, MetricsRecorder, Status
from agentloop.contrib.prometheus import LoopCollector
from agentloop.testing import FakeHTTPError

BOUNDS_MS = [2.0**octave for octave in range(21)]
FORMATS = [(generate_latest, parse_text), (openmetrics.generate_latest, parse_openmetrics)]


def scrape(sources: Any, generate: Any = generate_latest, parse: Any = parse_text) -> dict[Any, float]:
    """Return every value, by the name and the labels of its series."""
    registry = CollectorRegistry()
    registry.register(LoopCollector(sources))
    text = generate(registry).decode()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def histogram(values: dict[Any, float], name: str) -> Iterator[tuple[float, float]]:
    """Yield the bounds of a histogram in milliseconds, with how many durations there were up to each."""
    for (series, *labels), value in values.items():
        if series == f"agentloop_{name}_seconds_bucket":
            yield float(next(label for label in labels if label != "a")) * 1000, value


async def flaky(errors: list[Exception]) -> None:
    await anyio.sleep(1)
    if errors:
        raise errors.pop(0)


async def write() -> Any:
    await anyio.sleep(1)
    yield "word"


class Overloaded(Exception):
    status_code = 429


@pytest.mark.parametrize(("generate", "parse"), FORMATS, ids=["text", "openmetrics"])
async def test_a_run_is_read_by_the_parsers_of_the_client_library(generate: Any, parse: Any) -> None:
    config = LoopConfig(max_concurrency=1, max_retries=1, backoff=Backoff(initial_seconds=1, jitter="none"))
    loop = AgentLoop(config)
    await loop.run_all([Invocation(f"a{i}", flaky, ([],)) for i in range(3)])
    await loop.run_single("retried", flaky, [Overloaded()])
    await loop.run_single("failed", flaky, [OSError(), OSError()])
    async with loop.run_streaming("writer", write) as stream:
        async for _ in stream:
            pass

    values = scrape({"a": loop}, generate, parse)
    buckets = {key: value for key, value in values.items() if key[0].endswith("_bucket")}
    assert len(buckets) == 3 * 22
    assert {key: value for key, value in values.items() if key not in buckets} == {
        ("agentloop_invocations_total", "a", "success"): 5,
        ("agentloop_invocations_total", "a", "error"): 1,
        ("agentloop_invocations_total", "a", "timeout"): 0,
        ("agentloop_invocations_total", "a", "cancelled"): 0,
        ("agentloop_invocations_total", "a", "skipped"): 0,
        ("agentloop_retries_total", "a"): 2,
        ("agentloop_overloads_total", "a"): 1,
        ("agentloop_in_flight", "a"): 0,
        ("agentloop_running", "a"): 0,
        ("agentloop_waiting", "a"): 0,
        ("agentloop_limit", "a"): 1,
        ("agentloop_limiter_held", "a"): 0,
        ("agentloop_limiter_outage", "a"): 0,
        ("agentloop_latency_seconds_count", "a"): 6,
        ("agentloop_latency_seconds_sum", "a"): pytest.approx(1 + 1 + 1 + 3 + 3 + 1),
        ("agentloop_queue_seconds_count", "a"): 6,
        ("agentloop_queue_seconds_sum", "a"): pytest.approx(1 + 2),
        ("agentloop_first_chunk_seconds_count", "a"): 1,
        ("agentloop_first_chunk_seconds_sum", "a"): pytest.approx(1),
    }


async def test_state_of_this_moment_is_read_from_any_thread() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", flaky, ([],))] * 5)
        await anyio.wait_all_tasks_blocked()
        values = scrape({"a": loop})
        with anyio.fail_after(5):
            assert await to_thread.run_sync(scrape, {"a": loop}) == values

    names = ("running", "waiting", "limit", "in_flight")
    assert [values[f"agentloop_{name}", "a"] for name in names] == [2, 3, 2, 2]


@pytest.mark.parametrize(("error", "held"), [(FakeHTTPError(429, retry_after=10), 1), (OSError(), 0)])
async def test_trouble_of_the_provider_is_read_while_it_lasts(error: Exception, held: int) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=8, max_retries=0))
    states = []
    for errors in [error] * 8, []:
        await loop.run_all([Invocation("a", flaky, (errors,))] * 8)
        values = scrape({"a": loop})
        states.append([values[f"agentloop_limiter_{state}", "a"] for state in ("held", "outage")])

    assert states == [[held, 1 - held], [0, 0]]


def test_pause_is_held_too() -> None:
    loop = AgentLoop()
    loop.limiter.pause()
    assert scrape({"a": loop})["agentloop_limiter_held", "a"] == 1


def test_sources_are_told_apart_and_a_recorder_has_no_state() -> None:
    recorder = MetricsRecorder()
    recorder.record(InvocationResult("agent", Status.TIMEOUT, latency_ms=5.0))
    values = scrape({"a": AgentLoop(), 'odd "name"\n': recorder})
    assert values["agentloop_invocations_total", 'odd "name"\n', "timeout"] == 1
    assert values["agentloop_invocations_total", "a", "timeout"] == 0
    assert {key[1] for key in values if key[0] == "agentloop_running"} == {"a"}
    assert {key[1] for key in values if key[0] == "agentloop_in_flight"} == {"a", 'odd "name"\n'}


durations = st.floats(0, 3e12) | st.floats(0, 3e6) | st.sampled_from(BOUNDS_MS)


@given(st.lists(durations), st.integers(6, 12))
def test_counts_of_the_buckets_are_exact(values: list[float], scale: int) -> None:
    # A logarithm does not tell a bound from what lies less than a billionth above it.
    values = [value for value in values if not any(0 < value / bound - 1 < 1e-9 for bound in BOUNDS_MS)]
    recorder = MetricsRecorder(scale)
    for value in values:
        recorder.record(InvocationResult("agent", Status.SUCCESS, latency_ms=value))

    found = [*histogram(scrape({"a": recorder}), "latency")]
    assert [bound for bound, _ in found] == pytest.approx([*BOUNDS_MS, float("inf")])
    assert [count for _, count in found[:-1]] == [
        sum(value <= bound for value in values) for bound in BOUNDS_MS
    ]
    assert found[-1][1] == len(values)


def test_bounds_are_short_to_read() -> None:
    text = generate_latest_of({"a": AgentLoop()})
    for bound in ("0.001", "0.128", "1.024", "1048.576", "+Inf"):
        assert f'agentloop_latency_seconds_bucket{{le="{bound}",loop="a"}} 0.0\n' in text


def generate_latest_of(sources: Any) -> str:
    registry = CollectorRegistry()
    registry.register(LoopCollector(sources))
    return generate_latest(registry).decode()


def test_second_collector_in_a_registry_is_refused() -> None:
    registry = CollectorRegistry()
    registry.register(LoopCollector({"a": AgentLoop()}))
    with pytest.raises(ValueError, match=r"(?i)duplicate"):
        registry.register(LoopCollector({"b": AgentLoop()}))


def test_source_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^source 'a' must be an AgentLoop or a MetricsRecorder, got 5$"):
        bad: Any = 5
        LoopCollector({"a": bad})


def test_sources_may_change_afterwards_without_changing_what_is_read() -> None:
    sources: dict[str, Any] = {"a": AgentLoop()}
    collector = LoopCollector(sources)
    sources.clear()
    assert any(metric.samples for metric in collector.collect())
    assert not any(metric.samples for metric in collector.describe())

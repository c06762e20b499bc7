"""What happened so far, in constant memory. Nothing in here needs an event loop."""

import json
import math
import pickle
import random
import sys
import threading
from typing import Any

import attrs
import pytest
from elsewhere import in_threads
from hypothesis import given
from hypothesis import strategies as st

from agentloop import Distribution, InvocationResult, MetricsRecorder, MetricsSnapshot, Status
from agentloop._metrics.recorder import measurements_of

# Below a nanosecond all durations are alike.
NANOSECOND_MS = 1e-6

durations = st.floats(NANOSECOND_MS, 3e12) | st.floats(0.1, 1e5) | st.just(0.0)
samples = st.lists(durations, min_size=1, max_size=100)


def result(
    latency_ms: float = 0.0, queue_ms: float = 0.0, status: Status = Status.SUCCESS, retries: int = 0
) -> InvocationResult[Any]:
    return InvocationResult("agent", status, latency_ms=latency_ms, queue_ms=queue_ms, retries=retries)


def recorder_of(found: list[InvocationResult[Any]], scale: int = 6) -> MetricsRecorder:
    recorder = MetricsRecorder(scale)
    for one in found:
        recorder.record(one)
        measurements_of(recorder).add_attempt(one.latency_ms / 3)
        measurements_of(recorder).add_backoff(one.queue_ms, overload=one.retries == 1)

    return recorder


def latencies(values: list[float], scale: int = 6) -> Distribution:
    return recorder_of([result(value) for value in values], scale).snapshot().latency


def nearest_rank(values: list[float], percent: int) -> float:
    """Return the smallest value that at least ``percent`` of all values do not exceed."""
    rank = max(1, -(-len(values) * percent // 100))
    return sorted(values)[rank - 1]


def assert_close(measured: float, true: float) -> None:
    assert abs(measured - true) <= max(0.01 * true, NANOSECOND_MS)


# --- distributions


@given(samples, st.integers(0, 100))
def test_percentile_is_within_one_percent_and_all_else_exact(values: list[float], percent: int) -> None:
    latency = latencies(values)
    assert_close(latency.percentile(percent), nearest_rank(values, percent))
    assert (latency.count, latency.min_ms, latency.max_ms) == (len(values), min(values), max(values))
    assert latency.mean_ms == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
    percentiles = [latency.percentile(q) for q in range(0, 101, 5)]
    assert [latency.min_ms, *percentiles, latency.max_ms] == sorted(
        [latency.min_ms, *percentiles, latency.max_ms]
    )


@given(samples, st.randoms(use_true_random=False))
def test_order_of_recording_does_not_matter(values: list[float], rng: random.Random) -> None:
    shuffled = rng.sample(values, len(values))
    one, other = latencies(values), latencies(shuffled)
    assert attrs.evolve(other, mean_ms=one.mean_ms) == one


@given(durations, st.integers(1, 50))
def test_one_value_however_often_is_every_percentile(value: float, times: int) -> None:
    latency = latencies([value] * times)
    assert {latency.percentile(q) for q in (0, 1, 50, 99.9, 100)} == {value}


def test_zero_is_reported_as_zero() -> None:
    latency = latencies([0.0, 0.0, 0.0, 10.0])
    assert latency.percentile(75) == latency.p50_ms == 0


def test_percentiles_that_have_a_name_are_those_that_are_asked_for() -> None:
    latency = latencies([1.02**rank for rank in range(1000)])
    assert (latency.p50_ms, latency.p95_ms, latency.p99_ms) == tuple(map(latency.percentile, (50, 95, 99)))
    assert len({latency.percentile(q) for q in (49, 50, 51, 94, 95, 96, 98, 99, 100)}) == 9


def test_percentile_with_a_fraction_finds_its_rank() -> None:
    # 8.8 percent of 375 are exactly 33, although 375 * 8.8 / 100 is a little more in floating point.
    values = [1.05**rank for rank in range(1, 376)]
    assert_close(latencies(values).percentile(8.8), 1.05**33)


@pytest.mark.parametrize("q", [-1, -0.001, 100.001, math.nan, math.inf])
def test_percentile_out_of_its_range_is_refused(q: float) -> None:
    for distribution in (Distribution(), latencies([1.0])):
        with pytest.raises(ValueError, match=f"^q must be between 0 and 100, got {q!r}$"):
            distribution.percentile(q)


def test_values_out_of_all_proportion_are_recorded() -> None:
    values = [0.0, 5e-324, 1e-9, 1e15, 1e300]
    latency = latencies(values)
    assert (latency.count, latency.min_ms, latency.max_ms) == (5, 0, 1e300)
    assert latency.percentile(0) <= NANOSECOND_MS
    assert latency.percentile(100) > 1e12


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_values() -> None:
    rng = random.Random(1)
    recorder = MetricsRecorder()
    sizes: list[int] = []
    for count in (10_000, 90_000):
        for _ in range(count):
            recorder.record(result(10 ** rng.uniform(-9, 15), 10 ** rng.uniform(-9, 15)))

        snapshot = recorder.snapshot()
        sizes.append(len(pickle.dumps(snapshot)))

    assert snapshot.latency.count == 100_000
    assert sizes[1] < sizes[0] * 1.5
    assert len(snapshot.latency.buckets) < 4000


# --- the recorder


def test_new_recorder_is_empty() -> None:
    empty = Distribution(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    snapshot = MetricsRecorder().snapshot()
    assert snapshot == MetricsSnapshot(dict.fromkeys(Status, 0), 0, 0, 0, *[empty] * 6)
    assert snapshot.latency.percentile(50) == 0


def test_results_are_counted_by_status_and_retries_add_up() -> None:
    snapshot = recorder_of(
        [result(1.0, 0.0, status, n) for n, status in enumerate(Status, 1) for _ in range(n)]
    ).snapshot()
    assert snapshot.counts == dict(zip(Status, (1, 2, 3, 4, 5), strict=True))
    assert snapshot.retries == 1 + 4 + 9 + 16 + 25


@pytest.mark.parametrize("status", Status)
def test_everything_has_a_latency_unless_it_was_skipped(status: Status) -> None:
    recorder = MetricsRecorder()
    recorder.record(result(20.0, 5.0, status))
    snapshot = recorder.snapshot()
    assert snapshot.counts == {**dict.fromkeys(Status, 0), status: 1}
    if status is Status.SKIPPED:
        assert snapshot.latency == snapshot.queue == Distribution()
    else:
        assert (snapshot.latency.count, snapshot.latency.mean_ms) == (1, 20)
        assert (snapshot.queue.count, snapshot.queue.mean_ms) == (1, 5)


def test_snapshot_is_frozen_and_does_not_change_when_more_is_recorded() -> None:
    recorder = recorder_of([result(1.0)])
    before = recorder.snapshot()
    text = repr(before)
    recorder.record(result(100.0, retries=1))
    recorder.reset()
    assert repr(before) == text
    assert before.latency.percentile(100) == 1
    for frozen, name in ((before, "retries"), (before.latency, "count")):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(frozen, name, 1)


def test_reset_forgets_everything_and_repr_says_what_was_recorded() -> None:
    recorder = recorder_of([result(5.0, 1.0, Status.ERROR, 2)])
    recorder.reset()
    assert recorder.snapshot() == MetricsRecorder().snapshot()
    assert repr(recorder) == "<MetricsRecorder empty>"
    for status in (Status.SUCCESS, Status.SUCCESS, Status.TIMEOUT):
        recorder.record(result(7.0, status=status))

    assert recorder.snapshot().latency.min_ms == 7
    assert repr(recorder) == "<MetricsRecorder 2 success, 1 timeout>"


def test_threads_record_at_once_without_losing_any() -> None:
    recorder = MetricsRecorder()
    started = threading.Barrier(5)
    torn: list[MetricsSnapshot] = []

    def record() -> None:
        started.wait()
        for number in range(2000):
            recorder.record(result(float(number), retries=1))

    def read() -> None:
        started.wait()
        for _ in range(200):
            snapshot = recorder.snapshot()
            if not snapshot.counts[Status.SUCCESS] == snapshot.retries == snapshot.latency.count:
                torn.append(snapshot)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(record, record, record, record, read)
    finally:
        sys.setswitchinterval(interval)

    assert not torn
    snapshot = recorder.snapshot()
    assert snapshot.counts[Status.SUCCESS] == snapshot.retries == snapshot.latency.count == 8000
    assert snapshot.latency.mean_ms == 999.5


def test_recorder_shows_four_methods_and_nothing_else() -> None:
    public = [name for name in dir(MetricsRecorder()) if not name.startswith("_")]
    assert public == ["merge", "record", "reset", "snapshot"]


# --- many recorders


results = st.builds(
    InvocationResult,
    st.just("agent"),
    st.sampled_from(Status),
    latency_ms=durations | st.floats(0, 1e300),
    queue_ms=durations,
    retries=st.integers(0, 3),
    first_chunk_ms=st.none() | durations,
)
recorders = st.tuples(st.lists(results, max_size=12), st.sampled_from([6, 7, 9]))


@pytest.mark.long
@given(st.lists(recorders, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_merging_in_any_order_and_grouping_gives_the_same(
    parts: list[tuple[list[InvocationResult[Any]], int]], rng: random.Random
) -> None:
    whole = recorder_of([one for found, _ in parts for one in found])
    pool = [recorder_of(found, scale) for found, scale in parts] + [MetricsRecorder()]
    while len(pool) > 1:
        rng.shuffle(pool)
        pool[0].merge(pool.pop())

    assert pool[0].snapshot() == whole.snapshot()


def test_merged_recorders_of_two_scales_have_the_coarser_one() -> None:
    fine, coarse = recorder_of([result(5.0)], 9), recorder_of([result(7.0)], 6)
    fine.merge(coarse)
    assert fine.snapshot().latency.scale == 6
    assert fine.snapshot() == recorder_of([result(5.0), result(7.0)], 6).snapshot()


def test_what_is_in_flight_elsewhere_is_not_in_flight_here() -> None:
    one, other = MetricsRecorder(), MetricsRecorder()
    measurements_of(one).report_in_flight(1)
    measurements_of(other).report_in_flight(1)
    one.merge(other)
    assert one.snapshot().in_flight == 1
    assert pickle.loads(pickle.dumps(other)).snapshot().in_flight == 0
    measurements_of(one).report_in_flight(-1)
    assert one.snapshot().in_flight == 0


@given(st.lists(results, max_size=12))
def test_recorder_comes_out_of_a_pickle_as_it_went_in(found: list[InvocationResult[Any]]) -> None:
    recorder = recorder_of(found, 8)
    copy = pickle.loads(pickle.dumps(recorder))
    assert copy.snapshot() == recorder.snapshot()
    copy.record(result(1.0))
    assert copy.snapshot().counts[Status.SUCCESS] == recorder.snapshot().counts[Status.SUCCESS] + 1


def test_recorders_that_are_merged_with_each_other_at_once_come_to_an_end() -> None:
    one, other = recorder_of([result(1.0)]), recorder_of([result(2.0)])
    in_threads(lambda: [one.merge(other) for _ in range(8)], lambda: [other.merge(one) for _ in range(8)])


def test_only_another_recorder_can_be_merged() -> None:
    recorder = MetricsRecorder()
    with pytest.raises(TypeError, match=r"^other must be of type MetricsRecorder, got MetricsSnapshot"):
        recorder.merge(recorder.snapshot())

    with pytest.raises(ValueError, match=r"^a recorder cannot be merged with itself$"):
        recorder.merge(recorder)


@pytest.mark.parametrize("scale", [5, 13, 0])
def test_scale_out_of_its_range_is_refused(scale: int) -> None:
    with pytest.raises(ValueError, match=rf"^scale must be at (least 6|most 12), got {scale}$"):
        MetricsRecorder(scale)


@pytest.mark.parametrize("field", ["latency_ms", "queue_ms", "first_chunk_ms"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_duration_that_cannot_be_is_refused_and_leaves_nothing(field: str, value: float) -> None:
    recorder = MetricsRecorder()
    with pytest.raises(ValueError, match=r"^durations must be finite and at least 0, got InvocationResult"):
        recorder.record(attrs.evolve(result(), **{field: value}))

    assert recorder.snapshot() == MetricsRecorder().snapshot()


# --- what others make of it


@given(st.floats(NANOSECOND_MS * 2, 3e12), st.integers(6, 12))
def test_bucket_is_that_of_the_exponential_histogram(value: float, scale: int) -> None:
    latency = latencies([value], scale)
    ((index, count),) = latency.buckets.items()
    assert (count, latency.scale, latency.zeros) == (1, scale, 0)
    lower, upper = 2 ** (index / 2**scale), 2 ** ((index + 1) / 2**scale)
    assert lower * (1 - 1e-12) <= value <= upper * (1 + 1e-12)


@pytest.mark.parametrize(
    "values",
    [
        [3.0] * 999,
        [1.0] * 600 + [1000.0] * 400,
        [1.001**n for n in range(9000)],
        [random.Random(7).paretovariate(0.4) for _ in range(5000)],
        [random.Random(8).lognormvariate(2, 3) for _ in range(5000)],
        [0.0] * 40 + [5e-324] * 20 + [1e-300] * 20 + [5.0] * 20,
        [2.0**n for n in range(-15, 41)],
    ],
    ids=["constant", "bimodal", "even", "heavy tail", "log-normal", "zeros and denormals", "powers"],
)
@pytest.mark.parametrize("scale", [6, 8])
def test_percentiles_of_any_shape_are_within_one_percent(values: list[float], scale: int) -> None:
    latency = latencies(values, scale)
    for percent in (0, 1, 5, 25, 50, 75, 90, 95, 99, 100):
        assert_close(latency.percentile(percent), nearest_rank(values, percent))


def test_snapshot_is_plain_values_for_json() -> None:
    recorder = recorder_of([result(5.0, retries=1), result(0.0, status=Status.TIMEOUT)])
    snapshot = recorder.snapshot()
    read = json.loads(json.dumps(snapshot.to_dict()))
    assert read["counts"] == {"success": 1, "error": 0, "timeout": 1, "cancelled": 0, "skipped": 0}
    assert (read["retries"], read["overloads"], read["in_flight"]) == (1, 1, 0)
    latency = read["latency"]
    assert (latency["count"], latency["sum_ms"], latency["zeros"]) == (2, 5.0, 1)
    assert {int(index): count for index, count in latency["buckets"].items()} == snapshot.latency.buckets
    assert latency["p99_ms"] == snapshot.latency.p99_ms


def test_what_was_cancelled_or_skipped_is_no_failure() -> None:
    assert recorder_of([result(status=status) for status in Status]).snapshot().failures == 2

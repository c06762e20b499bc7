"""How long to wait before a retry. Nothing in here needs an event loop."""

import math
import random
import re
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop import Backoff

EXTREME = 1.7e308


@attrs.define
class FixedRandom:
    """A source that always draws the same number, and counts how often it was asked."""

    value: float
    calls: int = 0

    def random(self) -> float:
        self.calls += 1
        return self.value


SMALLEST = FixedRandom(0.0)
LARGEST = FixedRandom(math.nextafter(1, 0))

seconds = st.floats(0, EXTREME) | st.integers(0, 10**308)
multipliers = st.floats(1, EXTREME) | st.integers(1, 10**308)
jitters = st.sampled_from(["full", "equal", "none"])


@st.composite
def backoffs_of_any_sort(draw: st.DrawFn) -> Backoff:
    initial, longest = sorted([draw(seconds), draw(seconds)])
    return Backoff(initial, draw(multipliers), longest, draw(jitters))


backoffs = backoffs_of_any_sort()
retries = st.integers(0, 10**6)
draws = st.floats(0, 1, exclude_max=True).map(FixedRandom)


def ceiling(backoff: Backoff, retry: int) -> float:
    return attrs.evolve(backoff, jitter="none").delay(retry, SMALLEST)


# --- the settings


def test_defaults_are_those_of_the_contract() -> None:
    assert attrs.asdict(Backoff()) == {
        "initial_seconds": 0.1,
        "multiplier": 2.0,
        "max_seconds": 30.0,
        "jitter": "full",
        "max_retry_after_seconds": 300.0,
    }


@pytest.mark.parametrize("field", ["initial_seconds", "max_seconds", "max_retry_after_seconds", "multiplier"])
@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        *((value, TypeError, f"a number, got {value!r}") for value in (True, "1", None)),
        (math.nan, ValueError, "a number, got nan"),
        (10**400, ValueError, f"a number that fits a float, got {10**400}"),
        (-1, ValueError, "at least {minimum}, got -1"),
        (-math.inf, ValueError, "at least {minimum}, got -inf"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_bad_number_is_refused_by_name(field: str, value: Any, error: type[Exception], rule: str) -> None:
    rule = rule.format(minimum=1 if field == "multiplier" else 0)
    with pytest.raises(error, match=f"^{field} must be {re.escape(rule)}$"):
        Backoff(**{field: value})


@pytest.mark.parametrize("field", ["initial_seconds", "max_seconds", "multiplier"])
def test_infinity_is_refused_where_it_would_be_waited_for(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be finite, got inf$"):
        Backoff(**{field: math.inf})


@pytest.mark.parametrize("value", ["", "Full", "decorrelated", None, True, ["full"]], ids=repr)
def test_unknown_jitter_is_refused(value: Any) -> None:
    rule = f"one of 'full', 'equal', 'none', got {value!r}"
    with pytest.raises(ValueError, match=f"^jitter must be {re.escape(rule)}$"):
        Backoff(jitter=value)


def test_settings_are_frozen_and_never_shrink() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Backoff().max_seconds = 1.0

    with pytest.raises(ValueError, match=r"^multiplier must be at least 1, got 0\.5$"):
        Backoff(multiplier=0.5)


# --- the delay


def test_delay_grows_by_the_multiplier_up_to_the_maximum() -> None:
    backoff = Backoff(initial_seconds=0.5, multiplier=3, max_seconds=10, jitter="none")
    assert [backoff.delay(retry, SMALLEST) for retry in range(5)] == [0.5, 1.5, 4.5, 10, 10]


@pytest.mark.parametrize(
    ("jitter", "low", "high"), [("full", 0.0, 8.0), ("equal", 4.0, 8.0), ("none", 8.0, 8.0)]
)
def test_jitter_draws_from_its_own_range(
    jitter: Literal["full", "equal", "none"], low: float, high: float
) -> None:
    backoff = Backoff(initial_seconds=1, max_seconds=60, jitter=jitter)
    assert backoff.delay(3, SMALLEST) == low
    assert backoff.delay(3, LARGEST) == pytest.approx(high)
    assert backoff.delay(3, FixedRandom(0.5)) == pytest.approx((low + high) / 2)


def test_zero_initial_seconds_retries_at_once_however_often() -> None:
    backoff = Backoff(initial_seconds=0, multiplier=EXTREME, jitter="none")
    assert [backoff.delay(retry, SMALLEST) for retry in (0, 1, 2, 10**6)] == [0, 0, 0, 0]


def test_power_that_overflows_is_the_maximum() -> None:
    assert Backoff(jitter="none").delay(10**6, SMALLEST) == 30
    assert Backoff(jitter="none", multiplier=EXTREME).delay(2, SMALLEST) == 30
    assert Backoff(jitter="none", multiplier=10**300).delay(1000, SMALLEST) == 30


def test_negative_retry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^retry must be at least 0, got -1$"):
        Backoff().delay(-1, SMALLEST)


@given(backoffs, retries, draws)
def test_delay_stays_within_the_bounds_of_its_jitter_and_is_the_wait_without_a_retry_after(
    backoff: Backoff, retry: int, rng: FixedRandom
) -> None:
    high = ceiling(backoff, retry)
    low = {"full": 0, "equal": high / 2, "none": high}[backoff.jitter]
    assert 0 <= low <= backoff.delay(retry, rng) <= high <= backoff.max_seconds
    assert backoff.wait(retry, None, rng) == backoff.delay(retry, rng)


@given(backoffs, st.integers(0, 2000))
def test_delay_without_jitter_never_shrinks(backoff: Backoff, retry: int) -> None:
    assert ceiling(backoff, retry) <= ceiling(backoff, retry + 1)


@given(backoffs, retries, st.none() | st.floats(0, 1e300), st.integers())
def test_equal_randomness_gives_equal_waits_and_the_global_source_is_left_alone(
    backoff: Backoff, retry: int, retry_after: float | None, seed: int
) -> None:
    before = random.getstate()
    first, second = random.Random(seed), random.Random(seed)
    assert backoff.delay(retry, first) == backoff.delay(retry, second)
    assert backoff.wait(retry, retry_after, first) == backoff.wait(retry, retry_after, second)
    assert random.getstate() == before


def test_random_module_serves_as_a_source_and_none_is_asked_without_jitter() -> None:
    assert 0 <= Backoff().delay(0, random) < 0.1
    rng = FixedRandom(0.5)
    Backoff(jitter="none").wait(0, 5.0, rng)
    assert rng.calls == 0


# --- the wait, with a Retry-After under it


@given(backoffs, retries, st.floats(0, 1e300), draws)
def test_retry_after_is_a_floor_raised_by_at_most_a_quarter(
    backoff: Backoff, retry: int, retry_after: float, rng: FixedRandom
) -> None:
    delay = backoff.delay(retry, rng)
    wait = backoff.wait(retry, retry_after, rng)
    assert max(delay, retry_after) <= wait <= max(delay, retry_after * 1.25)


def test_retry_after_is_spread_over_its_quarter() -> None:
    backoff = Backoff(initial_seconds=0)
    assert backoff.wait(0, 100.0, SMALLEST) == 100
    assert backoff.wait(0, 100.0, FixedRandom(0.5)) == 112.5
    assert backoff.wait(0, 100.0, LARGEST) == pytest.approx(125)


@pytest.mark.parametrize(
    ("initial_seconds", "retry", "retry_after", "seconds"), [(0.1, 0, 7, 7), (10, 0, 7, 10), (0.1, 2, 0, 0.4)]
)
def test_wait_without_jitter_is_the_longer_of_retry_after_and_delay(
    initial_seconds: float, retry: int, retry_after: float, seconds: float
) -> None:
    backoff = Backoff(initial_seconds, jitter="none")
    assert backoff.wait(retry, float(retry_after), LARGEST) == pytest.approx(seconds)

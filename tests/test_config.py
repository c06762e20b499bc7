"""The settings of a loop: their defaults, and what is refused in which words."""

import math
import pickle
import re
from typing import Any

import attrs
import pytest

from agentloop import Backoff, LoopConfig, Verdict, VerdictKind, classify

DEFAULTS = {
    "max_concurrency": 10,
    "timeout_seconds": 300.0,
    "total_timeout_seconds": None,
    "retry_on_timeout": True,
    "max_retries": 3,
    "backoff": Backoff(),
    "classify": classify,
    "first_chunk_timeout_seconds": None,
    "idle_timeout_seconds": None,
    "overload_timeout_seconds": 600.0,
    "queue_timeout_seconds": None,
    "stop": None,
    "collect_metrics": True,
}
DURATIONS = [name for name in DEFAULTS if name.endswith("_seconds")]
COUNTS = {"max_concurrency": 1, "max_retries": 0}
SWITCHES = ["retry_on_timeout", "collect_metrics"]

every_duration = pytest.mark.parametrize("field", DURATIONS)
every_count = pytest.mark.parametrize("field", COUNTS)


def always_fatal(exc: Exception) -> Verdict:
    return Verdict(VerdictKind.FATAL)


def assert_refused(field: str, value: Any, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=f"^{field} must be {re.escape(rule)}$") as caught:
        LoopConfig(**{field: value})

    assert type(caught.value) is error


def test_every_field_has_the_default_of_the_contract() -> None:
    config = LoopConfig()
    assert {field.name: getattr(config, field.name) for field in attrs.fields(LoopConfig)} == DEFAULTS


def test_fields_are_given_by_keyword_only() -> None:
    with pytest.raises(TypeError):
        LoopConfig(10)


def test_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="max_concurency"):
        LoopConfig(max_concurency=10)


@pytest.mark.parametrize("field", DEFAULTS)
def test_field_cannot_be_assigned(field: str) -> None:
    config = LoopConfig()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(config, field, DEFAULTS[field])


@pytest.mark.parametrize(
    "values",
    [
        {"max_concurrency": 1},
        {"max_retries": 0},
        {"backoff": Backoff(jitter="none")},
        {"classify": always_fatal},
        {"classify": lambda exc: Verdict(VerdictKind.FATAL)},
        *({name: value} for name in SWITCHES for value in (True, False)),
        *({name: value} for name in DURATIONS for value in (None, 1, 0.001, 1e9, math.inf)),
    ],
    ids=lambda values: re.sub(r" at 0x\w+", "", repr(values)),
)
def test_value_within_its_bounds_is_kept_as_it_is(values: dict[str, Any]) -> None:
    config = LoopConfig(**values)
    for name, value in values.items():
        assert getattr(config, name) is value


@every_duration
@pytest.mark.parametrize("value", [True, False, "5", b"5", [], {}, 1j], ids=repr)
def test_duration_that_is_no_number_is_refused(field: str, value: Any) -> None:
    assert_refused(field, value, TypeError, f"a number or None, got {value!r}")


@every_duration
@pytest.mark.parametrize("value", [0, 0.0, -0.0, -1, -0.5, -math.inf], ids=repr)
def test_duration_that_is_not_above_zero_is_refused(field: str, value: float) -> None:
    assert_refused(field, value, ValueError, f"greater than 0, got {value!r} (None means no limit)")


@every_duration
def test_duration_that_is_not_a_number_in_the_sense_of_ieee_754_is_refused(field: str) -> None:
    assert_refused(field, math.nan, ValueError, "a number, got nan")


@every_duration
def test_duration_that_no_float_can_hold_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be "):
        LoopConfig(**{field: 10**400})


@every_count
@pytest.mark.parametrize("value", [True, False, 1.0, 2.5, math.nan, math.inf, "10", None, b"1"], ids=repr)
def test_count_that_is_no_int_is_refused(field: str, value: Any) -> None:
    assert_refused(field, value, TypeError, f"an int, got {value!r}")


@every_count
def test_count_below_its_minimum_is_refused(field: str) -> None:
    minimum = COUNTS[field]
    for value in (minimum - 1, -7):
        assert_refused(field, value, ValueError, f"at least {minimum}, got {value}")


@pytest.mark.parametrize("field", SWITCHES)
@pytest.mark.parametrize("value", [0, 1, "yes", "", None, math.nan], ids=repr)
def test_switch_that_is_no_bool_is_refused(field: str, value: Any) -> None:
    assert_refused(field, value, TypeError, f"of type bool, got {value!r}")


@pytest.mark.parametrize("value", [None, 0.1, "full", Backoff, {"jitter": "none"}], ids=repr)
def test_backoff_that_is_no_backoff_is_refused(value: Any) -> None:
    assert_refused("backoff", value, TypeError, f"of type Backoff, got {value!r}")


@pytest.mark.parametrize("value", [None, "transient", VerdictKind.FATAL], ids=repr)
def test_classify_that_cannot_be_called_is_refused(value: Any) -> None:
    assert_refused("classify", value, TypeError, f"callable, got {value!r}")


def test_evolving_changes_what_is_named_and_keeps_the_rest() -> None:
    config = LoopConfig(max_retries=7, classify=always_fatal)
    assert attrs.evolve(config, timeout_seconds=1) == LoopConfig(
        max_retries=7, classify=always_fatal, timeout_seconds=1
    )
    assert config.timeout_seconds == 300


def test_evolving_validates_again() -> None:
    with pytest.raises(ValueError, match=r"^max_concurrency must be at least 1, got 0$"):
        attrs.evolve(LoopConfig(), max_concurrency=0)


def test_equal_settings_are_equal_and_hash_alike() -> None:
    assert LoopConfig(max_retries=1) == LoopConfig(max_retries=1) != LoopConfig()
    assert len({LoopConfig(max_retries=1), LoopConfig(max_retries=1), LoopConfig()}) == 2


def test_settings_survive_pickling() -> None:
    config = LoopConfig(max_concurrency=50, classify=always_fatal, backoff=Backoff(jitter="equal"))
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(LoopConfig())) == LoopConfig()

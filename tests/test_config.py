"""The settings of a loop: their defaults, and what is refused in which words."""

import math
import pickle
import re
import typing
from typing import Any

import attrs
import pytest

from agentloop import AgentLoop, Backoff, LoopConfig, Verdict, VerdictKind, classify

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
COUNTS = ["max_concurrency", "max_retries"]
SWITCHES = ["retry_on_timeout", "collect_metrics"]


def always_fatal(exc: Exception) -> Verdict:
    return Verdict(VerdictKind.FATAL)


def test_every_field_has_the_default_of_the_contract() -> None:
    config = LoopConfig()
    assert {field.name: getattr(config, field.name) for field in attrs.fields(LoopConfig)} == DEFAULTS


@pytest.mark.parametrize("field", DEFAULTS)
def test_field_cannot_be_assigned_nor_given_by_position(field: str) -> None:
    config = LoopConfig()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(config, field, DEFAULTS[field])

    with pytest.raises(TypeError):
        LoopConfig(10)


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


ABOVE_ZERO = "greater than 0, got {!r} (None means no limit)"
REFUSED: list[tuple[list[str], list[Any], type[Exception], str]] = [
    (DURATIONS, [True, False, "5", b"5", [], {}, 1j], TypeError, "a number or None, got {!r}"),
    (DURATIONS, [0, 0.0, -0.0, -1, -0.5, -math.inf], ValueError, ABOVE_ZERO),
    (DURATIONS, [math.nan], ValueError, "a number, got nan"),
    (DURATIONS, [10**400], ValueError, "a number that fits a float, got {!r}"),
    (COUNTS, [True, False, 1.0, 2.5, math.nan, math.inf, "10", None, b"1"], TypeError, "an int, got {!r}"),
    (["max_concurrency"], [0, -7], ValueError, "at least 1, got {!r}"),
    (["max_retries"], [-1, -7], ValueError, "at least 0, got {!r}"),
    (SWITCHES, [0, 1, "yes", "", None, math.nan], TypeError, "of type bool, got {!r}"),
    (["backoff"], [None, 0.1, "full", Backoff, {"jitter": "none"}], TypeError, "of type Backoff, got {!r}"),
    (["classify"], [None, "transient", VerdictKind.FATAL], TypeError, "callable, got {!r}"),
]


@pytest.mark.parametrize(
    ("field", "value", "error", "rule"),
    [
        pytest.param(field, value, error, rule, id=f"{field}-{value!r}"[:60])
        for fields, values, error, rule in REFUSED
        for field in fields
        for value in values
    ],
)
def test_bad_value_is_refused_with_a_rule(field: str, value: Any, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=f"^{field} must be {re.escape(rule.format(value))}$") as caught:
        LoopConfig(**{field: value})

    assert type(caught.value) is error


def test_evolving_changes_what_is_named_keeps_the_rest_and_validates_again() -> None:
    config = LoopConfig(max_retries=7, classify=always_fatal)
    evolved = LoopConfig(max_retries=7, classify=always_fatal, timeout_seconds=1)
    assert attrs.evolve(config, timeout_seconds=1) == evolved
    assert config.timeout_seconds == 300
    with pytest.raises(ValueError, match=r"^max_concurrency must be at least 1, got 0$"):
        attrs.evolve(config, max_concurrency=0)


def test_type_checkers_know_each_setting_of_a_view() -> None:
    (changes,) = typing.get_args(typing.get_type_hints(AgentLoop.with_config)["changes"])
    settings = {field.name: field.type for field in attrs.fields(LoopConfig)}
    assert typing.get_type_hints(changes) == settings
    assert not changes.__required_keys__


def test_equal_settings_are_equal_and_hash_alike() -> None:
    assert LoopConfig(max_retries=1) == LoopConfig(max_retries=1) != LoopConfig()
    assert len({LoopConfig(max_retries=1), LoopConfig(max_retries=1), LoopConfig()}) == 2


def test_settings_survive_pickling() -> None:
    config = LoopConfig(max_concurrency=50, classify=always_fatal, backoff=Backoff(jitter="equal"))
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(LoopConfig())) == LoopConfig()

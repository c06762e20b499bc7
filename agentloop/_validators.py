"""Checks of values where they enter; each failure names the field, the rule and the value."""

from __future__ import annotations

__all__ = ["callable_", "check_number", "check_whole", "instance", "number", "one_of", "whole"]

import math
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import attrs

Validator: TypeAlias = Callable[[object, "attrs.Attribute[Any]", Any], None]


def whole(minimum: int) -> Validator:
    """Accept an ``int`` that is no ``bool`` and at least ``minimum``."""

    def validate(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        check_whole(attribute.name, value, minimum)

    return validate


def check_whole(name: str, value: Any, minimum: int) -> None:
    """Refuse what is no ``int``, a ``bool``, or less than ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")

    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


def number(
    *, above: float | None = None, minimum: float | None = None, optional: bool = False, finite: bool = False
) -> Validator:
    """Accept a real number that is no ``bool`` and no NaN, within the bounds."""

    def validate(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        check_number(attribute.name, value, above=above, minimum=minimum, optional=optional, finite=finite)

    return validate


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    minimum: float | None = None,
    optional: bool = False,
    finite: bool = False,
) -> None:
    """Refuse what is no real number, a ``bool``, NaN, or out of the bounds."""
    if value is None and optional:
        return

    if not isinstance(value, (int, float)) or isinstance(value, bool):
        expected = "a number or None" if optional else "a number"
        raise TypeError(f"{name} must be {expected}, got {value!r}")

    hint = " (None means no limit)" if optional else ""
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that fits a float, got {value!r}") from None

    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")

    if above is not None and value <= above:
        raise ValueError(f"{name} must be greater than {above}, got {value!r}{hint}")

    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}{hint}")

    if finite and math.isinf(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def instance(kind: type) -> Validator:
    """Accept an instance of ``kind``."""

    def validate(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{attribute.name} must be of type {kind.__name__}, got {value!r}")

    return validate


def one_of(choices: Collection[str]) -> Validator:
    """Accept one of ``choices``."""

    def validate(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in choices:
            names = ", ".join(map(repr, choices))
            raise ValueError(f"{attribute.name} must be one of {names}, got {value!r}")

    return validate


def callable_(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Accept anything that can be called."""
    if not callable(value):
        raise TypeError(f"{attribute.name} must be callable, got {value!r}")

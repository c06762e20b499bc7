"""Checks of values at entry; each error names the field, the rule and the value."""

from __future__ import annotations

__all__ = [
    "check_number",
    "check_plain_function",
    "check_whole",
    "close_coroutine",
    "instance",
    "is_async",
    "is_generator",
    "number",
    "one_of",
    "plain_function",
    "plain_functions",
    "whole",
]

import inspect
import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, TypeAlias, cast

import attrs

Validator: TypeAlias = Callable[[object, "attrs.Attribute[Any]", Any], None]


def whole(minimum: int) -> Validator:
    """Accept an ``int`` that is no ``bool`` and at least ``minimum``."""

    def validate(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        check_whole(attribute.name, value, minimum)

    return validate


def check_whole(name: str, value: Any, minimum: int) -> None:
    """Raise an error for a value that is no ``int``, a ``bool``, or less than ``minimum``."""
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
    """Raise an error for a value that is no real number, a ``bool``, NaN, or out of the bounds."""
    if value is None and optional:
        return

    if not isinstance(value, (int, float)) or isinstance(value, bool):
        close_coroutine(value)
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


def plain_function(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept anything that can be called and is not async."""
    check_plain_function(attribute.name, value)


def check_plain_function(name: str, value: object) -> None:
    """Raise ``TypeError`` for a value that cannot be called, or is async: its result is never awaited."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r}")

    if is_async(value):
        raise TypeError(f"{name} must be a plain function, got an async one, {value!r}")


def plain_functions(name: str, value: object) -> tuple[Callable[..., Any], ...]:
    """Return one or several functions as a tuple, empty for ``None``; refuse any that is not plain."""
    if value is None:
        return ()

    functions: tuple[object, ...] = (value,)
    if not callable(value) and isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        functions = tuple(cast("Iterable[object]", value))

    for function in functions:
        if not callable(function):
            raise TypeError(f"{name} must be a plain function, got {function!r}")

        check_plain_function(name, function)

    return cast("tuple[Callable[..., Any], ...]", functions)


def is_async(fn: object) -> bool:
    """Return whether a call returns a coroutine or an async generator, as far as is known without a call."""
    return any(
        inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called) for called in _called(fn)
    )


def is_generator(fn: object) -> bool:
    """Return whether a call returns a generator, as far as is known without a call."""
    return any(map(inspect.isgeneratorfunction, _called(fn)))


def _called(fn: object) -> tuple[object, object]:
    while isinstance(fn, partial):
        fn = fn.func

    # A call of an object uses a method of its class.
    return fn, type(fn).__call__


def close_coroutine(value: object) -> bool:
    """Close a coroutine, which will never be awaited; return whether ``value`` is one."""
    if inspect.iscoroutine(value):
        value.close()
        return True

    return False

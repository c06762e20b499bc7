"""JSON without loss, and errors that name the place of a value that JSON cannot carry."""

from __future__ import annotations

__all__ = ["encode", "path_of"]

import json
import math
from collections.abc import Iterable
from typing import Any, cast


def encode(values: dict[str, Any]) -> str:
    """
    Return values as JSON that decodes to equal values, except tuples, which become lists.

    :raises TypeError: if a value would not decode to an equal one: a type that JSON does not have, an enum or
        another subclass, or a key that is no plain ``str``
    :raises ValueError: if JSON has no such number, or a value contains itself or is nested too deeply
    """
    try:
        _check(values, ())
        return json.dumps(values)
    except RecursionError:
        raise ValueError(
            "cannot encode the store as JSON: a value contains itself, or is nested too deeply"
        ) from None


def path_of(steps: Iterable[Any]) -> str:
    """Return the path to a nested value as an expression: ``plan.steps[3].when``."""
    parts = (f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]" for step in steps)
    return "".join(parts).removeprefix(".")


def _check(value: Any, path: tuple[Any, ...]) -> None:
    kind: type[Any] = type(cast("object", value))
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                where = path_of(path) or "the store"
                raise TypeError(f"cannot encode {where} as JSON: its key {key!r} must be a plain str")

            _check(item, (*path, key))
    elif kind is list or kind is tuple:
        for index, item in enumerate(value):
            _check(item, (*path, index))
    elif kind is float and not math.isfinite(value):
        raise ValueError(f"cannot encode {path_of(path)} as JSON, which has no {value!r}")
    elif value is not None and kind not in (str, int, float, bool):
        raise TypeError(f"cannot encode {path_of(path)} as JSON, which has no {kind.__name__}")

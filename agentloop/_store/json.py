"""What JSON can carry, and where a value has something that it cannot."""

from __future__ import annotations

__all__ = ["check_json"]

import math
from typing import Any, cast

from .freezer import path_of


def check_json(value: Any, *path: Any) -> None:
    """
    Refuse what would not come back, which Python's encoder does not: it turns keys into strings.

    :param value: made of dicts, lists and what else JSON has; a tuple counts as a list
    :param path: the way to it, for the message
    :raises TypeError: if JSON has no such type, or a key is no ``str``
    :raises ValueError: if JSON has no such number
    """
    kind = type(cast("object", value))
    if issubclass(kind, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                where = path_of(path)
                raise TypeError(f"cannot encode {where} as JSON: its key {key!r} must be a str")

            check_json(item, *path, key)
    elif issubclass(kind, (list, tuple)):
        for index, item in enumerate(value):
            check_json(item, *path, index)
    elif issubclass(kind, float) and not math.isfinite(value):
        raise ValueError(f"cannot encode {path_of(path)} as JSON, which has no {value!r}")
    elif not (value is None or issubclass(kind, (str, int, float))):
        name = "set" if issubclass(kind, set) else kind.__name__
        raise TypeError(f"cannot encode {path_of(path)} as JSON, which has no {name}")

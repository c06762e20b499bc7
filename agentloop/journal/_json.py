"""JSON without loss."""

from __future__ import annotations

__all__ = ["check", "decode", "encode"]

import json
import math
from typing import Any, cast

decode = json.loads
# Made once: making an encoder takes longer than encoding an output.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_encode_ascii = json.JSONEncoder(separators=(",", ":")).encode


def encode(value: Any) -> str:
    """
    Return a value as JSON.

    :raises TypeError: if JSON does not have its type, so that it would not decode to an equal value
    :raises ValueError: if it has a number or a text that JSON cannot carry
    """
    check(value, strict=True)
    text = _encode(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair can be escaped. Two halves that follow each other come back as one character.
        text = _encode_ascii(value)
        if decode(text) != value:
            raise ValueError("JSON has no text of surrogate pairs") from None

    return text


def check(value: Any, *, strict: bool) -> None:
    """
    Raise an error for a value that JSON cannot carry, where Python's encoder would change it.

    :param value: the value, made of dicts, lists and the other types of JSON
    :param strict: whether it must decode to an equal value; else a tuple may become a list, and an object of
        a subclass one of its base
    :raises TypeError: if JSON has no such type, or a key is no ``str``
    :raises ValueError: if JSON has no such number
    """
    kind = type(cast("object", value))
    if kind is str or value is None or kind is bool or kind is int:
        return

    if kind is float or (not strict and issubclass(kind, (str, int, float))):
        if issubclass(kind, float) and not math.isfinite(value):
            raise ValueError(f"JSON has no {value!r}")
    elif kind is dict or (not strict and issubclass(kind, dict)):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"JSON has no key {key!r}")

            check(item, strict=strict)
    elif kind is list or (not strict and issubclass(kind, (list, tuple))):
        for item in value:
            check(item, strict=strict)
    else:
        raise TypeError(f"JSON has no {kind.__name__}")

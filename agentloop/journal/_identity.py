"""The identity of an input in a journal: the name of its agent, and its key or a hash of its arguments."""

from __future__ import annotations

__all__ = ["Identity", "identify", "is_same"]

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import attrs

from .._invocation import Invocation
from ._json import check

# Made once: making an encoder takes longer than encoding an invocation.
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
# The largest integer that SQLite can store, plus 1.
_LARGEST = 2**63


@attrs.frozen
class Identity:
    """
    The identity of an input in a journal.

    :param agent: the qualified name of its function
    :param key: its own key, or a hash of its arguments
    :param fn: the function itself, without its wrappers
    """

    agent: str
    key: str | int | bytes
    fn: Callable[..., Any]

    @property
    def is_hashed(self) -> bool:
        """Whether equal inputs have entries of their own."""
        return isinstance(self.key, bytes)


def identify(invocation: Invocation[Any]) -> Identity:
    """
    Return the identity of an invocation.

    :raises TypeError: if it needs a key and has none
    :raises ValueError: if its key cannot be stored
    """
    fn: Any = invocation.fn
    args, kwargs = invocation.args, dict(invocation.kwargs)
    while True:
        if isinstance(fn, partial):
            # In the order in which a call of a partial combines them.
            args, kwargs, fn = fn.args + args, {**fn.keywords, **kwargs}, fn.func
        elif (wrapped := getattr(fn, "__wrapped__", None)) is not None:
            fn = wrapped
        else:
            break

    agent, is_bound = _name(fn)
    if invocation.key is not None:
        return Identity(agent, _checked(invocation.key), fn)

    if is_bound:
        raise TypeError(
            f"{fn!r} depends on an object that a journal cannot know: give this invocation a key, "
            f"Invocation({invocation.agent_id!r}, fn, args, key=...)"
        )

    try:
        check([args, kwargs], strict=False)
        text = _encode([args, kwargs])
    except (TypeError, ValueError, RecursionError) as exc:
        raise TypeError(
            f"the arguments of {invocation.agent_id!r} cannot be hashed: {exc}; give this invocation a key, "
            "Invocation(agent_id, fn, args, key=...) or Invocation.map(fn, items, key=...)"
        ) from exc

    return Identity(agent, hashlib.blake2b(text.encode(), digest_size=16).digest(), fn)


def is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Return whether two functions of one name have the same code, and no closure or other bound values."""
    return one is other or (
        isinstance(one, FunctionType)
        and isinstance(other, FunctionType)
        and one.__code__ is other.__code__
        and not one.__closure__
        and one.__defaults__ == other.__defaults__
        and one.__kwdefaults__ == other.__kwdefaults__
    )


def _checked(key: str | int) -> str | int:
    if isinstance(key, int):
        if not -_LARGEST <= key < _LARGEST:
            raise ValueError(f"key must fit in 64 bits, got {key!r}; make a str of it")

        return int(key)

    try:
        key.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"key must be text that UTF-8 can encode, got {key!r}") from exc

    # As a plain str, if it is of a subclass.
    return str.__str__(key)


def _name(fn: Any) -> tuple[str, bool]:
    """Return the name of a function, and whether it is bound to an object."""
    owner: Any = getattr(fn, "__self__", None)
    if owner is not None and not isinstance(owner, ModuleType):
        is_bound = not isinstance(owner, type)
        kind: type[Any] = owner if isinstance(owner, type) else type(owner)
        return f"{_module(kind.__module__)}.{kind.__qualname__}.{fn.__name__}", is_bound

    name = getattr(fn, "__qualname__", None)
    if isinstance(name, str):
        return f"{_module(fn.__module__)}.{name}", False

    # An object with a __call__ method.
    return f"{_module(type(fn).__module__)}.{type(fn).__qualname__}", True


def _module(name: str) -> str:
    """Return the name of a module; for ``__main__``, the name by which other modules import it."""
    main = sys.modules.get("__main__")
    if name != "__main__" or main is None:
        return name

    if main.__spec__ is not None:
        return main.__spec__.name.removesuffix(".__main__")

    path = getattr(main, "__file__", None)
    return name if path is None else Path(path).stem

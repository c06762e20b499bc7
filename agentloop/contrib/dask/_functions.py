"""Functions that other processes call."""

from __future__ import annotations

__all__ = ["Function", "check_async", "load_function", "versions"]

import hashlib
import importlib.metadata
import inspect
import itertools
import platform
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from ._pickles import dumps, loads

_numbers = itertools.count()


def versions() -> dict[str, str]:
    """Return versions that must be equal in all processes, since each reads the others' pickles."""
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: importlib.metadata.version(name) for name in ("agentloop-anyio", "cloudpickle")},
    }


def check_async(fn: object) -> None:
    """
    Refuse anything but an async function.

    :raises TypeError: with a hint at the right call
    """
    called = fn
    while isinstance(called, partial):
        called = called.func

    # Calling an object calls a method of its class.
    kinds = (called, type(called).__call__)
    if any(map(inspect.iscoroutinefunction, kinds)):
        return

    if inspect.iscoroutine(fn):
        fn.close()
        hint = "pass the function and its arguments apart: workers.remote(fn)(x)"
    elif any(map(inspect.isasyncgenfunction, kinds)):
        hint = "chunks cannot travel; return them all, or stream in this process"
    elif callable(fn):
        hint = "a blocking function can be called in a thread there: workers.remote(in_thread(fn))"
    else:
        hint = "workers.remote(ask)"

    raise TypeError(f"fn must be an async function, got {fn!r}: {hint}")


class Function:
    """
    A function that can be sent to other processes.

    :param fn: the function. It is pickled at its first call, since it may refer to names that are defined
        after it
    """

    def __init__(self, fn: Callable[..., Awaitable[Any]]) -> None:
        self.number = next(_numbers)
        self._fn = fn
        self._data: bytes | None = None

    def define(self) -> bytes:
        """
        Return the function as bytes, for :func:`load_function`.

        :raises TypeError: if it does not pickle
        """
        if self._data is None:
            try:
                self._data = dumps((dumps(self._fn), _module_of(self._fn), _source(_module_of(self._fn))))
            except Exception as exc:
                raise TypeError(
                    f"{self._fn!r} cannot be sent to another process: {exc}; let the agent make what it "
                    "needs, such as a client, in the process that it runs in"
                ) from exc

        return self._data

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """
        Return the arguments of a call as bytes.

        :raises TypeError: if one of them does not pickle
        """
        try:
            return dumps((args, kwargs))
        except Exception as exc:
            bad = (name for name, value in [*enumerate(args, 1), *kwargs.items()] if not _pickles(value))
            raise TypeError(
                f"argument {next(bad, '')} of {self._fn!r} cannot be sent to another process: {exc}"
            ) from exc


def load_function(data: bytes) -> Callable[..., Awaitable[Any]]:
    """
    Return a function that another process has defined.

    :raises ImportError: if it cannot be imported here, or the source of its module differs
    """
    pickled, module, source = loads(data)
    try:
        fn: Callable[..., Awaitable[Any]] = loads(pickled)
    except (ImportError, AttributeError) as exc:
        raise ImportError(f"{exc}: the worker processes must be able to import the agent's module") from exc

    # If its module is not loaded, the function was pickled by value.
    if module in sys.modules and (found := _source(module)) != source:
        raise ImportError(
            f"the module {module} is another version in this worker process, {found} here and {source} in "
            "the process that called: give all of them the same code, and start them again"
        )

    return fn


def _pickles(value: object) -> bool:
    try:
        dumps(value)
    except Exception:
        return False

    return True


def _module_of(fn: Any) -> str:
    while isinstance(fn, partial):
        fn = fn.func

    return str(getattr(fn, "__module__", None) or type(fn).__module__)


def _source(name: str) -> str:
    """Return a hash of the source of a module; empty for ``__main__``, which travels by value, or no file."""
    path = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or path is None:
        return ""

    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    except OSError:
        return ""

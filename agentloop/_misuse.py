"""Errors for likely mistakes, with the right code in the message."""

from __future__ import annotations

__all__ = ["EnteredOnly", "OfOneProcess", "name_parameters"]

import functools
import inspect
import reprlib
from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# Likely wrong names for parameters that do not resemble them.
_OTHER_NAMES = {
    "max_concurrency": "concurrency limit max_at_once max_concurrent max_workers n_jobs parallel workers",
    "timeout_seconds": "request_timeout time_limit timeout",
    "total_timeout_seconds": "deadline total",
    "max_retries": "attempts max_attempts max_tries num_retries retries retry tries",
    "initial_seconds": "base_delay delay initial min_seconds",
    "multiplier": "base exponent factor",
    "max_seconds": "cap max max_delay max_wait",
    "limit": "max_rate rate requests",
    "per_seconds": "interval per period seconds time_period window",
    "on_event": "callback callbacks hook hooks sink sinks",
    "metrics": "recorder",
}


def name_parameters(settings: type | None = None) -> Callable[[type[T]], type[T]]:
    """
    Let a class name the right parameter in the error when it is called with an unknown one.

    :param settings: a class whose parameters the caller may have meant, and whose objects are passed instead
    """

    def decorate(cls: type[T]) -> type[T]:
        init: Callable[..., None] = cls.__init__
        names = inspect.signature(cls).parameters

        @functools.wraps(init)
        def checked(self: T, *args: Any, **kwargs: Any) -> None:
            wrong = {name: value for name, value in kwargs.items() if name not in names}
            if wrong:
                raise TypeError(
                    f"{cls.__name__}() got an unexpected keyword argument {next(iter(wrong))!r}: "
                    + _advice(cls.__name__, wrong, names, settings)
                )

            init(self, *args, **kwargs)

        setattr(cls, init.__name__, checked)
        return cls

    return decorate


def _advice(called: str, wrong: dict[str, Any], names: Collection[str], settings: type | None) -> str:
    if settings is not None:
        theirs = inspect.signature(settings).parameters
        moved = {right: value for name, value in wrong.items() if (right := _guess(name, theirs))}
        if moved:
            values = ", ".join(f"{right}={reprlib.repr(value)}" for right, value in moved.items())
            return f"pass {called}({settings.__name__}({values}))"

    right = _guess(next(iter(wrong)), names)
    return f"did you mean {right}?" if right else f"its parameters are {', '.join(names)}"


def _guess(name: str, names: Collection[str]) -> str | None:
    """Return the most likely match of ``name`` in ``names``."""
    synonyms = (right for right in names if name in _OTHER_NAMES.get(right, "").split())
    return next(synonyms, None) or next(iter(get_close_matches(name, names, 1)), None)


class EnteredOnly:
    """
    The base of async context managers that must not be iterated over, entered or awaited in any other way:
    each of these raises an error with the right code. Type checkers do not see these methods, so they go on
    to refuse such a use.
    """

    _usage: str

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("__iter__", "__enter__", "__exit__", "__await__"):
            setattr(cls, name, cls._refuse)

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(self._usage)


class OfOneProcess:
    """
    The base of classes whose objects cannot be pickled.

    :param since: the reason, for the message of the error
    """

    _since: str

    def __init_subclass__(cls, since: str | None = None) -> None:
        super().__init_subclass__()
        if since is not None:
            cls._since = since

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, since {self._since}: make one in each process"
        )

"""What is done to the exceptions of agents: shorter tracebacks, and notes."""

from __future__ import annotations

__all__ = ["add_note", "drop_frames", "plumbing", "trim"]

from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar, cast

from .._eventloop.context import await_it
from .._foreign import foreign_code

FnT = TypeVar("FnT", bound=Callable[..., Any])

# How many exceptions are looked at that an exception was caused by, or has as members.
CHAIN = 100

_PLUMBING: set[CodeType] = {await_it.__code__}


def plumbing(fn: FnT) -> FnT:
    """Mark a function as one that stands between the loop and an agent, and that tracebacks leave out."""
    _PLUMBING.add(fn.__code__)
    return fn


def trim(exc: BaseException) -> None:
    """Let the traceback begin in the agent: shorter to read, and no reference back to our own frames."""
    # Of an exception that does not let it be set, a frozen dataclass, say, the traceback keeps our frames.
    with foreign_code:
        traceback = exc.__traceback__
        while traceback is not None and traceback.tb_frame.f_code in _PLUMBING:
            traceback = traceback.tb_next

        exc.__traceback__ = traceback


def drop_frames(exc: BaseException) -> None:
    """Forget the tracebacks of an exception, and with them what the frames hold."""
    seen: dict[int, BaseException] = {}
    todo: list[BaseException | None] = [exc]
    while todo and len(seen) < CHAIN:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue

        seen[id(one)] = one
        # It may not let its attributes be set, or read.
        with foreign_code:
            one.__traceback__ = None
            todo += [one.__cause__, one.__context__]
            if issubclass(type(one), BaseExceptionGroup):
                todo += cast("BaseExceptionGroup[BaseException]", one).exceptions


def add_note(exc: BaseException, text: str) -> None:
    """Add a note to an exception, once."""
    # An exception that takes no notes is data all the same.
    with foreign_code:
        # One object may be raised by many attempts; say a thing once.
        if text not in getattr(exc, "__notes__", ()):
            exc.add_note(text)

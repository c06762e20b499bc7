"""Changes to the exceptions of agents: shorter tracebacks, notes, and an early ``RecursionError``."""

from __future__ import annotations

__all__ = ["add_note", "check_depth", "drop_frames", "plumbing", "trim"]

from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar, cast

from .._eventloop.context import await_it
from .._foreign import foreign_code
from .._limits.slots import Slot
from .._signs import is_plain

FnT = TypeVar("FnT", bound=Callable[..., Any])

# How many exceptions of a chain of causes and group members are read.
CHAIN = 100
# How many invocations may be nested without a check, and how many frames each needs at most to end.
DEEP = 10
FRAMES = 60

_PLUMBING: set[CodeType] = {await_it.__code__}


def plumbing(fn: FnT) -> FnT:
    """Mark a function that calls agents, so that tracebacks leave it out."""
    _PLUMBING.add(fn.__code__)
    return fn


def trim(exc: BaseException) -> None:
    """Let the traceback begin in the agent: it is shorter, and does not refer to our own frames."""
    # Some exceptions, such as frozen dataclasses, refuse a new traceback; these keep our frames.
    with foreign_code:
        traceback = exc.__traceback__
        while traceback is not None and traceback.tb_frame.f_code in _PLUMBING:
            traceback = traceback.tb_next

        exc.__traceback__ = traceback


def drop_frames(exc: BaseException) -> None:
    """Drop the tracebacks of an exception, so that it keeps no frames alive."""
    if is_plain(exc) and exc.__context__ is None:
        exc.__traceback__ = None  # the most frequent case
        return

    seen: dict[int, BaseException] = {}
    todo: list[BaseException | None] = [exc]
    while todo and len(seen) < CHAIN:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue

        seen[id(one)] = one
        # An exception may refuse to have its attributes set, or read.
        with foreign_code:
            one.__traceback__ = None
            todo += [one.__cause__, one.__context__]
            if issubclass(type(one), BaseExceptionGroup):
                todo += cast("BaseExceptionGroup[BaseException]", one).exceptions


def add_note(exc: BaseException, text: str) -> None:
    """Add a note to an exception, once."""
    # An exception that refuses notes is still a result.
    with foreign_code:
        # Many attempts may raise the same object; each text is added once.
        if text not in getattr(exc, "__notes__", ()):
            exc.add_note(text)


def check_depth(outer: Slot | None) -> None:
    """
    Raise ``RecursionError`` if a nested invocation has no frames left in which to end.

    Raised here it is an error of the agent. Raised where a scope is left, it would corrupt trio's scopes.

    :param outer: the slot of the invocation around it
    """
    for _ in range(DEEP):
        if outer is None:
            return

        outer = outer.outer

    _descend(FRAMES)


def _descend(frames: int) -> None:
    if frames:
        _descend(frames - 1)

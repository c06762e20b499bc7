"""Context variables of a batch, coroutines of users' functions, and the wait for a cancellation."""

from __future__ import annotations

__all__ = ["Inherited", "as_coroutine", "await_it", "resumable", "wait_for_cancellation"]

import inspect
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from typing import Any, ParamSpec, TypeVar

import anyio

from .._errors import not_async

T = TypeVar("T")
P = ParamSpec("P")


class Inherited:
    """
    The context variables that the tasks of a batch inherit from its caller.

    :param apart: a variable of the library's own, which each of these tasks sets
    """

    __slots__ = ("are_lost", "context", "count", "values")

    def __init__(self, apart: ContextVar[Any]) -> None:
        self.context: Context = copy_context()
        self.values: list[tuple[ContextVar[Any], object]] = [
            (var, value) for var, value in self.context.items() if var is not apart
        ]
        self.count: int = len(self.values) + 1
        """How many variables are set in a task where none was set or deleted since."""
        self.are_lost = False
        """Whether an agent has changed a variable in one of the tasks."""

    def check(self) -> None:
        """
        Note whether a variable was changed in the current task.

        No values are compared, only objects: comparing would call the user's ``__eq__``.
        """
        # An inherited variable can be set again, but not deleted.
        if len(copy_context()) != self.count or any(var.get() is not value for var, value in self.values):
            self.are_lost = True


async def wait_for_cancellation() -> None:
    """
    Wait until the cancellation of a scope around the current task is delivered.

    Polling for it, as ``checkpoint_if_cancelled()`` does on asyncio, can take for ever: while all other tasks
    of the scope are shielded, AnyIO delivers none to a task that was just started. Leaving a scope makes
    AnyIO deliver it.
    """
    anyio.CancelScope().__enter__().__exit__(None, None, None)
    await anyio.sleep_forever()


async def await_it(awaitable: Awaitable[T]) -> T:
    """Make a coroutine of an awaitable of another type."""
    return await awaitable


def resumable(fn: Callable[P, Generator[Any, Any, Any]]) -> Callable[P, Any]:
    """Let a generator ``yield from`` coroutines. The types of ``types.coroutine`` would hide its methods."""
    return types.coroutine(fn)


def as_coroutine(fn: object, returned: object) -> Coroutine[Any, Any, Any]:
    """
    Return a coroutine for the return value of a user's function.

    :raises TypeError: if the value cannot be awaited
    """
    if inspect.isawaitable(returned):
        return await_it(returned)

    if inspect.isasyncgen(returned):
        raise not_async(f"{fn!r} is an async generator function: run it with run_streaming()")

    raise not_async(
        f"{fn!r} returned a {type(returned).__name__}, which cannot be awaited: pass an async function, "
        "or in_thread(fn) for a blocking one"
    )

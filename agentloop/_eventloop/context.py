"""Running a call inside a context of its own, without a task of its own; and waiting to be cancelled."""

from __future__ import annotations

__all__ = ["await_it", "call_in_context", "wait_for_cancellation"]

import inspect
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from contextvars import Context
from typing import Any, TypeVar

import anyio

from .._errors import not_async
from .callers import CallersCancellation

T = TypeVar("T")

# What calling an async function gives.
_PLAIN: type[types.CoroutineType[Any, Any, Any]] = types.CoroutineType
_send = _PLAIN.send


@types.coroutine
def call_in_context(
    context: Context,
    fn: Callable[..., Awaitable[T]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    on_wait: Callable[[], object],
    caller: CallersCancellation | None = None,
) -> Generator[Any, Any, T]:
    """
    Call ``fn`` and await what it returns, with every step taken inside ``context``.

    Context variables that it sets stay in there, also for the tasks, threads and callbacks that it starts,
    and a token can be reset in any later step, since all steps share the one context.

    :param on_wait: called outside the context when the call waits for the first time
    :param caller: is shown the call when an exception is about to be thrown into it
    :raises TypeError: if ``fn`` returns something that cannot be awaited
    """
    coroutine: Any = context.run(fn, *args, **kwargs)
    # The plain case first: to ask an abstract class takes longer.
    if type(coroutine) is not _PLAIN:
        coroutine = _as_coroutine(fn, coroutine)

    # Bound methods are not kept: the collector would look at them as long as the call waits.
    try:
        step = context.run(_send, coroutine, None)
    except StopIteration as stop:
        value: T = stop.value
        return value

    on_wait()
    thrown: BaseException | None = None
    sent: Any = None
    while True:
        try:
            sent = yield step
        except GeneratorExit:
            context.run(coroutine.close)
            raise
        except BaseException as exc:
            # Thrown in below, outside of this block: inside, it would become the context of whatever the
            # agent raises later on, even if it had handled it.
            thrown = exc
            if caller is not None:
                caller.reaches(coroutine, exc)

        try:
            if thrown is None:
                step = context.run(_send, coroutine, sent)
            else:
                step = context.run(coroutine.throw, thrown)
        except StopIteration as stop:
            value = stop.value
            return value
        finally:
            # An exception refers to this frame, and trio sends exceptions too.
            thrown = sent = None


async def wait_for_cancellation() -> None:
    """
    Wait for the cancellation of a scope around the current task that has been cancelled.

    To poll for it, as ``checkpoint_if_cancelled()`` does on asyncio, can take for ever: while all else in the
    scope is shielded, AnyIO delivers none to a task that was just started. To leave a scope makes it do so.
    """
    anyio.CancelScope().__enter__().__exit__(None, None, None)
    await anyio.sleep_forever()


async def await_it(awaitable: Awaitable[T]) -> T:
    """Make a coroutine of what can only be awaited."""
    return await awaitable


def _as_coroutine(fn: object, returned: object) -> Coroutine[Any, Any, Any]:
    if inspect.isawaitable(returned):
        return await_it(returned)

    if inspect.isasyncgen(returned):
        raise not_async(f"{fn!r} is an async generator function: run it with run_streaming()")

    raise not_async(
        f"{fn!r} returned a {type(returned).__name__}, which cannot be awaited: pass an async function; run "
        "a blocking one in a thread, as in partial(anyio.to_thread.run_sync, fn)"
    )

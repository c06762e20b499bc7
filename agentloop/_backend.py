"""The one place where the two backends differ."""

from __future__ import annotations

__all__ = ["Host", "can_postpone", "clock", "host_maker", "is_running", "look_around", "runs_here"]

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import anyio
from anyio.lowlevel import EventLoopToken, current_token


class Host:
    """
    The task that runs agents, as far as an agent can leave marks on it. On trio it cannot.

    On asyncio a task counts the cancellations asked of it (``Task.cancelling()``). An agent that calls
    ``task.cancel()`` on its own task, or on CPython 3.11 just lets an ``asyncio.TaskGroup`` fail, leaves
    the count raised, and then a later scope in the same task does not catch its own cancellation.
    """

    __slots__ = ("cancellations",)

    def __init__(self, cancellations: Callable[[], int] = int) -> None:
        self.cancellations = cancellations
        """Returns how many native cancellations of the task are pending."""

    async def forget_cancellations(self, keep: int) -> None:
        """Take back the native cancellations of the task that came after the first ``keep``."""


class _AsyncioHost(Host):
    __slots__ = ("_task",)

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.cancellations = task.cancelling
        self._task = task

    async def forget_cancellations(self, keep: int) -> None:
        while self._task.cancelling() > keep:
            self._task.uncancel()

        # Before CPython 3.13 uncancel() leaves a cancellation that was not yet delivered in place, to be
        # raised at the next await: this one.
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -math.inf:
                raise


_TRIO_HOST = Host()


def can_postpone(scope: Any) -> bool:
    """
    Return whether the deadline of a scope can be moved to a later time by its ``_deadline`` alone.

    On asyncio, AnyIO's timer of a scope looks at the deadline when it fires, and is set anew if that is still
    to come. As long as one is under way that fires before, a new one is spared; a heap full of cancelled
    timers costs more than all else about a short attempt. Since nobody promises that, it is tried out.

    :param scope: a scope that has not been entered, for this to try it with
    """
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        return False

    handles: list[Any] = []
    try:
        for _ in range(2):
            scope._deadline = asyncio.get_running_loop().time() + 1000 * (1 + len(handles))
            scope._timeout()
            handles.append(scope._timeout_handle)

        return handles[1] is not handles[0] and handles[1].when() == scope._deadline
    except Exception:
        return False
    finally:
        for handle in handles:
            handle.cancel()


def look_around(backend: Any) -> Callable[[Any], bool]:
    """
    Return what tells whether the current task is cancelled, given a scope that it is in: by one around that.

    It means the same as ``current_effective_deadline() == -inf`` would outside of the scope. To find that out
    goes through all scopes and their deadlines each time, which takes as long as a fifth of all else about a
    short attempt; so here it is read off the scopes, as far as AnyIO and trio let us see them.

    :param backend: AnyIO's
    """

    def ask(scope: Any) -> bool:
        del scope
        return bool(backend.current_effective_deadline() == -math.inf)

    def look(scope: Any) -> bool:
        scope = scope._parent_scope
        while scope is not None:
            if scope._cancel_called:
                return True

            if scope._shield:
                return False

            scope = scope._parent_scope

        return False

    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        import trio  # it is there, since we run on it

        current_task = trio.lowlevel.current_task

        def look(scope: Any) -> bool:
            del scope
            task: Any = current_task()
            return bool(task._cancel_status._parent.effectively_cancelled)

    try:
        cancelled = ask(None)
        with backend.create_cancel_scope() as scope:
            return look if look(scope) is cancelled else ask
    except Exception:
        return ask


def clock() -> Callable[[], float]:
    """
    Return what reads the time of the current event loop, as ``anyio.current_time()`` does.

    That finds out at each call which backend and which loop it runs in, which costs more than the reading.
    """
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        loop = asyncio.get_running_loop()
        # The method of all loops that have no clock of their own does nothing but call this.
        return time.monotonic if type(loop).time is asyncio.BaseEventLoop.time else loop.time

    import trio  # it is there, since we run on it

    return trio.lowlevel.current_clock().current_time


def host_maker(token: EventLoopToken) -> Callable[[], Host]:
    """
    Return what gives the host that the current task is.

    :param token: of the event loop that it runs in
    """
    return _AsyncioHost if isinstance(token.native_token, asyncio.AbstractEventLoop) else lambda: _TRIO_HOST


def runs_here(token: EventLoopToken) -> bool:
    """Tell whether an event loop is the one that the current task runs in."""
    native = token.native_token
    try:
        # Of a trio run that is the guest of an asyncio loop, AnyIO has to find out.
        if asyncio.get_running_loop() is native and asyncio.current_task() is not None:
            return True
    except RuntimeError:
        pass

    return current_token() == token


def is_running(token: EventLoopToken) -> bool:
    """Tell whether an event loop, this one or another, is running."""
    native: Any = token.native_token
    if isinstance(native, asyncio.AbstractEventLoop):
        return native.is_running()

    # What a trio token knows it tells only when it is used; trio.RunFinishedError is a RuntimeError.
    try:
        native.run_sync_soon(_do_nothing, idempotent=True)
    except RuntimeError:
        return False

    return True


def _do_nothing() -> None:
    pass

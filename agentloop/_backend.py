"""The one place where the two backends differ."""

from __future__ import annotations

__all__ = ["Alarm", "Host", "clock", "host_maker", "is_running", "look_around", "make_alarm", "runs_here"]

import asyncio
import math
import time
from collections.abc import Callable
from contextvars import Context
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


class Alarm:
    """
    Cancels scopes when their time is up, with one timer of the event loop for all of them.

    AnyIO gives each scope on asyncio a timer of its own. To set that and to cancel it, and a heap full of
    cancelled ones, take longer than all else about a short attempt. But what has one time-out ends in the
    order in which it began, so that it is enough to watch the first.

    :param stays: whether the timer, once it has nothing to watch, is left to run out
    """

    __slots__ = ("_handle", "_latest", "_loop", "_scopes", "_stays")

    def __init__(self, loop: asyncio.AbstractEventLoop, stays: bool) -> None:
        self._loop = loop
        self._stays = stays
        # In the order of their deadlines.
        self._scopes: dict[Any, float] = {}
        self._latest = -math.inf
        self._handle: asyncio.TimerHandle | None = None

    def set(self, scope: Any, deadline: float) -> bool:
        """
        Set or move the deadline of a scope.

        :return: whether that could be done: if others end later, the scope has to have a timer of its own
        """
        scopes = self._scopes
        scopes.pop(scope, None)
        if not self._latest <= deadline < math.inf:
            return False

        scope._deadline = scopes[scope] = self._latest = deadline
        if self._handle is None or deadline < self._handle.when():
            self._wind(deadline)

        return True

    def drop(self, scope: Any) -> None:
        """Forget a scope that is about to be left."""
        self._scopes.pop(scope, None)
        if not self._scopes:
            self._latest = -math.inf
            if self._handle is not None and not self._stays:
                self._handle.cancel()
                self._handle = None

    def _wind(self, at: float) -> None:
        if self._handle is not None:
            self._handle.cancel()

        # In no context of anybody's, which it would keep alive.
        self._handle = self._loop.call_at(at, self._ring, context=Context())

    def _ring(self) -> None:
        self._handle = None
        now = self._loop.time()
        while self._scopes:
            scope, deadline = next(iter(self._scopes.items()))
            if deadline > now:
                self._wind(deadline)
                return

            self.drop(scope)
            # Somebody else may have moved it, and given it a timer by that.
            if scope._deadline <= deadline:
                scope.cancel("deadline exceeded")


def make_alarm(backend: Any) -> Alarm | None:
    """
    Return what times scopes out in the current event loop, if they do not have to do so themselves.

    On trio they have no timers. On asyncio their deadline has to be set in passing, past what sets a timer;
    since nobody promises that this can be done, it is tried out.

    :param backend: AnyIO's
    """
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        return None

    loop = asyncio.get_running_loop()
    deadline = loop.time() + 1000
    try:
        with backend.create_cancel_scope() as scope:
            scope._deadline = deadline
            if scope.deadline != deadline or scope._timeout_handle is not None:
                return None
    except Exception:
        return None

    # On a clock that jumps to the next timer, one that means nothing would mislead it.
    return Alarm(loop, stays=type(loop).time is asyncio.BaseEventLoop.time)


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

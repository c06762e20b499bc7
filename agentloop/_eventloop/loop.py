"""What the two backends do differently: an asyncio and a trio twin behind one class."""

from __future__ import annotations

__all__ = ["AsyncioLoop", "EventLoop", "TrioLoop", "kind_of_loop"]

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import anyio
from anyio.lowlevel import EventLoopToken, cancel_shielded_checkpoint, current_token

from .backend import make_deadline_queue, make_is_cancelled, make_is_left_open
from .callers import CallersCancellation
from .time_slice import TimeSlice


class EventLoop(ABC):
    """
    An event loop, for the code that runs in it.

    AnyIO's own functions find out at each call which backend and which event loop they run in. That costs
    more than what they then do, so it is found out once here. What needs no event loop can be called on the
    class that :func:`kind_of_loop` returns.

    :param token: of the current event loop
    """

    __slots__ = ("alarm", "backend", "is_cancelled_around", "is_left_open", "now", "pace", "token")

    loses_tasks: bool
    """Whether a task can be cancelled before its first step, so that it never runs."""

    def __init__(self, token: EventLoopToken) -> None:
        self.token = token
        self.backend = token.backend_class
        """AnyIO's."""
        self.now = self.clock()
        """Returns the time, as ``anyio.current_time()`` does."""
        self.is_cancelled_around = make_is_cancelled(self.backend)
        self.is_left_open = make_is_left_open(self.backend)
        self.alarm = make_deadline_queue(self.backend)
        self.pace = TimeSlice(self.now)

    @staticmethod
    @abstractmethod
    def clock() -> Callable[[], float]:
        """Return a function that reads the time of the current event loop."""

    @staticmethod
    @abstractmethod
    def count_cancellations() -> Callable[[], int]:
        """
        Return a function that counts the native cancellations of the current task. On trio there are none.

        On asyncio a task counts the cancellations asked of it (``Task.cancelling()``). An agent that calls
        ``task.cancel()`` on its own task, or on CPython 3.11 just lets an ``asyncio.TaskGroup`` fail, leaves
        the count raised, and then a later scope in the same task does not catch its own cancellation.
        """

    @staticmethod
    @abstractmethod
    def callers_cancellation() -> CallersCancellation | None:
        """Return what tells native cancellations of the current task, a caller's; on trio none."""

    @staticmethod
    @abstractmethod
    async def forget_cancellations() -> None:
        """Take back the native cancellations of the current task, which has to be ours."""

    @staticmethod
    @abstractmethod
    async def let_tasks_begin() -> None:
        """Let the tasks that were just started begin, where a cancellation could come before that."""

    @staticmethod
    @abstractmethod
    def make_is_current(native: Any) -> Callable[[], bool]:
        """
        Return a function that returns whether the current task runs in an event loop.

        :param native: AnyIO's ``native_token`` of it, which is of this backend
        """

    @staticmethod
    @abstractmethod
    def is_running(native: Any) -> bool:
        """Return whether an event loop, this one or another, is running."""

    @staticmethod
    @abstractmethod
    def can_go_on(native: Any) -> bool:
        """Return whether an event loop is running, or stopped in a way that lets it go on."""


class AsyncioLoop(EventLoop):
    """Asyncio's twin."""

    __slots__ = ()
    loses_tasks = True
    callers_cancellation = CallersCancellation

    @staticmethod
    def clock() -> Callable[[], float]:
        loop = asyncio.get_running_loop()
        # The method of all loops that have no clock of their own does nothing but call this.
        return time.monotonic if type(loop).time is asyncio.BaseEventLoop.time else loop.time

    @staticmethod
    def count_cancellations() -> Callable[[], int]:
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling

    @staticmethod
    async def forget_cancellations() -> None:
        task = asyncio.current_task()
        assert task is not None
        while task.cancelling():
            task.uncancel()

        # Before CPython 3.13 uncancel() leaves a cancellation that was not yet delivered in place, to be
        # raised at the next await: this one.
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -math.inf:
                raise

    @staticmethod
    async def let_tasks_begin() -> None:
        cancelled: BaseException | None = None
        # The first may come before their first step. If this is cancelled natively, they begin all the same.
        for _ in range(2):
            try:
                await cancel_shielded_checkpoint()
            except asyncio.CancelledError as exc:
                cancelled = exc

        if cancelled is not None:
            raise cancelled

    @staticmethod
    def make_is_current(native: asyncio.AbstractEventLoop) -> Callable[[], bool]:
        def is_current() -> bool:
            try:
                # Of a trio run that is the guest of an asyncio loop, AnyIO has to find out.
                if get_running_loop() is native and current_task(native) is not None:
                    return True
            except RuntimeError:
                pass

            return current_token().native_token is native

        get_running_loop, current_task = asyncio.get_running_loop, asyncio.current_task
        return is_current

    @staticmethod
    def is_running(native: asyncio.AbstractEventLoop) -> bool:
        return native.is_running()

    @staticmethod
    def can_go_on(native: asyncio.AbstractEventLoop) -> bool:
        return not native.is_closed()


class TrioLoop(EventLoop):
    """Trio's twin."""

    __slots__ = ()
    loses_tasks = False

    @staticmethod
    def clock() -> Callable[[], float]:
        import trio  # it is there, since we run on it

        return trio.lowlevel.current_clock().current_time

    @staticmethod
    def count_cancellations() -> Callable[[], int]:
        return int

    @staticmethod
    def callers_cancellation() -> None:
        return None

    @staticmethod
    async def forget_cancellations() -> None:
        pass

    @staticmethod
    async def let_tasks_begin() -> None:
        pass

    @staticmethod
    def make_is_current(native: Any) -> Callable[[], bool]:
        import trio

        def is_current() -> bool:
            if in_trio_task():
                return current_trio_token() is native

            return current_token().native_token is native

        in_trio_task, current_trio_token = trio.lowlevel.in_trio_task, trio.lowlevel.current_trio_token
        return is_current

    @staticmethod
    def is_running(native: Any) -> bool:
        # What a trio token knows it tells only when it is used; trio.RunFinishedError is a RuntimeError.
        try:
            native.run_sync_soon(_do_nothing, idempotent=True)
        except RuntimeError:
            return False

        return True

    can_go_on = is_running


def kind_of_loop() -> type[EventLoop]:
    """Return the twin of the current event loop."""
    return AsyncioLoop if anyio.get_cancelled_exc_class() is asyncio.CancelledError else TrioLoop


def _do_nothing() -> None:
    pass

"""The differences between the two backends: an asyncio and a trio twin behind one class."""

from __future__ import annotations

__all__ = ["AsyncioLoop", "EventLoop", "TrioLoop", "describe", "kind_of_loop"]

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import NoneType
from typing import Any, Protocol

import anyio
from anyio.lowlevel import EventLoopToken, cancel_shielded_checkpoint, current_token

from .absent import Absent
from .callers import CallersCancellation
from .deadlines import AsyncioQueue, AttemptScope, DeadlineQueue, TrioQueue
from .insides import AsyncioScope, TrioScope, works_here
from .public import PublicScope
from .time_slice import TimeSlice


class Event(Protocol):
    """The common interface of both backends' own events."""

    def set(self) -> None:
        """Wake the waiting tasks."""

    async def wait(self) -> object:
        """Wait until the event is set."""


class EventLoop(ABC):
    """
    The current event loop, for the code that runs in it.

    AnyIO's functions look up the backend and the event loop at each call, which costs more than their work.
    This class looks them up once. Its static methods can be called on the class that :func:`kind_of_loop`
    returns.

    :param token: AnyIO's token of the current event loop
    :param public: whether to avoid private attributes of AnyIO and trio even if they work
    """

    __slots__ = (
        "_deadlines",
        "_new_scope",
        "_scope_kind",
        "absent",
        "backend",
        "cancellations_before",
        "now",
        "spare",
        "time_slice",
        "token",
    )

    loses_tasks: bool
    """Whether a task can be cancelled before its first step, so that it never runs."""
    inside_scope: type[AttemptScope]
    """The kind of attempt scopes that uses private attributes."""

    def __init__(self, token: EventLoopToken, public: bool = False) -> None:
        self.token: EventLoopToken = token
        self.backend: Any = token.backend_class
        """The backend class of AnyIO."""
        self.now: Callable[[], float] = self.clock()
        """Returns the time, as ``anyio.current_time()`` does."""
        self.time_slice: TimeSlice = TimeSlice(self.now)
        self._new_scope: Callable[..., anyio.CancelScope] = self.backend.create_cancel_scope
        works = not public and works_here(self.inside_scope, self._new_scope)
        self._scope_kind = self.inside_scope if works else PublicScope
        self._deadlines = self.loop_deadlines() if works else None
        self.spare: list[AttemptScope] = []
        """Unused scopes of attempts, which any task can use again."""
        self.absent: Absent = Absent.current()
        """The agents that wait for a change by others."""
        self.cancellations_before: Callable[[], int | None] = self.callers_cancellations
        """As :meth:`callers_cancellations`; an attribute of the object is found faster."""

    @property
    def looks_inside(self) -> bool:
        """Whether attempt scopes use private attributes of AnyIO and trio."""
        return self._scope_kind is not PublicScope

    def attempt_scope(self, deadlines: DeadlineQueue | None = None) -> AttemptScope:
        """
        Return the scope for the attempts of the current task.

        :param deadlines: the queue that cancels it in time, if that is not the event loop's
        """
        return self._scope_kind(self.now, self._new_scope, self._deadlines or deadlines)

    @staticmethod
    @abstractmethod
    def loop_deadlines() -> DeadlineQueue | None:
        """Return the queue that cancels all attempts of the event loop in time, if it has timers."""

    @abstractmethod
    def batch_deadlines(self) -> TrioQueue | None:
        """Return the queue that cancels the attempts of a batch in time, if the event loop has none."""

    @staticmethod
    @abstractmethod
    def clock() -> Callable[[], float]:
        """Return a function that reads the time of the current event loop."""

    @staticmethod
    @abstractmethod
    def new_event() -> Callable[[], Event]:
        """
        Return the class of the event loop's own events. They must not be set before they are waited for.

        AnyIO's events wrap them. Making and awaiting these takes a tenth of the time of a stream's chunk on
        asyncio, and a twentieth on trio.
        """

    @staticmethod
    @abstractmethod
    def count_cancellations() -> Callable[[], int]:
        """
        Return a function that counts the native cancellations of the current task. On trio there are none.

        On asyncio a task counts its requested cancellations (``Task.cancelling()``). An agent that calls
        ``task.cancel()`` on its own task, or on CPython 3.11 just lets an ``asyncio.TaskGroup`` fail, leaves
        the count raised, and then a later scope in the same task does not catch its own cancellation.
        """

    @staticmethod
    @abstractmethod
    def callers_cancellations() -> int | None:
        """Return :meth:`CallersCancellation.count` of the current task; ``None`` on trio."""

    @staticmethod
    @abstractmethod
    async def forget_cancellations() -> None:
        """Take back the native cancellations of the current task, the library's own or one about to end."""

    @staticmethod
    @abstractmethod
    async def let_tasks_begin() -> BaseException | None:
        """
        Let new tasks take their first step, on a backend where a cancellation could come before that.

        :return: a native cancellation of the current task that came meanwhile, for the caller to raise
        """

    @staticmethod
    @abstractmethod
    def make_is_current(native: Any) -> Callable[[], bool]:
        """
        Return a function that returns whether the current task runs in an event loop.

        :param native: AnyIO's ``native_token`` of the event loop, which must be of this backend
        """

    @staticmethod
    @abstractmethod
    def is_running(native: Any) -> bool:
        """Return whether an event loop, this one or another, is running."""

    @staticmethod
    @abstractmethod
    def can_go_on(native: Any) -> bool:
        """Return whether an event loop is running, or stopped in a way that lets it go on."""

    @staticmethod
    @abstractmethod
    def call_from_thread(native: Any, callback: Callable[[], object]) -> None:
        """
        Schedule a function in an event loop, from any thread, without waiting for it.

        :raises RuntimeError: if the event loop has ended
        """


class AsyncioLoop(EventLoop):
    """Asyncio's twin."""

    __slots__ = ()
    loses_tasks = True
    inside_scope = AsyncioScope
    loop_deadlines = AsyncioQueue
    callers_cancellations = staticmethod(CallersCancellation.count)

    def batch_deadlines(self) -> None:
        return None

    @staticmethod
    def clock() -> Callable[[], float]:
        loop = asyncio.get_running_loop()
        # BaseEventLoop.time() only calls this function, so loops without a clock of their own can skip it.
        return time.monotonic if type(loop).time is asyncio.BaseEventLoop.time else loop.time

    @staticmethod
    def new_event() -> Callable[[], Event]:
        return asyncio.Event

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
    async def let_tasks_begin() -> BaseException | None:
        cancelled: BaseException | None = None
        # The first sleep may end before their first step. They begin even if this is cancelled.
        for _ in range(2):
            try:
                await cancel_shielded_checkpoint()
            except asyncio.CancelledError as exc:
                cancelled = exc

        return cancelled

    @staticmethod
    def make_is_current(native: asyncio.AbstractEventLoop) -> Callable[[], bool]:
        def is_current() -> bool:
            try:
                # Inside a trio run that is the guest of an asyncio loop, only AnyIO can tell.
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

    @staticmethod
    def call_from_thread(native: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
        native.call_soon_threadsafe(callback)


class TrioLoop(EventLoop):
    """Trio's twin."""

    __slots__ = ()
    loses_tasks = False
    inside_scope = TrioScope
    callers_cancellations = NoneType  # called, it returns None

    @staticmethod
    def loop_deadlines() -> None:
        return None

    def batch_deadlines(self) -> TrioQueue | None:
        return TrioQueue() if self.looks_inside else None

    @staticmethod
    def clock() -> Callable[[], float]:
        import trio  # installed, since this runs on it

        return trio.lowlevel.current_clock().current_time

    @staticmethod
    def new_event() -> Callable[[], Event]:
        import trio  # installed, since this runs on it

        return trio.Event

    @staticmethod
    def count_cancellations() -> Callable[[], int]:
        return int

    @staticmethod
    async def forget_cancellations() -> None:
        pass

    @staticmethod
    async def let_tasks_begin() -> None:
        return None

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
        # A trio token shows the end of its run only when it is used; trio.RunFinishedError is a RuntimeError.
        try:
            native.run_sync_soon(_do_nothing, idempotent=True)
        except RuntimeError:
            return False

        return True

    can_go_on = is_running

    @staticmethod
    def call_from_thread(native: Any, callback: Callable[[], object]) -> None:
        native.run_sync_soon(callback)


def kind_of_loop() -> type[EventLoop]:
    """Return the twin of the current event loop."""
    return AsyncioLoop if anyio.get_cancelled_exc_class() is asyncio.CancelledError else TrioLoop


def describe() -> str:
    """Return how the library sets deadlines and sees cancellations in the current event loop, in words."""
    looks_inside = kind_of_loop()(current_token()).looks_inside
    return "by the insides of AnyIO and trio" if looks_inside else "by public calls alone, which is slower"


def _do_nothing() -> None:
    pass

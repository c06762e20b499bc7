"""Our use of the insides of AnyIO's and trio's cancel scopes, and what stands in where it is not possible."""

from __future__ import annotations

__all__ = [
    "DeadlineQueue",
    "LoopDeadlineQueue",
    "TaskDeadlineQueue",
    "is_error",
    "make_deadline_queue",
    "make_is_cancelled",
    "make_is_left_open",
    "make_task_deadline_queue",
]

import asyncio
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import Context
from typing import Any, cast

import anyio


class DeadlineQueue(ABC):
    """
    Cancels scopes when their time is up, with one timer for all of them.

    Else each scope has one of its own. To set that and to cancel it, and on asyncio a heap full of cancelled
    ones, take as long as all else about a short attempt. But what has one time-out ends in the order in which
    it began, so that it is enough to watch the first. What ends before others that are watched has a timer of
    its own.
    """

    __slots__ = ("_alone", "_latest", "_rests", "_rings_at", "_scopes", "spare")

    def __init__(self, rests: bool) -> None:
        # When to look at each: no later than its deadline, and in the order of these times.
        self._scopes: dict[Any, float] = {}
        # Those with a timer of their own.
        self._alone: set[Any] = set()
        self._latest = -math.inf
        self._rings_at = math.inf
        # Whether the timer is stopped while there is nothing to watch.
        self._rests = rests
        self.spare: list[Any] = []
        """Scopes that were left and can be entered again."""

    inner: Callable[[Any], Any]
    """Returns that of AnyIO's scope which has the deadline: what :meth:`set` and :meth:`drop` are given."""

    def set(self, scope: Any, deadline: float) -> None:
        """Set or move the deadline of a scope that has been entered."""
        scopes = self._scopes
        if scope in scopes:
            if scopes[scope] <= deadline:
                # The timer finds out when it rings for it.
                scope._deadline = deadline
                return

            del scopes[scope]

        if deadline == math.inf or (scopes and deadline < self._latest) or scope in self._alone:
            # It ends before others do; or did, and trio would still cancel it at that time.
            self._alone.add(scope)
            scope.deadline = deadline
            return

        scope._deadline = scopes[scope] = self._latest = deadline
        if deadline < self._rings_at:
            self._wind(deadline)

    def drop(self, scope: Any) -> None:
        """Forget a scope that is about to be left."""
        self._scopes.pop(scope, None)
        if self._alone:
            self._alone.discard(scope)

        if self._rests and not self._scopes:
            self._rest()

    @abstractmethod
    def keep(self, scope: Any) -> None:
        """Keep a scope that was left, if it can be entered again: to make one costs as much as to use it."""

    @abstractmethod
    def _wind(self, at: float) -> None:
        """Ring at a time, and at no other."""

    @abstractmethod
    def _rest(self) -> None:
        """Stop the timer."""

    def _ring(self, now: float) -> None:
        self._rings_at = math.inf
        while self._scopes:
            scope, deadline = next(iter(self._scopes.items()))
            if deadline > now:
                self._wind(deadline)
                return

            del self._scopes[scope]
            if scope._deadline <= now:
                scope.cancel("deadline exceeded")
            else:
                self.set(scope, scope._deadline)


class LoopDeadlineQueue(DeadlineQueue):
    """
    One whose timer is asyncio's.

    :param rests: whether the timer is stopped once it has nothing to watch, and not left to run out
    """

    __slots__ = ("_handle", "_loop", "keeps")

    @staticmethod
    def inner(scope: Any) -> Any:
        return scope

    def __init__(self, loop: asyncio.AbstractEventLoop, rests: bool) -> None:
        super().__init__(rests)
        self._loop = loop
        self.keeps = True
        """Whether scopes can be entered again."""
        self._handle: asyncio.TimerHandle | None = None

    def keep(self, scope: Any) -> None:
        # Others may still look at a scope that was cancelled; and a scope within that was never left would be
        # cancelled with whatever comes next.
        if self.keeps and not (scope._cancel_called or scope._child_scopes or scope._tasks):
            # What else is left of the last time does not differ from a new scope's.
            scope._parent_scope = None
            scope._deadline = math.inf
            self.spare.append(scope)

    def _wind(self, at: float) -> None:
        if self._handle is not None:
            self._handle.cancel()

        self._rings_at = at
        # In no context of anybody's, which it would keep alive.
        self._handle = self._loop.call_at(at, self._fire, context=Context())

    def _rest(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
            self._rings_at = math.inf

    def _fire(self) -> None:
        self._handle = None
        self._ring(self._loop.time())


class TaskDeadlineQueue(DeadlineQueue):
    """One whose timer is a task, on trio."""

    __slots__ = ("_sleep", "_stopped")

    @staticmethod
    def inner(scope: Any) -> Any:
        # What AnyIO's scope wraps.
        return scope._CancelScope__original

    def __init__(self) -> None:
        super().__init__(rests=True)
        self._sleep = anyio.CancelScope()
        self._stopped = False

    def keep(self, scope: Any) -> None:
        """Trio's can be entered once."""

    async def watch(self) -> None:
        """Be the timer, until :meth:`stop`."""
        while not self._stopped:
            with anyio.CancelScope(deadline=self._rings_at) as self._sleep:
                await anyio.sleep_forever()

            self._ring(anyio.current_time())

    def stop(self) -> None:
        """Let :meth:`watch` end."""
        self._stopped = True
        self._sleep.cancel()

    def _wind(self, at: float) -> None:
        self._rings_at = self._sleep.deadline = at

    def _rest(self) -> None:
        self._wind(math.inf)


def make_deadline_queue(backend: Any) -> LoopDeadlineQueue | None:
    """
    Return what times all scopes of the current event loop out, on asyncio.

    :param backend: AnyIO's
    """
    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
        return None

    loop = asyncio.get_running_loop()
    # On a clock that jumps to the next timer, one that means nothing would mislead it.
    rests = type(loop).time is not asyncio.BaseEventLoop.time
    alarm = LoopDeadlineQueue(loop, rests)
    alarm.keeps = _can_reuse(backend, alarm)
    return alarm if _can_set(backend, LoopDeadlineQueue.inner) else None


def make_task_deadline_queue(backend: Any) -> TaskDeadlineQueue | None:
    """
    Return what times scopes out on trio, while somebody runs :meth:`TaskDeadlineQueue.watch`.

    :param backend: AnyIO's
    """
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        return None

    return TaskDeadlineQueue() if _can_set(backend, TaskDeadlineQueue.inner) else None


def _can_set(backend: Any, inner: Callable[[Any], Any]) -> bool:
    # The deadline is set in passing, past what sets a timer; nobody promises that this can be done.
    deadline = anyio.current_time() + 1000
    try:
        with backend.create_cancel_scope() as scope:
            inner(scope)._deadline = deadline
            return bool(scope.deadline == deadline)
    except Exception:
        return False


def _can_reuse(backend: Any, alarm: LoopDeadlineQueue) -> bool:
    try:
        scope = backend.create_cancel_scope()
        new = _state(scope)
        for _ in range(2):
            with scope:
                scope._deadline = anyio.current_time() + 1000

            alarm.keep(scope)
            if _state(alarm.spare.pop()) != new:
                return False

        return True
    except Exception:
        return False


def _state(scope: Any) -> str:
    return repr(scope.__getstate__())


def make_is_cancelled(backend: Any) -> Callable[[Any], bool]:
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

        def look(scope: Any) -> bool:
            return bool(scope._CancelScope__original._cancel_status._parent.effectively_cancelled)

    try:
        cancelled = ask(None)
        with backend.create_cancel_scope() as scope:
            return look if look(scope) is cancelled else ask
    except Exception:
        return ask


def make_is_left_open(backend: Any) -> Callable[[Any], bool]:
    """
    Return a function that tells whether a scope which an agent was called in has another one left in it.

    Without a look at AnyIO's and trio's own scopes this shows only when the scope cannot be left.

    :param backend: AnyIO's
    """

    def look(scope: Any) -> bool:
        return bool(scope._child_scopes)

    if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:

        def look(scope: Any) -> bool:
            return bool(scope._CancelScope__original._cancel_status._children)

    try:
        with backend.create_cancel_scope() as scope:
            before = look(scope)
            with backend.create_cancel_scope():
                within = look(scope)

            return look if (before, within, look(scope)) == (False, True, False) else _see_nothing
    except Exception:
        return _see_nothing


def _see_nothing(scope: Any) -> bool:
    del scope
    return False


def is_error(exc: BaseException) -> bool:
    """
    Tell whether a plain function of a user's has failed with an exception, rather than been interrupted.

    A cancellation that it raises is an error of its own, since nothing can be cancelled where nothing waits.
    """
    # Trio's, if it has been imported.
    cancelled = getattr(sys.modules.get("trio"), "Cancelled", asyncio.CancelledError)
    kinds = (Exception, asyncio.CancelledError, cancelled)
    # Only the type is asked: `__class__` may be a property that raises.
    if issubclass(type(exc), BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", exc).split(kinds)[1] is None

    return issubclass(type(exc), kinds)

"""
The time-outs of attempts.

**A scope for each task, not for each attempt.** An :class:`AttemptScope` is the cancel scope around the
attempts of one task. Leaving a scope, entering another one and setting its timer takes longer than all other
work of a short attempt. So the scope stays open from one attempt to the next, and only its deadline moves, as
long as the task awaits nothing else in between. Before the task awaits anything else, it calls ``leave()``.
Otherwise the deadline of an attempt that has ended could cancel that wait.

**A timer for each event loop, not for each scope.** Setting a timer and cancelling it costs as much again,
and attempts with equal time-outs are due in the order in which they began. So a :class:`DeadlineQueue` keeps
the scopes in that order, and sets its timer for the first. When the timer fires, the queue cancels the scope
if its time is up. If the deadline has moved meanwhile, as most have, the queue checks the scope again at the
new deadline. A scope whose deadline comes before that of others in the queue has a timer of its own until it
is left.

**The timer itself** is ``loop.call_at`` on asyncio, one for all. Trio has none outside of its scopes, so a
task of each batch is the timer (``watch()``), and invocations without a batch have timers of their own.

**Private attributes of AnyIO and trio** are used in ``insides`` alone: to set a deadline without a timer, and
to see whether a scope around ours was cancelled, or one within it was left open. Each event loop tries them
out once. If they do not work, ``public`` does the same with public names only: a new scope with a timer of
its own for each attempt, left as soon as the attempt ends. It is four times as slow.
"""

from __future__ import annotations

__all__ = ["AsyncioQueue", "AttemptScope", "DeadlineQueue", "TimeLimit", "TrioQueue"]

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextvars import Context
from typing import Any, NamedTuple

import anyio

from .._errors import InvocationTimeout


class TimeLimit(NamedTuple):
    """The time limit that a deadline enforces."""

    kind: type[InvocationTimeout]
    seconds: float
    is_total: bool = False
    """Whether it is the limit of all attempts together."""

    def error(self) -> InvocationTimeout:
        """Return the error for when the time is up."""
        return self.kind(self.seconds, True) if self.is_total else self.kind(self.seconds)


class AttemptScope(ABC):
    """
    The cancel scope around the attempts of one task.

    :param now: returns the time of the event loop
    :param new_scope: makes a scope; AnyIO's own function looks up the backend each time
    :param queue: cancels the scope in time; without one the scope has a timer of its own
    """

    __slots__ = (
        "_inner",
        "_look_at",
        "_new_scope",
        "_queue",
        "cause",
        "children",
        "closing",
        "is_spoilt",
        "left_open",
        "limit",
        "now",
        "reason",
        "scope",
        "until",
    )

    def __init__(
        self,
        now: Callable[[], float],
        new_scope: Callable[..., anyio.CancelScope],
        queue: DeadlineQueue | None,
    ) -> None:
        self.now: Callable[[], float] = now
        """Returns the time of the event loop."""
        self._new_scope = new_scope
        self._queue = queue
        self.scope: anyio.CancelScope | None = None
        """The scope, while it is open."""
        # The inner scope that has the deadline, and when the queue checks it; NaN with its own timer.
        self._inner: Any = None
        self._look_at = math.inf
        self.until: float = math.inf
        """An attempt that ends at this time or later leaves the scope at once."""
        self.children: Collection[object] = ()
        """The scopes that are open within it. If any are left after an attempt, the scope cannot be left."""
        self.closing: anyio.CancelScope | None = None
        """The scope within it that is shielded while a stream's agent is closed, if it has a stream."""
        self.limit: TimeLimit | None = None
        """The limit that the deadline enforces; ``None`` for the time-out of each attempt."""
        self.reason: str | None = None
        """The reason that was given to :meth:`cancel`, if it was called."""
        self.cause: Exception | None = None
        """The error that the agent made of a cancellation."""
        self.left_open: bool = False
        """Whether a stream's agent left a scope open in a scope of ours within this one."""
        self.is_spoilt: bool = False
        """Whether the scope had to be given up."""

    @abstractmethod
    def begin(self, deadline: float) -> bool:
        """
        Begin an attempt, or move its deadline.

        :return: whether the attempt may start; it may not if a scope around this one is cancelled
        """

    def due(self, now: float) -> None:
        """Cancel the attempt if its time is up. The queue calls this."""
        raise NotImplementedError

    def cancel(self, reason: str) -> None:
        """Cancel the running attempt, if there is one."""
        if self.scope is not None:
            self.reason = reason
            self.scope.cancel(reason)

    def end_by(self, at: float, reason: str) -> None:
        """Cancel the running attempt, if there is one, at a time, unless its own time is up before."""
        if self.scope is not None and at < self.scope.deadline:
            self.reason = reason
            self.scope.deadline = at

    def note(self, cause: Exception | None, left_open: bool = False) -> None:
        """Note the agent's error after a cancellation, or that the agent left a scope open."""
        self.cause = cause
        self.left_open = self.left_open or left_open

    def set_limit(self, limit: TimeLimit | None) -> None:
        """Note the limit that the deadline enforces."""
        self.limit = limit

    def move(self, deadline: float, limit: TimeLimit | None) -> None:
        """
        Move the deadline of the running attempt, from within it. The scope is left when the attempt ends.

        :param limit: the limit that the new deadline enforces
        """
        scope = self.scope
        if scope is not None and not scope.cancel_called:
            scope.deadline = deadline
            self.limit = limit
            self.until = -math.inf

    def leave(self, exc: BaseException | None = None) -> bool:
        """
        Leave the scope, if it is open. The task must call this before it awaits anything else.

        :param exc: the exception of the attempt
        :return: whether it was the cancellation of this scope
        """
        scope = self.scope
        if scope is None:
            return False

        self.scope = self._inner = None
        self.children = ()
        if self._queue is not None:
            self.forget()

        # Neither backend needs the traceback, and a user's exception may raise when it is read.
        caught = scope.__exit__(None if exc is None else type(exc), exc, None)
        return exc is not None and bool(caught)

    def forget(self) -> None:
        """Let the queue drop the scope, if it may have kept it after :meth:`leave`."""
        self._look_at = math.inf
        if self._queue is not None:
            self._queue.forget(self)

    def abandon(self, cancel: bool) -> None:
        """
        Abandon the scope, which cannot be left while a scope of the agent is open within it.

        :param cancel: whether to cancel it, for the tasks in a task group that the agent left open; not in a
            caller's task, which has to go on
        """
        scope, self.scope = self.scope, None
        assert scope is not None
        self.is_spoilt = True
        self.forget()
        if cancel:
            scope.cancel("a scope was left open in it")
            return

        # On trio this raises, but makes the outer scope the task's current one again.
        try:
            scope.__exit__(None, None, None)
        except RuntimeError:
            pass


class DeadlineQueue(ABC):
    """
    Cancels scopes whose time is up, with one timer for all of them.

    :param stops_timer: whether to stop the timer of an empty queue, rather than let it fire. A virtual clock
        jumps to the next timer, so a stale timer would advance time
    """

    __slots__ = ("_latest", "_timer_at", "scopes", "stops_timer")

    def __init__(self, stops_timer: bool) -> None:
        self.scopes: dict[AttemptScope, float] = {}
        """When to check each scope: no later than its deadline, and in the order of these times."""
        self._latest = -math.inf
        self._timer_at = math.inf
        self.stops_timer: bool = stops_timer
        """Whether to stop the timer of an empty queue."""

    def watch(self, scope: AttemptScope, at: float) -> bool:
        """
        Call a scope's :meth:`AttemptScope.due` at a time.

        :return: whether the queue will; it will not if the time is before that of a scope in the queue
        """
        scopes = self.scopes
        scopes.pop(scope, None)
        if at == math.inf:
            return True

        if scopes and at < self._latest and self._latest_in_use() > at:
            return False

        scopes[scope] = self._latest = at
        if at < self._timer_at:
            self._set_timer(at)

        return True

    def _latest_in_use(self) -> float:
        """Return the last time at which to check a scope, without the last ones that were left."""
        while self.scopes:
            scope = next(reversed(self.scopes))
            if scope.scope is not None:
                return self.scopes[scope]

            scope.forget()

        return -math.inf

    def forget(self, scope: AttemptScope) -> None:
        """Remove a scope, if it is in the queue."""
        self.scopes.pop(scope, None)
        if self.stops_timer and not self.scopes:
            self._stop_timer()

    def check_due(self, now: float) -> None:
        """Check the scopes whose time may be up."""
        self._timer_at = math.inf
        while self.scopes:
            scope, at = next(iter(self.scopes.items()))
            if at > now:
                self._set_timer(at)
                return

            del self.scopes[scope]
            scope.due(now)

    @abstractmethod
    def _set_timer(self, at: float) -> None:
        """Set the timer to a time, in place of its last one."""

    @abstractmethod
    def _stop_timer(self) -> None:
        """Stop the timer."""


class AsyncioQueue(DeadlineQueue):
    """The queue of all attempts of an event loop, with a timer of asyncio's."""

    __slots__ = ("_handle", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(stops_timer=type(self._loop).time is not asyncio.BaseEventLoop.time)
        self._handle: asyncio.TimerHandle | None = None

    def _set_timer(self, at: float) -> None:
        if self._handle is not None:
            self._handle.cancel()

        self._timer_at = at
        # In an empty context: the timer would keep another one alive.
        self._handle = self._loop.call_at(at, self._fire, context=Context())

    def _stop_timer(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
            self._timer_at = math.inf

    def _fire(self) -> None:
        self._handle = None
        self.check_due(self._loop.time())


class TrioQueue(DeadlineQueue):
    """The queue of the attempts of a batch, with a task of the batch as its timer."""

    __slots__ = ("_sleep", "_stopped")

    def __init__(self) -> None:
        super().__init__(stops_timer=True)
        self._sleep = anyio.CancelScope()
        self._stopped = False

    async def watch_scopes(self) -> None:
        """Run the timer, until :meth:`stop`."""
        while not self._stopped:
            with anyio.CancelScope(deadline=self._timer_at) as self._sleep:
                await anyio.sleep_forever()

            self.check_due(anyio.current_time())

    def stop(self) -> None:
        """End :meth:`watch_scopes`."""
        self._stopped = True
        self._sleep.cancel()

    def _set_timer(self, at: float) -> None:
        self._timer_at = self._sleep.deadline = at

    def _stop_timer(self) -> None:
        self._set_timer(math.inf)

"""
The time-outs of attempts.

**A scope for each task, not for each attempt.** An :class:`AttemptScope` is the cancel scope around the
attempts of one task. To leave a scope, enter another one and set its timer takes longer than all else about a
short attempt. So the scope stays open from one attempt to the next, and only its deadline moves, as long as
the task awaits nothing else in between. Before the task awaits anything else, it calls ``leave()``: else the
deadline of an attempt that has ended could cancel that.

**A timer for each event loop, not for each scope.** To set a timer and to cancel it again costs as much, and
attempts with one time-out end in the order in which they began. So a :class:`DeadlineQueue` keeps the scopes
in that order and watches the first. When it rings, it cancels the scope if its time is up. If the deadline
has moved meanwhile, which most have, it looks at that scope again then. A scope whose deadline comes before
that of others in the queue has a timer of its own until it is left.

**The timer itself** is ``loop.call_at`` on asyncio, one for all. Trio has none outside of its scopes, so a
task of each batch is the timer (``watch()``), and invocations without a batch have timers of their own.

**What neither AnyIO nor trio promises** is in ``insides``: that a deadline can be set without setting a
timer, and that a scope shows whether one around it was cancelled, or one within it was left open. That is
tried out once per event loop. Where it does not hold, ``public`` does the same with public names only: a new
scope with a timer of its own for each attempt, left as soon as that ends. It is four times as slow.
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
    """What a deadline is for."""

    kind: type[InvocationTimeout]
    seconds: float
    is_total: bool = False
    """Whether it is that of all attempts together."""

    def error(self) -> InvocationTimeout:
        """Return what to say when the time is up."""
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
        self.now = now
        """Returns the time of the event loop."""
        self._new_scope = new_scope
        self._queue = queue
        self.scope: anyio.CancelScope | None = None
        """The scope, while it is open."""
        # The one within it that has the deadline, and when the queue looks at that; not a number for one with
        # a timer of its own.
        self._inner: Any = None
        self._look_at = math.inf
        self.until = math.inf
        """An attempt that ends at this time or later leaves the scope at once."""
        self.children: Collection[object] = ()
        """What is open within it: after an attempt, what it has left open. The scope cannot be left then."""
        self.limit: TimeLimit | None = None
        """What the deadline is for; ``None`` for the time-out of each attempt."""
        self.reason: str | None = None
        """Why the attempt was cancelled by :meth:`cancel`, if it was."""
        self.cause: Exception | None = None
        """The error that the agent made of a cancellation."""
        self.left_open = False
        """Whether a stream has left a scope open within a scope of ours within this one."""
        self.is_spoilt = False
        """Whether the scope had to be given up."""

    @abstractmethod
    def begin(self, deadline: float) -> bool:
        """
        Begin an attempt, or move its deadline.

        :return: whether it may start: not if a scope around this one is cancelled
        """

    def due(self, now: float) -> None:
        """Cancel the attempt if its time is up. Called by the queue."""
        raise NotImplementedError

    def cancel(self, reason: str) -> None:
        """Cancel the attempt that runs, if one does."""
        if self.scope is not None:
            self.reason = reason
            self.scope.cancel(reason)

    def end_by(self, at: float, reason: str) -> None:
        """Cancel the attempt that runs, if one does, at a time, unless its own time is up before."""
        if self.scope is not None and at < self.scope.deadline:
            self.reason = reason
            self.scope.deadline = at

    def note(self, cause: Exception | None, left_open: bool = False) -> None:
        """Note what the agent has made of a cancellation, or that it has left a scope open."""
        self.cause = cause
        self.left_open = self.left_open or left_open

    def set_limit(self, limit: TimeLimit | None) -> None:
        """Say what the deadline is for."""
        self.limit = limit

    def move(self, deadline: float, limit: TimeLimit | None) -> None:
        """
        Move the deadline of the attempt that runs, from within it. The scope is left when the attempt ends.

        :param limit: what the deadline is for now
        """
        scope = self.scope
        if scope is not None and not scope.cancel_called:
            scope.deadline = deadline
            self.limit = limit
            self.until = -math.inf

    def leave(self, exc: BaseException | None = None) -> bool:
        """
        Leave the scope, if it is open. This has to be called before anything else is awaited.

        :param exc: what the attempt raised
        :return: whether it was the cancellation of this scope
        """
        scope = self.scope
        if scope is None:
            return False

        self.scope = self._inner = None
        self.children = ()
        if self._queue is not None:
            self._queue.forget(self)

        # Neither backend needs the traceback, and an exception of a user's may raise when asked for it.
        caught = scope.__exit__(None if exc is None else type(exc), exc, None)
        return exc is not None and bool(caught)

    def abandon(self, cancel: bool) -> None:
        """
        Give the scope up, which cannot be left while one that the agent entered is open within it.

        :param cancel: whether to cancel it, for the tasks in a task group that the agent left open; in a
            caller's task, which has to go on, this may not be
        """
        scope, self.scope = self.scope, None
        assert scope is not None
        self.is_spoilt = True
        if self._queue is not None:
            self._queue.forget(self)

        if cancel:
            scope.cancel("a scope was left open in it")
            return

        # On trio this raises, but makes the scope around it the task's own again.
        try:
            scope.__exit__(None, None, None)
        except RuntimeError:
            pass


class DeadlineQueue(ABC):
    """
    Cancels scopes when their time is up, with one timer for all of them.

    :param rests: whether the timer is stopped while there is nothing to watch, and not left to run out. A
        virtual clock jumps to the next timer, so a stale timer would advance time
    """

    __slots__ = ("_latest", "_rings_at", "rests", "scopes")

    def __init__(self, rests: bool) -> None:
        self.scopes: dict[AttemptScope, float] = {}
        """When to look at each: no later than its deadline, and in the order of these times."""
        self._latest = -math.inf
        self._rings_at = math.inf
        self.rests = rests
        """Whether the timer is stopped while there is nothing to watch."""

    def watch(self, scope: AttemptScope, at: float) -> bool:
        """
        Call a scope's :meth:`AttemptScope.due` at a time.

        :return: whether that can be done; not if it is earlier than what is watched already
        """
        scopes = self.scopes
        scopes.pop(scope, None)
        if at == math.inf:
            return True

        if scopes and at < self._latest:
            return False

        scopes[scope] = self._latest = at
        if at < self._rings_at:
            self._wind(at)

        return True

    def forget(self, scope: AttemptScope) -> None:
        """Forget a scope that is left."""
        self.scopes.pop(scope, None)
        if self.rests and not self.scopes:
            self._rest()

    def ring(self, now: float) -> None:
        """Look at the scopes whose time may be up."""
        self._rings_at = math.inf
        while self.scopes:
            scope, at = next(iter(self.scopes.items()))
            if at > now:
                self._wind(at)
                return

            del self.scopes[scope]
            scope.due(now)

    @abstractmethod
    def _wind(self, at: float) -> None:
        """Ring at a time, and at no other."""

    @abstractmethod
    def _rest(self) -> None:
        """Stop the timer."""


class AsyncioQueue(DeadlineQueue):
    """One for all attempts of an event loop, whose timer is asyncio's."""

    __slots__ = ("_handle", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(rests=type(self._loop).time is not asyncio.BaseEventLoop.time)
        self._handle: asyncio.TimerHandle | None = None

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
        self.ring(self._loop.time())


class TrioQueue(DeadlineQueue):
    """One for the attempts of a batch, one of whose tasks is the timer."""

    __slots__ = ("_sleep", "_stopped")

    def __init__(self) -> None:
        super().__init__(rests=True)
        self._sleep = anyio.CancelScope()
        self._stopped = False

    async def watch_scopes(self) -> None:
        """Be the timer, until :meth:`stop`."""
        while not self._stopped:
            with anyio.CancelScope(deadline=self._rings_at) as self._sleep:
                await anyio.sleep_forever()

            self.ring(anyio.current_time())

    def stop(self) -> None:
        """Let :meth:`watch_scopes` end."""
        self._stopped = True
        self._sleep.cancel()

    def _wind(self, at: float) -> None:
        self._rings_at = self._sleep.deadline = at

    def _rest(self) -> None:
        self._wind(math.inf)

"""
The attempt scopes that use private attributes of AnyIO and trio, each tried out before it is used.

These attributes may change in any release. ``deadlines`` has the theory; ``public`` works without them.
"""

from __future__ import annotations

__all__ = ["AsyncioScope", "TrioScope", "works_here"]

import math
from collections.abc import Callable
from typing import Any

import anyio

from .deadlines import AttemptScope, DeadlineQueue


class _InsideScope(AttemptScope):
    """A scope whose deadline can be set without setting a timer."""

    __slots__ = ()

    def due(self, now: float) -> None:
        # The queue has dropped it, and AsyncioScope.leave() does not reset this.
        self._look_at = math.inf
        if self._inner is None:
            return

        if self._inner._deadline > now:
            self._watch(self._inner._deadline)
        else:
            assert self.scope is not None
            self.scope.cancel("deadline exceeded")

    def _watch(self, deadline: float) -> None:
        # A timer of its own must be moved once it is set: trio's would cancel the scope at the old time.
        if self._queue is not None and not math.isnan(self._look_at) and self._queue.watch(self, deadline):
            self._inner._deadline = self._look_at = deadline
        else:
            assert self.scope is not None
            self.scope.deadline = deadline
            self._look_at = math.nan


class AsyncioScope(_InsideScope):
    """
    Asyncio's twin: AnyIO's own scopes.

    There is always a queue, that of the event loop. A scope that was left stays in it, since the next attempt
    is due later: taking it out and putting it in again takes as long as a fifth of :meth:`begin` and
    :meth:`leave`.

    An AnyIO scope that was left is entered again, unless it was cancelled, or has tasks or scopes in it.
    Making a scope takes as long as using one.
    """

    __slots__ = ("_left",)

    def __init__(
        self,
        now: Callable[[], float],
        new_scope: Callable[..., anyio.CancelScope],
        queue: DeadlineQueue | None,
    ) -> None:
        super().__init__(now, new_scope, queue)
        # The scope that can be entered again.
        self._left: Any = None

    def begin(self, deadline: float) -> bool:
        inner: Any = self._inner
        self.until = deadline
        if inner is None:
            inner = self._left or self._new_scope()
            self.scope = self._inner = inner
            self._left = None
            inner.__enter__()
            self.children = inner._child_scopes
            self.limit = self.reason = self.cause = None

        if self._look_at <= deadline:
            # The queue reads the new deadline at its next check.
            inner._deadline = deadline
        else:
            self._watch(deadline)

        around: Any = inner._parent_scope
        while around is not None:
            if around._cancel_called:
                return False

            if around._shield:
                break

            around = around._parent_scope

        return True

    def leave(self, exc: BaseException | None = None) -> bool:
        inner: Any = self._inner
        if exc is not None or self.scope is None:
            return super().leave(exc)

        self.scope = self._inner = None
        self.children = ()
        # The queue may keep the scope for the next attempt, and drops it if there is none at its next check.
        queue: Any = self._queue
        if queue.stops_timer or self._look_at != self._look_at:  # NaN
            self.forget()

        inner.__exit__(None, None, None)
        if not (inner._cancel_called or inner._child_scopes or inner._tasks):
            # All other attributes are equal to those of a new scope.
            inner._parent_scope = inner._host_task = None
            inner._deadline = math.inf
            self._left = inner

        return False


class TrioScope(_InsideScope):
    """Trio's twin: the scopes that AnyIO's wrap."""

    __slots__ = ()

    def begin(self, deadline: float) -> bool:
        inner: Any = self._inner
        self.until = deadline
        if inner is None:
            # Without a queue, a deadline from the start saves setting the timer a second time.
            own = self._queue is None
            scope: Any = self._new_scope(deadline=deadline if own else math.inf)
            self.scope = scope
            scope.__enter__()
            inner = self._inner = scope._CancelScope__original
            self.children = inner._cancel_status._children
            self.limit = self.reason = self.cause = None
            self._look_at = math.nan if own else math.inf
            if not own:
                self._watch(deadline)
        elif self._look_at <= deadline:
            inner._deadline = deadline
        else:
            self._watch(deadline)

        return not inner._cancel_status._parent.effectively_cancelled


class _Untimed(DeadlineQueue):
    """A queue that lets every deadline be set without a timer."""

    __slots__ = ()

    def _set_timer(self, at: float) -> None:
        pass

    def _stop_timer(self) -> None:
        pass


def works_here(kind: type[AttemptScope], new_scope: Callable[..., anyio.CancelScope]) -> bool:
    """Return whether a kind of attempt scope works with this AnyIO and trio, in the current task."""
    far = anyio.current_time() + 1000
    seen: list[bool] = []
    try:
        attempt = kind(anyio.current_time, new_scope, _Untimed(stops_timer=True))
        with new_scope(shield=True) as around:
            seen += [attempt.begin(far), attempt.begin(far + 1), bool(attempt.children)]
            scope: Any = attempt.scope
            seen.append(scope.deadline == far + 1)
            with new_scope():
                seen.append(bool(attempt.children))

            seen.append(bool(attempt.children))
            # An AnyIO scope may be entered again.
            attempt.leave()
            seen += [attempt.begin(far), bool(attempt.children)]
            scope = attempt.scope
            seen.append(scope.deadline == far)
            around.cancel()
            seen.append(attempt.begin(far))
            attempt.leave()
    except Exception:
        return False

    return seen == [True, True, False, True, True, False, True, False, True, False]

"""What times attempts out."""

from __future__ import annotations

__all__ = ["AttemptScope"]

import anyio

from .._eventloop.backend import DeadlineQueue
from .._limits.slots import SlotPool


class AttemptScope:
    """
    The cancel scope around the attempts of one task.

    It stays open from one attempt to the next, where nothing is awaited in between: to leave a scope, enter
    another one and set its timer takes longer than all else about a short attempt.

    :param pool: the state of the event loop that the task runs in
    :param alarm: what cancels the scope; if absent, it does so itself
    """

    __slots__ = ("_alarm", "_backend", "_inner", "is_spoilt", "scope")

    def __init__(self, pool: SlotPool, alarm: DeadlineQueue | None) -> None:
        # Scopes are made without looking up what backend this is, as AnyIO's own function does.
        self._backend = pool.loop.backend
        self._alarm = alarm
        self.scope: anyio.CancelScope | None = None
        """The scope, while it is open."""
        self.is_spoilt = False
        """Whether the scope had to be given up."""

    def open(self, deadline: float) -> anyio.CancelScope:
        """
        Begin an attempt.

        :param deadline: when it has to be over
        :return: the scope, which has not been cancelled
        """
        scope, alarm = self.scope, self._alarm
        if alarm is None:
            if scope is None:
                scope = self.scope = self._backend.create_cancel_scope(deadline=deadline)
                scope.__enter__()
            else:
                scope.deadline = deadline

            return scope

        if scope is None:
            scope = self.scope = alarm.spare.pop() if alarm.spare else self._backend.create_cancel_scope()
            scope.__enter__()
            self._inner = alarm.inner(scope)

        alarm.set(self._inner, deadline)
        return scope

    def abandon(self, cancel: bool) -> None:
        """
        Give the scope up, which cannot be left while one that the agent entered is open within it.

        :param cancel: whether to cancel it, for the tasks in a task group that the agent left open; in a
            caller's task, which has to go on, this may not be
        """
        scope, self.scope = self.scope, None
        assert scope is not None
        self.is_spoilt = True
        if self._alarm is not None:
            self._alarm.drop(self._inner)

        if cancel:
            scope.cancel("a scope was left open in it")
            return

        # On trio this raises, but makes the scope around it the task's own again.
        try:
            scope.__exit__(None, None, None)
        except RuntimeError:
            pass

    def close(self, exc: BaseException | None = None) -> bool:
        """
        Leave the scope, if it is open, before anything else is awaited.

        :param exc: what the attempt raised
        :return: whether it was our own cancellation
        """
        scope = self.scope
        if scope is None:
            return False

        self.scope = None
        alarm = self._alarm
        if alarm is not None:
            alarm.drop(self._inner)

        if exc is not None:
            # Neither backend needs the traceback, and an exception of a user's may raise when asked for it.
            return bool(scope.__exit__(type(exc), exc, None))

        scope.__exit__(None, None, None)
        if alarm is not None:
            alarm.keep(scope)

        return False

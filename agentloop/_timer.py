"""What times attempts out."""

from __future__ import annotations

__all__ = ["Timer"]

import math
from collections.abc import Callable
from typing import Any, cast

import anyio

from ._backend import can_postpone


class Timer:
    """
    The cancel scope around the attempts of one task.

    It stays open from one attempt to the next, where nothing is awaited in between: to leave a scope, enter
    another one and set its timer takes longer than all else about a short attempt.

    :param backend: AnyIO's, whose scopes are made without looking up what it is
    :param now: reads the clock
    """

    __slots__ = ("_armed_until", "_backend", "_now", "_postpones", "scope")

    def __init__(self, backend: Any, now: Callable[[], float]) -> None:
        self._backend = backend
        self._now = now
        self.scope: anyio.CancelScope | None = None
        """The scope, while it is open."""
        self._armed_until = math.inf
        self._postpones: bool | None = None

    def open(self, deadline: float, now: float) -> anyio.CancelScope:
        """
        Begin an attempt.

        :param deadline: when it has to be over
        :return: the scope, which has not been cancelled
        """
        scope = self.scope
        if scope is None:
            scope = self.scope = cast(
                "anyio.CancelScope", self._backend.create_cancel_scope(deadline=deadline)
            )
            scope.__enter__()
            self._armed_until = deadline
            return scope

        if self._postpones is None:
            self._postpones = can_postpone(self._backend.create_cancel_scope())

        if self._postpones and now < self._armed_until <= deadline:
            private: Any = scope
            private._deadline = deadline
        else:
            scope.deadline = self._armed_until = deadline

        return scope

    def close(self, exc: BaseException | None = None) -> bool:
        """
        Leave the scope, if it is open, before anything else is awaited.

        :param exc: what the attempt raised
        :return: whether it was our own cancellation
        """
        scope, self.scope = self.scope, None
        if scope is None:
            return False

        return bool(scope.__exit__(type(exc) if exc else None, exc, exc.__traceback__ if exc else None))

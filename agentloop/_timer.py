"""What times attempts out."""

from __future__ import annotations

__all__ = ["Timer"]

import math
from typing import Any

import anyio

from ._pool import Pool


class Timer:
    """
    The cancel scope around the attempts of one task.

    It stays open from one attempt to the next, where nothing is awaited in between: to leave a scope, enter
    another one and set its timer takes longer than all else about a short attempt.

    :param pool: the state of the event loop that the task runs in
    """

    __slots__ = ("_armed_until", "_pool", "scope")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.scope: anyio.CancelScope | None = None
        """The scope, while it is open."""
        self._armed_until = math.inf

    def open(self, deadline: float, now: float) -> anyio.CancelScope:
        """
        Begin an attempt.

        :param deadline: when it has to be over
        :return: the scope, which has not been cancelled
        """
        scope: Any = self.scope
        if scope is None:
            # Without looking up what backend this is, as AnyIO's own function does.
            scope = self.scope = self._pool.backend.create_cancel_scope(deadline=deadline)
            scope.__enter__()
            self._armed_until = deadline
        elif self._pool.postpones and now < self._armed_until <= deadline:
            scope._deadline = deadline
        else:
            scope.deadline = self._armed_until = deadline

        opened: anyio.CancelScope = scope
        return opened

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

"""The attempt scope that uses public names only. ``deadlines`` has the theory, ``insides`` the others."""

from __future__ import annotations

__all__ = ["PublicScope"]

import asyncio
import math

import anyio

from .deadlines import AttemptScope


class PublicScope(AttemptScope):
    """
    A scope for each attempt, with public names only.

    A scope that an agent left open shows when this one cannot be left.
    """

    __slots__ = ("_is_cancelled",)

    def begin(self, deadline: float) -> bool:
        self.leave()
        self.until = -math.inf
        if self.scope is not None:
            self.scope.deadline = deadline
            return not self._is_cancelled

        self.limit = self.reason = self.cause = None
        if anyio.current_effective_deadline() == -math.inf:
            return False

        self.scope = self._new_scope(deadline=deadline)
        self.scope.__enter__()
        return True

    def leave(self, exc: BaseException | None = None) -> bool:
        scope = self.scope
        if scope is None or self.children:
            return False

        # A shielded scope that the agent left open hides a cancellation from this check.
        reached = anyio.current_effective_deadline() == -math.inf
        try:
            return super().leave(exc)
        except RuntimeError:
            self.scope = scope
            self.children = (scope,)
            self._is_cancelled = reached and self._is_cancelled_around(scope)
            return False

    @staticmethod
    def _is_cancelled_around(scope: anyio.CancelScope) -> bool:
        """Return whether a scope around one that could not be left is cancelled."""
        if anyio.get_cancelled_exc_class() is not asyncio.CancelledError:
            # On trio the scope is left in spite of the error.
            return anyio.current_effective_deadline() == -math.inf

        # With the shield, only a cancellation of this scope or of one within it shows.
        scope.shield = True
        cancelled_within = anyio.current_effective_deadline() == -math.inf
        scope.shield = False
        return not cancelled_within

"""Tells the attempts that are at work from those that only wait for others."""

from __future__ import annotations

__all__ = ["Work"]

import math
from collections.abc import Iterable
from typing import Protocol

# For how long a stream whose reader takes nothing counts as at work: the reader may wait for it in turn.
READER_SECONDS = 5.0


class Attempt(Protocol):
    """The part of an attempt's slot that this module uses."""

    @property
    def is_released(self) -> bool:
        """Whether the attempt has ended."""
        ...


class Work:
    """
    Tracks which attempts of a pool are at work.

    An attempt is at work unless its agent waits for nested invocations. A chain of loans has one slot, and at
    most one attempt at work.
    """

    def __init__(self) -> None:
        self.loans = 0
        """How many slots are on loan."""
        self.calls: dict[object, Attempt] = {}
        """The calls in progress through the same limiter, each with the attempt whose agent made it."""
        self._others: dict[object, Attempt] = {}
        # Until when each stream that waits for its reader counts as at work.
        self._stalled: dict[Attempt, float] = {}

    def count(self, slots: int, unused_loans: int) -> int:
        """
        Return how many attempts are at work.

        :param slots: how many slots are in use
        :param unused_loans: how many slots are on loan to attempts that have not begun
        """
        return slots + self.loans - unused_loans - len(_unended(self.calls))

    def begin_call(self, call: object, attempt: Attempt, own: bool) -> None:
        """
        Note that the agent of an attempt makes a call.

        :param own: whether the call uses the same limiter
        """
        (self.calls if own else self._others)[call] = attempt

    def end_call(self, call: object) -> None:
        """Note that a call has ended."""
        self.calls.pop(call, None)
        self._others.pop(call, None)

    def calls_of(self, attempt: Attempt) -> list[object]:
        """Return the calls in progress of the agent of an attempt."""
        return [call for calls in (self.calls, self._others) for call, by in calls.items() if by is attempt]

    def begin_stall(self, attempt: Attempt, now: float) -> None:
        """Note that a stream begins to wait for its reader."""
        self._stalled[attempt] = now + READER_SECONDS

    def end_stall(self, attempt: Attempt) -> None:
        """Note that a stream goes on."""
        self._stalled.pop(attempt, None)

    def lasts_until(self, attempts: Iterable[Attempt]) -> float:
        """Return until when one of the attempts is at work, if nothing changes: infinite if one runs."""
        waiting = _unended(self.calls) | _unended(self._others)
        return max(
            (self._stalled.get(attempt, math.inf) for attempt in attempts if attempt not in waiting),
            default=-math.inf,
        )


def _unended(calls: dict[object, Attempt]) -> set[Attempt]:
    return {attempt for attempt in calls.values() if not attempt.is_released}

"""Which of the attempts that hold slots are at work, and which only wait for others."""

from __future__ import annotations

__all__ = ["Guard", "Work"]

from typing import Protocol

import anyio


class Attempt(Protocol):
    """The slot of an attempt, as far as this module knows it."""

    @property
    def is_released(self) -> bool:
        """Whether the attempt has ended."""
        ...


class Work:
    """
    Keeps account of what the attempts of a pool do with their slots.

    An attempt is at work unless its agent waits for invocations that it runs itself. A chain of loans has one
    slot, and at most one attempt that is at work.
    """

    def __init__(self) -> None:
        self.loans = 0
        """How many slots are on loan."""
        self.calls: dict[object, Attempt] = {}
        """The calls in progress, by the attempts whose agents have made them."""

    def count(self, slots: int, unused_loans: int) -> int:
        """
        Return how many attempts are at work.

        :param slots: how many slots are in use
        :param unused_loans: how many are on loan to attempts that have not begun
        """
        waiting = {attempt for attempt in self.calls.values() if not attempt.is_released}
        return slots + self.loans - unused_loans - len(waiting)


class Guard:
    """
    Proves that there are never more slots in use than the limit, by tokens of AnyIO's limiter.

    It keeps each token that it has borrowed for the next attempt: to give one back and borrow another takes
    longer than all else about a slot.

    :param limit: how many slots there are
    """

    __slots__ = ("_tokens", "borrowed")

    def __init__(self, limit: int) -> None:
        self._tokens = anyio.CapacityLimiter(limit)
        self.borrowed = 0

    def resize(self, limit: int) -> None:
        """Change how many slots there are."""
        self._tokens.total_tokens = limit

    def borrow(self) -> None:
        """Borrow one more token, or raise if there is none."""
        # A borrower of its own for each: equal or repeated borrowers collide.
        self._tokens.acquire_on_behalf_of_nowait(object())
        self.borrowed += 1

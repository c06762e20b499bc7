"""A check of the limit itself, apart from the counts of the pool."""

from __future__ import annotations

__all__ = ["Guard"]

import anyio


class Guard:
    """
    Raises if more slots were in use than the limit, by tokens of AnyIO's limiter.

    It keeps each token for later attempts, since to return and to take one is slower than all other work of a
    slot.

    :param limit: how many slots there are
    """

    __slots__ = ("_tokens", "taken")

    def __init__(self, limit: int) -> None:
        self._tokens = anyio.CapacityLimiter(limit)
        self.taken = 0
        """How many tokens it has taken: the largest number of slots that were in use at once."""

    def resize(self, limit: int) -> None:
        """Change how many slots there are."""
        self._tokens.total_tokens = limit

    def take(self) -> None:
        """Take one more token, or raise if there is none."""
        # A new object each time, since AnyIO refuses equal or repeated borrowers.
        self._tokens.acquire_on_behalf_of_nowait(object())
        self.taken += 1

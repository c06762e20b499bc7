"""
The pools of all keys of a ``KeyedLimiter`` in one event loop.

**A place is the right to be at work.** An attempt under a key needs a slot of that key's pool, and a place.
There are as many places as ``max_concurrency`` of the ``KeyedLimiter``. A free place goes to the waiting key
with the fewest attempts running, and within a key to the first in line.

**Places are lent as slots are, but apart from them**: an attempt that runs others, and waits for them, lends
them its place, one at a time, under any key. So nested use never waits for a place for ever. But an
attempt lends its slot only under its own key (``slots`` has the theory), so two agents can come to wait for
each other's key for ever. The last of them gets an error (:meth:`Keys.deadlocked`).
"""

from __future__ import annotations

__all__ = ["Call", "Keys"]

import math
from collections import Counter
from collections.abc import Hashable
from typing import Any, Protocol

from .lines import Waiter
from .slots import HELD, Slot


class Call(Protocol):
    """The part of a call in progress that keys use."""

    def may_go_on(self, keys: Any) -> bool:
        """Return whether the call waits for anything besides slots of these keys."""
        ...


class Keys:
    """
    Tracks the running and waiting attempts of each key.

    :param home: the pool of the keyed limiter itself
    :param limit: how many places there are
    """

    def __init__(self, home: Any, limit: float) -> None:
        self.home = home
        self.limit: float = limit
        self.running = 0
        """How many places are taken."""
        # The borrower of each lender's place, and the lender of each borrower.
        self._lent: dict[Slot, Slot] = {}
        self._lenders: dict[Slot, Slot] = {}
        self.pools: dict[Any, Hashable] = {}
        """The pools, each with its key."""
        self.nested = 0
        """How many nested attempts wait for a slot."""
        self.held: dict[Slot, None] = {}
        """The slots that were granted to nested attempts which have not ended."""

    def join(self, pool: Any, key: Hashable) -> None:
        """Add a pool, with the attempts that already run there."""
        if pool.keys is not self:
            pool.keys = self
            self.pools[pool] = key
            if self.limit < math.inf:
                pool.admission.share()
                self.running += pool.running

    def leave(self, pool: Any) -> None:
        """Remove a pool that is not in use."""
        del self.pools[pool]
        pool.keys = None

    def resize(self, limit: float) -> None:
        """Change how many places there are."""
        self.limit = limit
        self.serve()

    # -- places

    def has_place(self, slot: Slot) -> bool:
        """Return whether a slot can get a place: a free one, or that of the invocation around it."""
        return self.running < self.limit or self._lender(slot) is not None

    def take(self, slot: Slot) -> None:
        """Take a place for a slot: that of the invocation around it if it is not lent, else a free one."""
        if self.limit == math.inf:
            return

        # Among keys with equally many running, the most recently served comes last.
        self.pools[slot.pool] = self.pools.pop(slot.pool)
        lender = self._lender(slot)
        if lender is None:
            self.running += 1
        else:
            self._lend(lender, slot)

    def give_back(self, slot: Slot) -> None:
        """Take back the place of a slot, or leave it to the borrower."""
        if self.limit == math.inf:
            return

        borrower, lender = self._lent.pop(slot, None), self._lenders.pop(slot, None)
        if borrower is not None:
            del self._lenders[borrower]

        if lender is not None:
            del self._lent[lender]

        if borrower is None:
            self.running -= lender is None
        elif lender is not None:
            self._lend(lender, borrower)

    def move(self, granted: Slot, slot: Slot) -> None:
        """Give the place of one slot to another one."""
        lender = self._lenders.pop(granted, None)
        if lender is not None:
            self._lend(lender, slot)

    def _lend(self, lender: Slot, borrower: Slot) -> None:
        self._lent[lender] = borrower
        self._lenders[borrower] = lender

    def serve(self) -> None:
        """Give the free places to waiters, one by one, each to the key with the fewest running."""
        served = True
        while served:
            waiting = sorted((pool for pool in self.pools if pool.lines), key=_running)
            served = any(pool.serve_some(1) for pool in waiting)

    def _lender(self, slot: Slot) -> Slot | None:
        """Return the slot of the innermost invocation around one, if its place is not lent."""
        outer = self._around(slot)
        return outer if outer is not None and outer not in self._lent else None

    def _around(self, slot: Slot) -> Slot | None:
        outer = slot.outer
        while outer is not None and (outer.hold is not HELD or outer.pool.keys is not self):
            outer = outer.outer

        return outer

    # -- deadlocks

    def deadlocked(self) -> tuple[Waiter, Hashable, Hashable] | None:
        """
        Return an attempt that waits for a slot which never becomes free, if there is one, the keys of the
        agent that runs it and of the slot.

        A slot never becomes free if its agent waits only for attempts that are in line for such slots. Where
        this cannot be known, as for a call through another limiter, the call counts as going on. Attempts
        that come back are not refused.
        """
        waiters = {
            waiter: outer
            for pool in self.pools
            for waiter in pool.lines.nested
            if (outer := self._around(waiter.slot)) is not None
        }
        if not any(outer.pool is not waiter.slot.pool for waiter, outer in waiters.items()):
            return None

        stuck = self._stuck(waiters)
        returning = {waiter for pool in self.pools for waiter in pool.lines.returning}
        hopeless = {
            waiter: outer
            for waiter, outer in self._hopeless(waiters, stuck).items()
            if outer in stuck and waiter not in returning
        }
        for waiter, outer in (_circle(hopeless) or hopeless).items():
            return waiter, self.pools[outer.pool], self.pools[waiter.slot.pool]

        return None

    def _stuck(self, waiters: dict[Waiter, Slot]) -> set[Slot]:
        """Return the attempts that never end: all except those that go on, and those that wait for these."""
        calls: dict[Slot, list[Call]] = {}
        for pool in self.pools:
            for call, slot in pool.work.calls.items():
                calls.setdefault(slot, []).append(call)

        running = {slot: self._around(slot) for slot in self.held}
        nested = Counter([*running.values(), *waiters.values()])
        stuck = {
            slot
            for slot in calls
            if slot.hold is HELD
            # A call without a waiter or a running attempt is about to go on.
            and len(calls[slot]) <= nested[slot]
            and not any(call.may_go_on(self) for call in calls[slot])
        }
        before = -1
        while len(stuck) != before:
            before = len(stuck)
            hopeless = self._hopeless(waiters, stuck)
            stuck -= {outer for slot, outer in running.items() if slot not in stuck and outer is not None}
            stuck -= {outer for waiter, outer in waiters.items() if waiter not in hopeless}

        return stuck

    def _hopeless(self, waiters: dict[Waiter, Slot], stuck: set[Slot]) -> dict[Waiter, Slot]:
        """Return the waiters whose slot or place never becomes free, in their order."""
        full = {pool for pool in self.pools if _never_frees(pool, stuck)}
        own_places = sum(slot not in self._lenders for slot in stuck)
        no_place = self.running >= self.limit and own_places >= self.running
        return {
            waiter: outer
            for waiter, outer in waiters.items()
            if (waiter.slot.pool in full and (waiter.lender is None or waiter.lender.lent is not None))
            or (no_place and outer in self._lent)
        }


def _circle(waiters: dict[Waiter, Slot]) -> dict[Waiter, Slot]:
    """Leave out waiters for whose keys no other waits: they are outside of the circle."""
    before = -1
    while len(waiters) != before:
        before = len(waiters)
        awaited = {waiter.slot.pool for waiter in waiters}
        waiters = {waiter: outer for waiter, outer in waiters.items() if outer.pool in awaited}

    return waiters


def _never_frees(pool: Any, stuck: set[Slot]) -> bool:
    """Return whether all slots of a pool are in use, by attempts that never end."""
    if pool.running < pool.limit or pool.admission.paused:
        return False

    own = sum(slot.pool is pool and slot.lender is None for slot in stuck)
    return own >= _running(pool)


def _running(pool: Any) -> int:
    running: int = pool.running
    return running

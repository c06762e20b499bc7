"""
The pools of all keys of a ``KeyedLimiter`` in one event loop.

**A place is the right to be at work.** An attempt under a key needs a slot of that key's pool, and a place,
of which there are as many as all keys together may use. A free place goes to the waiting key with the fewest
attempts running; within a key it is first come, first served.

**Places are lent as slots are**: an attempt that runs others, and waits for them, lends them its place, one
at a time, whatever their key. So nested use never waits for a place in vain. Its slot it lends only under its
own key (``slots`` has the theory), so that two agents can come to wait for each other's key for ever. The one
that is about to do so gets an error (:meth:`Keys.deadlocked`).
"""

from __future__ import annotations

__all__ = ["Call", "Keys"]

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, Protocol

from .lines import Waiter
from .slots import HELD, RELEASED, Slot


class Call(Protocol):
    """A call in progress, as far as keys know it."""

    def may_go_on(self, keys: Any) -> bool:
        """Return whether there is something that it waits for besides slots of these keys."""
        ...


class Keys:
    """
    Knows what runs and waits under each key.

    :param home: the pool of the keyed limiter itself
    :param limit: how many places there are
    """

    def __init__(self, home: Any, limit: float) -> None:
        self.home = home
        self.limit: float = limit
        self.running = 0
        """How many places are taken."""
        self.pools: dict[Any, Hashable] = {}
        """The pools, each with its key."""
        self.nested = 0
        """How many attempts wait for a slot which an invocation runs."""
        self.held: dict[Slot, None] = {}
        """The slots of attempts that have been granted one and have not ended."""

    def join(self, pool: Any, key: Hashable) -> None:
        """Let a pool take part, with what runs there already."""
        if pool.keys is not self:
            pool.keys = self
            pool.admission.share()
            self.pools[pool] = key
            self.running += pool.running

    def leave(self, pool: Any) -> None:
        """Forget a pool that is not in use."""
        del self.pools[pool]
        pool.keys = None

    def resize(self, limit: float) -> None:
        """Change how many places there are."""
        self.limit = limit
        self.serve()

    # -- places

    def has_place(self, slot: Slot) -> bool:
        """Return whether there is a place for a slot: a free one, or that of the invocation around it."""
        return self.running < self.limit or self._lender(slot) is not None

    def take(self, slot: Slot) -> None:
        """Take a place for a slot, a free one if there is one."""
        # Of keys with as many running, the one that was served last comes last.
        self.pools[slot.pool] = self.pools.pop(slot.pool)
        lender = None if self.running < self.limit else self._lender(slot)
        if lender is None:
            self.running += 1
        else:
            lender.lend(slot)

    def give_back(self) -> None:
        """Take back a place that is nobody's any more."""
        self.running -= 1

    def serve(self) -> None:
        """Give the free places to those that wait, one by one, each to the key with the fewest running."""
        served = True
        while served:
            waiting = sorted((pool for pool in self.pools if pool.lines), key=_running)
            served = any(pool.serve_some(1) for pool in waiting)

    def _lender(self, slot: Slot) -> Slot | None:
        """Return the slot of the innermost invocation around one, if its place is not lent."""
        outer = self._around(slot)
        return outer if outer is not None and outer.lent is None else None

    def _around(self, slot: Slot) -> Slot | None:
        outer = slot.outer
        while outer is not None and (outer.hold is not HELD or outer.pool.keys is not self):
            outer = outer.outer

        return outer

    # -- those that wait for each other

    def deadlocked(self) -> Iterator[tuple[Waiter, Hashable, Hashable]]:
        """
        Yield each attempt that waits for a slot which never becomes free, the keys of the agent that runs it
        and of the slot.

        A slot never becomes free if its agent waits for attempts alone that are in line for such slots. What
        cannot be told, such as a call through another limiter, counts as going on.
        """
        waiters = {
            waiter: (outer, pool)
            for pool in self.pools
            for waiter in pool.lines.nested
            if (outer := self._around(waiter.slot)) is not None
        }
        if not any(outer.pool is not pool for outer, pool in waiters.values()):
            return

        stuck = self._stuck(waiters.values())
        for waiter, (outer, pool) in waiters.items():
            if outer in stuck and self._is_full(pool) and stuck.issuperset(self._held(pool)):
                yield waiter, self.pools[outer.pool], self.pools[pool]

    def _stuck(self, waiting: Iterable[tuple[Slot, Any]]) -> set[Slot]:
        """Return the attempts that never end: all, but those that go on, and what depends on these."""
        calls: dict[Slot, list[Call]] = {}
        for pool in self.pools:
            for call, slot in pool.work.calls.items():
                calls.setdefault(slot, []).append(call)

        # The pools in which each attempt has others in line, and how many it has there or running.
        awaited: dict[Slot, list[Any]] = {}
        for outer, pool in waiting:
            awaited.setdefault(outer, []).append(pool)

        running = {slot: self._around(slot) for slot in self.held}
        nested = Counter([*running.values(), *(outer for outer, pools in awaited.items() for _ in pools)])
        stuck = {
            slot
            for slot in self.held
            if slot.hold is HELD
            # Each call has somebody in line, or running; what has neither is about to go on.
            and 0 < len(calls.get(slot, ())) <= nested[slot]
            and not any(call.may_go_on(self) for call in calls[slot])
        }
        before = -1
        while len(stuck) != before:
            before = len(stuck)
            free = {
                pool
                for pool in self.pools
                if not (self._is_full(pool) and stuck.issuperset(self._held(pool)))
            }
            stuck -= {outer for slot, outer in running.items() if slot not in stuck and outer is not None}
            stuck -= {slot for slot in stuck if not free.isdisjoint(awaited.get(slot, ()))}

        return stuck

    def _held(self, pool: Any) -> set[Slot]:
        return {slot for slot in self.held if slot.pool is pool and slot.hold is not RELEASED}

    @staticmethod
    def _is_full(pool: Any) -> bool:
        return pool.running >= pool.limit and not pool.admission.paused


def _running(pool: Any) -> int:
    running: int = pool.running
    return running

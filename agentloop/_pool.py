"""The slots of one event loop: who has one, who waits for one, and who lends to whom."""

from __future__ import annotations

__all__ = ["Pool", "Slot", "Waiter", "current_slot"]

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
from anyio.lowlevel import EventLoopToken

from ._backend import clock
from ._invocation import Invocation
from ._pace import Pace
from ._verdict import Verdict

current_slot: ContextVar[Slot | None] = ContextVar("agentloop.current_slot", default=None)
"""The slot of the invocation that the current code runs in."""


class Slot:
    """
    The right to run one attempt: a token of the limiter, or the slot of an invocation further out.

    An invocation that runs others lends them its own slot, one at a time, as GNU make's jobserver does
    (Paul Smith, "POSIX Jobserver", GNU make manual, section 13.1): only further parallelism needs another
    token, so however deep the nesting, the innermost invocation always has a slot to run in.
    """

    __slots__ = ("lender", "lent", "outer", "pool", "released", "suspended", "token", "waiters")

    def __init__(self, pool: Pool, lender: Slot | None, outer: Slot | None) -> None:
        self.pool = pool
        self.lender = lender
        self.outer = outer
        # The token that was borrowed from anyio's limiter, in the slot that has it to give back.
        self.token: object | None = None
        self.lent: Slot | None = None
        self.released = False
        self.suspended = False
        # Who would take this slot on loan; made when the first one asks.
        self.waiters: OrderedDict[Waiter, None] | None = None

    def release(self, verdict: Verdict | None = None) -> None:
        """
        Give the slot back, or leave it to the one it is lent to, who then gives it back.

        :param verdict: the judgement of the attempt, where it failed
        """
        del verdict  # for the limiter's overload control, which the first form does not have
        self.released = True
        self._pass_on()
        # What is released is skipped from now on, so that a chain of invocations, each of which starts the
        # next one in the background, does not keep all of its past.
        self.outer = self.pool.lender(self.outer, anyones=True)

    def suspend(self) -> None:
        """Give the slot back as in :meth:`release`, but for a while only."""
        self.suspended = True
        self._pass_on()

    def resume(self, granted: Slot) -> None:
        """
        Go on after :meth:`suspend`, as the same slot, since what the invocation runs meanwhile refers to it.

        :param granted: the slot that was acquired for it
        """
        self.suspended = False
        self.lender, granted.lender = granted.lender, None
        self.token, granted.token = granted.token, None
        granted.released = True
        if self.lender is not None:
            self.lender.lent = self

        self.pool.offer_loans_anew()

    def _pass_on(self) -> None:
        waiters, self.waiters = self.waiters, None
        if waiters:
            lender = self.pool.lender(self.outer)
            for waiter in waiters:
                waiter.lender = lender
                self.pool.offer_loan(waiter)

        borrower, self.lent = self.lent, None
        lender, self.lender = self.lender, None
        if borrower is not None:
            # The loan becomes the borrower's own.
            borrower.lender = lender
            if lender is not None:
                lender.lent = borrower
            else:
                borrower.token, self.token = self.token, None
        elif lender is None:
            self.pool.give_back(self)
        else:
            lender.lent = None
            if lender.waiters:
                self.pool.offer_loan(next(iter(lender.waiters)))


class Waiter:
    """A place in the queue for a slot."""

    __slots__ = ("event", "lender", "outer", "slot")

    def __init__(self, lender: Slot | None, outer: Slot | None) -> None:
        self.lender = lender
        self.outer = outer
        self.slot: Slot | None = None
        self.event = anyio.Event()


class Pool:
    """
    The state that a limiter has in one event loop.

    Every change of it is synchronous, so that no cancellation can tear it.
    """

    def __init__(self, token: EventLoopToken, max_concurrency: int) -> None:
        self.token = token
        # Looked up once: anyio's own functions find out at each call which backend they run on.
        self.backend = token.backend_class
        self.now = clock()
        self.thread = threading.current_thread()
        self.pace = Pace(self.now)
        self.asleep = 0
        """How many invocations wait to be retried."""
        self.to_come = 0
        """How many inputs of running batches are there, and were not pulled yet."""
        self.on_raise: set[Callable[[], None]] = set()
        """Called when the limit was raised, so that a batch can start more workers."""
        self._tokens = anyio.CapacityLimiter(max_concurrency)
        # Ordered, and with removal in O(1): a cancelled waiter leaves nothing behind. The limiter's own
        # queue will not do, since a waiter may stand in two queues: this one and its lender's.
        self._queue: OrderedDict[Waiter, None] = OrderedDict()

    @property
    def running(self) -> int:
        return int(self._tokens.borrowed_tokens)

    @property
    def waiting(self) -> int:
        return self.in_line + self.asleep + self.to_come

    @property
    def in_line(self) -> int:
        return len(self._queue)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def in_another_thread(self) -> bool:
        return self.thread is not threading.current_thread()

    def resize(self, max_concurrency: int) -> None:
        raised = max_concurrency > self._tokens.total_tokens
        self._tokens.total_tokens = max_concurrency
        if raised:
            self._grant()
            for callback in tuple(self.on_raise):
                callback()

    def lender(self, slot: Slot | None, anyones: bool = False) -> Slot | None:
        """Return the innermost slot of this pool, from ``slot`` outwards, whose invocation still runs."""
        while slot is not None and (
            slot.released or ((slot.suspended or slot.pool is not self) and not anyones)
        ):
            slot = slot.outer

        return slot

    def acquire_nowait(self, invocation: Invocation[Any], outer: Slot | None) -> Slot | None:
        """
        Return a slot if there is one for which nobody waits.

        :param invocation: what the slot is for
        :param outer: the slot of the invocation that asks, if one does
        """
        del invocation  # for the limiter's rates, which take its cost and which the first form does not have
        lender = self.lender(outer)
        if lender is not None and not lender.lent:
            lender.lent = Slot(self, lender, outer)
            return lender.lent

        return None if self._queue else self._take(outer)

    def enqueue(self, invocation: Invocation[Any], outer: Slot | None) -> Waiter:
        """Stand in line for a slot: the pool's, and the one of the invocation that asks, if one does."""
        del invocation
        waiter = Waiter(self.lender(outer), outer)
        self._queue[waiter] = None
        self.offer_loan(waiter)
        return waiter

    async def wait(self, waiter: Waiter) -> Slot | None:
        """
        Wait for the slot. Cancellation gives up the place in the line, and a slot granted meanwhile.

        :return: the slot; ``None`` if the waiter was withdrawn
        """
        try:
            await waiter.event.wait()
        except BaseException:
            if waiter.slot is None:
                self.withdraw(waiter)
            else:
                waiter.slot.release()

            raise

        return waiter.slot

    def withdraw(self, waiter: Waiter) -> None:
        """Take out of the line one who has not been granted a slot, and wake it."""
        self._queue.pop(waiter, None)
        if waiter.lender is not None and waiter.lender.waiters:
            waiter.lender.waiters.pop(waiter, None)

        waiter.event.set()

    def offer_loan(self, waiter: Waiter) -> None:
        """Lend the waiter its lender's slot, now if it is free, else when it will be."""
        lender = waiter.lender
        if lender is None:
            return

        if not lender.lent:
            lender.lent = Slot(self, lender, waiter.outer)
            self._give(waiter, lender.lent)
            return

        if lender.waiters is None:
            lender.waiters = OrderedDict()

        lender.waiters[waiter] = None

    def offer_loans_anew(self) -> None:
        """Let everybody in line ask the innermost slot around it, once one of these has been resumed."""
        for waiter in tuple(self._queue):
            lender = self.lender(waiter.outer)
            if lender is not waiter.lender:
                if waiter.lender is not None and waiter.lender.waiters:
                    del waiter.lender.waiters[waiter]

                waiter.lender = lender
                self.offer_loan(waiter)

    def give_back(self, slot: Slot) -> None:
        """Take a token back and pass it on."""
        self._tokens.release_on_behalf_of(slot.token)
        if self._queue:
            self._grant()

    def _take(self, outer: Slot | None) -> Slot | None:
        if self._tokens.available_tokens < 1:
            return None

        # A borrower of its own for each attempt: equal or repeated borrowers collide.
        slot = Slot(self, None, outer)
        slot.token = object()
        self._tokens.acquire_on_behalf_of_nowait(slot.token)
        return slot

    def _grant(self) -> None:
        while self._queue:
            waiter = next(iter(self._queue))
            slot = self._take(waiter.outer)
            if slot is None:
                return

            self._give(waiter, slot)

    def _give(self, waiter: Waiter, slot: Slot) -> None:
        waiter.slot = slot
        self.withdraw(waiter)

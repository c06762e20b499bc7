"""The slots of a limiter in one event loop: who gets which, and when. ``slots`` has the theory."""

from __future__ import annotations

__all__ = ["SlotPool"]

import math
from collections.abc import Callable
from typing import Any

import anyio

from .._invocation import Invocation
from .lines import Waiter
from .pool_state import PoolState
from .slots import RELEASED, SUSPENDED, Slot


class SlotPool(PoolState):
    """The state that a limiter has in one event loop: slots, lines, and what else an attempt needs."""

    route: Callable[[Invocation[Any]], SlotPool] | None = None
    """Finds the pool of an invocation, where that is another one."""
    home: SlotPool | None = None
    """The pool whose :attr:`route` leads here, if there is one."""

    # -- slots

    def lender(self, slot: Slot | None, anyones: bool = False) -> Slot | None:
        """Return the innermost slot of this pool, from ``slot`` outwards, whose invocation still runs."""
        while slot is not None and (
            slot.hold is RELEASED or ((slot.hold is SUSPENDED or slot.pool is not self) and not anyones)
        ):
            slot = slot.outer

        return slot

    def encloses(self, slot: Slot | None) -> bool:
        """Return whether an invocation with a slot, or one around it, runs here or where this one leads."""
        while slot is not None and (
            slot.hold is RELEASED or (slot.pool is not self and slot.pool.home is not self)
        ):
            slot = slot.outer

        return slot is not None

    def acquire_nowait(self, slot: Slot, returning: bool = False) -> bool:
        """
        Grant a slot if there is one for which nobody waits, and no time to wait for.

        :param returning: whether the attempt has begun and goes on
        :return: whether it was granted
        """
        if not (slot.is_plain and self.admission.is_open):
            return self._acquire(slot, returning)

        running = self.running
        if running >= self.limit or self.in_line:
            return False

        # The same as _take() does; a call for every invocation shows.
        self.running = running + 1
        if running >= self.guard.borrowed:
            self.guard.borrow()

        return True

    def _acquire(self, slot: Slot, returning: bool) -> bool:
        lender = self.lender(slot.outer)
        if lender is not None and lender.lent is not None:
            lender = None

        self._look_for_break()
        admission = self.admission
        if lender is None and (
            self.running >= self.limit or self.in_line or (admission.paused and not returning)
        ):
            return False

        if admission.gated and not returning:
            now = self.loop.now()
            if self._first() is not None or admission.ready_at(slot.bill, now) > now:
                return False

            admission.reserve(slot, slot.bill, now)
            admission.open_gate(now)

        if lender is None:
            self._take()
        else:
            lender.lend(slot)

        slot.take(admission.epoch)
        if returning and admission.gated:
            # The slot may have been the one for which the first in line waits for the time to come.
            self.serve()

        return True

    def enqueue(self, slot: Slot, returning: bool = False) -> Waiter:
        """Stand in line for a slot: the pool's, and the one of the invocation that asks, if one does."""
        waiter = self.lines.join(slot, returning)
        self.in_line += 1
        self.offer_loan(waiter, self.lender(slot.outer))
        # There may be a slot for it already.
        self.serve()
        return waiter

    async def wait(self, waiter: Waiter) -> bool:
        """
        Wait for the slot. Cancellation gives up the place in line, and a slot granted meanwhile.

        :return: whether it was granted; it was not if the waiter was withdrawn
        """
        try:
            while True:
                with anyio.CancelScope(deadline=waiter.wake_at) as waiter.scope:
                    await waiter.event.wait()

                if not waiter.event.is_set():
                    self.serve()

                if waiter.event.is_set():
                    return waiter.granted
        except BaseException:
            if waiter.granted:
                waiter.slot.give_back()
            else:
                self.withdraw(waiter)

            raise

    def withdraw(self, waiter: Waiter) -> None:
        """Take a waiter that was granted no slot out of the line, and wake it."""
        self._leave(waiter)
        self.used()
        waiter.return_loan()
        # The next one may have waited for nothing else.
        self.serve()

    def offer_loan(self, waiter: Waiter, lender: Slot | None) -> None:
        """Lend a waiter a lender's slot, now if it is free, else when it will be."""
        # Others may have been served meanwhile, and this one with them.
        if not waiter.ask(lender):
            return

        if waiter.line is self.lines.returning or not self.admission.gated:
            self._grant(waiter)
            return

        self.in_line -= 1
        waiter.move(self.lines.borrowing)
        self.serve()

    def offer_loans_anew(self) -> None:
        """Let everybody in line ask the innermost slot around it, once one of these has been resumed."""
        for waiter in (*self.lines.returning, *self.lines.queue):
            lender = self.lender(waiter.slot.outer)
            if lender is not waiter.lender:
                self.offer_loan(waiter, lender)

    def give_back(self) -> None:
        """Take back the slot of an attempt that has ended, which its task has kept."""
        self.running -= 1
        self.serve()

    def _take(self) -> None:
        """Count one more slot as running."""
        self.running += 1
        if self.running > self.guard.borrowed:
            self.guard.borrow()

        if self.admission.recovers:
            self.admission.begin(self.running)

    # -- the lines

    def serve(self) -> None:
        """Serve all that can be served now, and have the next of them woken when it is time."""
        lines = self.lines
        if not lines:
            return

        # 1. Attempts that go on: a slot is all they need.
        while lines.returning and self.running < self.limit:
            first = next(iter(lines.returning))
            self._take()
            self._grant(first)

        # 2. Attempts that begin while nothing but slots is scarce.
        admission = self.admission
        if not admission.gated:
            while (waiter := self._first()) is not None:
                self._take()
                self._grant(waiter)

            return

        # 3. Attempts that begin when it is time. The first that is too early keeps the others back.
        now = self.loop.now()
        while (waiter := self._first()) is not None:
            at = admission.ready_at(waiter.slot.bill, now)
            if at > now:
                lines.set_alarm(waiter, at)
                return

            admission.reserve(waiter.slot, waiter.slot.bill, now)
            if not waiter.has_loan:
                self._take()

            self._grant(waiter)

        lines.set_alarm(None, math.inf)
        admission.open_gate(now)

    def _first(self) -> Waiter | None:
        return self.lines.first(not self.admission.paused and self.running < self.limit)

    def _grant(self, waiter: Waiter) -> None:
        waiter.grant(self.admission.epoch)
        self._leave(waiter)

    def _leave(self, waiter: Waiter) -> None:
        self.in_line -= waiter.line is not self.lines.borrowing
        self.lines.leave(waiter)

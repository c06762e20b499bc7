"""Grants the slots of a limiter in one event loop. ``slots`` has the theory."""

from __future__ import annotations

__all__ = ["SlotPool"]

import math
from collections.abc import Callable
from typing import Any

from anyio.lowlevel import checkpoint

from .._errors import DeadlockError, QueueFull
from .._invocation import Invocation
from .lines import Owner, Waiter
from .pool_state import PoolState
from .slots import RELEASED, SUSPENDED, Slot


class SlotPool(PoolState):
    """The state of a limiter in one event loop: slots, lines and admission."""

    route: Callable[[Invocation[Any]], SlotPool] | None = None
    """Returns the pool of an invocation's key; ``None`` without keys."""

    # -- slots

    def lender(self, slot: Slot | None, anyones: bool = False) -> Slot | None:
        """Return the innermost slot of this pool, from ``slot`` outwards, whose invocation still runs."""
        while slot is not None and (
            slot.hold is RELEASED or ((slot.hold is SUSPENDED or slot.pool is not self) and not anyones)
        ):
            slot = slot.outer

        return slot

    def encloses(self, slot: Slot | None) -> bool:
        """Return whether a slot, or one around it, is of this pool or of a pool that this one routes to."""
        while slot is not None and (
            slot.hold is RELEASED
            or (slot.pool is not self and (slot.pool.keys is None or slot.pool.keys.home is not self))
        ):
            slot = slot.outer

        return slot is not None

    def acquire_nowait(self, slot: Slot, returning: bool = False) -> bool:
        """
        Grant a slot if one is free, no attempt waits for it, and no rate or cool-off delays it.

        :param returning: whether the attempt has begun and waits to go on
        :return: whether it was granted
        """
        admission = self.admission
        if not (slot.is_plain and admission.is_open and slot.epoch == admission.epoch):
            return self._acquire(slot, returning)

        running = self.running
        if running >= self.limit or self.in_line:
            return False

        # As _count_running() does; inlined for speed.
        self.running = running + 1
        if running >= self.guard.taken:
            self.guard.take()

        return True

    def _acquire(self, slot: Slot, returning: bool) -> bool:
        lender = self.lender(slot.outer)
        if lender is not None and (
            lender.lent is not None or (self.keys is not None and not self.keys.has_place(slot))
        ):
            lender = None

        self._note_break()
        admission = self.admission
        if lender is None and (
            not self._has_slot(slot) or self.in_line or (admission.paused and not returning)
        ):
            return False

        if admission.gated and not returning:
            now = self.loop.now()
            if self._first() is not None or admission.ready_at(slot.bill, now) > now:
                return False

            admission.reserve(slot, slot.bill, now)
            admission.update_gate(now)

        if lender is None:
            self._count_running(slot)
        else:
            lender.lend(slot)

        if self.keys is not None:
            self._note_nested(slot)

        slot.note_grant(admission.epoch)
        if returning and admission.gated:
            # The head of the line may have counted on this slot while it waits for a time.
            self.serve()

        return True

    def enqueue(self, slot: Slot, returning: bool = False, owner: Owner | None = None) -> Waiter:
        """
        Join the pool's line for a slot, and the line of the lender, if there is one.

        :param owner: called when the wait is over, if no task is in :meth:`wait`
        """
        waiter = self.lines.join(slot, returning, owner)
        self.in_line += 1
        if self.keys is not None:
            self.keys.nested += slot.outer is not None

        self.offer_loan(waiter, self.lender(slot.outer))
        if self.running < self.limit or self.admission.gated:
            # A slot may be free already.
            self.serve()

        return waiter

    def refuse_if_full(self, waiter: Waiter) -> QueueFull | None:
        """
        Count a waiter without a slot; withdraw it if too many wait already.

        :return: the error of a waiter that was withdrawn
        """
        bound = self.admission.bound
        if bound is None:
            return None

        if bound.waiting < bound.max_waiting:
            waiter.count(bound)
            return None

        self.withdraw(waiter)
        bill, ahead, now = waiter.slot.bill, len(self.lines), self.loop.now()
        return QueueFull(bound.waiting, self.admission.estimate(bill, ahead, self.limit, now))

    async def wait(self, waiter: Waiter) -> bool:
        """
        Wait for the slot. Cancellation gives up the place in line, and a slot granted meanwhile.

        :return: whether the slot was granted; it was not if the waiter was withdrawn or refused, or its time
            is up. The caller must withdraw a refused waiter
        """
        try:
            self.refuse_deadlocked()
            while True:
                await waiter.wait()
                if not waiter.is_over:
                    self.serve()

                if not waiter.is_over and self.loop.now() >= waiter.until:
                    # An attempt that ends in this step may still grant the slot.
                    await checkpoint()
                    self.withdraw(waiter)

                if waiter.is_over:
                    return waiter.granted
        except BaseException:
            if waiter.granted:
                waiter.slot.give_back()
            else:
                self.withdraw(waiter)

            raise

    def withdraw(self, waiter: Waiter) -> None:
        """Remove a waiter without a slot from the line, once, and end its wait."""
        if waiter not in waiter.line:
            return

        self._leave(waiter)
        self.used()
        waiter.return_loan()
        # The next waiter may have waited for this one alone.
        self.serve()

    def offer_loan(self, waiter: Waiter, lender: Slot | None) -> None:
        """Lend a lender's slot to a waiter, now if it is free, else later."""
        # The waiter may be served already, by an earlier offer in the caller's loop.
        if not waiter.ask(lender):
            return

        if waiter.line is self.lines.returning or not self.admission.gated:
            self._grant(waiter)
            return

        self.in_line -= 1
        self.lines.lend(waiter)
        self.serve()

    def offer_loans_anew(self) -> None:
        """Let every waiter ask the innermost slot around it, once such a slot has been resumed."""
        for waiter in (*self.lines.returning, *self.lines.queue):
            lender = self.lender(waiter.slot.outer)
            if lender is not waiter.lender:
                self.offer_loan(waiter, lender)

    def give_back(self) -> None:
        """Take back a slot, and its place."""
        self.running -= 1
        self.serve()

    def forget(self, slot: Slot) -> None:
        """Note that an attempt has ended, or gives its slot back for a while."""
        if self.keys is not None:
            self.keys.held.pop(slot, None)
            # The agent around it may now wait only for a slot that never becomes free.
            self.refuse_deadlocked()

    def _note_nested(self, slot: Slot) -> None:
        if self.keys is not None and slot.outer is not None:
            self.keys.held[slot] = None

    def _has_slot(self, slot: Slot) -> bool:
        return self.running < self.limit and (self.keys is None or self.keys.has_place(slot))

    def refuse_deadlocked(self) -> None:
        """End the waits of attempts that keys keep waiting for ever: as few as resolve the deadlock."""
        while self.keys is not None and self.keys.nested and (found := self.keys.deadlocked()) is not None:
            waiter, key, other = found
            waiter.refuse(DeadlockError(key, other))
            waiter.slot.pool.withdraw(waiter)

    def _count_running(self, slot: Slot) -> None:
        """Count one more slot as running."""
        if self.keys is not None:
            self.keys.take(slot)

        self.running += 1
        if self.running > self.guard.taken:
            self.guard.take()

        if self.admission.recovers:
            self.admission.begin(self.running)

    # -- the lines

    def serve(self) -> None:
        """Serve all waiters that can be served now, and set the alarm of the next."""
        if self.keys is not None and self.keys.limit < math.inf:
            self.keys.serve()
        elif self.in_line or self.lines.borrowing:
            self.serve_some(math.inf)

    def serve_some(self, most: float) -> bool:
        """
        Serve some waiters.

        :param most: the largest number to serve
        :return: whether any was served
        """
        lines, served = self.lines, 0
        # 0. Attempts that could borrow a slot, and lacked only a place.
        if self.keys is not None and self.keys.limit < math.inf:
            for nested in tuple(lines.nested):
                lender = nested.lender
                if served < most and lender is not None and lender.lent is None:
                    self.offer_loan(nested, lender)
                    served += lender.lent is not None

        # 1. Attempts that go on: they need only a slot.
        while (
            served < most and lines.returning and self._has_slot((first := next(iter(lines.returning))).slot)
        ):
            self._count_running(first.slot)
            self._grant(first)
            served += 1

        # 2. Attempts that begin while only slots are scarce.
        admission = self.admission
        if not admission.gated:
            while served < most and (waiter := self._first()) is not None:
                if not waiter.has_loan:
                    self._count_running(waiter.slot)

                self._grant(waiter)
                served += 1

            return served > 0

        # 3. Attempts that need a rate or the end of a cool-off. The first that is too early blocks others.
        now = self.loop.now()
        while served < most and (waiter := self._first()) is not None:
            if waiter.error is not None:
                return served > 0  # a refused waiter is about to leave the line

            at = admission.ready_at(waiter.slot.bill, now)
            if at > now:
                if at == math.inf and admission.budgets:
                    at = self._look_at_budgets(waiter, now)

                lines.set_alarm(waiter, at)
                return served > 0

            admission.reserve(waiter.slot, waiter.slot.bill, now)
            if not waiter.has_loan:
                self._count_running(waiter.slot)

            self._grant(waiter)
            served += 1

        if served < most:
            lines.set_alarm(None, math.inf)
            admission.update_gate(now)

        return served > 0

    def _look_at_budgets(self, waiter: Waiter, now: float) -> float:
        """
        Refuse a waiter whose budget is spent.

        :return: when to check again, if nothing changes before
        """
        until = self.work.lasts_until(self.admission.unsettled.values())
        bill = waiter.slot.bill
        assert bill is not None
        error = self.admission.spent(bill, until > now)
        if error is not None:
            waiter.refuse(error)

        return until if until > now else math.inf

    def _first(self) -> Waiter | None:
        waiter = self.lines.first(not self.admission.paused and self.running < self.limit)
        if waiter is None or waiter.has_loan or self.keys is None or self.keys.has_place(waiter.slot):
            return waiter

        # The first waiter gets no place, but a nested one may borrow one.
        nested = (other for other in self.lines.nested if self.keys.has_place(other.slot))
        return next(nested, None) or self.lines.first(False)

    def _grant(self, waiter: Waiter) -> None:
        self._note_nested(waiter.slot)
        waiter.grant(self.admission.epoch)
        self._leave(waiter)

    def _leave(self, waiter: Waiter) -> None:
        self.in_line -= waiter.line is not self.lines.borrowing
        if self.keys is not None:
            self.keys.nested -= waiter.slot.outer is not None

        self.lines.leave(waiter)

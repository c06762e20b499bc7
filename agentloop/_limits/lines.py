"""The lines in which attempts wait for slots. The theory is at the top of ``slots``."""

from __future__ import annotations

__all__ = ["Lines", "Owner", "Waiter"]

import math
from collections import OrderedDict
from typing import Protocol

import anyio

from .admission import QueueBound
from .slots import Slot


class Owner(Protocol):
    """Waits in line without a task of its own."""

    def wait_ended(self, waiter: Waiter) -> None:
        """Take note that a wait is over. This must not call the pool."""

    def wake_at(self, waiter: Waiter, at: float) -> None:
        """Serve the pool at a time, which may be infinite; this replaces the time of earlier calls."""


class Waiter:
    """
    A place in line for a slot.

    :param slot: the slot to be granted
    :param number: its number in the order of arrival
    :param line: the pool's line that it stands in
    :param owner: called when the wait is over, and with the time to serve the pool; if absent, a task waits
    """

    __slots__ = (
        "_owner",
        "_woken",
        "bound",
        "error",
        "granted",
        "has_loan",
        "is_over",
        "lender",
        "line",
        "number",
        "scope",
        "slot",
        "until",
        "wake_at",
    )

    def __init__(
        self,
        slot: Slot,
        number: int,
        line: OrderedDict[Waiter, None],
        owner: Owner | None,
    ) -> None:
        self.slot = slot
        self.number = number
        self.line = line
        # The slot that it would take on loan.
        self.lender: Slot | None = None
        # Whether it has a slot on loan, and waits only for a time.
        self.has_loan = False
        self.granted = False
        # Why it will never be granted a slot. It keeps its place until it is withdrawn, so that no other
        # attempt of the same batch overtakes it.
        self.error: Exception | None = None
        # Either an owner is called when the wait is over, or an event wakes a task that waits.
        self._owner = owner
        self._woken: anyio.Event | None = None
        # Whether the wait is over.
        self.is_over = False
        # When its task has to serve the pool; finite only for the head of the line.
        self.wake_at = math.inf
        self.scope: anyio.CancelScope | None = None
        # When it gives up, and the bound that counts it meanwhile.
        self.until = math.inf
        self.bound: QueueBound | None = None

    def expire_at(self, at: float) -> None:
        """Set the time at which it gives up, before it waits."""
        self.until = at
        self.wake_at = min(at, self.wake_at)

    def count(self, bound: QueueBound) -> None:
        """Count as waiting until it leaves its line."""
        self.bound = bound
        bound.waiting += 1

    async def wait(self) -> None:
        """Wait until this is over, until its alarm, or until its first alarm is set."""
        self._woken = woken = anyio.Event()
        if self.is_over:
            woken.set()

        if self.wake_at == math.inf:
            # Most waiters never get an alarm, and a scope takes longer than all other work of a wait.
            self.scope = None
            await woken.wait()
        else:
            with anyio.CancelScope(deadline=self.wake_at) as self.scope:
                await woken.wait()

    def end(self) -> None:
        """Wake the task or call the owner: the wait is over."""
        self.is_over = True
        if self._owner is not None:
            self._owner.wait_ended(self)
        elif self._woken is not None:
            self._woken.set()

    def set_alarm(self, at: float) -> None:
        """Wake its task at a time."""
        self.wake_at = min(at, self.until)
        if self._owner is not None:
            self._owner.wake_at(self, at)
        elif self.scope is not None:
            self.scope.deadline = self.wake_at
        elif self._woken is not None and self.wake_at < math.inf:
            self._woken.set()

    def ask(self, lender: Slot | None) -> bool:
        """
        Ask a lender for its slot.

        :return: whether the lender has lent it; if not, it will offer it later
        """
        if self.lender is not lender:
            self._forget_lender()
            self.lender = lender

        return lender is not None and not self.has_loan and not self.is_over and lender.offer(self)

    def move(self, line: OrderedDict[Waiter, None]) -> None:
        """Wait in another line, with a slot on loan."""
        self.leave()
        self.has_loan = True
        self.line = line
        line[self] = None

    def grant(self, epoch: int) -> None:
        """Note that it has its slot."""
        self.granted = True
        self.has_loan = False
        self.slot.note_grant(epoch)

    def refuse(self, error: Exception) -> None:
        """End the wait without a slot, but keep the place in line."""
        self.error = error
        self.end()

    def return_loan(self) -> None:
        """Give back a slot on loan that it has not used."""
        if self.has_loan:
            self.has_loan = False
            self.slot.give_back()

    def leave(self) -> None:
        """Leave all lines."""
        self.line.pop(self, None)
        self._forget_lender()

    def _forget_lender(self) -> None:
        if self.lender is not None:
            self.lender.forget(self)


class Lines:
    """
    The three lines of a pool, and the alarm of the one waiter that waits for a time.

    They are ordered, with removal in O(1): a cancelled waiter leaves nothing behind. AnyIO's limiter has one
    queue, but here a waiter may stand in two lines: one of these and its lender's.
    """

    def __init__(self) -> None:
        self.queue: OrderedDict[Waiter, None] = OrderedDict()
        """Attempts that have not begun."""
        self.returning: OrderedDict[Waiter, None] = OrderedDict()
        """Attempts that have begun and wait to go on."""
        self.borrowing: OrderedDict[Waiter, None] = OrderedDict()
        """Attempts that have a slot on loan and wait for a time."""
        self.nested: dict[Waiter, None] = {}
        """Nested attempts in the other two lines."""
        self.alarmed: Waiter | None = None
        """The waiter whose alarm is set."""
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.queue) + len(self.returning) + len(self.borrowing)

    def join(self, slot: Slot, returning: bool, owner: Owner | None = None) -> Waiter:
        """
        Add a waiter at the end of a line.

        :param owner: called when the wait is over
        """
        self._arrivals += 1
        line = self.returning if returning else self.queue
        waiter = Waiter(slot, self._arrivals, line, owner)
        line[waiter] = None
        if slot.outer is not None:
            self.nested[waiter] = None

        return waiter

    def lend(self, waiter: Waiter) -> None:
        """Let a waiter that has a slot on loan wait for a time alone."""
        self.nested.pop(waiter, None)
        waiter.move(self.borrowing)

    def leave(self, waiter: Waiter) -> None:
        """Remove a waiter, and end its wait."""
        waiter.leave()
        self.nested.pop(waiter, None)
        if waiter.bound is not None:
            waiter.bound.waiting -= 1

        if self.alarmed is waiter:
            self.set_alarm(None, math.inf)

        waiter.end()

    def first(self, has_slot: bool) -> Waiter | None:
        """
        Return the first attempt that has not begun and has, or could have, a slot.

        :param has_slot: whether the pool has one for the queue
        """
        borrower = next(iter(self.borrowing)) if self.borrowing else None
        if not self.queue or not has_slot:
            return borrower

        head = next(iter(self.queue))
        return head if borrower is None or head.number < borrower.number else borrower

    def set_alarm(self, waiter: Waiter | None, at: float) -> None:
        """Wake a waiter at a time, and no other."""
        alarmed, self.alarmed = self.alarmed, waiter
        if alarmed is not None and alarmed is not waiter:
            alarmed.set_alarm(math.inf)

        if waiter is not None:
            waiter.set_alarm(at)

"""
The slots of one event loop.

**A slot is the right to run one attempt.** A pool has ``limit`` of them. An attempt that runs other
invocations, and waits for them, *lends* them its slot, one at a time, as GNU make's jobserver does (Paul
Smith, "POSIX Jobserver", GNU make manual, section 13.1). A borrower can lend on. So at most ``limit``
invocations do work of their own, and however deep they are nested, the innermost one has a slot to run in:
nested use never deadlocks. More than one at a time needs further slots of the pool.

**A waiter stands in up to two lines**: one of the pool's, and the one of its lender, which is the innermost
invocation around it that still runs. The first grant takes it out of both. The pool has three lines, each
first come, first served:

- ``_returning``: attempts that gave their slot up while they waited for a reader. They go first and pay
  nothing.
- ``_queue``: attempts that have not begun. They need a slot, and all at once the costs of all rates and the
  end of a cool-off.
- ``_borrowing``: the same with a slot on loan, which wait for rates or a cool-off alone. A pause does not
  hold them, since their lender runs already.

**All decisions are in ``_serve()``**, which serves every waiter that can be served, and sets one alarm for
the first that has to wait for a time. Later arrivals never overtake it. It is called whenever something
changes that a waiter may wait for: a slot is given back, a limit is raised, a cost is paid, given back or
settled, a pause ends, an alarm rings. Every change is synchronous. The one ``await`` is in ``wait()``, and a
cancellation there gives up the place in line, or the slot if it was granted in the same moment.

**When an invocation ends whose slot is on loan**, the loan becomes the borrower's own slot, and waiters in
its line move on to the lender around it.
"""

from __future__ import annotations

__all__ = ["HELD", "Slot", "SlotPool", "Waiter", "current_slot"]

import enum
import math
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio

from .._eventloop.handover import Handover, LoopState
from .._invocation import Invocation
from .._result import InvocationResult
from .._verdict import Verdict
from .admission import Admission, Bill
from .overload import AdaptiveLimit

current_slot: ContextVar[Slot | None] = ContextVar("agentloop.current_slot", default=None)
"""The slot of the invocation that the current code runs in."""


class Hold(enum.Enum):
    """Whether an attempt has its slot."""

    HELD = enum.auto()
    SUSPENDED = enum.auto()
    """It has given the slot up for a while."""
    RELEASED = enum.auto()


HELD, SUSPENDED, RELEASED = Hold


class Slot:
    """
    The right to run one attempt: one of the limiter's, or the slot of an invocation further out, on loan.

    :param pool: where it comes from
    :param outer: the slot of the invocation that runs this one, if one does
    :param bill: what the attempt has to pay for it, if there are rates
    """

    __slots__ = ("bill", "epoch", "hold", "is_plain", "lender", "lent", "outer", "pool", "waiters")

    def __init__(self, pool: SlotPool, outer: Slot | None, bill: Bill | None = None) -> None:
        self.pool = pool
        self.outer = outer
        self.bill = bill
        self.epoch = pool.admission.epoch
        self.hold = HELD
        # Whether it has nothing to do with another slot, and pays nothing.
        self.is_plain = outer is None and bill is None
        self.lender: Slot | None = None
        self.lent: Slot | None = None
        # The waiters that would take this slot on loan; made when the first one asks.
        self.waiters: OrderedDict[Waiter, None] | None = None

    @property
    def is_released(self) -> bool:
        """Whether the attempt has ended."""
        return self.hold is RELEASED

    def take(self, epoch: int) -> None:
        """Note that the slot was granted, in an epoch of the limit."""
        self.hold = HELD
        self.epoch = epoch

    def pay(self) -> None:
        """Pay what was reserved for the attempt, which calls its agent now."""
        assert self.bill is not None
        self.pool.pay(self.bill)

    def release(
        self, verdict: Verdict | None = None, succeeded: bool = False, longest_hold: float = math.inf
    ) -> None:
        """
        Give the slot back, or leave it to the one it is lent to, who then gives it back. What was reserved
        for an attempt that never began is given back too.

        :param verdict: the judgement of the attempt, where it failed
        :param succeeded: whether it succeeded; a cancelled one did neither
        :param longest_hold: for how many seconds others wait at most because of it
        """
        pool = self.pool
        if self.is_plain and verdict is None and pool.is_open:
            # Most slots were never lent, and there is nothing to learn from most attempts.
            self.hold = RELEASED
            pool.running -= 1
            if pool.lines:
                pool.serve()

            return

        suspended = self.hold is SUSPENDED
        self.hold = RELEASED
        bill = self.bill
        if bill is not None and bill.charges and not bill.is_paid:
            pool.refund(bill)
        elif verdict is not None or (succeeded and pool.admission.listens):
            pool.learn(self, verdict, longest_hold)

        if not suspended:
            self._pass_on()

        if self.outer is not None:
            # What is released is skipped from now on, so that a chain of invocations, each of which starts
            # the next one in the background, does not keep all of its past.
            self.outer = pool.lender(self.outer, anyones=True)

    def give_back(self) -> None:
        """Give the slot back as :meth:`release` does, for an attempt that did not begin and still may."""
        if self.bill is not None and self.bill.charges:
            self.pool.refund(self.bill)

        self._pass_on()

    def suspend(self) -> None:
        """Give the slot back, but for a while only."""
        self.hold = SUSPENDED
        self.is_plain = False
        self._pass_on()

    def resume(self, granted: Slot) -> None:
        """
        Go on after :meth:`suspend`, as the same slot, since what the invocation runs meanwhile refers to it.

        :param granted: the slot that was acquired for it
        """
        self.hold = HELD
        self.lender, granted.lender = granted.lender, None
        granted.hold = RELEASED
        if self.lender is not None:
            self.lender.lent = self

        self.pool.offer_loans_anew()

    # -- loans

    def lend(self, borrower: Slot) -> None:
        """Lend the slot."""
        self.is_plain = False
        self.lent = borrower
        borrower.lender = self

    def offer(self, waiter: Waiter) -> bool:
        """Lend the slot to a waiter now, if it is not lent; else put the waiter in line for it."""
        if self.lent is None:
            self.lend(waiter.slot)
            return True

        if self.waiters is None:
            self.is_plain = False
            self.waiters = OrderedDict()

        self.waiters[waiter] = None
        return False

    def forget(self, waiter: Waiter) -> None:
        """Take a waiter out of the line for this slot."""
        if self.waiters:
            self.waiters.pop(waiter, None)

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
        elif lender is None:
            self.pool.running -= 1
            self.pool.serve()
        else:
            lender.lent = None
            if lender.waiters:
                self.pool.offer_loan(next(iter(lender.waiters)))


class Waiter:
    """
    A place in line for a slot.

    :param slot: what is waited for
    :param number: how many came before it
    :param line: the pool's line that it stands in
    :param lender: the slot that it would take on loan
    """

    __slots__ = ("event", "granted", "has_loan", "lender", "line", "number", "scope", "slot", "wake_at")

    def __init__(self, slot: Slot, number: int, line: OrderedDict[Waiter, None], lender: Slot | None) -> None:
        self.slot = slot
        self.number = number
        self.line = line
        self.lender = lender
        # Whether it has a slot on loan, which it may use when it is time.
        self.has_loan = False
        self.granted = False
        self.event = anyio.Event()
        # When it has to look whether it is time; only the first in line does.
        self.wake_at = math.inf
        self.scope: anyio.CancelScope | None = None

    def set_alarm(self, at: float) -> None:
        """Wake its task at a time."""
        self.wake_at = at
        if self.scope is not None:
            self.scope.deadline = at

    def leave_lines(self) -> None:
        self.line.pop(self, None)
        if self.lender is not None:
            self.lender.forget(self)


class SlotPool(LoopState):
    """
    The state that a limiter has in one event loop: slots, lines, and what else an attempt needs.

    :param pools: hands the limiter over from one event loop to the next
    :param max_concurrency: how many slots there are
    :param admission: what an attempt needs besides
    :param tell_limit: is told when the limit has changed
    """

    route: Callable[[Invocation[Any]], SlotPool] | None = None
    """Finds the pool of an invocation, where that is another one."""
    home: SlotPool | None = None
    """The pool whose :attr:`route` leads here, if there is one."""

    def __init__(
        self,
        pools: Handover[SlotPool],
        max_concurrency: int,
        admission: Admission,
        tell_limit: Callable[[SlotPool], None],
    ) -> None:
        super().__init__(pools)
        self.loop = self.kind(self.token)
        self.admission = admission
        self.asleep = 0
        """How many invocations wait to be retried."""
        self.to_come = 0
        """How many inputs of running batches are there, and were not pulled yet."""
        self.on_raise: set[Callable[[], None]] = set()
        """Called when the limit was raised, so that a batch can start more workers."""
        self.is_open = False
        """Whether a free slot is all that an attempt needs, and nothing is learnt from its success."""
        self.limit = max_concurrency
        self.running = 0
        self._tell_limit = tell_limit
        # Keeps us from ever having more than the limit. What was borrowed is kept for the next attempt: to
        # give a token back and borrow another takes longer than all else about a slot.
        self._tokens = anyio.CapacityLimiter(max_concurrency)
        self._borrowed = 0
        # Ordered, and with removal in O(1): a cancelled waiter leaves nothing behind. The limiter's own
        # queue will not do, since a waiter may stand in two queues: this one and its lender's.
        self._queue: OrderedDict[Waiter, None] = OrderedDict()
        self._returning: OrderedDict[Waiter, None] = OrderedDict()
        self._borrowing: OrderedDict[Waiter, None] = OrderedDict()
        self.lines = 0
        """How many wait for a slot, and have none on loan."""
        self._arrivals = 0
        self._alarmed: Waiter | None = None
        self._look()

    @property
    def waiting(self) -> int:
        return self.in_line + self.asleep + self.to_come

    @property
    def in_line(self) -> int:
        return self.lines + len(self._borrowing)

    @property
    def selective(self) -> bool:
        """Whether it matters which invocation an attempt is of."""
        return self.route is not None or bool(self.admission.meters)

    @property
    def held_until(self) -> float | None:
        """When the cool-off ends, if there is one."""
        until = self.admission.held_until
        return until if until > self.loop.now() else None

    def resize(self, max_concurrency: int) -> None:
        """Change the limit, or what is the ceiling of it."""
        governor = self.admission.governor
        if governor is None:
            self._set_limit(max_concurrency)
        else:
            governor.resize(max_concurrency)
            self._follow(governor)

        for callback in tuple(self.on_raise):
            callback()

    def pause(self) -> None:
        """Start nothing new but what runs on loan."""
        self.admission.paused = True
        self._look()
        # Another waiter may be the first in line now.
        self.serve()

    def resume(self) -> None:
        """Start again."""
        self.admission.paused = False
        self._look()
        self.serve()

    # -- what attempts cost, and what they teach

    def pay(self, bill: Bill) -> None:
        """Pay what was reserved for an attempt."""
        self.admission.pay(bill, self.loop.now())
        # When the next one can pay may have depended on it.
        self.serve()

    def refund(self, bill: Bill) -> None:
        """Give back what was reserved for an attempt that will not begin."""
        self.admission.refund(bill)
        self.serve()

    def settle(self, bill: Bill, result: InvocationResult[Any]) -> None:
        """Correct what was paid for the last attempt of an invocation, now that it has ended."""
        if bill.is_paid:
            self.admission.settle(bill, result, self.loop.now())
            self.serve()

    def learn(self, slot: Slot, verdict: Verdict | None, longest_hold: float) -> None:
        """
        Learn from the end of an attempt.

        :param verdict: why it failed; ``None`` if it succeeded
        """
        admission = self.admission
        if admission.learn(verdict, slot.epoch, self.running, longest_hold, self.loop.now()):
            assert admission.governor is not None
            self._follow(admission.governor)

    def _look(self) -> None:
        """Find out whether a free slot is all that an attempt needs, after anything of that has changed."""
        admission = self.admission
        self.is_open = not (admission.gated or admission.paused or admission.listens or admission.epoch)

    def _follow(self, governor: AdaptiveLimit) -> None:
        self.admission.follow(governor)
        self._look()
        if governor.limit != self.limit:
            self._set_limit(governor.limit)

    def _set_limit(self, limit: int) -> None:
        self.limit = self._tokens.total_tokens = limit
        self._tell_limit(self)
        self.serve()

    # -- slots

    def lender(self, slot: Slot | None, anyones: bool = False) -> Slot | None:
        """Return the innermost slot of this pool, from ``slot`` outwards, whose invocation still runs."""
        while slot is not None and (
            slot.hold is RELEASED or ((slot.hold is SUSPENDED or slot.pool is not self) and not anyones)
        ):
            slot = slot.outer

        return slot

    def encloses(self, slot: Slot | None) -> bool:
        """Return whether an invocation that has a slot, or one around it, runs here or where this one leads."""
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
        if not (slot.is_plain and self.is_open):
            return self._acquire(slot, returning)

        running = self.running
        if running >= self.limit or self.lines:
            return False

        # The same as _take() does; a call for every invocation shows.
        self.running = running + 1
        if running >= self._borrowed:
            self._borrow()

        return True

    def _acquire(self, slot: Slot, returning: bool) -> bool:
        lender = self.lender(slot.outer)
        if lender is not None and lender.lent is not None:
            lender = None

        admission = self.admission
        if lender is None and (
            self.running >= self.limit or self.lines or (admission.paused and not returning)
        ):
            return False

        if admission.gated and not returning:
            now = self.loop.now()
            if self._next() is not None or admission.ready_at(slot.bill, now) > now:
                return False

            admission.reserve(slot.bill, now)
            admission.open_gate(now)
            self._look()

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
        self._arrivals += 1
        line = self._returning if returning else self._queue
        waiter = Waiter(slot, self._arrivals, line, self.lender(slot.outer))
        line[waiter] = None
        self.lines += 1
        self.offer_loan(waiter)
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
        if waiter.has_loan:
            waiter.has_loan = False
            waiter.slot.give_back()

        # The next one may have waited for nothing else.
        self.serve()

    def offer_loan(self, waiter: Waiter) -> None:
        """Lend a waiter its lender's slot, now if it is free, else when it will be."""
        lender = waiter.lender
        # Others may have been served meanwhile, and this one with them.
        if lender is None or waiter.has_loan or waiter.event.is_set() or not lender.offer(waiter):
            return

        if waiter.line is self._returning or not self.admission.gated:
            self._grant(waiter)
            return

        waiter.leave_lines()
        self.lines -= 1
        waiter.has_loan = True
        waiter.line = self._borrowing
        self._borrowing[waiter] = None
        self.serve()

    def offer_loans_anew(self) -> None:
        """Let everybody in line ask the innermost slot around it, once one of these has been resumed."""
        for waiter in (*self._returning, *self._queue):
            lender = self.lender(waiter.slot.outer)
            if lender is not waiter.lender:
                if waiter.lender is not None:
                    waiter.lender.forget(waiter)

                waiter.lender = lender
                self.offer_loan(waiter)

    def _take(self) -> None:
        """Count one more slot as running."""
        self.running += 1
        if self.running > self._borrowed:
            self._borrow()

        if self.admission.recovers:
            self.admission.begin(self.running)

    def _borrow(self) -> None:
        # A borrower of its own for each: equal or repeated borrowers collide.
        self._tokens.acquire_on_behalf_of_nowait(object())
        self._borrowed += 1

    # -- the lines

    def serve(self) -> None:
        """Serve all that can be served now, and have the next of them woken when it is time."""
        if not self.in_line:
            return

        # 1. Attempts that go on: a slot is all they need.
        while self._returning and self.running < self.limit:
            first = next(iter(self._returning))
            self._take()
            self._grant(first)

        # 2. Attempts that begin while nothing but slots is scarce.
        admission = self.admission
        if not admission.gated:
            while (waiter := self._next()) is not None:
                self._take()
                self._grant(waiter)

            return

        # 3. Attempts that begin when it is time. The first that is too early keeps the others back.
        now = self.loop.now()
        while (waiter := self._next()) is not None:
            at = admission.ready_at(waiter.slot.bill, now)
            if at > now:
                self._set_alarm(waiter, at)
                return

            admission.reserve(waiter.slot.bill, now)
            if not waiter.has_loan:
                self._take()

            self._grant(waiter)

        self._set_alarm(None, math.inf)
        admission.open_gate(now)
        self._look()

    def _next(self) -> Waiter | None:
        """Return the first in line of those for whom there is a slot."""
        borrower = next(iter(self._borrowing)) if self._borrowing else None
        if not self._queue or self.admission.paused or self.running >= self.limit:
            return borrower

        head = next(iter(self._queue))
        return head if borrower is None or head.number < borrower.number else borrower

    def _set_alarm(self, waiter: Waiter | None, at: float) -> None:
        alarmed, self._alarmed = self._alarmed, waiter
        if alarmed is not None and alarmed is not waiter:
            alarmed.set_alarm(math.inf)

        if waiter is not None:
            waiter.set_alarm(at)

    def _grant(self, waiter: Waiter) -> None:
        waiter.granted = True
        waiter.has_loan = False
        waiter.slot.take(self.admission.epoch)
        self._leave(waiter)

    def _leave(self, waiter: Waiter) -> None:
        self.lines -= waiter.line is not self._borrowing
        waiter.leave_lines()
        if self._alarmed is waiter:
            self._set_alarm(None, math.inf)

        waiter.event.set()

"""
The slots of one event loop.

**A slot is the right to run one attempt.** A pool has ``limit`` of them. An attempt that runs other
invocations, and waits for them, *lends* them its slot, one at a time, as GNU make's jobserver does. A
borrower can lend on. So at most ``limit`` invocations do work of their own, and however deep they are nested,
the innermost one has a slot to run in: nested use never deadlocks. More than one at a time needs further
slots of the pool.

**A waiter stands in up to two lines**: one of the pool's, and the one of its lender, which is the innermost
invocation around it that still runs. The first grant takes it out of both. The pool has three lines, each
first come, first served:

- ``_returning``: attempts that gave their slot up while they waited for a reader. They go first and pay
  nothing.
- ``_queue``: attempts that have not begun. They need a slot, and all at once the costs of all rates and the
  end of a cool-off.
- ``_borrowing``: the same with a slot on loan, which wait for rates or a cool-off alone. A pause does not
  hold them, since their lender runs already.

**All decisions are in ``_grant()``**, which serves every waiter that can be served, and sets one alarm for
the first that has to wait for a time. Later arrivals never overtake it. It is called whenever something
changes that a waiter may wait for: a slot is given back, a limit is raised, a cost is paid, given back or
settled, a pause ends, an alarm rings. Every change is synchronous. The one ``await`` is in ``wait()``, and a
cancellation there gives up the place in line, or the slot if it was granted in the same moment.

**When an invocation ends whose slot is on loan**, the loan becomes the borrower's own slot, and waiters in
its line move on to the lender around it.

**Rates are reserved at the grant and paid when the agent is called** (``pay()``): in between, the event loop
may be busy with other tasks for longer than the time that a rate is about.
"""

from __future__ import annotations

__all__ = ["Slot", "SlotPool", "Waiter", "current_slot"]

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import anyio
from anyio.lowlevel import EventLoopToken

from .. import _validators as must
from .._eventloop.backend import is_error
from .._eventloop.handover import LoopState
from .._foreign import foreign_code
from .._invocation import Invocation
from .._result import InvocationResult
from .._verdict import Verdict, VerdictKind
from .overload import AdaptiveLimit
from .rates import Charge, Rate, make_meter, price
from .retry_budget import RetryLedger

_logger = logging.getLogger("agentloop")

current_slot: ContextVar[Slot | None] = ContextVar("agentloop.current_slot", default=None)
"""The slot of the invocation that the current code runs in."""


class Slot:
    """
    The right to run one attempt: one of the limiter's, or the slot of an invocation further out.

    An invocation that runs others lends them its own slot, one at a time, as GNU make's jobserver does
    (Paul Smith, "POSIX Jobserver", GNU make manual, section 13.1): only further parallelism needs another
    token, so however deep the nesting, the innermost invocation always has a slot to run in.
    """

    __slots__ = (
        "charges",
        "epoch",
        "lender",
        "lent",
        "outer",
        "pool",
        "released",
        "suspended",
        "waiters",
    )

    def __init__(self, pool: SlotPool, lender: Slot | None, outer: Slot | None) -> None:
        self.pool = pool
        self.outer = outer
        self.epoch: int = pool.epoch
        self.lender = lender
        self.lent: Slot | None = None
        self.released = False
        self.suspended = False
        # The costs that are reserved for the attempt, until it calls its agent.
        self.charges: list[Charge] | None = None
        # Who would take this slot on loan; made when the first one asks.
        self.waiters: OrderedDict[Waiter, None] | None = None

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
        self.released = True
        pool = self.pool
        if self.charges is not None:
            pool.refund(self.charges)
        elif verdict is not None or (succeeded and pool.listens):
            pool.learn(self, verdict, longest_hold)

        if self.lent is not None or self.lender is not None or self.waiters is not None:
            self._pass_on()
        else:
            pool.give_back()

        if self.outer is not None:
            # What is released is skipped from now on, so that a chain of invocations, each of which starts
            # the next one in the background, does not keep all of its past.
            self.outer = pool.lender(self.outer, anyones=True)

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
        elif lender is None:
            self.pool.give_back()
        else:
            lender.lent = None
            if lender.waiters:
                self.pool.offer_loan(next(iter(lender.waiters)))


class Waiter:
    """
    A place in line for a slot.

    :param costs: what is to be paid with it; ``None`` for an attempt that has begun and goes on
    :param number: how many came before it
    """

    __slots__ = (
        "costs",
        "event",
        "lender",
        "line",
        "loan",
        "number",
        "outer",
        "scope",
        "slot",
        "wake_at",
    )

    def __init__(
        self,
        costs: tuple[float, ...] | None,
        number: int,
        line: OrderedDict[Waiter, None],
        lender: Slot | None,
        outer: Slot | None,
    ) -> None:
        self.costs = costs
        self.number = number
        self.line = line
        self.lender = lender
        self.outer = outer
        # A slot on loan that it may use when it is time.
        self.loan: Slot | None = None
        self.slot: Slot | None = None
        self.event = anyio.Event()
        # When it has to look whether it is time; only the first in line does.
        self.wake_at = math.inf
        self.scope: anyio.CancelScope | None = None

    def set_alarm(self, at: float) -> None:
        """Wake its task at a time."""
        self.wake_at = at
        if self.scope is not None:
            self.scope.deadline = at


class SlotPool(LoopState):
    """
    The state that a limiter has in one event loop.

    An attempt starts when there is a slot for it, the limiter's or one on loan, and when every rate can be
    paid and no cool-off is in force: all of it at once, or nothing. Who has to wait for a time, and not for
    a slot, is first in line, and sets itself an alarm; so nobody polls, and who comes later does not start
    before. Loans are not held back by a pause, since whoever lends runs already.

    Every change of it is synchronous, so that no cancellation can tear it.
    """

    route: Callable[[Invocation[Any]], SlotPool] | None = None
    """Finds the pool of an invocation, where that is another one."""
    home: SlotPool | None = None
    """The pool whose :attr:`route` leads here, if there is one."""
    _settle_failed = False

    def __init__(
        self,
        token: EventLoopToken,
        max_concurrency: int,
        rates: Iterable[Rate],
        governor: AdaptiveLimit | None,
        ledger: RetryLedger | None,
        tell_limit: Callable[[SlotPool], None],
    ) -> None:
        super().__init__(token)
        self.loop = self._kind(token)
        self.asleep = 0
        """How many invocations wait to be retried."""
        self.to_come = 0
        """How many inputs of running batches are there, and were not pulled yet."""
        self.on_raise: set[Callable[[], None]] = set()
        """Called when the limit was raised, so that a batch can start more workers."""
        self.meters = tuple(make_meter(rate) for rate in rates)
        self.selective = bool(self.meters)
        """Whether it matters which invocation an attempt is of."""
        self.governor = governor
        self.ledger = ledger
        self.epoch: int = 0
        self.paused = False
        self._tell_limit = tell_limit
        self._recovers = False
        # Whether more than a slot may be needed; while a cool-off lasts, even where there are no rates.
        self._gated = bool(self.meters)
        # Whether a success is of interest.
        self.listens = ledger is not None
        self.limit = max_concurrency
        self.running = 0
        # Keeps us from ever having more than the limit. What was borrowed is kept for whoever comes next: to
        # give a token back and borrow another takes longer than all else about a slot.
        self._tokens = anyio.CapacityLimiter(max_concurrency)
        self._borrowed = 0
        # Ordered, and with removal in O(1): a cancelled waiter leaves nothing behind. The limiter's own
        # queue will not do, since a waiter may stand in two queues: this one and its lender's.
        self._queue: OrderedDict[Waiter, None] = OrderedDict()
        # Those that have begun, and go on as soon as there is a slot.
        self._returning: OrderedDict[Waiter, None] = OrderedDict()
        # Those that have a slot on loan, and wait for a time.
        self._borrowing: OrderedDict[Waiter, None] = OrderedDict()
        self._arrivals = 0
        self._alarmed: Waiter | None = None

    @property
    def waiting(self) -> int:
        return self.in_line + self.asleep + self.to_come

    @property
    def in_line(self) -> int:
        return len(self._queue) + len(self._returning) + len(self._borrowing)

    @property
    def held_until(self) -> float | None:
        """When the cool-off ends, if there is one."""
        until = -math.inf if self.governor is None else self.governor.held_until
        return until if until > self.loop.now() else None

    def resize(self, max_concurrency: int) -> None:
        """Change the limit, or what is the ceiling of it."""
        if self.governor is None:
            self._set_limit(max_concurrency)
        else:
            self.governor.resize(max_concurrency)
            self._follow(self.governor)

        for callback in tuple(self.on_raise):
            callback()

    def pause(self) -> None:
        """Start nothing new but what runs on loan."""
        self.paused = True
        # Who is first in line now may be another one.
        self._grant()

    def resume(self) -> None:
        """Start again."""
        self.paused = False
        self._grant()

    # -- what attempts cost, and what they teach

    def price(self, invocation: Invocation[Any]) -> tuple[float, ...]:
        """
        Return what an attempt of an invocation pays to each rate.

        :raises Exception: if that cannot be told, or never be paid
        """
        return tuple(price(meter.rate, invocation) for meter in self.meters)

    def settle(self, charges: list[Charge], result: InvocationResult[Any]) -> None:
        """Correct what was paid for the last attempt of an invocation, now that it has ended."""
        now = self.loop.now()
        for meter, charge in zip(self.meters, charges, strict=True):
            settle = meter.rate.settle
            if settle is None:
                continue

            try:
                cost = settle(result)
                must.check_number("what settle returns", cost, minimum=0, finite=True)
            except BaseException as exc:
                if not is_error(exc):
                    raise

                if not self._settle_failed:
                    self._settle_failed = True
                    with foreign_code:
                        _logger.exception("settle=%r failed; its further errors are not logged", settle)
            else:
                meter.correct(charge, cost, now)

        self._grant()

    def pay(self, charges: list[Charge]) -> None:
        """Pay what was reserved for an attempt, which calls its agent now."""
        now = self.loop.now()
        for meter, charge in zip(self.meters, charges, strict=True):
            meter.pay(charge, now)

        if self.in_line:
            # When the next one can pay may have depended on it.
            self._grant()

    def refund(self, charges: list[Charge]) -> None:
        """Give back what was reserved for an attempt that will not begin."""
        for meter, charge in zip(self.meters, charges, strict=True):
            meter.release(charge)

        self._grant()

    def learn(self, slot: Slot, verdict: Verdict | None, longest_hold: float) -> None:
        """
        Take notice of how an attempt ended.

        :param verdict: why it failed; ``None`` if it succeeded
        """
        governor = self.governor
        if verdict is None:
            if self.ledger is not None:
                self.ledger.succeeded(self.loop.now())

            if governor is None or not self._recovers:
                return

            governor.complete(self.running - 1)
        elif governor is None or verdict.kind is not VerdictKind.OVERLOAD:
            return
        else:
            now = self.loop.now()
            if verdict.retry_after is not None:
                governor.hold(now, min(verdict.retry_after, longest_hold))

            governor.reject(slot.epoch, now)
            self._gated = self._gated or now < governor.staggers_until

        self._follow(governor)

    def _follow(self, governor: AdaptiveLimit) -> None:
        self.epoch = governor.epoch
        self._recovers = governor.recovers
        self.listens = self._recovers or self.ledger is not None
        if governor.limit != self.limit:
            self._set_limit(governor.limit)

    def _set_limit(self, limit: int) -> None:
        self.limit = self._tokens.total_tokens = limit
        self._tell_limit(self)
        self._grant()

    # -- slots

    def lender(self, slot: Slot | None, anyones: bool = False) -> Slot | None:
        """Return the innermost slot of this pool, from ``slot`` outwards, whose invocation still runs."""
        while slot is not None and (
            slot.released or ((slot.suspended or slot.pool is not self) and not anyones)
        ):
            slot = slot.outer

        return slot

    def encloses(self, slot: Slot | None) -> bool:
        """Tell whether an invocation that has a slot, or one around it, runs here or where this one leads."""
        while slot is not None and (slot.released or (slot.pool is not self and slot.pool.home is not self)):
            slot = slot.outer

        return slot is not None

    def acquire_nowait(self, costs: tuple[float, ...] | None, outer: Slot | None) -> Slot | None:
        """
        Return a slot if there is one for which nobody waits.

        :param costs: what to pay to each rate; ``None`` for an attempt that has begun and goes on
        :param outer: the slot of the invocation that asks, if one does
        """
        if outer is None and not self._gated and not self.paused:
            # So it is most often.
            free = self.running < self.limit and not self._queue and not self._returning
            return self._take(None) if free else None

        lender = None if outer is None else self.lender(outer)
        if lender is not None and lender.lent:
            lender = None

        if lender is None and (
            self.running >= self.limit
            or self._queue
            or self._returning
            or (self.paused and costs is not None)
        ):
            return None

        charges: list[Charge] | None = None
        if self._gated and costs is not None:
            now = self.loop.now()
            if self._next() is not None or self._ready_at(costs, now) > now:
                return None

            charges = self._reserve(costs, now)
            self._ungate(now)

        if lender is None:
            slot = self._take(outer)
        else:
            slot = lender.lent = Slot(self, lender, outer)

        if self._gated:
            slot.charges = charges
            if costs is None:
                # The slot may have been the one for which somebody waits for the time to come.
                self._grant()

        return slot

    def enqueue(self, costs: tuple[float, ...] | None, outer: Slot | None) -> Waiter:
        """Stand in line for a slot: the pool's, and the one of the invocation that asks, if one does."""
        self._arrivals += 1
        line = self._returning if costs is None else self._queue
        waiter = Waiter(costs, self._arrivals, line, self.lender(outer), outer)
        line[waiter] = None
        self.offer_loan(waiter)
        if self._gated or self.paused:
            # There may be a slot for it already.
            self._grant()

        return waiter

    async def wait(self, waiter: Waiter) -> Slot | None:
        """
        Wait for the slot. Cancellation gives up the place in the line, and a slot granted meanwhile.

        :return: the slot; ``None`` if the waiter was withdrawn
        """
        try:
            while True:
                with anyio.CancelScope(deadline=waiter.wake_at) as waiter.scope:
                    await waiter.event.wait()

                if not waiter.event.is_set():
                    self._grant()

                if waiter.event.is_set():
                    return waiter.slot
        except BaseException:
            if waiter.slot is None:
                self.withdraw(waiter)
            else:
                waiter.slot.release()

            raise

    def withdraw(self, waiter: Waiter) -> None:
        """Take out of the line one who has not been granted a slot, and wake it."""
        self._leave(waiter)
        loan, waiter.loan = waiter.loan, None
        if loan is not None:
            loan.release()

        # Whoever stood behind it may have waited for nothing else.
        if self._gated:
            self._grant()

    def offer_loan(self, waiter: Waiter) -> None:
        """Lend the waiter its lender's slot, now if it is free, else when it will be."""
        lender = waiter.lender
        # Others may have been served meanwhile, and this one with them.
        if lender is None or waiter.loan is not None or waiter.event.is_set():
            return

        if lender.lent:
            if lender.waiters is None:
                lender.waiters = OrderedDict()

            lender.waiters[waiter] = None
            return

        slot = lender.lent = Slot(self, lender, waiter.outer)
        if waiter.costs is None or not self._gated:
            self._give(waiter, slot)
            return

        self._leave_lines(waiter)
        waiter.loan = slot
        waiter.line = self._borrowing
        self._borrowing[waiter] = None
        self._grant()

    def offer_loans_anew(self) -> None:
        """Let everybody in line ask the innermost slot around it, once one of these has been resumed."""
        for waiter in (*self._returning, *self._queue):
            lender = self.lender(waiter.outer)
            if lender is not waiter.lender:
                if waiter.lender is not None and waiter.lender.waiters:
                    waiter.lender.waiters.pop(waiter, None)

                waiter.lender = lender
                self.offer_loan(waiter)

    def give_back(self) -> None:
        """Take a slot back and pass it on."""
        self.running -= 1
        if self._queue or self._returning:
            self._grant()

    def _take(self, outer: Slot | None) -> Slot:
        self.running += 1
        if self.running > self._borrowed:
            # A borrower of its own for each: equal or repeated borrowers collide.
            self._tokens.acquire_on_behalf_of_nowait(object())
            self._borrowed += 1

        if self._recovers:
            assert self.governor is not None
            self.governor.begin(self.running)

        return Slot(self, None, outer)

    # -- the lines

    def _grant(self) -> None:
        """Serve all that can be served now, and have the next of them woken when it is time."""
        while self._returning and self.running < self.limit:
            first = next(iter(self._returning))
            self._give(first, self._take(first.outer))

        if not self._gated:
            while (waiter := self._next()) is not None:
                self._give(waiter, self._take(waiter.outer))

            return

        now = self.loop.now()
        while (waiter := self._next()) is not None:
            assert waiter.costs is not None
            at = self._ready_at(waiter.costs, now)
            if at > now:
                self._set_alarm(waiter, at)
                return

            charges = self._reserve(waiter.costs, now)
            slot, waiter.loan = waiter.loan or self._take(waiter.outer), None
            slot.charges = charges
            self._give(waiter, slot)

        self._set_alarm(None, math.inf)
        self._ungate(now)

    def _ungate(self, now: float) -> None:
        """Need no more than a slot from now on, once a cool-off is over, if nobody waits for a time."""
        if not self.meters and self.governor is not None:
            self._gated = now < self.governor.staggers_until

    def _next(self) -> Waiter | None:
        """Return the first in line of those for whom there is a slot."""
        borrower = next(iter(self._borrowing)) if self._borrowing else None
        if not self._queue or self.paused or self.running >= self.limit:
            return borrower

        head = next(iter(self._queue))
        return head if borrower is None or head.number < borrower.number else borrower

    def _ready_at(self, costs: tuple[float, ...], now: float) -> float:
        at = now if self.governor is None else self.governor.ready_at(now)
        for meter, cost in zip(self.meters, costs, strict=True):
            at = max(at, meter.ready_at(cost, now))

        return at

    def _reserve(self, costs: tuple[float, ...], now: float) -> list[Charge] | None:
        if self.governor is not None:
            self.governor.start(now)

        return [meter.reserve(cost) for meter, cost in zip(self.meters, costs, strict=True)] or None

    def _set_alarm(self, waiter: Waiter | None, at: float) -> None:
        alarmed, self._alarmed = self._alarmed, waiter
        if alarmed is not None and alarmed is not waiter:
            alarmed.set_alarm(math.inf)

        if waiter is not None:
            waiter.set_alarm(at)

    def _give(self, waiter: Waiter, slot: Slot) -> None:
        waiter.slot = slot
        self._leave(waiter)

    def _leave(self, waiter: Waiter) -> None:
        self._leave_lines(waiter)
        if self._alarmed is waiter:
            self._set_alarm(None, math.inf)

        waiter.event.set()

    def _leave_lines(self, waiter: Waiter) -> None:
        waiter.line.pop(waiter, None)
        if waiter.lender is not None and waiter.lender.waiters:
            waiter.lender.waiters.pop(waiter, None)

"""
The slots of one event loop.

**A slot is the right to run one attempt.** A pool has ``limit`` of them. An attempt that runs other
invocations, and waits for them, *lends* them its slot, one at a time, as GNU make's jobserver does (Paul
Smith, "POSIX Jobserver", GNU make manual, section 13.1). A borrower can lend on. So at most ``limit``
invocations do work of their own, and however deep they are nested, the innermost one has a slot to run in:
nested use never deadlocks. A second nested invocation at the same time needs a slot of the pool.

**A waiter stands in up to two lines**: one of the pool's, and that of its lender, the innermost invocation
around it that still runs. The first grant takes it out of both. The pool has three lines, each first come,
first served:

- ``returning``: attempts that gave their slot up while they waited for a reader or for a change by other
  agents. They go first and pay nothing.
- ``queue``: attempts that have not begun. They need a slot, and all at once the costs of all rates and the
  end of a cool-off.
- ``borrowing``: attempts that have not begun and have a slot on loan. They wait only for rates or a cool-off.
  A pause does not hold them, since their lender runs already.

**All decisions are in ``SlotPool.serve()``**, which serves every waiter that can be served, and sets one
alarm for the first that must wait for a time. Later arrivals never overtake it. It is called at each change
that a waiter may wait for: a slot is given back, a limit is raised, a cost is paid, given back or settled, an
attempt that may give back a part of a budget begins to wait for others, a pause ends, an alarm fires. Every
change is synchronous. The one ``await`` is in ``SlotPool.wait()``, and a cancellation there gives up the
place in line, or the slot if it was granted in the same moment.

**An agent that waits for a change by other agents** gives its slot back meanwhile. ``away`` has the theory.

**When an invocation ends while its slot is on loan**, the loan becomes the borrower's own slot, and waiters
in its line move on to the lender around it.
"""

from __future__ import annotations

__all__ = ["HELD", "RELEASED", "SUSPENDED", "Pool", "Slot", "Waiting", "current_slot"]

import enum
import math
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

from .._errors import QueueFull
from .._eventloop.deadlines import AttemptScope
from .._eventloop.loop import EventLoop
from .._invocation import Invocation
from .._result import InvocationResult
from .._verdict import Verdict
from .admission import Admission, Bill
from .work import Work

current_slot: ContextVar[Slot | None] = ContextVar("agentloop.current_slot", default=None)
"""The slot of the invocation that the current code runs in."""


class Waiting(Protocol):
    """The part of a waiter that slots use."""

    @property
    def slot(self) -> Slot:
        """The slot to be granted."""
        ...


class Pool(Protocol):
    """The part of a :class:`SlotPool` that slots and their holders use."""

    admission: Admission
    loop: EventLoop
    running: int
    in_line: int
    pending: int
    users: int
    route: Callable[[Invocation[Any]], Any] | None
    keys: Any
    is_current: Callable[[], bool]
    on_resize: set[Callable[[], None]]
    limit: int
    work: Work

    @property
    def max_concurrency(self) -> int: ...

    def serve(self) -> None: ...
    def lender(self, slot: Slot | None, anyones: bool = False) -> Slot | None: ...
    def offer_loan(self, waiter: Any, lender: Slot | None) -> None: ...
    def offer_loans_anew(self) -> None: ...
    def pay(self, bill: Bill) -> None: ...
    def refund(self, bill: Bill) -> None: ...
    def conclude(self, bill: Bill) -> None: ...
    def settle(self, bill: Bill, result: InvocationResult[Any]) -> None: ...
    def revise(self, verdict: Verdict, error: Exception, timed_out: bool) -> Verdict: ...
    def learn(self, slot: Slot, verdict: Verdict | None, longest_cool_off: float) -> None: ...
    def answered(self, slot: Slot) -> None: ...
    def begin_stall(self, slot: Slot) -> None: ...
    def end_stall(self, slot: Slot) -> None: ...
    def used(self) -> None: ...
    def forget(self, slot: Slot) -> None: ...
    def refuse_deadlocked(self) -> None: ...
    def is_hopeless(self, patience: float | None) -> bool: ...
    def waits_for_calls(self, slot: Slot) -> bool: ...
    def report_away(self) -> None: ...
    def acquire_nowait(self, slot: Slot, returning: bool = False) -> bool: ...
    def enqueue(self, slot: Slot, returning: bool = False, owner: Any = None) -> Any: ...
    def refuse_if_full(self, waiter: Any) -> QueueFull | None: ...
    async def wait(self, waiter: Any) -> bool: ...
    def withdraw(self, waiter: Any) -> None: ...


class Hold(enum.Enum):
    """Whether an attempt has its slot."""

    HELD = enum.auto()
    SUSPENDED = enum.auto()
    """It has given the slot up for a while."""
    RELEASED = enum.auto()


HELD, SUSPENDED, RELEASED = Hold


class Slot:
    """
    The right to run one attempt: a slot of the limiter, or the slot of an outer invocation, on loan.

    :param pool: the pool that grants it
    :param outer: the slot of the invocation that runs this one; ``None`` outside of an agent
    :param bill: the bill of the attempt, if there are rates
    """

    def __init__(self, pool: Pool, outer: Slot | None, bill: Bill | None = None) -> None:
        self.pool: Pool = pool
        self.outer = outer
        self.bill: Bill | None = bill
        self.epoch: int = pool.admission.epoch
        self.hold: Hold = HELD
        # Whether it can be acquired and released by a count alone: it has no outer slot and no bill, and was
        # neither lent, nor asked for, nor suspended.
        self.is_plain: bool = outer is None and bill is None
        self.lender: Slot | None = None
        self.lent: Slot | None = None
        # The waiters for this slot on loan; made for the first one.
        self.waiters: OrderedDict[Waiting, None] | None = None

    @property
    def is_released(self) -> bool:
        """Whether the attempt has ended."""
        return self.hold is RELEASED

    def attempt_scope(self) -> AttemptScope | None:
        """Return the scope of the attempt, if it has begun."""

    @property
    def began_at(self) -> float | None:
        """When the attempt began, if it is the first one of its invocation."""
        return None

    def note_grant(self, epoch: int) -> None:
        """Note that the slot was granted, in an epoch of the limit."""
        self.hold = HELD
        self.epoch = epoch

    def pay(self) -> None:
        """Pay the reserved bill of the attempt, which calls its agent now."""
        assert self.bill is not None
        self.pool.pay(self.bill)

    def release(
        self, verdict: Verdict | None = None, succeeded: bool = False, longest_cool_off: float = math.inf
    ) -> None:
        """
        Give the slot back. If it is lent, the borrower keeps it and gives it back later. The reservation of
        an attempt that never began is given back too.

        :param verdict: the judgement of the attempt, where it failed
        :param succeeded: whether it succeeded; a cancelled one did neither
        :param longest_cool_off: the longest cool-off that a Retry-After may begin, in seconds
        """
        pool = self.pool
        if self.is_plain and verdict is None and pool.admission.is_open:
            # The common case: a slot that was never lent, and an attempt that teaches nothing.
            self.hold = RELEASED
            pool.running -= 1
            if pool.in_line:
                pool.serve()

            return

        suspended = self.hold is SUSPENDED
        self.hold = RELEASED
        bill = self.bill
        if bill is not None and bill.charges and not bill.is_paid:
            pool.refund(bill)
        elif verdict is not None or (succeeded and pool.admission.listens):
            pool.learn(self, verdict, longest_cool_off)

        if not suspended:
            self._pass_on()
        else:
            self._is_back()

        if pool.keys is not None:
            pool.forget(self)

        if self.outer is not None and self.outer.hold is RELEASED:
            # Released outer slots are skipped. Otherwise a chain of invocations, each of which starts the
            # next one in the background, would keep all slots before it alive.
            self.outer = pool.lender(self.outer, anyones=True)

    def give_back(self) -> None:
        """Give the slot back as :meth:`release` does, for an attempt that did not begin and still may."""
        if self.bill is not None and self.bill.charges:
            self.pool.refund(self.bill)

        self._pass_on()
        self.pool.forget(self)

    def suspend(self) -> None:
        """Give the slot back for a while."""
        self.hold = SUSPENDED
        self.is_plain = False
        self._pass_on()

    def resume(self, granted: Slot) -> None:
        """
        Go on after :meth:`suspend`, as the same object, since nested invocations refer to it.

        :param granted: the slot that was acquired for it
        """
        self.hold = HELD
        self.lender, granted.lender = granted.lender, None
        granted.hold = RELEASED
        if self.pool.keys is not None:
            self.pool.keys.move(granted, self)

        self.pool.forget(granted)
        if self.lender is not None:
            self.lender.lent = self

        self._is_back()
        self.pool.offer_loans_anew()
        if self.pool.keys is not None:
            # A nested attempt of another key may borrow its place.
            self.pool.serve()

        self.step_aside_again()

    def step_aside_if_waiting(self) -> None:
        """Give the slot back if the agent only waits for others; outer agents that wait for it do so too."""
        absent = self.pool.loop.absent
        waits = self in absent.waits or self.pool.waits_for_calls(self)
        if waits and self.hold is HELD and self.lent is None:
            absent.away.add(self)
            self.suspend()
            self.pool.report_away()
            around = self._around()
            if around is not None:
                around.step_aside_if_waiting()

    def _is_back(self) -> None:
        if self in self.pool.loop.absent.away:
            self.pool.loop.absent.away.remove(self)
            self.pool.report_away()

    def _around(self) -> Slot | None:
        """Return the slot of the innermost invocation around this one that has its slot."""
        outer = self.outer
        while outer is not None and outer.hold is not HELD:
            outer = outer.outer

        return outer

    # -- loans

    def lend(self, borrower: Slot) -> None:
        """Lend the slot."""
        self.is_plain = False
        self.lent = borrower
        borrower.lender = self
        self.pool.work.loans += 1
        if self.pool.keys is not None:
            self.pool.keys.take(borrower)

    def offer(self, waiter: Waiting) -> bool:
        """Lend the slot to a waiter if it is not lent; else add the waiter to its line."""
        if self.lent is None and (self.pool.keys is None or self.pool.keys.has_place(waiter.slot)):
            self.lend(waiter.slot)
            return True

        if self.waiters is None:
            self.is_plain = False
            self.waiters = OrderedDict()

        self.waiters[waiter] = None
        return False

    def forget(self, waiter: Waiting) -> None:
        """Remove a waiter from the line for this slot."""
        if self.waiters:
            self.waiters.pop(waiter, None)

    def _pass_on(self) -> None:
        pool = self.pool
        pool.admission.end_probe(self)
        waiters, self.waiters = self.waiters, None
        if waiters:
            lender = pool.lender(self.outer)
            for waiter in waiters:
                pool.offer_loan(waiter, lender)

        if pool.keys is not None:
            pool.keys.give_back(self)

        borrower, self.lent = self.lent, None
        lender, self.lender = self.lender, None
        if borrower is None and lender is None:
            pool.running -= 1
        else:
            pool.work.loans -= 1

        if borrower is not None:
            # The borrower now owns the slot, or has it on loan from the outer attempt.
            borrower.lender = lender
            if lender is not None:
                lender.lent = borrower
        elif lender is not None:
            lender._take_back()

        pool.serve()

    def _take_back(self) -> None:
        """Take the slot back from its borrower, and lend it to the next waiter."""
        self.lent = None
        if self.waiters:
            self.pool.offer_loan(next(iter(self.waiters)), self)

        self.step_aside_again()

    def step_aside_again(self) -> None:
        """Give the slot back if the agent, or one that it waits for, has stepped aside without it."""
        absent = self.pool.loop.absent
        if not (absent.waits or absent.away):
            return

        if self in absent.waits or any(slot._around() is self for slot in absent.away):
            self.step_aside_if_waiting()

"""The conditions for an attempt besides a slot: rates that it can pay, and a provider that takes it."""

from __future__ import annotations

__all__ = ["Admission", "Bill", "QueueBound"]

import logging
import math
from collections.abc import Iterable
from typing import Any

import attrs

from .. import _validators as must
from .._errors import BudgetSpent
from .._eventloop.errors import is_error
from .._foreign import foreign_code
from .._invocation import Invocation
from .._provider.provider import Provider
from .._result import InvocationResult
from .._verdict import Verdict, VerdictKind
from .budget import Budget
from .rates import Charge, Meter, price
from .retry_budget import RetryLedger

_logger = logging.getLogger("agentloop")

# Weight of the moving mean of durations: roughly the number of the latest attempts that it covers.
_LATELY = 20


@attrs.define(eq=False)
class Bill:
    """
    The payments of one attempt to each rate.

    The costs are *reserved* when the attempt gets its slot, and *paid* when its agent is called. An attempt
    that never begins gets a *refund*. When the invocation has ended, the payment of its last attempt is
    *settled*: it is corrected to the real cost. A payment for an earlier attempt is *concluded*: it stays,
    but budgets *forgive* it after an overload.

    :param costs: the cost for each rate
    :param charges: the reserved or paid amounts; empty before that, and once they were given back
    :param is_paid: whether the bill is paid
    """

    costs: tuple[float, ...]
    charges: list[Charge] = attrs.field(factory=list[Charge])
    is_paid: bool = False

    def again(self) -> Bill:
        """Return the bill of another attempt of the same invocation."""
        return Bill(self.costs)


class QueueBound:
    """
    Bounds how many invocations wait for a slot, and knows how long attempts take.

    :param max_waiting: how many may wait
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.waiting = 0
        """How many of the counted invocations wait."""
        self.mean: float | None = None
        """The mean duration of the latest attempts, in seconds; ``None`` before one has ended."""
        self._ended = 0

    def ended(self, seconds: float) -> None:
        """Count an attempt that has ended after so many seconds."""
        self._ended = min(self._ended + 1, _LATELY)
        mean = self.mean or 0.0
        self.mean = mean + (max(0.0, seconds) - mean) / self._ended


class Admission:
    """
    The rates, the provider and the retry budget of a limiter in one event loop.

    An attempt reserves the costs of all rates at once when it gets its slot, and pays them when its agent is
    called. In between, the event loop may be busy with other tasks for longer than the period of a rate.

    It never reads a clock: the caller passes the time.

    :param meters: count the rates
    :param provider: adapts the limit to the provider, and holds attempts back for it
    :param ledger: bounds retries
    :param bound: bounds how many invocations wait
    """

    def __init__(
        self,
        meters: Iterable[Meter] = (),
        provider: Provider | None = None,
        ledger: RetryLedger | None = None,
        bound: QueueBound | None = None,
    ) -> None:
        self.meters: tuple[Meter, ...] = tuple(meters)
        self.budgets: tuple[Budget, ...] = tuple(meter for meter in self.meters if isinstance(meter, Budget))
        self.unsettled: dict[Bill, Any] = {}
        """The attempts that reserved or paid from a budget and have not ended, by their bills."""
        self.provider = provider
        self.ledger = ledger
        self.bound = bound
        self.gated: bool = bool(self.meters)
        """Whether an attempt may need more than a slot: because of rates, a pause or a cool-off."""
        self.paused: bool = False
        """Whether only attempts on a borrowed slot may begin."""
        self.epoch: int = 0
        """How often the limit was cut. An attempt remembers the epoch in which it began."""
        self.recovers: bool = False
        """Whether the limit was cut and may grow again."""
        self._always_listens = ledger is not None or bound is not None
        self.listens: bool = self._always_listens
        """Whether successes have to be counted."""
        self.is_open: bool = not (self.gated or self.listens)
        """Whether an attempt needs only a free slot, and its success need not be counted."""
        self._settle_failed = False
        self._shared = False

    def _update_is_open(self) -> None:
        self.is_open = not (self.gated or self.paused or self.listens or self._shared)

    def share(self) -> None:
        """Note that an attempt also needs a place, which limiters of other keys share."""
        self._shared = True
        self._update_is_open()

    def pause(self, paused: bool) -> None:
        """Let only attempts on a borrowed slot begin, or all again."""
        self.paused = paused
        self._update_is_open()

    # -- before an attempt

    def price(self, invocation: Invocation[Any]) -> Bill | None:
        """
        Return the bill of an invocation's attempts, if there are rates.

        :raises Exception: if a rate's ``cost`` raises, or the cost can never be paid
        """
        if not self.meters:
            return None

        return Bill(tuple(price(meter.rate, invocation) for meter in self.meters))

    def ready_at(self, bill: Bill | None, now: float) -> float:
        """Return when a bill can be reserved, ``now`` or later."""
        at = now if self.provider is None else self.provider.ready_at(now)
        if bill is not None:
            for meter, cost in zip(self.meters, bill.costs, strict=True):
                at = max(at, meter.ready_at(cost, now))

        return at

    def binds(self, now: float) -> bool:
        """Return whether a rate is used in part, or attempts are held back."""
        held = self.provider is not None and self.provider.holds(now)
        return held or any(meter.binds(now) for meter in self.meters)

    def estimate(self, bill: Bill | None, ahead: int, limit: int, now: float) -> float | None:
        """
        Return in about how many seconds an attempt would begin that stands in line.

        :param ahead: how many stand in line before it
        :param limit: how many may run at once
        :return: ``None`` if there is no estimate: while paused, or before any attempt has ended
        """
        if self.paused or self.bound is None or self.bound.mean is None:
            return None

        held_until = None if self.provider is None else self.provider.held_until(now)
        at = max(now + (ahead + 1) * self.bound.mean / limit, self.ready_at(bill, now), held_until or now)
        return at - now if at < math.inf else None

    def reserve(self, attempt: object, bill: Bill | None, now: float) -> None:
        """Reserve the bill of an attempt that :meth:`ready_at` lets begin now."""
        if self.provider is not None:
            self.provider.cool_off.start(attempt, now)

        if bill is not None:
            bill.charges = [meter.reserve(cost) for meter, cost in zip(self.meters, bill.costs, strict=True)]
            if self.budgets:
                self.unsettled[bill] = attempt

    def spent(self, bill: Bill, corrected: bool) -> BudgetSpent | None:
        """
        Return the error of an attempt that cannot be paid, now or later, because a budget is spent.

        :param corrected: whether an attempt that has paid may still be settled
        """
        for meter, cost in zip(self.meters, bill.costs, strict=True):
            if isinstance(meter, Budget) and meter.is_spent(cost, corrected):
                return BudgetSpent(cost, meter.remaining, meter.rate.limit)

        return None

    def end_probe(self, attempt: object) -> None:
        """Note that an attempt, which may be the probe of a cool-off, gives its slot back."""
        if self.provider is not None and self.provider.cool_off.probe is not None:
            self.provider.cool_off.end(attempt)

    def update_gate(self, now: float) -> None:
        """Update :attr:`gated`, once no attempt waits for a time: only rates and cool-offs shut the gate."""
        if not self.meters and self.provider is not None:
            self.gated = self.provider.holds(now)
            self._update_is_open()

    # -- once it begins, and afterwards

    def begin(self, running: int) -> None:
        """Count an attempt that begins while the limit recovers."""
        assert self.provider is not None
        self.provider.limit.begin(running)

    def pay(self, bill: Bill, now: float) -> None:
        """Pay a reserved bill."""
        bill.is_paid = True
        for meter, charge in zip(self.meters, bill.charges, strict=True):
            meter.pay(charge, now)

    def refund(self, bill: Bill) -> None:
        """Give back a reservation that was not paid."""
        for meter, charge in zip(self.meters, bill.charges, strict=True):
            meter.release(charge)

        bill.charges = []
        self.unsettled.pop(bill, None)

    def conclude(self, bill: Bill) -> bool:
        """
        Note that an attempt has ended and will be retried.

        :return: whether waiters may have waited for its budget
        """
        return self.unsettled.pop(bill, None) is not None

    def forgive(self, bill: Bill) -> None:
        """Give back the budget payments of an attempt that met an overload."""
        for meter, charge in zip(self.meters, bill.charges, strict=True):
            if isinstance(meter, Budget):
                meter.forgive(charge)

    def settle(self, bill: Bill, result: InvocationResult[Any], now: float) -> None:
        """Correct the payment of an invocation's last attempt, now that the invocation has ended."""
        try:
            self._settle(bill, result, now)
        finally:
            self.unsettled.pop(bill, None)

    def _settle(self, bill: Bill, result: InvocationResult[Any], now: float) -> None:
        for meter, charge in zip(self.meters, bill.charges, strict=True):
            settle = meter.rate.settle
            if settle is None:
                continue

            try:
                cost = settle(result)
                must.check_number("the return value of settle", cost, minimum=0, finite=True)
            except BaseException as exc:
                if not is_error(exc):
                    raise

                if not self._settle_failed:
                    self._settle_failed = True
                    with foreign_code:
                        _logger.exception("settle=%r failed; its further errors are not logged", settle)
            else:
                meter.correct(charge, cost, now)

    def succeeded(self, epoch: int, running: int, now: float) -> None:
        """
        Learn from an attempt that has succeeded.

        :param epoch: the epoch in which it began
        :param running: how many attempts run, with this one
        """
        if self.ledger is not None:
            self.ledger.succeeded(now)

        if self.provider is not None:
            self.provider.answered(epoch, now)
            if self.recovers:
                self.provider.limit.complete(epoch, running - 1)

    def failed(self, verdict: Verdict, epoch: int, running: int, longest_cool_off: float, now: float) -> None:
        """
        Learn from an attempt that has failed.

        :param epoch: the epoch in which it began
        :param running: how many attempts run, with this one
        :param longest_cool_off: the longest cool-off that a Retry-After may begin, in seconds
        """
        if self.provider is not None and verdict.kind is VerdictKind.OVERLOAD:
            asked = verdict.retry_after
            # A Retry-After that no invocation will wait for holds nothing back.
            hold_seconds = None if asked is None or asked > longest_cool_off else asked
            self.provider.reject(epoch, running - 1, hold_seconds, now)

    def follow(self, now: float) -> None:
        """Update the flags from the provider's state."""
        provider = self.provider
        assert provider is not None
        self.epoch = provider.limit.epoch
        self.recovers = provider.limit.recovers
        self.listens = provider.listens or self._always_listens
        self.gated = bool(self.meters) or provider.holds(now)
        self._update_is_open()

    def may_retry(self, now: float) -> bool:
        """Count a retry, if the budget has one left."""
        return self.ledger is None or self.ledger.may_retry(now)

"""What an attempt needs besides a slot: rates that it can pay, and the end of a cool-off."""

from __future__ import annotations

__all__ = ["Admission", "Bill"]

import logging
import math
from collections.abc import Iterable
from typing import Any

import attrs

from .. import _validators as must
from .._eventloop.errors import is_error
from .._foreign import foreign_code
from .._invocation import Invocation
from .._result import InvocationResult
from .._verdict import Verdict, VerdictKind
from .overload import AdaptiveLimit
from .rates import Charge, Rate, make_meter, price
from .retry_budget import RetryLedger

_logger = logging.getLogger("agentloop")


@attrs.define(eq=False)
class Bill:
    """
    What one attempt pays to each rate.

    :param costs: how much
    :param charges: what is reserved or paid; empty before that, and once it was given back
    :param is_paid: whether it is paid
    """

    costs: tuple[float, ...]
    charges: list[Charge] = attrs.field(factory=list[Charge])
    is_paid: bool = False

    def again(self) -> Bill:
        """Return the bill of another attempt of the same invocation."""
        return Bill(self.costs)


class Admission:
    """
    The rates, the working limit and the retry budget of a limiter in one event loop.

    An attempt reserves the costs of all rates at once when it gets its slot, and pays them when its agent is
    called: in between, the event loop may be busy with other tasks for longer than the time that a rate is
    about.

    It never reads a clock: the caller tells the time.

    :param rates: how much may start in a time
    :param governor: lowers the limit after overloads, and holds attempts back in a cool-off
    :param ledger: bounds retries
    """

    def __init__(
        self,
        rates: Iterable[Rate] = (),
        governor: AdaptiveLimit | None = None,
        ledger: RetryLedger | None = None,
    ) -> None:
        self.meters = tuple(make_meter(rate) for rate in rates)
        self.governor = governor
        self.ledger = ledger
        self.gated = bool(self.meters)
        """Whether an attempt may need more than a slot; during a cool-off, even where there are no rates."""
        self.paused = False
        """Whether no attempt begins but those on loan."""
        self.epoch = 0
        """How often the limit was cut. An attempt remembers the epoch in which it began."""
        self.recovers = False
        """Whether the limit was cut and may grow again."""
        self.listens = ledger is not None
        """Whether successes count for anything."""
        self.is_open = not (self.gated or self.listens)
        """Whether a free slot is all that an attempt needs, and nothing is learnt from its success."""
        self._settle_failed = False

    def _look(self) -> None:
        self.is_open = not (self.gated or self.paused or self.listens or self.epoch)

    def pause(self, paused: bool) -> None:
        """Let no attempt begin but those on loan, or all again."""
        self.paused = paused
        self._look()

    @property
    def held_until(self) -> float:
        """When the cool-off ends; minus infinity if there was none."""
        return -math.inf if self.governor is None else self.governor.held_until

    @property
    def cuts(self) -> int:
        """How often overload has lowered the limit."""
        return 0 if self.governor is None else self.governor.cuts

    # -- before an attempt

    def price(self, invocation: Invocation[Any]) -> Bill | None:
        """
        Return what an attempt of an invocation pays, if there are rates.

        :raises Exception: if a rate's ``cost`` raises, or the cost can never be paid
        """
        if not self.meters:
            return None

        return Bill(tuple(price(meter.rate, invocation) for meter in self.meters))

    def ready_at(self, bill: Bill | None, now: float) -> float:
        """Return when a bill can be reserved, ``now`` or later."""
        at = now if self.governor is None else self.governor.ready_at(now)
        if bill is not None:
            for meter, cost in zip(self.meters, bill.costs, strict=True):
                at = max(at, meter.ready_at(cost, now))

        return at

    def reserve(self, bill: Bill | None, now: float) -> None:
        """Reserve a bill for which it is time."""
        if self.governor is not None:
            self.governor.start(now)

        if bill is not None:
            bill.charges = [meter.reserve(cost) for meter, cost in zip(self.meters, bill.costs, strict=True)]

    def open_gate(self, now: float) -> None:
        """Note that no attempt waits for a time; once a cool-off is over, a slot is all that is needed."""
        if not self.meters and self.governor is not None:
            self.gated = now < self.governor.staggers_until
            self._look()

    # -- once it begins, and afterwards

    def begin(self, running: int) -> None:
        """Count an attempt that begins while the limit recovers."""
        assert self.governor is not None
        self.governor.begin(running)

    def pay(self, bill: Bill, now: float) -> None:
        """Pay what was reserved."""
        bill.is_paid = True
        for meter, charge in zip(self.meters, bill.charges, strict=True):
            meter.pay(charge, now)

    def refund(self, bill: Bill) -> None:
        """Give back what was reserved and not paid."""
        for meter, charge in zip(self.meters, bill.charges, strict=True):
            meter.release(charge)

        bill.charges = []

    def settle(self, bill: Bill, result: InvocationResult[Any], now: float) -> None:
        """Correct what the last attempt of an invocation has paid, now that it has ended."""
        for meter, charge in zip(self.meters, bill.charges, strict=True):
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

    def learn(
        self, verdict: Verdict | None, epoch: int, running: int, longest_hold: float, now: float
    ) -> bool:
        """
        Learn from the end of an attempt.

        :param verdict: why it failed; ``None`` if it succeeded
        :param epoch: the epoch in which it began
        :param running: how many attempts run, with this one
        :param longest_hold: for how many seconds others wait at most because of it
        :return: whether the limit may have changed
        """
        governor = self.governor
        if verdict is None:
            if self.ledger is not None:
                self.ledger.succeeded(now)

            if governor is None or not self.recovers:
                return False

            governor.complete(running - 1)
        elif governor is None or verdict.kind is not VerdictKind.OVERLOAD:
            return False
        else:
            if verdict.retry_after is not None:
                governor.hold(now, min(verdict.retry_after, longest_hold))

            governor.reject(epoch, now)
            self.gated = self.gated or now < governor.staggers_until

        self.follow(governor)
        return True

    def follow(self, governor: AdaptiveLimit) -> None:
        """Take over what the governor has come to."""
        self.epoch = governor.epoch
        self.recovers = governor.recovers
        self.listens = self.recovers or self.ledger is not None
        self._look()

    def may_retry(self, now: float) -> bool:
        """Count a retry, if the budget has one left."""
        return self.ledger is None or self.ledger.may_retry(now)

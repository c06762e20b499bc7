"""How much may start in a time, or at all: rates, and what keeps count of them."""

__all__ = ["Charge", "Meter", "Rate", "make_meter", "price"]

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from .. import _validators as must
from .._invocation import Invocation
from .._misuse import name_parameters
from .._result import InvocationResult


def _check_unit(rate: "Rate", attribute: "attrs.Attribute[Any]", value: float | None) -> None:
    if rate.cost is None and value is not None and value < 1:
        advice = (
            ""
            if rate.per_seconds is None
            else ": for one attempt in two seconds write Rate(1, per_seconds=2)"
        )
        raise ValueError(
            f"{attribute.name} must be at least 1 where each attempt costs 1, got {value!r}{advice}"
        )


def _check_burst(rate: "Rate", attribute: "attrs.Attribute[Any]", value: float | None) -> None:
    del attribute
    if value is not None and rate.per_seconds is None:
        raise ValueError(
            f"burst must be left out where per_seconds is None, got {value!r}: "
            "nothing flows back into a budget, and all of it may be spent at once"
        )


def _optional_callable(owner: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None:
        must.plain_function(owner, attribute, value)


@name_parameters()
@attrs.frozen
class Rate:
    """
    How much may start in a time, as a provider's requests or tokens per minute; or a budget.

    Every attempt pays its cost when its agent is called, a retry like any other. Without ``burst`` the
    attempts that start within any ``per_seconds`` never cost more than ``limit`` together; all of it may be
    spent at once. With ``burst`` this is a token bucket of that size, which fills evenly: at most ``burst``
    is spent at once, and within any ``per_seconds`` at most ``limit + burst``.

    With ``per_seconds=None`` this is a *budget*: ``limit`` may be spent once, as long as the limiter lives,
    in all event loops together. Nothing flows back but what ``settle`` corrects, and the cost of an attempt
    that ended in an overload. An attempt that cannot be paid waits as long as a running one may give
    something back: one for which there is a ``settle``, and which neither waits for invocations that it runs
    nor has waited for the reader of its stream for five seconds. If there is none, a single invocation is
    ``SKIPPED`` with a :exc:`BudgetSpent`, a stream raises it, and a batch stops. The first in line decides:
    cheaper invocations behind it do not overtake it, and those of its batch are not tried.

    :param limit: how much may be spent in ``per_seconds``
    :param per_seconds: the time that ``limit`` is meant for, in seconds; ``None`` for a budget
    :param burst: how much may be spent at once; absent, ``limit``
    :param cost: what an attempt is going to cost, given its invocation, such as its tokens; absent, 1. It is
        asked once for each invocation, and what it raises is the invocation's error
    :param settle: what the last attempt did cost, given the result of its invocation, whatever its status;
        the difference is given back, or charged. What it raises is logged, and changes nothing
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if a value is out of its range
    """

    limit: float = attrs.field(validator=[must.number(above=0, finite=True), _check_unit])
    per_seconds: float | None = attrs.field(
        default=60.0, validator=must.number(above=0, optional=True, finite=True)
    )
    burst: float | None = attrs.field(
        default=None, validator=[must.number(above=0, optional=True, finite=True), _check_burst, _check_unit]
    )
    cost: Callable[[Invocation[Any]], float] | None = attrs.field(default=None, validator=_optional_callable)
    settle: Callable[[InvocationResult[Any]], float] | None = attrs.field(
        default=None, validator=_optional_callable
    )


def price(rate: Rate, invocation: Invocation[Any]) -> float:
    """
    Return what an attempt of an invocation costs.

    :raises Exception: what the rate's ``cost`` raises
    :raises TypeError: if it gives no number
    :raises ValueError: if that is negative or not finite, or more than can ever be paid at once
    """
    if rate.cost is None:
        return 1

    cost = rate.cost(invocation)
    must.check_number(f"the cost of {invocation.agent_id!r}", cost, minimum=0, finite=True)
    name, most = ("limit", rate.limit) if rate.burst is None else ("burst", rate.burst)
    if cost > most:
        raise ValueError(
            f"the cost of {invocation.agent_id!r} is {cost!r}, which can never be paid with {name}={most!r}: "
            "split the invocation, or raise the rate"
        )

    return cost


@attrs.define(eq=False)
class Charge:
    """
    What one attempt has paid to one meter.

    :param cost: how much
    :param at: when it paid; infinite while that is only reserved
    :param number: which charge of its meter it is, from 1
    """

    cost: float
    at: float = math.inf
    number: int = 0


class Meter(ABC):
    """
    Keeps count of one rate in one event loop.

    A cost is reserved when an attempt is admitted, and paid when its agent is called. Between the two the
    event loop may be busy with other tasks, for longer than ``per_seconds`` too.

    It never reads a clock: the caller tells the time. What :meth:`ready_at` returns is a time at which a cost
    can be paid, so that one look at that time is enough, and no rounding can make that go on for ever.
    """

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._reserved: float = 0
        self._reservations: int = 0

    def reserve(self, cost: float) -> Charge:
        """Reserve a cost for which it is time."""
        self._reservations += 1
        self._reserved += cost
        return Charge(cost)

    def pay(self, charge: Charge, now: float) -> None:
        """Pay a cost that was reserved."""
        self.release(charge)
        charge.at = now
        self._pay(charge)

    def release(self, charge: Charge) -> None:
        """Give a reservation back."""
        self._reservations -= 1
        # Exactly, whatever the fractions before added up to.
        self._reserved = self._reserved - charge.cost if self._reservations else 0

    @abstractmethod
    def ready_at(self, cost: float, now: float) -> float:
        """
        Return when a cost can be reserved, at ``now`` or later, if no other is reserved before.

        :return: the time; infinite while that depends on when other reservations are paid
        """

    @abstractmethod
    def binds(self, now: float) -> bool:
        """Return whether less can be spent than at first."""

    @abstractmethod
    def _pay(self, charge: Charge) -> None: ...

    @abstractmethod
    def correct(self, charge: Charge, cost: float, now: float) -> None:
        """Make of a charge what it should have been."""


class _Window(Meter):
    """Remembers what was paid within the last ``per_seconds``, and for how long."""

    def __init__(self, rate: Rate) -> None:
        super().__init__(rate)
        assert rate.per_seconds is not None
        self._seconds = rate.per_seconds
        self._charges: deque[Charge] = deque()
        self._spent: float = 0

    def ready_at(self, cost: float, now: float) -> float:
        charges, seconds = self._charges, self._seconds
        while charges and charges[0].at + seconds <= now:
            charge = charges.popleft()
            self._spent -= charge.cost
            charge.at = -math.inf  # past correction

        if not charges:
            self._spent = 0  # exactly, whatever the fractions before added up to

        too_much = self._spent + self._reserved + cost - self.rate.limit
        at = now
        for charge in charges:
            if too_much <= 0:
                break

            too_much -= charge.cost
            at = charge.at + seconds

        return math.inf if too_much > 0 and self._reservations else at

    def binds(self, now: float) -> bool:
        return self._reservations > 0 or any(charge.at + self._seconds > now for charge in self._charges)

    def _pay(self, charge: Charge) -> None:
        if charge.cost:
            self._charges.append(charge)
            self._spent += charge.cost

    def correct(self, charge: Charge, cost: float, now: float) -> None:
        if charge.at + self._seconds > now:
            self._spent += cost - charge.cost
            if not charge.cost:
                # One that was for nothing was not remembered. Later than it was is on the safe side.
                self._charges.append(charge)
                charge.at = now

            charge.cost = cost


class _Bucket(Meter):
    """
    A token bucket, kept as the time at which it will be full again: the virtual scheduling form of the
    generic cell rate algorithm (ITU-T Recommendation I.371, annex A), where that time is called TAT.
    """

    def __init__(self, rate: Rate) -> None:
        super().__init__(rate)
        assert rate.burst is not None
        assert rate.per_seconds is not None
        self._seconds_each = rate.per_seconds / rate.limit
        self._depth = rate.burst * self._seconds_each
        self._full_at = -math.inf
        self._count = 0
        # How far from full the bucket was when each charge was paid, as far as it was nearer to full then
        # than at any later charge: so each number, and each value, is greater than the one before. What was
        # paid before the bucket was last full has flowed back since, and must not be given back as well.
        self._lows: list[tuple[int, float]] = []

    def ready_at(self, cost: float, now: float) -> float:
        seconds = (self._reserved + cost) * self._seconds_each
        if self._reserved and seconds > self._depth:
            return math.inf

        return max(now, self._full_at + seconds - self._depth)

    def binds(self, now: float) -> bool:
        return self._reservations > 0 or self._full_at > now

    def _pay(self, charge: Charge) -> None:
        charge.number = self._spend(charge.cost * self._seconds_each, charge.at)

    def correct(self, charge: Charge, cost: float, now: float) -> None:
        more = (cost - charge.cost) * self._seconds_each
        charge.cost = cost
        if more > 0:
            self._spend(more, now)
            return

        first = bisect_right(self._lows, (charge.number, math.inf))
        later = self._lows[first:]
        back = min(-more, max(0.0, self._full_at - now), *(missing for _, missing in later[:1]))
        self._full_at -= back
        # It was nearer to full by as much at every later charge.
        del self._lows[first:]
        for number, missing in later:
            self._note(number, missing - back)

    def _spend(self, seconds: float, now: float) -> int:
        self._count += 1
        self._note(self._count, max(0.0, self._full_at - now))
        self._full_at = max(self._full_at, now) + seconds
        return self._count

    def _note(self, number: int, missing: float) -> None:
        while self._lows and self._lows[-1][1] >= missing:
            self._lows.pop()

        self._lows.append((number, missing))


def make_meter(rate: Rate) -> Meter:
    """Return what keeps count of a rate that is no budget, in one event loop."""
    return _Window(rate) if rate.burst is None else _Bucket(rate)

"""Rates, and the meters that count them."""

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
    A bound on starts in a time, such as a provider's requests or tokens per minute; or a budget.

    Every attempt pays its cost when its agent is called, a retry like any other. Without ``burst`` the
    attempts that start within any ``per_seconds`` never cost more than ``limit`` together; all of it may be
    spent at once. With ``burst`` this is a token bucket of that size, which fills evenly: at most ``burst``
    is spent at once, and within any ``per_seconds`` at most ``limit + burst``.

    With ``per_seconds=None`` this is a *budget*: ``limit`` may be spent once, as long as the limiter lives,
    in all event loops together. Only corrections by ``settle`` flow back, and the cost of an attempt that
    ended in an overload. An attempt that cannot be paid waits as long as a running one may give something
    back: with a ``settle``, an attempt that neither waits for nested invocations nor has waited for the
    reader of its stream for five seconds. If there is none, a single invocation is ``SKIPPED`` with a
    :exc:`BudgetSpent`, a stream raises it, and a batch stops. Cheaper invocations do not overtake the first
    in line, and those of its batch are not tried.

    :param limit: how much may be spent in ``per_seconds``
    :param per_seconds: the time that ``limit`` is meant for, in seconds; ``None`` for a budget
    :param burst: how much may be spent at once; absent, ``limit``
    :param cost: returns the estimated cost of an attempt, such as its tokens, given its invocation; absent,
        1. It is called once for each invocation, and its exception is the invocation's error
    :param settle: returns the real cost of the last attempt, given the result of its invocation, of any
        status; the difference is given back, or charged. Its exception is logged, and changes nothing
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
    Return the cost of an attempt of an invocation.

    :raises Exception: the exception of the rate's ``cost``
    :raises TypeError: if ``cost`` returns no number
    :raises ValueError: if the cost is negative or not finite, or more than can ever be paid at once
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
    The payment of one attempt to one meter.

    :param cost: the amount
    :param at: when it was paid; infinite while it is only reserved
    :param number: its number among the charges of the meter, from 1
    """

    cost: float
    at: float = math.inf
    number: int = 0


class Meter(ABC):
    """
    Counts one rate in one event loop.

    A cost is reserved when an attempt is admitted, and paid when its agent is called. Between the two the
    event loop may be busy with other tasks, for longer than ``per_seconds`` too.

    It never reads a clock: the caller passes the time. :meth:`ready_at` returns a time at which the cost can
    be paid despite rounding, so that a waiter wakes only once.
    """

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._reserved: float = 0
        self._reservations: int = 0

    def reserve(self, cost: float) -> Charge:
        """Reserve a cost that :meth:`ready_at` lets begin now."""
        self._reservations += 1
        self._reserved += cost
        return Charge(cost)

    def pay(self, charge: Charge, now: float) -> None:
        """Pay a reserved cost."""
        self.release(charge)
        charge.at = now
        self._pay(charge)

    def release(self, charge: Charge) -> None:
        """Give a reservation back."""
        self._reservations -= 1
        # Exactly 0 without reservations, so that rounding errors do not add up.
        self._reserved = self._reserved - charge.cost if self._reservations else 0

    @abstractmethod
    def ready_at(self, cost: float, now: float) -> float:
        """
        Return when a cost can be reserved, at ``now`` or later, unless another one is reserved before.

        :return: the time; infinite while it depends on the payment of other reservations
        """

    @abstractmethod
    def binds(self, now: float) -> bool:
        """Return whether a part of the limit is used."""

    @abstractmethod
    def _pay(self, charge: Charge) -> None: ...

    @abstractmethod
    def correct(self, charge: Charge, cost: float, now: float) -> None:
        """Change the amount of a charge to its real cost."""


class _Window(Meter):
    """A sliding window: remembers each charge for ``per_seconds``."""

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
            self._spent = 0  # exactly, so that rounding errors do not add up

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
                # A charge of 0 was not remembered. It is added at the current time: too late is safe.
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
        # How far from full the bucket was when each charge was paid, for the charges at which it was nearer
        # to full than at any later one: so each number, and each value, is greater than the one before. A
        # charge that was paid before the bucket was last full has flowed back since, and must not be given
        # back as well.
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
        # The correction brings the bucket nearer to full at every later charge, by the same amount.
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
    """Return the meter of a rate that is no budget, for one event loop."""
    return _Window(rate) if rate.burst is None else _Bucket(rate)

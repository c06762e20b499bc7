"""How much may be spent at all: what keeps count of a rate without a time."""

__all__ = ["Budget", "Purse"]

import math

from .rates import Charge, Meter, Rate

# Up to such a part of a budget, sums of fractions are equal.
ROUNDING = 1e-9


class Purse:
    """
    What is left of one budget of a limiter, over all event loops that use it in turn.

    :param limit: how much may be spent
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._rounding = limit * ROUNDING
        self._left = limit

    def spend(self, cost: float) -> None:
        """Take something out, or put it back if it is negative."""
        self._left -= cost

    def left(self, reserved: float = 0) -> float:
        """Return what is left besides what is reserved; negative if more was spent than there was."""
        left = self._left - reserved
        return 0.0 if abs(left) <= self._rounding else left

    def can_pay(self, cost: float, reserved: float) -> bool:
        """Return whether a cost can be paid. What costs nothing always can."""
        return not cost or cost <= self._left - reserved + self._rounding


class Budget(Meter):
    """
    Keeps count of a budget in one event loop.

    What was paid is the purse's, so that it remains when the event loop ends, even by force. What was only
    reserved then has not been spent.
    """

    def __init__(self, rate: Rate, purse: Purse) -> None:
        super().__init__(rate)
        self._purse = purse

    @property
    def remaining(self) -> float:
        """What is left for attempts to come."""
        return self._purse.left(self._reserved)

    def binds(self, now: float) -> bool:
        del now  # for good
        return self.remaining < self._purse.limit

    def ready_at(self, cost: float, now: float) -> float:
        return now if self._purse.can_pay(cost, self._reserved) else math.inf

    def is_spent(self, cost: float, corrected: bool) -> bool:
        """
        Return whether a cost cannot be paid, now or later.

        :param corrected: whether an attempt that has paid may still be settled
        """
        if self._purse.can_pay(cost, self._reserved) or self._reservations:
            return False

        return self.rate.settle is None or not corrected

    def forgive(self, charge: Charge) -> None:
        """Give back what was paid, for good."""
        self._purse.spend(-charge.cost)
        charge.at = -math.inf  # past correction

    def _pay(self, charge: Charge) -> None:
        self._purse.spend(charge.cost)

    def correct(self, charge: Charge, cost: float, now: float) -> None:
        del now  # it is never too late
        if charge.at > -math.inf:
            self._purse.spend(cost - charge.cost)
            charge.cost = cost

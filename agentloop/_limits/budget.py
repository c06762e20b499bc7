"""Budgets: rates without a period, whose limit may be spent once."""

__all__ = ["Budget", "Purse"]

import math

from .rates import Charge, Meter, Rate

# Sums of fractions count as equal up to this part of a budget.
ROUNDING = 1e-9


class Purse:
    """
    The remainder of one budget of a limiter, over all event loops that use it in turn.

    :param limit: how much may be spent
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._rounding = limit * ROUNDING
        self._left = limit

    def spend(self, cost: float) -> None:
        """Take a cost out, or put a negative one back."""
        self._left -= cost

    def left(self, reserved: float = 0) -> float:
        """Return the remainder without reservations; negative if the budget was overdrawn."""
        left = self._left - reserved
        return 0.0 if abs(left) <= self._rounding else left

    def can_pay(self, cost: float, reserved: float) -> bool:
        """Return whether a cost can be paid. A cost of 0 always can."""
        return not cost or cost <= self._left - reserved + self._rounding


class Budget(Meter):
    """
    Counts a budget in one event loop.

    Payments are kept in the purse, so that they remain when the event loop ends, even by force. Reservations
    end with the event loop.
    """

    def __init__(self, rate: Rate, purse: Purse) -> None:
        super().__init__(rate)
        self._purse = purse

    @property
    def remaining(self) -> float:
        """The remainder for later attempts."""
        return self._purse.left(self._reserved)

    def binds(self, now: float) -> bool:
        del now  # a budget does not flow back
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
        """Give a payment back, for good."""
        self._purse.spend(-charge.cost)
        charge.at = -math.inf  # past correction

    def _pay(self, charge: Charge) -> None:
        self._purse.spend(charge.cost)

    def correct(self, charge: Charge, cost: float, now: float) -> None:
        del now  # it is never too late
        if charge.at > -math.inf:
            self._purse.spend(cost - charge.cost)
            charge.cost = cost

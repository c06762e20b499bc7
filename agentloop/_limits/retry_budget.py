"""Bounds the share of retries."""

__all__ = ["RetryBudget", "RetryLedger"]

from collections import deque

import attrs

from .. import _validators as must

SLICES = 10


@attrs.frozen
class RetryBudget:
    """
    Bounds the retries of everything that shares a limiter, so that an outage does not multiply the load.

    Within the last ``window_seconds`` there may be as many retries as ``ratio`` times the successes, and
    ``min_per_second`` for each second besides. Beyond that, an invocation is not retried: it fails with its
    last error, and a note on the error says so. Retries of an overload do not count: the limit, the cool-off
    and ``LoopConfig.overload_timeout_seconds`` bound them. This is the retry budget of Finagle
    (``com.twitter.finagle.service.RetryBudget``), which counts successes rather than calls here; for why, see
    "Handling Overload" in Beyer et al., "Site Reliability Engineering" (2016).

    :param ratio: retries for each success; 0.1 is one for ten
    :param min_per_second: retries in each second that are allowed in any case
    :param window_seconds: the time over which both are counted, in seconds, to a tenth of it
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if a value is out of its range
    """

    ratio: float = attrs.field(default=0.2, validator=must.number(minimum=0, finite=True))
    min_per_second: float = attrs.field(default=1.0, validator=must.number(minimum=0, finite=True))
    window_seconds: float = attrs.field(default=60.0, validator=must.number(above=0, finite=True))


class RetryLedger:
    """
    Counts a retry budget in one event loop, in slices of its window. It never reads a clock.

    :param budget: the settings
    """

    def __init__(self, budget: RetryBudget) -> None:
        self.budget = budget
        self._seconds = budget.window_seconds / SLICES
        # For each slice that is not over: its number, the successes in it, and the retries.
        self._slices: deque[list[int]] = deque()
        self._successes = 0
        self._retries = 0

    def succeeded(self, now: float) -> None:
        """Count a success."""
        self._slice(now)[1] += 1
        self._successes += 1

    def may_retry(self, now: float) -> bool:
        """Count a retry, if there may be one."""
        current = self._slice(now)
        budget = self.budget
        allowed = budget.ratio * self._successes + budget.min_per_second * budget.window_seconds
        if self._retries + 1 > allowed:
            return False

        current[2] += 1
        self._retries += 1
        return True

    def _slice(self, now: float) -> list[int]:
        number = int(now // self._seconds)
        slices = self._slices
        while slices and slices[0][0] <= number - SLICES:
            _, successes, retries = slices.popleft()
            self._successes -= successes
            self._retries -= retries

        if not slices or slices[-1][0] != number:
            slices.append([number, 0, 0])

        return slices[-1]

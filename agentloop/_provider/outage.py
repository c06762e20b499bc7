"""Detects outages of a provider, and measures the time without a success."""

from __future__ import annotations

__all__ = ["Outage"]

import math

# An outage is so many failures in a row, or as many as run at once if that is more.
IN_A_ROW = 8
# A limiter without a running or waiting attempt for so long was not in use.
BREAK_SECONDS = 60.0


class Outage:
    """
    Distinguishes failures of a provider from those of single invocations, and measures the time without a
    success.

    A single call without a connection may be chance. When as many calls in a row as run at once fail so, and
    none succeeds, the provider is down: a few retries each would lose all of them within seconds. From then
    on such failures are an overload, until the first success.

    It never reads a clock: the caller passes the time.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        """The time of the first failure of an outage; ``None`` if there is no outage."""
        self.fruitless_since: float | None = None
        """The time of the first overload since the last success; ``None`` if there was none."""
        self.timed_out: bool = True
        """Whether all of these overloads were time-outs."""
        self.row: int = 0
        """How many failures in a row are signs of an outage."""
        self._row_began = 0.0
        self._used_at = -math.inf

    @property
    def listens(self) -> bool:
        """Whether a success would change anything."""
        return self.row > 0 or self.fruitless_since is not None

    def fail(self, limit: int, now: float) -> bool:
        """
        Count a failure that is a sign of an outage.

        :param limit: how many calls may run at once
        :return: whether it is a part of an outage
        """
        if not self.row:
            self._row_began = now

        self.row += 1
        if self.since is None and self.row >= max(IN_A_ROW, limit):
            self.since = self._row_began

        return self.since is not None

    def overload(self, now: float, timed_out: bool) -> None:
        """Count an overload."""
        if self.fruitless_since is None:
            self.fruitless_since = now
            self.timed_out = True

        self.timed_out = self.timed_out and timed_out

    def succeed(self, since: bool = True) -> None:
        """
        Note that a call has succeeded.

        :param since: whether it began after the first failure in a row
        """
        self.fruitless_since = None
        if since:
            self.row = 0
            self.since = None

    # -- patience

    def use(self, now: float) -> None:
        """Note that an attempt has run or waited until now."""
        self._used_at = now

    def begin(self, now: float) -> None:
        """Note that an attempt runs or waits again: after a break, the time without a success begins anew."""
        if now >= self._used_at + BREAK_SECONDS:
            self.fruitless_since = None

    def lasts(self, patience: float | None, now: float) -> bool:
        """Return whether nothing has succeeded for longer than so many seconds; ``None`` is for ever."""
        since = self.fruitless_since
        return since is not None and patience is not None and now >= since + patience

"""The cool-off after a Retry-After: the hold on all calls, and the probes that test it."""

from __future__ import annotations

__all__ = ["CoolOff"]

import math

# The first probe comes after a twentieth of the time, and at least a second.
FIRST_PROBE = 0.05
SHORTEST_GAP = 1.0
# The waiting calls start one by one within a quarter of the time.
STAGGER = 0.25


class CoolOff:
    """
    Holds calls back for as long as a server has asked (Retry-After), except *probes*.

    Many servers name a time that is far longer than needed. So one call at a time goes ahead: the first after
    a twentieth of the time, and each next one after twice the gap before it, so that a server which punishes
    calls gets few of them. The first success of a call that began in the cool-off ends it. Otherwise calls
    start one by one when the time is over.

    It never reads a clock: the caller passes the time.
    """

    def __init__(self) -> None:
        self.until: float = -math.inf
        """Until when calls are held back."""
        self.staggers_until: float = -math.inf
        """Until when calls start one by one."""
        self.probe: object = None
        """The call that is the running probe."""
        self._probe_at = -math.inf
        self._gap = 0.0
        self._next_at = -math.inf
        self._pace = 0.0

    def hold(self, now: float, seconds: float, limit: int) -> bool:
        """
        Hold calls back for a time, unless they are held for longer already.

        :param limit: how many may run at once afterwards
        :return: whether this has begun a cool-off
        """
        begins = now >= self.until
        if now + seconds > self.until:
            self.until = self._next_at = now + seconds
            self.staggers_until = self.until + seconds * STAGGER
            self._pace = seconds * STAGGER / limit

        if begins:
            self.probe = None
            self._gap = max(SHORTEST_GAP, seconds * FIRST_PROBE)
            self._probe_at = now + self._gap

        return begins

    def ready_at(self, now: float) -> float:
        """Return when the next call may start; the end of a probe may change that."""
        if now < self.until:
            return self.until if self.probe is not None else max(now, min(self._probe_at, self.until))

        return max(now, min(self._next_at, self.staggers_until))

    def start(self, call: object, now: float) -> None:
        """Count a call that starts, at a time that :meth:`ready_at` allows."""
        if now < self.until:
            self.probe = call
            self._gap *= 2
            self._probe_at = now + self._gap
        elif now < self.staggers_until:
            self._next_at = max(self._next_at, now) + self._pace

    def end(self, call: object) -> bool:
        """Note that a call has ended, and return whether it was the probe."""
        if self.probe is not call:
            return False

        self.probe = None
        return True

    def lift(self, now: float) -> None:
        """End the cool-off early, and hold nothing back any more."""
        if now < self.until:
            self.until = self.staggers_until = -math.inf

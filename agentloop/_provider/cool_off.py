"""The time for which a server has asked not to be called, and the few calls that try it all the same."""

from __future__ import annotations

__all__ = ["CoolOff"]

import math

# The first probe comes after a twentieth of the time, and at least a second.
FIRST_PROBE = 0.05
SHORTEST_GAP = 1.0
# Those that waited start one by one within a quarter of the time.
STAGGER = 0.25


class CoolOff:
    """
    Holds calls back for as long as a server has asked (Retry-After), but for *probes*.

    Many servers name a time that is far longer than needed. So one call at a time goes ahead: the first after
    a twentieth of the time, and each next one after twice the gap before it, so that a server which punishes
    calls gets few of them. The first success of a call that began since ends the cool-off. Otherwise calls
    start one by one when the time is over.

    It never reads a clock: the caller tells the time.
    """

    def __init__(self) -> None:
        self.until = -math.inf
        """Until when calls are held back."""
        self.staggers_until = -math.inf
        """Until when those that may start do so one by one."""
        self.probe: object = None
        """The call that is the probe under way."""
        self._probe_at = -math.inf
        self._gap = 0.0
        self._next_at = -math.inf
        self._pace = 0.0

    def hold(self, now: float, seconds: float, limit: int) -> bool:
        """
        Hold calls back for a time, if they are not held for longer already.

        :param limit: how many may run at once afterwards
        :return: whether the cool-off has begun with this
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
        """Return when the next call may start; a probe that ends may change that."""
        if now < self.until:
            return self.until if self.probe is not None else max(now, min(self._probe_at, self.until))

        return max(now, min(self._next_at, self.staggers_until))

    def start(self, call: object, now: float) -> None:
        """Count a call that starts, and for which it is time."""
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
        """End a cool-off that is not over yet: hold nothing back any more."""
        if now < self.until:
            self.until = self.staggers_until = -math.inf

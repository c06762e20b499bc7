"""What a limiter learns from a provider that has too much to do."""

from __future__ import annotations

__all__ = ["AdaptiveLimit"]

import math
import random

from .._backoff import Backoff

CUT = 0.8
GROWTH = 0.05
# After so many steps of growth in a row each is by as much larger than the one before, up to a quarter.
STEADY_STEPS = 6
LARGEST_GROWTH = 0.25
IN_USE = 0.8
STAGGER = 0.25

# Where not even one call at a time is taken, one is tried now and then.
PROBES = Backoff(initial_seconds=0.1, multiplier=2, max_seconds=30, jitter="equal")
# So many such in a row are an outage.
OUTAGE = 3


class AdaptiveLimit:
    """
    Holds a working limit below a ceiling, by the rule of an epoch cut: an overload cuts it to four fifths,
    but only if the call that met it began after the last cut, so that one burst of rejections counts once,
    and no timer has to tell bursts apart. After as many clean completions in a row as the limit is, it grows
    by a twentieth, if four fifths of it were in use meanwhile; after a few such steps without a cut, by more,
    since the capacity is far above then (the idea of Ha, Rhee and Xu, "CUBIC: A New TCP-Friendly High-Speed
    TCP Variant", 2008). This is additive increase and multiplicative decrease (Chiu and Jain, "Analysis of
    the Increase and Decrease Algorithms for Congestion Avoidance", 1989) that counts calls, not seconds.

    At a limit of 1 there is nothing to cut, so the next call waits, twice as long each time. What was an
    outage rather than a lack of capacity ends as a TCP connection starts (RFC 5681, section 3.1): one more
    for each clean completion, up to the limit that there was before.

    It also keeps the cool-off for which a server has asked, and lets those who waited go one by one. It never
    reads a clock: who asks tells the time.

    :param ceiling: the highest limit
    """

    def __init__(self, ceiling: int) -> None:
        self.ceiling = self.limit = ceiling
        self.epoch: int = 0
        """How often there was a reason for a cut; a call remembers what it was when it began."""
        self.cuts = 0
        self.held_until = -math.inf
        """Until when nothing may start."""
        self.staggers_until = -math.inf
        """Until when those that may start do so one by one."""
        self._next_at = -math.inf
        self._gap = 0.0
        self._clean = 0
        self._most_in_use = 0
        self._steps = 0
        self._refused_probes = 0
        # The limit before a row of cuts, and up to where it is found again fast.
        self._before = ceiling
        self._in_row = False
        self._known = 0

    @property
    def recovers(self) -> bool:
        """Whether a clean completion is of interest."""
        return self.limit < self.ceiling or self._refused_probes > 0

    def resize(self, ceiling: int) -> None:
        """Change the ceiling, and the limit with it unless that is lower for a reason."""
        self.limit = ceiling if self.limit == self.ceiling else min(self.limit, ceiling)
        self.ceiling = ceiling

    def begin(self, in_use: int) -> None:
        """Count a call that begins."""
        self._most_in_use = max(self._most_in_use, in_use)

    def complete(self, in_use: int) -> None:
        """
        Count a call that has succeeded.

        :param in_use: how many calls run without it
        """
        if self._refused_probes >= OUTAGE:
            self._known = self._before

        self._refused_probes = 0
        self._clean += 1
        if self.limit < min(self._known, self.ceiling):
            self.limit += 1
        elif self._clean >= self.limit:
            self._in_row = False
            if self._most_in_use >= self.limit * IN_USE:
                self._steps += 1
                growth = min(GROWTH * max(1, self._steps - STEADY_STEPS + 1), LARGEST_GROWTH)
                self.limit = min(self.ceiling, self.limit + max(1, int(self.limit * growth)))
        else:
            return

        self._clean = 0
        self._most_in_use = in_use

    def reject(self, epoch: int, now: float) -> None:
        """
        Count a call that met an overload.

        :param epoch: the epoch in which it began
        """
        self._clean = 0
        if epoch != self.epoch:
            return

        self.epoch += 1
        self._known = self._steps = 0
        if self.limit == 1:
            self.hold(now, PROBES.delay(self._refused_probes, random))
            self._refused_probes += 1
            return

        if not self._in_row:
            self._in_row = True
            self._before = self.limit

        self.cuts += 1
        self.limit = max(1, int(self.limit * CUT))
        self._most_in_use = 0

    def hold(self, now: float, seconds: float) -> None:
        """Let nothing start for a time, and then one call after the other for a quarter of it."""
        if now + seconds > self.held_until:
            self.held_until = self._next_at = now + seconds
            self.staggers_until = self.held_until + seconds * STAGGER
            self._gap = seconds * STAGGER / self.limit

    def ready_at(self, now: float) -> float:
        """Return when the next call may start."""
        return max(now, min(self._next_at, self.staggers_until))

    def start(self, now: float) -> None:
        """Count a start for which it is time."""
        if now < self.staggers_until:
            self._next_at = max(self._next_at, now) + self._gap

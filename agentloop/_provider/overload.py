"""The adaptive limit: lower after an overload, higher again after successes."""

from __future__ import annotations

__all__ = ["AdaptiveLimit"]

import math
import random

from .._backoff import Backoff

# The factor of a cut.
CUT = 0.8
# The factors of the first and later cuts while the provider takes nothing.
DEEP_CUTS = (0.5, 0.0)
GROWTH = 0.05
# After so many steps of growth in a row, each step is larger than the last by GROWTH, up to a quarter.
STEADY_STEPS = 6
LARGEST_GROWTH = 0.25
IN_USE = 0.8

# How long the next attempt waits after an overload at a limit of 1.
PAUSES = Backoff(initial_seconds=0.1, multiplier=2, max_seconds=30, jitter="equal")
# After so many of these waits the provider counts as having been down, rather than short of capacity.
GONE = 3


class AdaptiveLimit:
    """
    Holds a working limit below a ceiling, by the rule of an epoch cut: an overload cuts it to four fifths,
    but only if the call that met it began after the last cut, so that one burst of rejections counts once,
    and no timer has to tell bursts apart. After as many clean completions in a row as the limit is, it grows
    by a twentieth, if four fifths of it were in use meanwhile; after a few such steps without a cut, by more,
    since the capacity is far above then (the idea of Ha, Rhee and Xu, "CUBIC: A New TCP-Friendly High-Speed
    TCP Variant", 2008). This is additive increase and multiplicative decrease (Chiu and Jain, "Analysis of
    the Increase and Decrease Algorithms for Congestion Avoidance", 1989) that counts calls, not seconds.

    When all calls that ran at the last cut have ended, and no call that began since has succeeded, the
    provider takes nothing at all: then a cut halves the limit, and the next one makes it 1. So a used-up
    window of requests costs few rejections.

    At a limit of 1 there is nothing to cut, so the next call waits, twice as long each time. After the
    provider was down, rather than short of capacity, the limit grows as in the slow start of TCP (RFC 5681,
    section 3.1): one more for each clean completion, up to the limit before.

    It never reads a clock: the caller passes the time.

    :param ceiling: the highest limit
    """

    def __init__(self, ceiling: int) -> None:
        self.ceiling: int = ceiling
        self.limit: int = ceiling
        self.epoch: int = 0
        """The number of the current epoch. Each call remembers the epoch of its start."""
        self._cut_at = 0
        self.cuts: int = 0
        self.next_at: float = -math.inf
        """When the next call may start."""
        self._clean = 0
        self._most_in_use = 0
        self._steps = 0
        # How many calls of earlier epochs run, and whether one of this epoch has succeeded.
        self._old = 0
        self._taken = True
        # Deep cuts, and pauses at a limit of 1, since the last success.
        self._deep_cuts = 0
        self._pauses = 0
        # The limit before a row of cuts, up to which it grows back fast.
        self._before = ceiling
        self._in_row = False
        self._known = 0

    @property
    def recovers(self) -> bool:
        """Whether a clean completion would change anything."""
        return self.limit < self.ceiling or self._pauses > 0

    def resize(self, ceiling: int) -> None:
        """Change the ceiling, and the limit with it unless overload has lowered the limit."""
        self.limit = ceiling if self.limit == self.ceiling else min(self.limit, ceiling)
        self.ceiling = ceiling

    def begin(self, in_use: int) -> None:
        """Count a call that begins."""
        self._most_in_use = max(self._most_in_use, in_use)

    def complete(self, epoch: int, in_use: int) -> None:
        """
        Count a call that has succeeded.

        :param epoch: the epoch in which it began
        :param in_use: how many calls run without it
        """
        self.answered(epoch)
        self._old -= epoch < self._cut_at
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

    def answered(self, epoch: int) -> None:
        """Note that the provider has taken a call, which may not be complete yet."""
        self._taken = self._taken or epoch >= self._cut_at
        if self._pauses >= GONE:
            self._known = self._before

        self._deep_cuts = self._pauses = 0
        self.next_at = -math.inf

    def reject(self, epoch: int, in_use: int, now: float) -> None:
        """
        Count a call that met an overload.

        :param epoch: the epoch in which it began
        :param in_use: how many calls run without it
        """
        self._clean = 0
        if epoch < self._cut_at:
            self._old -= 1
            return

        takes_nothing = self._old <= 0 and not self._taken
        self._cut_at = self.new_epoch()
        self._old = in_use
        self._taken = False
        self._known = self._steps = 0
        if self.limit == 1:
            self.next_at = now + PAUSES.delay(self._pauses, random)
            self._pauses += 1
            return

        if not self._in_row:
            self._in_row = True
            self._before = self.limit

        share = CUT
        if takes_nothing:
            share = DEEP_CUTS[min(self._deep_cuts, 1)]
            self._deep_cuts += 1

        self.cuts += 1
        self.limit = max(1, int(self.limit * share))
        self._most_in_use = 0

    def new_epoch(self) -> int:
        """Begin a new epoch, for the calls that begin from now on, and return it."""
        self.epoch += 1
        return self.epoch

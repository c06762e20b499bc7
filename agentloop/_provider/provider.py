"""The state of the provider behind a limiter."""

from __future__ import annotations

__all__ = ["Provider"]

import math

from .._signs import is_sign_of_outage
from .._verdict import Verdict, VerdictKind
from .cool_off import CoolOff
from .outage import Outage
from .overload import AdaptiveLimit


class Provider:
    """
    Learns from the ends of attempts: how many the provider takes at once, how long its cool-off lasts, and
    whether there is an outage.

    It never reads a clock: the caller passes the time.

    :param limit: how many attempts may run at once
    """

    def __init__(self, limit: AdaptiveLimit) -> None:
        self.limit = limit
        self.cool_off: CoolOff = CoolOff()
        self.outage: Outage = Outage()
        # The first epoch of calls in the cool-off, and the first one after the first failure of a row.
        self._held_at = self._row_at = 0
        self._shown: tuple[int, float, float | None] = limit.limit, -math.inf, None

    @property
    def listens(self) -> bool:
        """Whether a success would change anything."""
        return self.limit.recovers or self.outage.listens or self.cool_off.until > -math.inf

    def held_until(self, now: float) -> float | None:
        """Return when the cool-off ends, if there is one."""
        return self.cool_off.until if self.cool_off.until > now else None

    def has_changed(self) -> bool:
        """Return whether limit, cool-off or outage have changed since the last call of this method."""
        shown, self._shown = self._shown, (self.limit.limit, self.cool_off.until, self.outage.since)
        return shown != self._shown

    # -- before an attempt

    def holds(self, now: float) -> bool:
        """Return whether attempts may have to wait for a time."""
        return now < self.cool_off.staggers_until or now < self.limit.next_at

    def ready_at(self, now: float) -> float:
        """Return when the next attempt may begin."""
        return max(self.limit.next_at, self.cool_off.ready_at(now))

    # -- after an attempt

    def revise(self, verdict: Verdict, error: Exception, timed_out: bool, now: float) -> Verdict:
        """
        Return the verdict to act on: in an outage, a failure of the provider is an overload.

        :param verdict: the judgement of the error by itself
        :param timed_out: whether the attempt ran into a time-out of its own
        """
        outage = self.outage
        if verdict.kind is VerdictKind.OVERLOAD:
            outage.overload(now, False)
        elif verdict.kind is VerdictKind.TRANSIENT and (timed_out or is_sign_of_outage(error)):
            if not outage.row:
                self._row_at = self.limit.new_epoch()

            if outage.fail(self.limit.limit, now):
                outage.overload(now, timed_out)
                verdict = Verdict(VerdictKind.OVERLOAD, verdict.retry_after)

        return verdict

    def answered(self, epoch: int, now: float) -> None:
        """
        Note that an attempt was taken: it has succeeded, or its stream has yielded a chunk.

        :param epoch: the epoch in which it began
        """
        if epoch >= self._held_at:
            self.cool_off.lift(now)

        self.limit.answered(epoch)
        # The success of a call that began before the failures does not end the outage.
        self.outage.succeed(epoch >= self._row_at)

    def reject(self, epoch: int, in_use: int, hold_seconds: float | None, now: float) -> None:
        """
        Learn from an attempt that met an overload.

        :param epoch: the epoch in which it began
        :param in_use: how many attempts run without it
        :param hold_seconds: how long to hold others back, if at all
        """
        limit = self.limit
        limit.reject(epoch, in_use, now)
        if hold_seconds is not None and self.cool_off.hold(now, hold_seconds, limit.limit):
            # A success of a call that began before the cool-off does not end it.
            self._held_at = limit.new_epoch()

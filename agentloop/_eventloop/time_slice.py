"""Lets other tasks run beside work that never waits."""

from __future__ import annotations

__all__ = ["TimeSlice"]

from collections.abc import Callable

from anyio.lowlevel import checkpoint

SLICE_SECONDS = 0.005
# A virtual clock stands still while any task is ready, so time alone would never end a slice.
SLICE_CALLS = 200


class TimeSlice:
    """
    A slice of time that all tasks of one event loop share for work that may never wait.

    A checkpoint after each piece of work would cost more than the work. One per slice costs nothing, and lets
    other tasks run, and delivers cancellation, every few milliseconds. The slice is shared because a hundred
    workers with a slice each would block all other tasks for half a second.
    """

    __slots__ = ("_calls", "_end", "_now", "_yielding")

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._end = now() + SLICE_SECONDS
        self._calls = 0
        self._yielding = False

    def used_up(self, now: float) -> bool:
        """Count a piece of work that did not wait; return whether it is time for :meth:`yield_to_others`."""
        self._calls += 1
        return now >= self._end or self._calls >= SLICE_CALLS

    async def yield_to_others(self) -> None:
        """Let every other ready task run once. This is a checkpoint for cancellation."""
        if self._yielding:
            # Another worker already waits in this round, and begins the next slice after it.
            await checkpoint()
            return

        self._yielding = True
        try:
            await checkpoint()
        finally:
            self._yielding = False
            self._calls = 0
            self._end = self._now() + SLICE_SECONDS

"""When work that never waits has to let other tasks run."""

from __future__ import annotations

__all__ = ["TimeSlice"]

from collections.abc import Callable

from anyio.lowlevel import checkpoint

SLICE_SECONDS = 0.005
# A clock that stands still while anything is ready to run, as a virtual one does, ends no slice.
SLICE_CALLS = 200


class TimeSlice:
    """
    A slice of time shared by all tasks of one event loop that run work which may never wait.

    A checkpoint after each piece of work would cost more than the work; one per slice costs nothing, and
    lets others run, and cancellation in, every few milliseconds. The slice is shared because a slice for
    each of a hundred workers would be half a second for everybody else.
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
        """Let every other task that is ready run once. Cancellation passes through."""
        if self._yielding:
            # Another worker already measures this round, and begins the next slice when it is over.
            await checkpoint()
            return

        self._yielding = True
        try:
            await checkpoint()
        finally:
            self._yielding = False
            self._calls = 0
            self._end = self._now() + SLICE_SECONDS

"""A function call at a given time, within a batch."""

from __future__ import annotations

__all__ = ["Timer"]

from collections.abc import Callable

import anyio


class Timer:
    """
    Calls a function at a given time, in a task of the batch.

    :param at: when, by the event loop's clock
    :param action: the function
    """

    def __init__(self, at: float, action: Callable[[], object]) -> None:
        self._at = at
        self._action: Callable[[], object] | None = action
        self._scope = anyio.CancelScope()

    async def run(self) -> None:
        """Wait until the time has come or the timer is stopped."""
        # A new scope each time: a task that was cancelled natively runs this again.
        with anyio.CancelScope() as self._scope:
            if self._action is not None:
                await anyio.sleep_until(self._at)

        action, self._action = self._action, None
        if action is not None:
            action()

    def stop(self) -> None:
        """Drop the function, and end :meth:`run`."""
        self._action = None
        self._scope.cancel()

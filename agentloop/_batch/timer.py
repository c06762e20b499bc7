"""What a batch does at a time."""

from __future__ import annotations

__all__ = ["Timer"]

from collections.abc import Callable

import anyio


class Timer:
    """
    Calls a function at a time, in a task of the batch.

    :param at: when, by the event loop's clock
    :param action: the function
    """

    def __init__(self, at: float, action: Callable[[], object]) -> None:
        self._at = at
        self._action: Callable[[], object] | None = action
        self._scope = anyio.CancelScope()

    async def run(self) -> None:
        """Wait until it is time, unless this is stopped."""
        # Entered anew each time, since a task goes on that is cancelled natively.
        with anyio.CancelScope() as self._scope:
            if self._action is not None:
                await anyio.sleep_until(self._at)

        action, self._action = self._action, None
        if action is not None:
            action()

    def stop(self) -> None:
        """Call nothing any more, and let :meth:`run` end."""
        self._action = None
        self._scope.cancel()

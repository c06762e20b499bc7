"""From one event loop to another, in another thread or not."""

from __future__ import annotations

__all__ = ["Courier", "courier_here"]

from collections import deque
from collections.abc import Callable
from typing import Any

from anyio.lowlevel import RunVar, current_token


class Courier:
    """
    Calls functions in one event loop, in the order in which any threads have sent them, and waits for none.

    Many calls share one wake-up of the event loop, which costs more than all else about a call.

    :param native: the event loop of asyncio, or trio's token
    """

    def __init__(self, native: Any) -> None:
        self._soon: Callable[..., object] = (
            getattr(native, "run_sync_soon", None) or native.call_soon_threadsafe
        )
        self._sent: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._is_woken = False

    def send(self, fn: Callable[..., object], *args: Any) -> None:
        """
        Have a function called soon.

        :raises RuntimeError: if the event loop has ended
        """
        self._sent.append((fn, args))
        # Looked at only after the append: deliver() resets it before it looks for what was sent.
        if not self._is_woken:
            self._is_woken = True
            try:
                self._soon(self._deliver)
            except RuntimeError:
                self._is_woken = False
                raise

    def _deliver(self) -> None:
        self._is_woken = False
        while self._sent:
            fn, args = self._sent.popleft()
            fn(*args)


_courier: RunVar[Courier] = RunVar("agentloop.courier")


def courier_here() -> Courier:
    """Return the courier to the current event loop."""
    courier = _courier.get(None)
    if courier is None:
        courier = Courier(current_token().native_token)
        _courier.set(courier)

    return courier

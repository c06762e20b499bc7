"""Function calls from any thread to an event loop."""

from __future__ import annotations

__all__ = ["Mailbox", "mailbox_here"]

from collections import deque
from collections.abc import Callable
from typing import Any

from anyio.lowlevel import RunVar, current_token


class Mailbox:
    """
    Calls functions in one event loop, in the order in which threads have sent them. No sender waits.

    Functions that are sent together share one wake-up of the event loop: a wake-up costs more than all else
    about a remote call.

    :param native: asyncio's event loop or trio's token
    """

    def __init__(self, native: Any) -> None:
        self._soon: Callable[..., object] = (
            getattr(native, "run_sync_soon", None) or native.call_soon_threadsafe
        )
        self._sent: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._is_woken = False

    def send(self, fn: Callable[..., object], *args: Any) -> None:
        """
        Call a function soon in the event loop.

        :raises RuntimeError: if the event loop has ended
        """
        self._sent.append((fn, args))
        # Append first: _deliver() resets the flag before it reads the queue, so it misses no function.
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


_mailbox: RunVar[Mailbox] = RunVar("agentloop.mailbox")


def mailbox_here() -> Mailbox:
    """Return the mailbox of the current event loop."""
    mailbox = _mailbox.get(None)
    if mailbox is None:
        mailbox = Mailbox(current_token().native_token)
        _mailbox.set(mailbox)

    return mailbox

"""
Objects that serve several event loops in turn, and never two at once.

**A call counts itself, and then looks whether its state is marked as retired. An event loop that takes the
object over marks the state of the one before, and then looks at the count of its calls.** Whichever comes
second sees what the first has written. So a call needs the lock, under which all marks are made, only if it
finds one. This is Dekker's algorithm (E. W. Dijkstra, "Cooperating sequential processes", 1965). It needs all
threads to see all writes in one order, which the GIL gives.
"""

from __future__ import annotations

__all__ = ["Handover", "LoopState"]

import os
import threading
from typing import Any, Generic, TypeVar

from anyio.lowlevel import current_token

from .loop import kind_of_loop


class LoopState:
    """
    The state that an object has in the current event loop.

    :param handover: of the object
    """

    def __init__(self, handover: Handover[Any]) -> None:
        self._handover = handover
        self.token = current_token()
        self.kind = kind_of_loop()
        self.is_current = self.kind.make_is_current(self.token.native_token)
        """Returns whether the current task runs in the event loop."""
        self._process = os.getpid()
        self._thread = threading.current_thread()
        self.users = 0
        """How many calls are in progress in the event loop. Only its thread writes this."""
        self.retired = False
        """Whether another event loop has taken the object, or tried to, since the last claim."""

    @property
    def thread_name(self) -> str:
        """The name of the thread that runs the event loop."""
        return self._thread.name

    @property
    def in_another_thread(self) -> bool:
        """Whether another thread runs the event loop."""
        return self._thread is not threading.current_thread()

    def is_running(self) -> bool:
        """Return whether the event loop is running, in this process."""
        return self._process == os.getpid() and self.kind.is_running(self.token.native_token)

    def is_in_use(self) -> bool:
        """Return whether a call is in progress, in an event loop that runs or can go on."""
        if not self.users:
            return False

        if not self.in_another_thread:
            # Two event loops take turns in one thread if a trio run is the guest of an asyncio loop. A run
            # that was torn down there leaves calls behind that never end.
            return self.is_running()

        return (
            self._process == os.getpid()
            and self._thread.is_alive()
            and self.kind.can_go_on(self.token.native_token)
        )

    def claim(self) -> None:
        """
        Count a call that begins, and ends with ``users -= 1``.

        :raises RuntimeError: if the object is in use in another event loop by now
        """
        if not self.users:
            # One thread after the other can run an event loop.
            self._thread = threading.current_thread()

        self.users += 1
        if self.retired:
            try:
                self._handover.take(self)
            except BaseException:
                self.users -= 1
                raise


S = TypeVar("S", bound=LoopState)


class Handover(Generic[S]):
    """
    Hands an object from one event loop to the next, and refuses while it is in use.

    :param name: what to call the object in the message of an error
    :param advice: the end of that message: what to do instead
    """

    def __init__(self, name: str, advice: str) -> None:
        self._name = name
        self._advice = advice
        self._lock = threading.Lock()
        self.state: S | None = None
        """The state in the event loop that had the object last."""

    def current(self) -> S | None:
        """Return the state in the current event loop, if this had the object last."""
        state = self.state
        return state if state is not None and state.is_current() else None

    def take(self, state: S) -> None:
        """
        Take the object over.

        :param state: that of the current event loop
        :raises RuntimeError: if the object is in use in another event loop
        """
        with self._lock:
            last = self.state
            if last is not None and last is not state:
                last.retired = True
                if last.is_in_use():
                    raise RuntimeError(
                        f"this {self._name} is in use in another event loop, in thread {last.thread_name!r}"
                        f"{self._advice}"
                    )

            self.state = state
            state.retired = False

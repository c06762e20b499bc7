"""
Objects that serve several event loops in turn, and never two at once.

**A call counts itself, and then checks whether its state is marked as retired. An event loop that takes the
object over marks the state of the last one, and then checks the count of its calls.** The later of the two
sees the write of the earlier. So a call takes the lock, under which all marks are made, only if it finds a
mark. This is Dekker's algorithm (E. W. Dijkstra, "Cooperating sequential processes", 1965). It needs all
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
    The state of an object in the current event loop.

    :param handover: the handover of the object
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
            # that was torn down there leaves calls that never end.
            return self.is_running()

        return (
            self._process == os.getpid()
            and self._thread.is_alive()
            and self.kind.can_go_on(self.token.native_token)
        )

    def claim(self) -> None:
        """
        Count a call that begins. At its end, the caller does ``users -= 1``.

        :raises RuntimeError: if the object is now in use in another event loop
        """
        if not self.users:
            # An event loop can move to another thread.
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
    Hands an object from one event loop to the next, unless it is in use.

    :param name: the name of the object in error messages
    :param advice: the end of the message, with the alternative
    """

    def __init__(self, name: str, advice: str) -> None:
        self._name = name
        self._advice = advice
        self._lock = threading.Lock()
        self.state: S | None = None
        """The state in the event loop that had the object last."""

    def current(self) -> S | None:
        """Return the state in the current event loop, if that had the object last."""
        state = self.state
        return state if state is not None and state.is_current() else None

    def take(self, state: S) -> None:
        """
        Take the object over.

        :param state: the state in the current event loop
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

"""Objects that serve several event loops in turn, and never two at once."""

from __future__ import annotations

__all__ = ["Handover", "LoopState"]

import os
import threading
from typing import Generic, TypeVar

from anyio.lowlevel import EventLoopToken

from .loop import kind_of_loop


class LoopState:
    """
    The state that an object has in one event loop.

    :param token: of the event loop, which is the current one
    """

    def __init__(self, token: EventLoopToken) -> None:
        self._native = token.native_token
        self._kind = kind_of_loop()
        self.is_current = self._kind.make_is_current(self._native)
        """Returns whether the current task runs in the event loop."""
        self._process = os.getpid()
        self.thread = threading.current_thread()
        """The thread that runs the event loop."""
        self.users = 0
        """How many calls are in progress in the event loop. Only its thread writes this."""
        self.retired = False
        """Whether another event loop has the object, or is about to."""

    @property
    def in_another_thread(self) -> bool:
        """Whether another thread runs the event loop."""
        return self.thread is not threading.current_thread()

    def is_running(self) -> bool:
        """Return whether the event loop is running, in this process."""
        return self._process == os.getpid() and self._kind.is_running(self._native)

    def is_in_use(self) -> bool:
        """Return whether a call is in progress, in an event loop that runs or can go on."""
        if not self.users:
            return False

        if not self.in_another_thread:
            # Two event loops take turns in one thread if a trio run is the guest of an asyncio loop. A run
            # that was torn down there leaves calls behind that never end.
            return self.is_running()

        return self._process == os.getpid() and self.thread.is_alive() and self._kind.can_go_on(self._native)


S = TypeVar("S", bound=LoopState)


class Handover(Generic[S]):
    """
    Hands an object from one event loop to the next, and refuses while it is in use.

    **Two event loops never use it at once.** One that takes it over marks the other's state as retired, and
    then looks at its count of users. One that begins to use its state counts itself, and then looks at the
    mark. Whichever comes second sees the other. So only an event loop that finds the mark has to take the
    lock, under which all marks are made. (This is Dekker's algorithm. It needs both to see all writes in one
    order, which the GIL gives.)

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

        :param state: a new one, in the current event loop
        :raises RuntimeError: if the object is in use in another event loop
        """
        with self._lock:
            self._retire()
            self.state = state

    def claim(self, state: S) -> None:
        """
        Count a call that begins to use the object, and ends with ``state.users -= 1``.

        :param state: that in the current event loop
        :raises RuntimeError: if the object is in use in another event loop by now
        """
        if not state.users:
            # One thread after the other can run an event loop.
            state.thread = threading.current_thread()

        state.users += 1
        if state.retired:
            self._take_back(state)

    def _take_back(self, state: S) -> None:
        with self._lock:
            if self.state is not state:
                try:
                    self._retire()
                except BaseException:
                    state.users -= 1
                    raise

                self.state = state

            state.retired = False

    def _retire(self) -> None:
        state = self.state
        if state is None:
            return

        state.retired = True
        if state.is_in_use():
            state.retired = False
            raise RuntimeError(
                f"this {self._name} is in use in another event loop, in thread {state.thread.name!r}"
                f"{self._advice}"
            )

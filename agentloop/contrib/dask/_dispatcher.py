"""Which call goes to which process, and what becomes of the calls of a process that has died."""

from __future__ import annotations

__all__ = ["Call", "Dispatcher", "Link"]

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio

from ._courier import Courier
from ._errors import WorkerLost, pack_error
from ._functions import Function
from ._pickles import dumps

_numbers = itertools.count()
# A call that saw as many processes die runs alone from then on: one may be the fault of its neighbours.
_ALONE_AFTER = 2


class Call:
    """
    One call of a remote agent.

    :param function: what is called
    :param call: its arguments and what else travels with it, as ``Seat`` takes it
    :param caller: the courier to the current event loop, which waits
    """

    __slots__ = (
        "_caller",
        "call",
        "data",
        "deaths",
        "ended",
        "function",
        "is_cancelled",
        "is_error",
        "is_sent",
        "link",
        "number",
    )

    def __init__(self, function: Function, call: tuple[Any, ...], caller: Courier) -> None:
        self.number = next(_numbers)
        self.function = function
        self.call = call
        self.deaths = 0
        self.link: Link | None = None
        """The process that it was given to."""
        self.is_sent = self.is_cancelled = False
        self.ended = anyio.Event()
        self.is_error = False
        self.data = b""
        """The pickle of what the call has returned, or of its error."""
        self._caller = caller

    def end(self, is_error: bool, data: bytes) -> None:
        """Tell the caller, if its event loop is still running."""
        self.is_error = is_error
        self.data = data
        try:
            self._caller.send(self.ended.set)
        except RuntimeError:
            pass

    def fail(self, error: Exception) -> None:
        """Tell the caller that the call was given up."""
        self.end(True, pack_error(error, "the caller's process"))


class Link:
    """
    The calls of one worker process.

    :param address: the process
    :param wake: is called when there is something to send
    """

    def __init__(self, address: str, wake: Callable[[], object]) -> None:
        self.address = address
        self.open: dict[int, Call] = {}
        """All that has not ended there, cancelled calls too, so that a process that hangs gets no more."""
        self._wake = wake
        self._unsent: list[Call] = []
        self._cancelled: list[int] = []
        self._defined: set[int] = set()

    def assign(self, call: Call) -> None:
        """Send a call soon."""
        call.link = self
        call.is_sent = False
        self.open[call.number] = call
        self._unsent.append(call)
        self._wake()

    def cancel(self, call: Call) -> None:
        """Send the cancellation of a call soon."""
        self._cancelled.append(call.number)
        self._wake()

    def pack(self) -> bytes:
        """Return the message with all that is to be sent now; it is empty if that is nothing."""
        if not self._unsent and not self._cancelled:
            return b""

        calls, self._unsent = self._unsent, []
        cancelled, self._cancelled = self._cancelled, []
        definitions: dict[int, bytes] = {}
        for call in calls:
            call.is_sent = True
            function = call.function
            if function.number not in self._defined:
                self._defined.add(function.number)
                definitions[function.number] = function.define()

        sent = [(call.number, call.function.number, *call.call) for call in calls]
        return dumps((definitions, sent, cancelled))


class Dispatcher:
    """
    Gives each call to the process with the fewest. It never waits, and reads no clock.

    :param max_deaths: how many processes a call may see die
    """

    def __init__(self, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        self._alone_after = min(_ALONE_AFTER, max_deaths - 1)
        self.links: list[Link] = []
        self.waiting: deque[Call] = deque()
        """Calls that have no process."""
        self.suspects: deque[Call] = deque()
        """Calls that wait for a process of their own."""
        self._quarantine: Link | None = None
        """The process that takes nothing but suspects, one at a time."""
        self.lost = 0
        """How many processes have died."""
        self._closed: Exception | None = None

    def submit(self, call: Call) -> None:
        """Take a call that is new, or has lost its process."""
        if self._closed is not None:
            call.fail(self._closed)
            return

        is_suspect = call.deaths and call.deaths >= self._alone_after
        (self.suspects if is_suspect else self.waiting).append(call)
        self._serve()

    def add(self, link: Link) -> None:
        """Take a process that has joined."""
        self.links.append(link)
        self._serve()

    def lose(self, link: Link) -> list[Call]:
        """
        Give the calls of a process that has died to others.

        :return: those that were open there
        """
        self.links.remove(link)
        self.lost += 1
        if link is self._quarantine:
            self._quarantine = None

        calls, link.open = [*link.open.values()], {}
        for call in calls:
            call.link = None
            call.deaths += call.is_sent
            if call.is_cancelled:
                call.end(True, b"")
            elif call.deaths >= self._max_deaths:
                times = "once" if call.deaths == 1 else f"{call.deaths} times"
                call.fail(WorkerLost(f"the worker process died {times} while it ran this call", call.deaths))
            else:
                self.submit(call)

        self._serve()
        return calls

    def cancel(self, call: Call) -> None:
        """Have a call cancelled where it runs, unless it has ended."""
        call.is_cancelled = True
        if call.link is not None:
            if call.number in call.link.open:
                call.link.cancel(call)

            return

        for line in (self.waiting, self.suspects):
            if call in line:
                line.remove(call)
                call.end(True, b"")

    def ended(self, link: Link, number: int, is_error: bool, data: bytes) -> None:
        """Tell the caller of a call that has ended in its process."""
        # Unknown if the process answers twice.
        link.open.pop(number).end(is_error, data)
        if self.suspects or self._quarantine is not None:
            self._serve()

    def fail(self, error: Exception) -> None:
        """Give up all calls that wait for a process."""
        calls = [*self.waiting, *self.suspects]
        self.waiting.clear()
        self.suspects.clear()
        for call in calls:
            call.fail(error)

    def close(self, error: Exception) -> None:
        """Give up all calls, and those that are still to come."""
        self._closed = error
        self.fail(error)
        for link in self.links:
            calls, link.open = [*link.open.values()], {}
            for call in calls:
                call.fail(error)

    def _serve(self) -> None:
        if not self.links:
            return

        if self.suspects:
            link = self._quarantine = self._quarantine or self._emptiest(self.links)
            if not link.open:
                link.assign(self.suspects.popleft())
        elif self._quarantine is not None and not self._quarantine.open:
            self._quarantine = None

        others = self.links
        if self._quarantine is not None:
            others = [link for link in self.links if link is not self._quarantine]

        while self.waiting and others:
            self._emptiest(others).assign(self.waiting.popleft())

    def _emptiest(self, links: list[Link]) -> Link:
        return min(links, key=lambda link: len(link.open))

"""Assigns each call to a worker process, and the calls of a process that has died to others."""

from __future__ import annotations

__all__ = ["Call", "Dispatcher", "Worker"]

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio

from ._errors import WorkerLost, pack_error
from ._functions import Function
from ._mailbox import Mailbox
from ._pickles import dumps

_numbers = itertools.count()
# After so many deaths of its process, a call runs alone: another call may have caused one death.
_ALONE_AFTER = 2


class Call:
    """
    One call of a remote agent.

    :param function: the function to call
    :param call: its arguments, attempt and trace context, packed for ``AgentActor``
    :param caller: the mailbox of the current event loop, in which the caller waits
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
        "number",
        "worker",
    )

    def __init__(self, function: Function, call: tuple[Any, ...], caller: Mailbox) -> None:
        self.number = next(_numbers)
        self.function = function
        self.call = call
        self.deaths = 0
        self.worker: Worker | None = None
        """The worker process that the call was assigned to."""
        self.is_sent = self.is_cancelled = False
        self.ended = anyio.Event()
        self.is_error = False
        self.data = b""
        """The pickled return value or error."""
        self._caller = caller

    def end(self, is_error: bool, data: bytes) -> None:
        """Send the reply to the caller, if its event loop still runs."""
        self.is_error = is_error
        self.data = data
        try:
            self._caller.send(self.ended.set)
        except RuntimeError:
            pass

    def fail(self, error: Exception) -> None:
        """Give up the call: the caller gets the error."""
        self.end(True, pack_error(error, "the caller's process"))


class Worker:
    """
    One worker process and its calls.

    :param address: the address of the process in the cluster
    :param wake: called when there is something to send
    """

    def __init__(self, address: str, wake: Callable[[], object]) -> None:
        self.address = address
        self.open: dict[int, Call] = {}
        """Calls that have not ended, cancelled ones too: so a process that hangs looks busy, not idle."""
        self._wake = wake
        self._unsent: list[Call] = []
        self._cancelled: list[int] = []
        self._defined: set[int] = set()

    def assign(self, call: Call) -> None:
        """Send a call with the next message."""
        call.worker = self
        call.is_sent = False
        self.open[call.number] = call
        self._unsent.append(call)
        self._wake()

    def cancel(self, call: Call) -> None:
        """Send the cancellation of a call with the next message."""
        self._cancelled.append(call.number)
        self._wake()

    def pack(self) -> bytes:
        """Return the next message for ``AgentActor``; it is empty if there is nothing to send."""
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
    Assigns each call to the worker process with the fewest open calls. It never waits, and reads no clock.

    A call that may have killed its processes is a *suspect*. Suspects run one at a time in one process, the
    *quarantine*, which runs nothing else meanwhile. So the next death has one possible cause.

    :param max_deaths: after so many deaths of its process, a call fails with a :exc:`WorkerLost`
    """

    def __init__(self, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        self._alone_after = min(_ALONE_AFTER, max_deaths - 1)
        self.workers: list[Worker] = []
        self.waiting: deque[Call] = deque()
        """Calls that wait for a process."""
        self.suspects: deque[Call] = deque()
        """Calls that wait for the quarantine."""
        self._quarantine: Worker | None = None
        self.lost = 0
        """How many processes have died or left."""
        self._closed: Exception | None = None

    def submit(self, call: Call) -> None:
        """Add a call that is new, or whose process has died."""
        if self._closed is not None:
            call.fail(self._closed)
            return

        is_suspect = call.deaths and call.deaths >= self._alone_after
        (self.suspects if is_suspect else self.waiting).append(call)
        self._serve()

    def add(self, worker: Worker) -> None:
        """Add a process that has joined."""
        self.workers.append(worker)
        self._serve()

    def lose(self, worker: Worker) -> list[Call]:
        """
        Remove a process that has died, and assign its calls to others.

        :return: the calls that were open in it
        """
        self.workers.remove(worker)
        self.lost += 1
        if worker is self._quarantine:
            self._quarantine = None

        calls, worker.open = [*worker.open.values()], {}
        for call in calls:
            call.worker = None
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
        """Cancel a call in its process, unless it has ended. A call without a process ends at once."""
        call.is_cancelled = True
        if call.worker is not None:
            if call.number in call.worker.open:
                call.worker.cancel(call)

            return

        for line in (self.waiting, self.suspects):
            if call in line:
                line.remove(call)
                call.end(True, b"")

    def ended(self, worker: Worker, number: int, is_error: bool, data: bytes) -> None:
        """Send the reply of a process to the caller."""
        # Raises KeyError if the process replies twice.
        worker.open.pop(number).end(is_error, data)
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
        """Give up all calls, and each later one in :meth:`submit`."""
        self._closed = error
        self.fail(error)
        for worker in self.workers:
            calls, worker.open = [*worker.open.values()], {}
            for call in calls:
                call.fail(error)

    def _serve(self) -> None:
        if not self.workers:
            return

        if self.suspects:
            worker = self._quarantine = self._quarantine or self._emptiest(self.workers)
            if not worker.open:
                worker.assign(self.suspects.popleft())
        elif self._quarantine is not None and not self._quarantine.open:
            self._quarantine = None

        others = self.workers
        if self._quarantine is not None:
            others = [worker for worker in self.workers if worker is not self._quarantine]

        while self.waiting and others:
            self._emptiest(others).assign(self.waiting.popleft())

    def _emptiest(self, workers: list[Worker]) -> Worker:
        return min(workers, key=lambda worker: len(worker.open))

"""
The crew of a batch: its workers, and when each is hired, parked and woken.

**A worker** is a task that takes an invocation, waits for a slot, runs one attempt, and goes on with the
next. There are at most as many as the limiter has slots.

**Activated on demand.** A worker that begins an attempt activates another one (``activate()``), if there is
work left: it wakes a parked one, else it hires a new one. That one runs once the agent waits, or once the
time slice of agents that never wait is used up. So a batch of ten needs ten workers at most.

**Seeking.** A worker between two attempts is *seeking*: it is about to look for a job. While one is seeking,
no other is activated, since that one takes the next job, and activates the next worker with it.
``seeking`` changes in the same step as the worker, so that no worker counts twice: a worker that begins an
attempt stops seeking, one that ends it seeks again, and an activated worker seeks at once, before its task
runs.

**Parked.** A worker that finds no job waits on an event of its own. The caller that sets the event counts the
worker as seeking. ``close()`` wakes all of them, and they end.

**Replaced.** A worker whose agent has changed a context variable ends, and another one takes its place in all
counts: ``_runtime.run`` says why.

**Spoilt.** A worker in whose task an agent has left a scope open cannot go on: that scope could cancel the
next agent. Another worker takes its place too.
"""

from __future__ import annotations

__all__ = ["Crew"]

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import anyio

from .._eventloop.tasks import Tasks


class Member(Protocol):
    """The part of a worker that its crew uses."""

    def cancel(self, reason: str) -> None: ...


class Crew:
    """
    The workers of a batch.

    :param size: the largest number of workers
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.seeking = 0
        """How many workers are between two attempts."""
        self.can_activate = False
        """Whether a worker is parked or can be hired."""
        self.spoilt = 0
        """In how many workers an agent has left a scope open."""
        self.latest: Member | None = None
        """The worker that has looked for a job last; so all others have waited since they looked."""
        self._tasks: Tasks | None = None
        self._work: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._has_work: Callable[[], bool] | None = None
        self._hired = 0
        self._parked: dict[anyio.Event, None] = {}
        self._members: set[Member] = set()

    def open(
        self, tasks: Tasks, work: Callable[[], Coroutine[Any, Any, None]], has_work: Callable[[], bool]
    ) -> None:
        """
        Start workers on demand from now on, in a task group.

        :param work: the async function that a worker runs
        :param has_work: returns whether there is a job
        """
        self._tasks = tasks
        self._work = work
        self._has_work = has_work
        self._hired = self.seeking = 0
        self._parked.clear()
        self._count()

    def close(self) -> None:
        """Hire no more, and wake the parked workers to end."""
        # These refer to the batch, which refers to this object.
        self._tasks = self._work = self._has_work = self.latest = None
        self.seeking += len(self._parked)
        while self._parked:
            self._parked.popitem()[0].set()

        self._count()

    def resize(self, size: int) -> None:
        """Change the largest number of workers."""
        self.size = size
        self._count()

    def activate(self) -> None:
        """Wake or hire a worker, if there is work and no worker is seeking."""
        if self.seeking or not self.can_activate or self._has_work is None or not self._has_work():
            return

        self.seeking += 1
        if self._parked:
            self._parked.popitem()[0].set()
        else:
            self._hired += 1
            self.replace()

        self._count()

    async def park(self) -> None:
        """Wait until activated or closed."""
        if self._tasks is None:
            return

        event = anyio.Event()
        self._parked[event] = None
        self.seeking -= 1
        self._count()
        try:
            await event.wait()
        except BaseException:
            # A worker whose event was set already counts as seeking.
            self.seeking += event in self._parked
            self._parked.pop(event, None)
            self._count()
            raise

    def enter(self, worker: Member) -> None:
        """Note that a worker has begun."""
        self._members.add(worker)

    def leave(self, worker: Member) -> None:
        """Note that a worker has ended."""
        self._members.discard(worker)

    def cancel(self, reason: str) -> None:
        """Cancel all attempts that run."""
        for worker in tuple(self._members):
            worker.cancel(reason)

    def replace_spoilt(self) -> None:
        """Start another worker in place of the current one, whose task was spoilt."""
        assert self._tasks is not None
        self.spoilt += 1
        self._tasks.spoil()
        self.replace()

    def replace(self) -> None:
        """Start another worker, which takes the place of the current one in all counts."""
        assert self._tasks is not None
        assert self._work is not None
        self._tasks.start_once(self._work(), "agentloop worker")

    def _count(self) -> None:
        self.can_activate = self._tasks is not None and (bool(self._parked) or self._hired < self.size)

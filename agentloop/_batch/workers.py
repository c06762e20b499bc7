"""
The workers of a batch: who calls, parks and wakes them.

**A worker** is a task that takes an invocation, waits for a slot, runs one attempt, and goes on with the
next. There are at most as many as the limiter has slots.

**Called on demand.** A worker that has begun an attempt runs alone until its agent waits. Only then another
one is called (``call()``), if there is something left to do: a parked one, else a new one. So agents that
never wait need a single worker, and a batch of ten needs ten at most.

**Seeking.** A worker between two attempts is *seeking*: it is about to look for something to do. While one
does, no other is called, since that one takes what there is, and its agent then calls the next. Each change
of ``seeking`` is made in the same step as what it is about, so that it never counts a worker twice: a worker
that begins an attempt seeks no more, one that ends it seeks again, and a worker that is called seeks from
that moment on, before its task runs.

**Parked.** A worker that finds nothing to do waits on an event of its own. Whoever sets that counts the
worker as seeking. ``close()`` wakes all of them, and they end.

**Spoilt.** A worker in whose task an agent has left a scope open cannot go on: that scope could cancel
whatever runs in it. Another one takes over what it counts for.
"""

from __future__ import annotations

__all__ = ["Crew"]

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import anyio

from .._eventloop.tasks import Tasks


class Member(Protocol):
    """A worker, as far as its crew knows it."""

    def cancel(self, reason: str) -> None: ...


class Crew:
    """
    The workers of a batch.

    :param size: how many there are at most
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.seeking = 0
        """How many are between two attempts."""
        self.can_call = False
        """Whether one is parked or can be hired."""
        self.spoilt = 0
        """In how many an agent has left a scope open."""
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
        Hire from now on, into a task group.

        :param work: what a worker does
        :param has_work: returns whether there is something to do
        """
        self._tasks = tasks
        self._work = work
        self._has_work = has_work
        self._hired = self.seeking = 0
        self._parked.clear()
        self._count()

    def close(self) -> None:
        """Hire no more, and let those that are parked end."""
        # These refer to the batch, which refers to this.
        self._tasks = self._work = self._has_work = None
        self.seeking += len(self._parked)
        while self._parked:
            self._parked.popitem()[0].set()

        self._count()

    def resize(self, size: int) -> None:
        """Change how many there are at most."""
        self.size = size
        self._count()

    def call(self) -> None:
        """Let a worker look for something to do, if there is something and none looks already."""
        if self.seeking or not self.can_call or self._has_work is None or not self._has_work():
            return

        self.seeking += 1
        if self._parked:
            self._parked.popitem()[0].set()
        else:
            self._hired += 1
            self._hire()

        self._count()

    async def park(self) -> None:
        """Wait until called, or closed."""
        if self._tasks is None:
            return

        event = anyio.Event()
        self._parked[event] = None
        self.seeking -= 1
        self._count()
        try:
            await event.wait()
        except BaseException:
            # Whoever wakes a worker has counted it as seeking.
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

    def replace(self) -> None:
        """Let another worker go on in place of the current one, whose task was spoilt."""
        assert self._tasks is not None
        self.spoilt += 1
        self._tasks.spoil()
        # It takes over what this one counts for.
        self._hire()

    def _hire(self) -> None:
        assert self._tasks is not None
        assert self._work is not None
        self._tasks.start_once(self._work(), "agentloop worker")

    def _count(self) -> None:
        self.can_call = self._tasks is not None and (bool(self._parked) or self._hired < self.size)

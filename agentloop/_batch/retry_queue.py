"""The invocations of a batch that wait to be retried, or whose total time may pass while they wait."""

from __future__ import annotations

__all__ = ["RetryQueue"]

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import anyio

from .._limits.lines import Waiter
from .._limits.slots import Pool
from .._runtime.job import Job
from .room import KeyRoom


class RetryQueue:
    """
    Jobs that wait for a time, and one timer task for all of them. They need neither a slot nor a worker.

    The heap holds a job until its next attempt may begin. Then the job is due, until a worker takes it. For a
    job that is due or in line for a slot, the heap holds the time at which its total time is up.

    :param now: returns the time
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.count = 0
        """How many jobs wait to be retried."""
        self.due: dict[Job[Any], None] = {}
        """The jobs whose next attempt may begin."""
        self.waiters: dict[Job[Any], Waiter] = {}
        """The jobs that wait for a slot, each with its waiter."""
        self.room: KeyRoom | None = None
        """Counts the waiting jobs of each key, if each key has a limiter of its own."""
        self._now = now
        self._on_due: Callable[[], object] | None = None
        self._on_late: Callable[[Job[Any], float], object] | None = None
        self._heap: list[tuple[float, int, Job[Any]]] = []
        self._sequence = itertools.count()
        # How many entries of the heap belong to jobs that have left it.
        self._stale = 0
        self._wake: anyio.Event | None = None
        self._closed = False

    def push(self, job: Job[Any], wake_at: float) -> bool:
        """
        Add a job that waits to be retried.

        :return: whether the caller must start :meth:`watch`
        """
        self.count += 1
        heapq.heappush(self._heap, (wake_at, next(self._sequence), job))
        if self._wake is None:
            self._wake = anyio.Event()
            return True

        if self._heap[0][0] == wake_at:
            self._wake.set()

        return False

    def pop(self) -> Job[Any]:
        """Remove and return the first job that is due."""
        job = next(iter(self.due))
        if job.deadline < math.inf:
            # Called while the job is due, so that its total time stays in the heap while it waits in line.
            self._drop_stale()

        self._remove(job)
        return job

    def pop_all(self) -> list[Job[Any]]:
        """Remove and return all jobs, due or not."""
        jobs = [*self.due, *(job for at, _, job in self._heap if at == job.wake_at)]
        for job in jobs:
            self._remove(job)

        self._heap.clear()
        return jobs

    def pop_of(self, pool: Pool) -> list[Job[Any]]:
        """Remove and return all jobs of a pool, due or not."""
        jobs = [job for job in self.due if job.pool is pool]
        jobs += [job for at, _, job in self._heap if at == job.wake_at and job.pool is pool]
        for job in jobs:
            self._remove(job)

        self._heap = [entry for entry in self._heap if entry[2].pool is not pool]
        heapq.heapify(self._heap)
        return jobs

    def add_waiter(self, job: Job[Any], waiter: Waiter) -> None:
        """Note that a job waits in line for a slot."""
        self.waiters[job] = waiter

    def remove_waiter(self, job: Job[Any]) -> None:
        """Note that a job waits for a slot no more."""
        del self.waiters[job]

    def _drop_stale(self) -> None:
        """Bound the heap to a multiple of its live entries, once a job has left it."""
        self._stale += 1
        if self._stale * 2 > len(self._heap) + 16:
            self._heap = [
                (at, order, job)
                for at, order, job in self._heap
                if job in self.due or job in self.waiters or at == job.wake_at
            ]
            heapq.heapify(self._heap)
            self._stale = 0

    def open(self, on_due: Callable[[], object], on_late: Callable[[Job[Any], float], object]) -> None:
        """
        Begin, or begin again, without a timer task.

        :param on_due: called when jobs have become due
        :param on_late: called for each job whose total time is up
        """
        self._wake = None
        self._closed = False
        self._on_due = on_due
        self._on_late = on_late

    def close(self) -> None:
        """End :meth:`watch`."""
        self._closed = True
        # These refer to the batch, which refers to this object.
        self._on_due = self._on_late = None
        if self._wake is not None:
            self._wake.set()

    async def watch(self) -> None:
        """Wait for the time of each entry, until the heap is empty."""
        while self._heap and not self._closed:
            self._wake = anyio.Event()
            with anyio.CancelScope(deadline=self._heap[0][0]):
                await self._wake.wait()

            if not self._closed:
                self._move_due(self._now())

        self._wake = None

    def _remove(self, job: Job[Any]) -> None:
        self.due.pop(job, None)
        self.count -= 1
        job.wake()

    def _move_due(self, now: float) -> None:
        on_due, on_late = self._on_due, self._on_late
        assert on_due is not None
        assert on_late is not None
        while self._heap and self._heap[0][0] <= now:
            at, _, job = heapq.heappop(self._heap)
            if at == job.wake_at:
                self.due[job] = None
                if job.deadline < math.inf:
                    heapq.heappush(self._heap, (job.deadline, next(self._sequence), job))
            elif job in self.due:
                self._remove(job)
                on_late(job, now)
            elif job in self.waiters:
                on_late(job, now)

        on_due()

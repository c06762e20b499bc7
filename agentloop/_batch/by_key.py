"""The invocations of a batch that wait for a slot of their key, if each key has its own limiter."""

from __future__ import annotations

__all__ = ["ByKey"]

import math
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import anyio

from .._errors import BudgetSpent
from .._limits.lines import Waiter
from .._limits.slots import Pool, Slot
from .._runtime.job import Job
from .ending import Ending
from .inputs import InputSource
from .retry_queue import RetryQueue

T = TypeVar("T")


class ByKey(Generic[T]):
    """
    Jobs in the lines of their keys, each without a worker, so that no key holds up another.

    A worker that takes a job whose key has no slot leaves it in that key's line, and takes the next one. When
    the wait is over, the job is ready again. One task serves the pools in which the head of the line
    waits for a time.

    :param source: counts the jobs in line as not live, and takes those whose wait has ended
    :param retries: knows which jobs are in line
    :param ending: knows which keys were stopped
    :param now: returns the time
    """

    def __init__(
        self, source: InputSource[T], retries: RetryQueue, ending: Ending, now: Callable[[], float]
    ) -> None:
        self._source = source
        self._now = now
        self._retries = retries
        self._ending = ending
        self._jobs: dict[Waiter, Job[T]] = {}
        # The time at which each pool has to be served.
        self._alarms: dict[Pool, float] = {}
        self._changed: anyio.Event | None = None
        # Whether granted slots may have to be given back.
        self._may_be_unused = False
        self._activate: Callable[[], object] | None = None
        self._may_start: Callable[[], bool] | None = None
        self._spend: Callable[[Job[T], BudgetSpent], object] | None = None
        self._start: Callable[[Callable[[], Coroutine[Any, Any, None]], str], object] | None = None

    def acquire(self, job: Job[T]) -> Slot | None:
        """
        Return a slot for the next attempt of a job.

        :return: ``None`` if the job gets no further attempt, or waits in line
        """
        waiter = self._retries.waiters.get(job)
        if waiter is None:
            waiter_or_slot = self._ask(job)
            if not isinstance(waiter_or_slot, Waiter):
                return waiter_or_slot

            waiter = waiter_or_slot
            self._retries.add_waiter(job, waiter)
            if not waiter.is_over:
                self._jobs[waiter] = job
                self._source.free_room(job)
                return None

        self._retries.remove_waiter(job)
        if waiter.granted and self._ending.stopped_for(job) is None:
            return waiter.slot

        if waiter.granted:
            waiter.slot.give_back()
        elif waiter.error is not None:
            if isinstance(waiter.error, BudgetSpent) and self._spend is not None:
                self._spend(job, waiter.error)
            else:
                job.refuse(waiter.error)

            job.pool.withdraw(waiter)

        return None

    def _ask(self, job: Job[T]) -> Slot | Waiter | None:
        """Return a slot, or a place in line for it; ``None`` if the job gets no further attempt."""
        # resolve() finds the key, so it comes before the check of that key.
        if self._ending.stopped is not None or not job.resolve() or self._ending.stopped_for(job) is not None:
            return None

        slot = job.next_slot() if job.attempts else job
        return slot if job.pool.acquire_nowait(slot) else job.join_line(slot, self)

    def wait_ended(self, waiter: Waiter) -> None:
        job = self._jobs.pop(waiter, None)
        if job is not None:
            self._source.use_room(job)
            self._source.add_ready(job)
            if self._activate is not None:
                self._activate()

            self.check_unused()

    def stop(self, pool: Pool) -> list[Job[T]]:
        """
        Take out the waiting jobs of a key, which is neither to start nor to retry any more.

        :return: the jobs that waited to be retried; those that were in line are ready again
        """
        jobs = self._retries.pop_of(pool)
        for job in jobs:
            self._source.use_room(job)

        for waiter in [waiter for waiter in self._jobs if waiter.slot.pool is pool]:
            pool.withdraw(waiter)

        return jobs

    # -- time

    def open(
        self,
        activate: Callable[[], object],
        spend: Callable[[Job[T], BudgetSpent], object],
        start: Callable[[Callable[[], Coroutine[Any, Any, None]], str], object],
        may_start: Callable[[], bool] | None,
    ) -> None:
        """
        Start the task when it is needed, from now on.

        :param activate: activates a worker, if there is work
        :param spend: stops a key whose budget is spent
        :param may_start: returns whether a job can start now; if absent, each one can without help by others
        """
        self._may_start = may_start
        self._activate = activate
        self._spend = spend
        self._start = start
        self._changed = None
        self._watch_if_needed()

    def close(self) -> None:
        """End the task."""
        # These refer to the batch, which refers to this object.
        self._activate = self._spend = self._start = self._may_start = None
        if self._changed is not None:
            self._changed.set()

    def abandon(self) -> None:
        """Leave all lines, and give back all unused slots. No job becomes ready any more."""
        self._activate = None
        for waiter in tuple(self._jobs):
            waiter.slot.pool.withdraw(waiter)

        for job, waiter in tuple(self._retries.waiters.items()):
            self._retries.remove_waiter(job)
            if waiter.granted:
                waiter.slot.give_back()

    def wake_at(self, waiter: Waiter, at: float) -> None:
        pool = waiter.slot.pool
        self._alarms.pop(pool, None)
        if at < math.inf:
            self._alarms[pool] = at

        self._wake()

    def check_unused(self) -> None:
        """
        Have the task give back the slots of jobs that cannot start.

        Such a job waits for the reader. If the reader is an agent, it may run another invocation before it
        reads on, which needs the slot.
        """
        if self._may_start is not None:
            self._may_be_unused = True
            self._wake()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
        else:
            self._watch_if_needed()

    def _watch_if_needed(self) -> None:
        if (self._alarms or self._may_be_unused) and self._start is not None:
            self._changed = anyio.Event()
            self._start(self._watch, "agentloop keys")

    async def _watch(self) -> None:
        """Give unused slots back, and serve each pool when it is time."""
        while (self._alarms or self._may_be_unused) and self._start is not None:
            self._changed = anyio.Event()
            if self._may_be_unused:
                self._give_back_unused()
                continue

            with anyio.CancelScope(deadline=min(self._alarms.values())):
                await self._changed.wait()

            now = self._now()
            for pool in tuple(self._alarms):
                # Serving one pool changes the times of others that wait for the same places.
                if self._alarms.get(pool, math.inf) <= now:
                    del self._alarms[pool]
                    pool.serve()

        self._changed = None

    def _give_back_unused(self) -> None:
        self._may_be_unused = False
        for job, waiter in tuple(self._retries.waiters.items()):
            if waiter.granted and self._may_start is not None and not self._may_start():
                # The job stays ready, and asks for a slot again when a worker takes it.
                self._retries.remove_waiter(job)
                waiter.slot.give_back()

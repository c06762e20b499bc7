"""One worker of a batch."""

from __future__ import annotations

__all__ = ["Worker"]

import math
from types import TracebackType
from typing import Generic, TypeVar

import anyio

from .._errors import BudgetSpent
from .._eventloop.context import wait_for_cancellation
from .._eventloop.tasks import Tasks
from .._limits.slots import Slot, current_slot
from .._runtime.job import Job
from .bookkeeping import Bookkeeping

T = TypeVar("T")

_set_slot = current_slot.set


class Worker(Generic[T]):
    """
    Takes a job, waits for a slot, runs one attempt, and goes on with the next. ``crew`` has the theory.

    A worker keeps three things from one job to the next, since making each costs as much as all other work of
    a short attempt: the scope that times attempts out, the slot, if no waiter needs one, and the context, if
    no agent changes it. It leaves the scope and releases the slot before it awaits anything but an agent.

    :param batch: the batch
    :param tasks: the tasks of the batch
    """

    __slots__ = ("_batch", "_directly", "_has_slot", "_scope", "_tasks")

    def __init__(self, batch: Bookkeeping[T], tasks: Tasks) -> None:
        self._batch = batch
        self._tasks = tasks
        self._scope = batch.pool.loop.attempt_scope(batch.deadlines)
        # Whether the worker keeps the slot of its last job.
        self._has_slot = False
        # Whether it runs attempts in its own context, and so calls no other function of the user there.
        is_plain = batch.options.observer.only_counts and not batch.source.must_resolve
        self._directly = is_plain and batch.options.run is None and not batch.inherited.are_lost

    async def work(self) -> None:
        """Work until the batch is done."""
        batch, scope, inherited = self._batch, self._scope, self._batch.inherited
        pool, crew, source, ending = batch.pool, batch.crew, batch.source, batch.ending
        loop, options, admission, next_job = pool.loop, batch.options, pool.admission, batch.next_job
        now_at, cancellations = loop.now, loop.count_cancellations()
        directly, must_resolve, new_context = self._directly, source.must_resolve, inherited.context.copy
        async with self:
            while not batch.done:
                if directly and inherited.are_lost:
                    crew.replace()
                    break

                job: Job[T] | None = None
                slot: Slot | None = None
                crew.latest = self
                try:
                    if scope.scope is None and not scope.begin(math.inf):
                        # The batch is cancelled. The worker waits here, where it holds neither job nor slot.
                        await wait_for_cancellation()

                    job = next_job()
                    if job is None:
                        await self._park()
                        continue

                    fresh, in_limit = source.is_fresh and not must_resolve, pool.running <= pool.limit
                    if fresh and self._has_slot and in_limit and admission.is_open and ending.stopped is None:
                        slot, now = job, job.queued_at
                        self._has_slot = False
                    else:
                        slot = await self._acquire(job, must_resolve)
                        # A job that was just pulled began to wait in this step, unless it waited in line.
                        now = job.queued_at if fresh and not job.waited else now_at()

                    if slot is not None:
                        crew.seeking -= 1
                        if not crew.seeking and crew.can_activate:
                            crew.activate()

                        try:
                            if directly:
                                now = await job.run_directly(slot, options, scope, inherited, now)
                            else:
                                now = await job.run_isolated(slot, options, scope, new_context, now)
                        except BaseException:
                            crew.seeking += 1
                            batch.finish_cancelled(job, scope)
                            raise

                        crew.seeking += 1
                        if job.failures is not None:
                            batch.retry_or_finish(job, slot, scope, now)
                            if scope.is_spoilt:
                                break
                        else:
                            if slot.is_plain and slot.pool is pool and admission.is_open and not pool.in_line:
                                self._has_slot = True
                            else:
                                slot.release(None, True)

                            batch.finish(job, now)
                    elif job not in batch.retries.waiters:  # else it waits in the line of its key
                        ending.end_job(job)
                        batch.finish(job, now)

                    # A parked worker must not keep the arguments of a finished invocation alive.
                    job = slot = None
                    # While this worker waited, another one has looked for a job, if there is any.
                    if cancellations() or (crew.latest is self and loop.time_slice.used_up(now)):
                        await self._rest()
                except anyio.get_cancelled_exc_class():
                    # A late cancellation that an agent requested from a callback does not end the worker.
                    self.let_go()
                    await self._tasks.go_on()

    async def _rest(self) -> None:
        """Drop the native cancellations that an agent has left, or let other tasks run."""
        loop = self._batch.pool.loop
        self.let_go()
        if loop.count_cancellations()():
            await loop.forget_cancellations()
        else:
            await loop.time_slice.yield_to_others()

    async def _park(self) -> None:
        """Wait until there may be a job, or the batch is done."""
        batch = self._batch
        batch.check_done()
        if batch.pool.keys is not None:
            # Without more input, the batch may wait for its keys alone.
            batch.pool.refuse_deadlocked()
            if batch.has_work():
                return

        self.let_go()
        await batch.crew.park()

    async def __aenter__(self) -> None:
        if self._directly:
            _set_slot(self._batch.source.outer)

        self._tasks.enter()
        self._batch.crew.enter(self)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.let_go()
        self._scope.forget()
        self._batch.crew.leave(self)
        if exc is not None and self._batch.by_key is not None:
            # A cancelled agent may need one of the unused slots before it can end.
            self._batch.by_key.abandon()

        return await self._tasks.leave_by(exc)

    async def _acquire(self, job: Job[T], must_resolve: bool) -> Slot | None:
        """
        Return a slot for the next attempt of a job.

        :return: ``None`` if the job gets no further attempt, or waits in the line of its key
        """
        slot: Slot | None
        batch = self._batch
        self._give_back()
        if batch.by_key is not None:
            slot = batch.by_key.acquire(job)
        elif batch.ending.stopped is not None or (must_resolve and not job.resolve()):
            slot = None
        else:
            slot = job.next_slot() if job.attempts else job
            if not job.pool.acquire_nowait(slot):
                self.let_go()
                slot = await self._wait_in_line(job, slot)

        if slot is not None and job.total is not None and job.pool.loop.now() >= job.deadline:
            # The total time was up in the moment in which the slot was granted.
            slot.give_back()
            job.expire(job.total)
            slot = None

        return slot

    def _give_back(self) -> None:
        if self._has_slot:
            self._has_slot = False
            self._batch.pool.give_back()

    def cancel(self, reason: str) -> None:
        """Cancel the running attempt, if there is one."""
        self._scope.cancel(reason)

    def let_go(self) -> None:
        """Leave the scope and give the slot back, before awaiting anything but an agent."""
        self._scope.leave()
        self._give_back()
        if self._directly:
            # A waiting worker must not keep its last job alive.
            _set_slot(self._batch.source.outer)

    async def _wait_in_line(self, job: Job[T], slot: Slot) -> Slot | None:
        """Wait for the slot and return it; ``None`` if it was not granted, or the batch was stopped."""
        batch = self._batch
        waiter = job.join_line(slot)
        batch.retries.add_waiter(job, waiter)
        try:
            granted = await job.pool.wait(waiter)
            if isinstance(waiter.error, BudgetSpent):
                batch.spend(job, waiter.error)
                job.pool.withdraw(waiter)
        except BaseException:
            # The job was not started, so it is ready again if the batch goes on.
            batch.source.put_back(job)
            raise
        finally:
            batch.retries.remove_waiter(job)

        if granted and batch.ending.stopped is not None:
            slot.give_back()
            return None

        return slot if granted else None

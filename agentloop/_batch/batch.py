"""Many invocations at once, by a bounded number of workers."""

from __future__ import annotations

__all__ = ["Batch"]

import math
from collections.abc import Callable
from contextvars import copy_context
from typing import ClassVar, Generic, TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._errors import BatchStopped, InvocationCancelled, describe
from .._eventloop.context import wait_for_cancellation
from .._eventloop.deadlines import AttemptScope
from .._eventloop.tasks import LOST, Tasks
from .._invocation import Inputs
from .._limits.limiter import Limiter, pool_of
from .._limits.slots import Slot, current_slot
from .._result import InvocationResult
from .._runtime.job import Job
from .._runtime.observer import COUNTED_AT_ONCE
from .._runtime.options import RunOptions
from .._verdict import VerdictKind
from .ending import FATAL_HINT, Ending
from .inputs import InputSource
from .retry_queue import RetryQueue
from .workers import Crew

T = TypeVar("T")


class Batch(Generic[T]):
    """
    Runs a batch: takes invocations from an input source, has a crew of workers run them, puts those that are
    to be retried into a queue, and hands each result over.

    All bookkeeping is synchronous: between two awaits nothing can tear it.

    Subclasses decide what to do with each result.

    :param inputs: what to run
    :param limiter: says how many run at once
    :param options: holds for every invocation
    """

    _keep_rest: ClassVar[bool]
    """Whether a batch that was stopped still pulls the rest of a sync input, and skips it."""
    _results: list[InvocationResult[T]] | None = None
    """Where the results go, if they are only kept."""

    def __init__(self, inputs: Inputs[T], limiter: Limiter, options: RunOptions) -> None:
        self._limiter = limiter
        self._options = options
        self._pool = pool_of(limiter)
        self._new_context = copy_context().copy
        self._retries = RetryQueue(self._pool.loop.now)
        self._source = InputSource(
            inputs,
            self._pool,
            current_slot.get(),
            options.observer,
            self._retries,
            limiter.max_concurrency,
            self._keep_rest,
        )
        self._crew = Crew(limiter.max_concurrency)
        self._deadlines = self._pool.loop.batch_deadlines()
        self._tasks: Tasks | None = None
        # When the caller's own time is up.
        self._deadline = math.inf
        # How many jobs have their result.
        self._ended = 0
        self._done = False
        self.ending = Ending()

    @property
    def input_error(self) -> Exception | None:
        """What the input has raised."""
        return self._source.error

    @property
    def cut_short(self) -> bool:
        """Whether there was input left when it was decided to pull no more."""
        return self._source.cut_short

    @property
    def stopped(self) -> BatchStopped | None:
        """What to raise once the batch has ended, if inputs were skipped or not pulled."""
        return self.ending.error(self.cut_short)

    async def run(self) -> None:
        """
        Run the batch to its end. When it returns or raises, nothing of it is left.

        :raises BaseException: the caller's cancellation, and what an agent raised that is no ``Exception``
        """
        self._deadline = anyio.current_effective_deadline()
        self._pool.claim()
        self._pool.on_raise.add(self._resized)
        self._source.count_to_come(1)
        try:
            while not self._done:
                await self._run_tasks()
                if not self._done:
                    # Natively, and before it could begin, so that AnyIO has cancelled the others too.
                    self.stop(LOST, InvocationCancelled(LOST))

            self.ending.complete()
        finally:
            self._pool.on_raise.discard(self._resized)
            self._source.count_to_come(-1)
            self._pool.users -= 1
            self._abandon()
            self._source.close()

    async def _run_tasks(self) -> None:
        """Run tasks until the batch is done, or they are cancelled."""
        self._retries.open(self._changed, self._expire)
        try:
            async with Tasks() as tasks:
                self._tasks = tasks
                self._crew.open(tasks, self._work, self._has_work)
                if self._source.feeder is not None and not self._source.exhausted:
                    tasks.start_soon(self._feed, "agentloop feeder")

                if self._deadlines is not None:
                    tasks.start_soon(self._deadlines.watch_scopes, "agentloop timer")

                self._resized()
        finally:
            self._tasks = None
            self._crew.close()
            self._retries.close()

        # A task group on asyncio may end without an exception although its tasks were cancelled.
        await checkpoint_if_cancelled()
        if tasks.failure is not None:
            raise tasks.failure

    def _deliver(self, job: Job[T], result: InvocationResult[T], now: float) -> None:
        """Take the result of a job that ended at ``now``. It counts as live until :meth:`_taken`."""
        raise NotImplementedError

    def _taken(self) -> None:
        """Count a delivered result as no longer live."""
        self._source.live -= 1
        self._changed()

    def _changed(self) -> None:
        """Call a worker, and the feeder, if there is something for them to do and nobody else does it."""
        if not self._done and self._tasks is not None:
            if self._source.feeder is not None:
                self._source.feeder.wake(self._source)

            self._crew.call()

    def _resized(self) -> None:
        self._source.limit = self._limiter.max_concurrency
        self._crew.resize(self._source.limit)
        self._changed()

    def _has_work(self) -> bool:
        return self._source.has_work()

    @property
    def _take_job(self) -> Callable[[], Job[T] | None]:
        """What returns the next job to be done."""
        return self._source.next_job

    async def _feed(self) -> None:
        assert self._source.feeder is not None
        await self._source.feeder.run(self._source, self._changed)
        self._check_done()

    # -- its end

    def stop(self, reason: str, cause: BaseException, hint: str = "") -> None:
        """
        Start nothing new and retry nothing; let running invocations finish.

        :param reason: what stops the batch, in words
        :param cause: the same, as an exception
        :param hint: what to do to have it go on
        """
        stopped = None if self._done else self.ending.stop(reason, cause, hint)
        if stopped is None:
            return

        if self._source.feeder is not None or not self._keep_rest:
            self._source.cut()

        now = self._pool.loop.now()
        self._options.observer.stopped(stopped.reason, now)
        for job in self._pop_retries():
            self.ending.close(job)
            self._finish(job, now)

        for job in tuple(self._retries.in_line):
            # One that has been granted a slot meanwhile finds out by itself.
            if job.waiter is not None and not job.waiter.granted:
                job.pool.withdraw(job.waiter)

        self._check_done()

    def cancel(self, reason: str, cause: BaseException) -> None:
        """
        Stop, and cancel what runs. Each invocation still has its result, except those of an async input that
        were not pulled: there is no saying how long that would take.
        """
        self.stop(reason, cause)
        self._crew.cancel(reason)

    def drain(self) -> None:
        """Begin nothing new that nobody waits for; somebody waits for the whole of a batch."""

    def _abandon(self) -> None:
        """End what a cancelled batch has not started again, so that every invocation is accounted for."""
        now = self._pool.loop.now()
        for job in (*self._source.pop_all(), *self._pop_retries()):
            job.cancel(self.ending.reason)
            self._finish(job, now)

    def _pop_retries(self) -> list[Job[T]]:
        jobs = self._retries.pop_all()
        self._source.live += len(jobs)
        return jobs

    def _check_done(self) -> None:
        if self._source.exhausted and self._ended == self._source.pulled and not self._done:
            self._done = True
            self._crew.close()
            self._retries.close()
            self._source.stop_feeding()
            if self._deadlines is not None:
                self._deadlines.stop()

    # -- workers

    async def _work(self) -> None:
        """Be a worker: take a job, wait for a slot, run one attempt; and again."""
        assert self._tasks is not None
        pool, crew, source, ending = self._pool, self._crew, self._source, self.ending
        loop, options, new_context = pool.loop, self._options, self._new_context
        now_at, pace, cancellations = loop.now, loop.pace, loop.count_cancellations()
        next_job, scope = self._take_job, loop.attempt_scope(self._deadlines)
        selective = pool.selective
        async with self._tasks.member() as tasks:
            with crew.member(scope):
                while not self._done:
                    job = slot = None
                    try:
                        if scope.scope is None and not scope.begin(math.inf):
                            # Cancelled before it has anything, so that it holds nothing while that is on its way.
                            await wait_for_cancellation()

                        job = next_job()
                        if job is None:
                            self._check_done()
                            scope.leave()
                            await crew.park()
                            continue

                        if selective or job.attempts or ending.stopped is not None:
                            slot = await self._acquire(job, scope)
                            now = now_at()
                        elif pool.acquire_nowait(job):
                            slot = job
                            # A job that was just pulled has not been queued.
                            now = job.queued_at if source.is_fresh else now_at()
                        else:
                            scope.leave()
                            slot = await self._wait_in_line(job, job)
                            now = now_at()

                        if slot is not None:
                            crew.seeking -= 1
                            try:
                                now = await job.run(slot, options, scope, new_context, now, crew)
                            except BaseException:
                                crew.seeking += 1
                                self._lose(job, scope)
                                raise

                            crew.seeking += 1
                            if job.failures is not None:
                                self._settle(job, scope, now)
                                if scope.is_spoilt:
                                    break
                            else:
                                self._finish(job, now)
                        else:
                            ending.close(job)
                            self._finish(job, now)

                        waited = job.waited
                        # Not kept while parked: the arguments of a finished invocation are the caller's alone.
                        job = slot = None
                        if cancellations():
                            scope.leave()
                            await loop.forget_cancellations()

                        if not waited and pace.used_up(now):
                            scope.leave()
                            await pace.rest()
                    except anyio.get_cancelled_exc_class():
                        # By a cancellation that an agent asked for long ago, from a callback: no reason to end.
                        scope.leave()
                        await tasks.go_on()

    async def _acquire(self, job: Job[T], scope: AttemptScope) -> Slot | None:
        """Return a slot for the next attempt of any job; ``None`` if it is not to have one."""
        if self.ending.stopped is not None or not job.resolve():
            return None

        slot = job.next_slot()
        if job.pool.acquire_nowait(slot):
            return slot

        scope.leave()
        return await self._wait_in_line(job, slot)

    async def _wait_in_line(self, job: Job[T], slot: Slot) -> Slot | None:
        """Return the slot, once it was granted; ``None`` if it was not, or the batch has been stopped."""
        waiter = job.join_line(slot)
        self._retries.in_line[job] = None
        routed = self._pool.route is not None
        if routed:
            # Others may be of a key that has slots.
            self._crew.seeking -= 1
            self._changed()

        try:
            granted = await job.pool.wait(waiter)
        except BaseException:
            # Whether the batch goes on or not, nothing has happened to this job yet.
            self._source.put_back(job)
            raise
        finally:
            self._crew.seeking += routed
            job.leave_line()
            self._retries.leave_line(job)

        if granted and self.ending.stopped is not None:
            slot.give_back()
            return None

        return slot if granted else None

    def _lose(self, job: Job[T], scope: AttemptScope) -> None:
        """End a job whose attempt was cancelled with the batch, or has ended the batch."""
        job.cancel(self.ending.reason, scope.cause)
        if scope.is_spoilt:
            self._crew.replace()

        self._finish(job, self._pool.loop.now())

    def _settle(self, job: Job[T], scope: AttemptScope, now: float) -> None:
        """Retry a job that failed later, or make its outcome final."""
        failed = job.failed
        verdict = None if failed is None else failed.verdict
        if scope.is_spoilt:
            assert failed is not None
            self._crew.replace()
            if self._crew.spoilt >= self._crew.size:
                agent = f"the last one {job.invocation.agent_id!r}"
                self.stop(f"{self._crew.spoilt} agents left a scope open, {agent}", failed.error)
        elif failed is not None and verdict is not None:
            if verdict.kind is VerdictKind.FATAL:
                reason = f"{job.invocation.agent_id!r} failed with {describe(failed.error)}"
                self.stop(reason, failed.error, FATAL_HINT)
            elif self.ending.stopped is not None:
                if verdict.kind is not VerdictKind.PERMANENT:
                    self.ending.close(job)
            elif job.next_start(now, self._deadline, self._options) is not None:
                self._retry(job, now)
                return

        self._finish(job, now)

    def _retry(self, job: Job[T], now: float) -> None:
        wake_at = job.rest(self._options.observer, now)
        self._source.live -= 1
        if self._retries.push(job, wake_at):
            assert self._tasks is not None
            self._tasks.start_soon(self._retries.watch, "agentloop alarm")

        # There is room for one more input.
        self._changed()

    def _expire(self, job: Job[T], now: float) -> None:
        """End a job that has waited until its total time was up."""
        assert self._options.total is not None
        if job.waiter is None:
            self._source.live += 1
            job.expire(self._options.total)
            self._finish(job, now)
        elif not job.waiter.granted:
            job.expire(self._options.total)
            job.pool.withdraw(job.waiter)

    def _finish(self, job: Job[T], now: float) -> None:
        source, results = self._source, self._results
        result = job.finish(self._options.observer, now)
        self._ended = ended = self._ended + 1
        if not ended % COUNTED_AT_ONCE:
            self._options.observer.count()

        if not job.is_plain:
            job.settle(result, self._pool)

        if results is None:
            self._deliver(job, result, now)
        else:
            # The same as _deliver() and _taken() would do; a call for every invocation shows.
            results.append(result)
            source.live -= 1
            if not self._crew.seeking or source.feeder is not None:
                self._changed()

        if source.exhausted:
            self._check_done()

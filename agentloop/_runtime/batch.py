"""Many invocations at once, by a bounded number of workers."""

from __future__ import annotations

__all__ = ["Batch"]

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterator, Sequence
from contextvars import copy_context
from operator import length_hint
from typing import Any, ClassVar, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._errors import BatchStopped, InvocationCancelled, describe
from .._eventloop.backend import TaskDeadlineQueue, is_error, make_task_deadline_queue
from .._eventloop.context import wait_for_cancellation
from .._eventloop.tasks import LOST, Tasks
from .._invocation import Input, Inputs, Invocation, Mapped, as_invocation
from .._limits.limiter import Limiter, claim, pool_of
from .._limits.slots import Slot, current_slot
from .._result import InvocationResult
from .._verdict import Verdict, VerdictKind
from .attempt import RunOptions, run_attempt
from .attempt_scope import AttemptScope
from .job import Job, as_exception

T = TypeVar("T")

# How many invocations may wait to be retried, per slot, before no new input is pulled.
ASLEEP_PER_SLOT = 8
# How long an input that is an async generator may take to close, in seconds.
CLOSE_SECONDS = 5.0
INPUT_CANCELLED = "the input was cancelled from within"
# What to do about a batch that one failure has stopped.
FATAL_HINT = "a classify= that does not judge the error FATAL lets a batch go on"


class Batch(ABC, Generic[T]):
    """
    Runs a batch, with at most as many workers as the limiter has slots.

    A worker takes an invocation, waits for a slot, runs one attempt, and goes on with the next. One more
    worker is called only when an agent waits while there is something left to do, so agents that never
    wait need a single one. An attempt that is to be retried lies in a heap, which one alarm task watches:
    it needs neither a slot nor a worker. Workers with nothing to do are parked. An async input is pulled by
    one feeder task, since a generator may hold scopes open that belong to the task that advances it.

    All bookkeeping is synchronous: between two awaits nothing can tear it.

    Subclasses decide what to do with each result.

    """

    _keep_rest: ClassVar[bool]
    """Whether a batch that was stopped still pulls the rest of a sync input, and skips it."""

    def __init__(
        self,
        inputs: Inputs[T],
        limiter: Limiter,
        plan: RunOptions,
    ) -> None:
        self._limiter = limiter
        self._limit = limiter.max_concurrency
        self._plan = plan
        self._pool = pool_of(limiter)
        self._outer: Slot | None = current_slot.get()
        self._new_context = copy_context().copy
        self._deadline = math.inf
        self._tasks: Tasks | None = None
        self._pulled = 0
        # How many of those have their final result.
        self._ended = 0
        # Where all inputs are there from the start, they wait from the start.
        self._began = self._pool.loop.now() if self._keep_rest and isinstance(inputs, Sequence) else None
        self._to_come = 0 if self._began is None else len(cast("Sequence[Any]", inputs))

        # A sync input is pulled by the workers, in one context whichever of them does it.
        self._input_context = copy_context()
        self._iterator: Iterator[Input[T]] | None = None
        self._stream: AsyncIterable[Input[T]] | None = None
        if isinstance(inputs, AsyncIterable):
            self._stream = inputs
        else:
            self._iterator = iter(inputs)

        # What may know whether there is more input.
        self._sized: object = inputs if isinstance(inputs, Mapped) else self._iterator
        self._feeding = anyio.CancelScope()
        # Jobs that were pulled and wait for a worker, not for a retry.
        self._fed: deque[Job[T]] = deque()
        self._room: anyio.Event | None = None
        self._exhausted = False

        self._workers: set[anyio.CancelScope] = set()
        self._hired = 0
        # Workers between two jobs. While there is one, nobody needs to call another.
        self._seeking = 0
        self._parked: dict[anyio.Event, None] = {}

        # Jobs that hold a slot, wait for one, or have a result that was not taken; jobs that wait to be
        # retried.
        self._live = 0
        self._resting = 0
        # Of the jobs that wait to be retried, all are in the heap until their time has come, and then in
        # the queue until a worker takes them. The heap also says when a job in a queue runs out of time.
        self._heap: list[tuple[float, int, Job[T]]] = []
        self._sequence = itertools.count()
        self._due: dict[Job[T], None] = {}
        self._in_line: dict[Job[T], None] = {}
        self._alarm: anyio.Event | None = None
        self._stale = 0
        # Times attempts out where the event loop has no timers.
        self._task_alarm: TaskDeadlineQueue | None = None

        # How many agents have left a scope open in a worker.
        self._spoilt = 0
        self._done = False
        self._stopped: BatchStopped | None = None
        self._cancelled_by = "the batch was cancelled"
        self._has_skipped = False
        self.cut_short = False
        """Whether there was input left when it was decided to pull no more."""
        self._complete = False
        self.input_error: Exception | None = None

    async def run(self) -> None:
        """
        Run the batch to its end. When it returns or raises, nothing of it is left.

        :raises BaseException: the caller's cancellation, and what an agent raised that is no ``Exception``
        """
        self._deadline = anyio.current_effective_deadline()
        claim(self._limiter, self._pool)
        self._pool.on_raise.add(self._resized)
        self._pool.to_come += self._to_come
        try:
            while not self._done:
                await self._run_tasks()
                if not self._done:
                    # Natively, and before it could begin, so that AnyIO has cancelled the others too.
                    self.stop(LOST, InvocationCancelled(LOST))

            self._complete = True
        finally:
            self._pool.on_raise.discard(self._resized)
            self._pool.to_come -= self._to_come
            self._pool.users -= 1
            self._abandon()
            self._close_input()

    async def _run_tasks(self) -> None:
        """Run tasks until the batch is done, or they are cancelled."""
        self._hired = self._seeking = 0
        self._room = self._alarm = None
        self._parked.clear()
        try:
            async with Tasks() as tasks:
                self._tasks = tasks
                if self._stream is not None and not self._exhausted:
                    tasks.start_soon(self._feed, "agentloop feeder")

                self._task_alarm = make_task_deadline_queue(self._pool.loop.backend)
                if self._task_alarm is not None:
                    tasks.start_soon(self._task_alarm.watch, "agentloop timer")

                self._resized()
        finally:
            self._tasks = None

        # A task group on asyncio may end without an exception although its tasks were cancelled.
        await checkpoint_if_cancelled()
        if tasks.failure is not None:
            raise tasks.failure

    @property
    def stopped(self) -> BatchStopped | None:
        """What to raise once the batch has ended, if inputs were skipped or not pulled."""
        if self._complete:
            return self._stopped if self.cut_short or self._has_skipped else None

        return BatchStopped(self._reason)

    @abstractmethod
    def _deliver(self, job: Job[T], result: InvocationResult[T], now: float) -> None:
        """Take the result of a job that ended at ``now``. It counts as live until :meth:`_taken`."""

    def _taken(self) -> None:
        """Count a delivered result as no longer live."""
        self._live -= 1
        if not self._seeking or self._room is not None:
            self._changed()

    def stop(self, reason: str, cause: BaseException, hint: str = "") -> None:
        """
        Start nothing new and retry nothing; let running invocations finish.

        :param reason: what stopped the batch, in words
        :param cause: the same, as an exception
        :param hint: what to do to have it go on
        """
        if self._stopped is not None or self._done:
            return

        self._stopped = BatchStopped(reason, hint)
        self._stopped.__cause__ = cause
        if self._stream is not None or not self._keep_rest:
            self._cut_input()

        now = self._pool.loop.now()
        self._plan.observer.stopped(self._stopped.reason, now)
        for job in self._pop_resting():
            self._give_up(job)
            self._finish(job, now)

        for job in tuple(self._in_line):
            # One that has been granted a slot meanwhile finds out by itself.
            if job.waiter is not None and job.waiter.slot is None:
                job.pool.withdraw(job.waiter)

        self._check_done()

    def _cut_input(self) -> None:
        """Pull no more input."""
        if not self._exhausted:
            # An iterator may know that there is no more, even if it has not been asked for it.
            self.cut_short = self._iterator is None or length_hint(self._sized, 1) > 0
            self._exhausted = True
            self._feeding.cancel()

    def cancel(self, reason: str, cause: BaseException) -> None:
        """
        Stop, and cancel what runs. Each invocation still has its result, except those of an async input that
        were not pulled: there is no saying how long that would take.
        """
        self.stop(reason, cause)
        for scope in tuple(self._workers):
            scope.cancel(reason)

    @property
    def _reason(self) -> str:
        return self._cancelled_by if self._stopped is None else self._stopped.reason

    def _pop_resting(self) -> list[Job[T]]:
        """Take all jobs that wait to be retried out of heap and queue."""
        jobs = [*self._due, *(job for at, _, job in self._heap if at == job.wake_at)]
        for job in jobs:
            self._wake(job)

        self._heap.clear()
        return jobs

    def _abandon(self) -> None:
        """End what a cancelled batch has not started again, so that every invocation is accounted for."""
        now = self._pool.loop.now()
        for job in (*self._fed, *self._pop_resting()):
            job.cancel(self._reason)
            self._finish(job, now)

        self._fed.clear()

    def _close_input(self) -> None:
        """Close a generator that was given as input, as the feeder does with an async one."""
        iterator: Any = self._iterator
        if isinstance(iterator, Generator):
            try:
                self._input_context.run(iterator.close)
            except BaseException as exc:
                if not is_error(exc):
                    raise

                self.input_error = self.input_error or as_exception(exc, INPUT_CANCELLED)

    def drain(self) -> None:
        """Begin nothing new that nobody waits for; somebody waits for the whole of a batch."""

    def _changed(self) -> None:
        """Call a worker, and the feeder, if there is something for them to do and nobody else does it."""
        if self._done or self._tasks is None:
            return

        if self._room is not None and self._may_pull():
            self._room.set()
            self._room = None

        if self._seeking or not self._has_work():
            return

        if self._parked:
            self._seeking += 1
            self._parked.popitem()[0].set()
        elif self._hired < self._limit:
            self._seeking += 1
            self._hired += 1
            self._tasks.start_soon(self._work, "agentloop worker")

    def _resized(self) -> None:
        self._limit = self._limiter.max_concurrency
        self._changed()

    def _has_work(self) -> bool:
        if self._fed:
            return True

        if self._due and self._live < self._limit:
            return True

        return self._iterator is not None and self._may_pull()

    def _may_pull(self) -> bool:
        limit = self._limit
        return not self._exhausted and self._live < limit and self._resting < ASLEEP_PER_SLOT * limit

    # -- workers

    async def _work(self) -> None:
        cancellations = self._pool.loop.count_cancellations()
        timer = AttemptScope(self._pool, self._pool.loop.alarm or self._task_alarm)
        while not self._done and not timer.is_spoilt:
            # Left by cancel(): then the worker's job has its result, and there may be more to skip. Left by
            # a cancellation that an agent asked for long ago, from a callback: no reason to end.
            with anyio.CancelScope() as scope:
                self._workers.add(scope)
                try:
                    try:
                        await self._take_jobs(scope, cancellations, timer)
                    finally:
                        timer.close()
                except anyio.get_cancelled_exc_class():
                    await checkpoint_if_cancelled()
                    await self._pool.loop.forget_cancellations()
                finally:
                    self._workers.discard(scope)

    async def _take_jobs(
        self, scope: anyio.CancelScope, cancellations: Callable[[], int], timer: AttemptScope
    ) -> None:
        waited = False

        def on_wait() -> None:
            nonlocal waited
            waited = True
            # Most often all workers are at work, and nobody can be called.
            if not self._seeking and (self._parked or self._hired < self._limit):
                self._changed()

        pool, plan = self._pool, self._plan
        now_at, is_cancelled_around = pool.loop.now, pool.loop.is_cancelled_around
        selective, pace = pool.selective, pool.loop.pace
        # Whether inputs are pulled here and start at once: they do not wait from the start, and nobody takes
        # time to say what they cost.
        pulls = self._iterator is not None and self._began is None and not selective
        while not self._done and not timer.is_spoilt:
            if is_cancelled_around(scope):
                # Cancelled before it has anything, so that it holds nothing while that is on its way.
                await wait_for_cancellation()

            fresh = pulls and not self._fed
            job = self._next_job()
            if job is None:
                timer.close()
                await self._park()
                continue

            slot: Slot | None = None
            waited = False
            if self._stopped is None and (not selective or job.costs or job.resolve_limits()):
                slot = job.pool.acquire_nowait(job.costs if selective else (), self._outer)
                if slot is None:
                    fresh = False
                    timer.close()
                    slot = await self._wait_in_line(job)

            if slot is not None and self._stopped is None:
                self._seeking -= 1
                if job.attempts and job.deadline < math.inf:
                    self._drop_stale_alarms()

                try:
                    # For one that was just pulled no time has passed, and it has not been queued.
                    now = job.queued_at if fresh and not job.attempts else now_at()
                    now = await run_attempt(job, plan, slot, self._new_context, None, on_wait, timer, now)
                except BaseException:
                    self._seeking += 1
                    job.cancel(self._reason)
                    if timer.is_spoilt:
                        self._replace_worker(job)

                    self._finish(job, self._pool.loop.now())
                    raise

                self._seeking += 1
                if timer.is_spoilt:
                    self._replace_worker(job)

                if job.verdict is None:
                    self._finish(job, now)
                else:
                    self._settle(job, job.verdict, now)

                if cancellations() and not timer.is_spoilt:
                    timer.close()
                    await self._pool.loop.forget_cancellations()
            else:
                if slot is not None:
                    slot.release()

                now = self._pool.loop.now()
                self._give_up(job)
                self._finish(job, now)

            # Not kept while parked: the arguments of a finished invocation are the caller's alone.
            del job, slot
            if not waited and not timer.is_spoilt and pace.used_up(now):
                timer.close()
                await pace.rest()

    def _replace_worker(self, job: Job[T]) -> None:
        """Let another worker go on in place of this one, in whose task a job has left a scope open."""
        assert self._tasks is not None
        self._tasks.spoil()
        # It takes over what this one counts for.
        self._tasks.start_soon(self._work, "agentloop worker")
        self._spoilt += 1
        if self._spoilt >= self._limit:
            error = job.error
            assert error is not None
            self.stop(
                f"{self._spoilt} agents left a scope open, the last one {job.invocation.agent_id!r}", error
            )

    def _next_job(self) -> Job[T] | None:
        if self._fed:
            return self._fed.popleft()

        limit = self._limit
        if self._due and self._live < limit:
            job = next(iter(self._due))
            self._wake(job)
            return job

        # As _may_pull() has it; a call for every input shows.
        if (
            self._iterator is not None
            and not self._exhausted
            and self._live < limit
            and self._resting < ASLEEP_PER_SLOT * limit
        ):
            try:
                return self._make_job(self._input_context.run(next, self._iterator))
            except StopIteration:
                pass
            except BaseException as exc:
                if not is_error(exc):
                    raise

                self.input_error = as_exception(exc, INPUT_CANCELLED)

            self._exhausted = True
            self._check_done()

        return None

    def _make_job(self, item: Input[T]) -> Job[T]:
        pool, observer = self._pool, self._plan.observer
        now = pool.loop.now() if self._began is None else self._began
        invocation = item if type(item) is Invocation else as_invocation(item)
        index = self._pulled
        self._pulled = index + 1
        job: Job[T] = Job(invocation, index, now, pool)
        if not observer.is_plain:
            observer.queued(job)

        if self._to_come:
            self._to_come -= 1
            self._pool.to_come -= 1

        self._live += 1
        return job

    async def _wait_in_line(self, job: Job[T]) -> Slot | None:
        job.waiter = job.pool.enqueue(job.costs, self._outer)
        self._in_line[job] = None
        if self._pool.route is not None:
            # Others may be of a key that has slots.
            self._seeking -= 1
            self._changed()

        try:
            return await job.pool.wait(job.waiter)
        except BaseException:
            # Whether the batch goes on or not, nothing has happened to this job yet.
            self._fed.appendleft(job)
            raise
        finally:
            self._seeking += self._pool.route is not None
            job.waiter = None
            del self._in_line[job]

    async def _park(self) -> None:
        if self._done:
            return

        event = anyio.Event()
        self._parked[event] = None
        self._seeking -= 1
        try:
            await event.wait()
        except BaseException:
            # Whoever wakes a worker has counted it as seeking.
            self._seeking += event in self._parked
            self._parked.pop(event, None)
            raise

    # -- what becomes of a job

    def _settle(self, job: Job[T], verdict: Verdict, now: float) -> None:
        """Retry a job that failed later, or make its outcome final."""
        if verdict.kind is VerdictKind.FATAL:
            assert job.error is not None
            reason = f"{job.invocation.agent_id!r} failed with {describe(job.error)}"
            self.stop(reason, job.error, FATAL_HINT)
        elif self._stopped is not None:
            if verdict.kind is not VerdictKind.PERMANENT:
                self._give_up(job)
        else:
            wake_at = job.next_start(now, self._deadline, self._plan.config)
            if wake_at is not None:
                self._plan.observer.retrying(job, now)
                self._live -= 1
                self._resting += 1
                job.pool.asleep += 1
                self._set_alarm(wake_at, job)
                return

        self._finish(job, now)

    def _wake(self, job: Job[T]) -> None:
        """Count a job that waited to be retried as live."""
        self._due.pop(job, None)
        self._resting -= 1
        job.pool.asleep -= 1
        self._live += 1

    def _give_up(self, job: Job[T]) -> None:
        """Make final what a stopped batch does not start or retry, unless it has run out of time."""
        if job.expired or self._stopped is None:
            return

        if job.attempts:
            job.give_up(f"the batch was stopped: {self._stopped.reason}")
        else:
            self._has_skipped = True
            job.skip(self._stopped)

    def _finish(self, job: Job[T], now: float) -> None:
        job.leave_pool(self._pool)
        result = self._plan.observer.finish(job, now)
        if job.charges is not None:
            job.pool.settle(job.charges, result)

        self._ended += 1
        self._deliver(job, result, now)
        if self._exhausted:
            self._check_done()

    def _check_done(self) -> None:
        if self._exhausted and self._ended == self._pulled and not self._done:
            self._done = True
            self._seeking += len(self._parked)
            while self._parked:
                self._parked.popitem()[0].set()

            if self._alarm is not None:
                self._alarm.set()

            if self._task_alarm is not None:
                self._task_alarm.stop()

            self._feeding.cancel()

    # -- the alarm

    def _set_alarm(self, at: float, job: Job[T]) -> None:
        heapq.heappush(self._heap, (at, next(self._sequence), job))
        if self._alarm is None:
            assert self._tasks is not None
            self._alarm = anyio.Event()
            self._tasks.start_soon(self._watch, "agentloop alarm")
        elif self._heap[0][0] == at:
            self._alarm.set()

    def _drop_stale_alarms(self) -> None:
        """Keep the heap no larger than a multiple of what it is about, once a job has left its queue."""
        self._stale += 1
        if self._stale * 2 > len(self._heap) + 16:
            self._heap = [
                (at, order, job)
                for at, order, job in self._heap
                if job in self._due or job in self._in_line or at == job.wake_at
            ]
            heapq.heapify(self._heap)
            self._stale = 0

    async def _watch(self) -> None:
        while self._heap and not self._done:
            self._alarm = anyio.Event()
            with anyio.CancelScope(deadline=self._heap[0][0]):
                await self._alarm.wait()

            self._ring(self._pool.loop.now())

        self._alarm = None

    def _ring(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            at, _, job = heapq.heappop(self._heap)
            if at == job.wake_at:
                self._due[job] = None
                if job.deadline < math.inf:
                    heapq.heappush(self._heap, (job.deadline, next(self._sequence), job))
            elif job in self._due:
                job.expire()
                self._wake(job)
                self._finish(job, now)
            elif job in self._in_line and job.waiter is not None and job.waiter.slot is None:
                job.expire()
                job.pool.withdraw(job.waiter)

        self._changed()

    # -- an async input

    async def _feed(self) -> None:
        assert self._stream is not None
        with self._feeding:
            iterator, ended = aiter(self._stream), False
            try:
                while True:
                    await self._wait_for_room()
                    self._fed.append(self._make_job(await anext(iterator)))
                    self._changed()
            except StopAsyncIteration:
                ended = True
            except Exception as exc:
                await checkpoint_if_cancelled()
                self.input_error = exc
                ended = True
            except anyio.get_cancelled_exc_class() as exc:
                await checkpoint_if_cancelled()
                # It ends the input like a StopAsyncIteration would, but truncated is not complete.
                self.input_error = as_exception(exc, INPUT_CANCELLED)
                ended = True
            finally:
                self._exhausted = True
                # Cancelled by stop(), or with all tasks of the batch.
                self.cut_short = self.cut_short or not ended
                if isinstance(iterator, AsyncGenerator):
                    await self._close_generator(cast("AsyncGenerator[Any]", iterator))

        self._check_done()

    async def _close_generator(self, iterator: AsyncGenerator[Any]) -> None:
        with anyio.CancelScope(deadline=self._pool.loop.now() + CLOSE_SECONDS, shield=True) as scope:
            try:
                await iterator.aclose()
            except Exception as exc:
                self.input_error = self.input_error or exc
            except anyio.get_cancelled_exc_class():
                if scope.cancel_called:
                    raise

                await self._pool.loop.forget_cancellations()

    async def _wait_for_room(self) -> None:
        # Once the input counts as exhausted, there is no room any more, and this is about to be cancelled.
        while self._fed or not self._may_pull():
            self._room = anyio.Event()
            try:
                await self._room.wait()
            except anyio.get_cancelled_exc_class():
                # It is not the input's fault if this task is cancelled natively.
                await checkpoint_if_cancelled()
                await self._pool.loop.forget_cancellations()

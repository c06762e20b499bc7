"""Where the invocations of a batch come from: pulled from a sync input, or fed from an async one."""

from __future__ import annotations

__all__ = ["InputSource"]

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterator, Sequence
from contextvars import copy_context
from operator import length_hint
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._eventloop.errors import is_error
from .._invocation import Input, Inputs, Invocation, Mapped, as_invocation
from .._limits.pool import SlotPool
from .._limits.slots import Slot
from .._runtime.job import Job
from .._runtime.observer import Observer
from .._runtime.outcome import as_exception
from .retry_queue import RetryQueue

T = TypeVar("T")

# How many invocations may wait to be retried, per slot, before no new input is pulled.
ASLEEP_PER_SLOT = 8
# How long an input that is an async generator may take to close, in seconds.
CLOSE_SECONDS = 5.0
CANCELLED = "the input was cancelled from within"


class InputSource(Generic[T]):
    """
    Makes jobs of inputs, as long as there is room, and gives out what there is to do.

    Workers pull a sync input, in one context whichever of them does it. One feeder task pulls an async input,
    since a generator may hold scopes open that belong to the task that advances it.

    :param inputs: the inputs
    :param pool: where jobs get their slots from
    :param outer: the slot of the invocation that runs the batch, if one does
    :param observer: is told of each job
    :param retries: those that wait to be retried
    :param limit: how many jobs may be live
    :param wait_from_start: whether the inputs of a sequence wait from the start
    """

    def __init__(
        self,
        inputs: Inputs[T],
        pool: SlotPool,
        outer: Slot | None,
        observer: Observer,
        retries: RetryQueue,
        limit: int,
        wait_from_start: bool,
    ) -> None:
        self.limit = limit
        self.live = 0
        """How many jobs hold a slot, wait for one, or have a result that was not taken."""
        self.pulled = 0
        self.is_async = isinstance(inputs, AsyncIterable)
        self.exhausted = False
        self.is_fresh = False
        """Whether the job that was given out last was pulled in the same moment."""
        self.cut_short = False
        """Whether there was input left when it was decided to pull no more."""
        self.error: Exception | None = None
        """What the input has raised."""
        self._pool = pool
        self._outer = outer
        self._observer = observer
        self._retries = retries
        self._run = copy_context().run
        self._now = pool.loop.now
        self._iterator: Iterator[Input[T]] | None = None
        self._stream: AsyncIterable[Input[T]] | None = None
        if isinstance(inputs, AsyncIterable):
            self._stream = inputs
        else:
            self._iterator = iter(inputs)

        # What may know whether there is more input.
        self._sized: object = inputs if isinstance(inputs, Mapped) else self._iterator
        # Where all inputs are there from the start, they wait from the start.
        self._began = pool.loop.now() if wait_from_start and isinstance(inputs, Sequence) else None
        self._to_come = 0 if self._began is None else len(cast("Sequence[Any]", inputs))
        # Whether anybody is told of a job that is pulled.
        self._reports = self._to_come > 0 or not observer.is_plain
        # What workers pull, as long as there is more.
        self._to_pull = self._iterator
        # Jobs that were pulled and wait for a worker, not for a retry.
        self._fed: deque[Job[T]] = deque()
        self._has_fed = False
        self._feeding = anyio.CancelScope()
        self._room: anyio.Event | None = None

    @property
    def needs_feeder(self) -> bool:
        """Whether there is async input left."""
        return self.is_async and not self.exhausted

    def open(self) -> None:
        """Begin, or begin again."""
        self._room = None

    def count_to_come(self, sign: int) -> None:
        """Count what is still to be pulled as waiting in the limiter, or no more."""
        self._pool.pending += sign * self._to_come

    # -- what there is to do

    def has_work(self) -> bool:
        """Return whether :meth:`next_job` would give a job, or try to pull one; if not, let the feeder pull."""
        self.wake_feeder()
        if self._fed or (self._retries.due and self.live < self.limit):
            return True

        return self._to_pull is not None and self.may_pull()

    def may_pull(self) -> bool:
        """Return whether there is room for one more input."""
        limit = self.limit
        return not self.exhausted and self.live < limit and self._retries.count < ASLEEP_PER_SLOT * limit

    def next_job(self) -> Job[T] | None:
        """Return the next job to be done, if there is one: one that was fed, is due again, or is pulled."""
        iterator = self._to_pull
        if iterator is None or self._has_fed or self._retries.count or self.live >= self.limit:
            job = self._next_job()
            if job is not None or iterator is None or not self.may_pull():
                return job

        try:
            item = self._run(next, iterator)
            if type(item) is not Invocation:
                item = as_invocation(item)
        except StopIteration:
            self._exhaust()
            return None
        except BaseException as exc:
            if not is_error(exc):
                raise

            self.error = as_exception(exc, CANCELLED)
            self._exhaust()
            return None

        index, began = self.pulled, self._began
        self.pulled = index + 1
        self.live += 1
        self.is_fresh = began is None
        job = Job(item, index, self._now() if began is None else began, self._pool, self._outer)
        if self._reports:
            self._report(job)

        return job

    def _next_job(self) -> Job[T] | None:
        """Return a job that need not be pulled."""
        self.is_fresh = False
        if self._fed:
            job = self._fed.popleft()
            self._has_fed = bool(self._fed)
            return job

        if self._retries.due and self.live < self.limit:
            self.live += 1
            return self._retries.pop()

        return None

    def put_back(self, job: Job[T]) -> None:
        """Give a job out again before all others."""
        self._fed.appendleft(job)
        self._has_fed = True

    def pop_all(self) -> list[Job[T]]:
        """Take the jobs that were pulled and wait for a worker."""
        jobs = [*self._fed]
        self._fed.clear()
        self._has_fed = False
        return jobs

    def _exhaust(self) -> None:
        self.exhausted = True
        self._to_pull = None

    def _report(self, job: Job[T]) -> None:
        job.queue(self._observer)
        if self._to_come:
            self._to_come -= 1
            self._pool.pending -= 1

    # -- an async input

    async def feed(self, on_job: Callable[[], object]) -> None:
        """
        Be the feeder.

        :param on_job: called when there is one more job, and at the end
        """
        assert self._stream is not None
        with self._feeding:
            iterator, ended = aiter(self._stream), False
            try:
                while True:
                    await self._wait_for_room()
                    item = await anext(iterator)
                    now = self._now()
                    job: Job[T] = Job(as_invocation(item), self.pulled, now, self._pool, self._outer)
                    self.pulled += 1
                    self.live += 1
                    self._report(job)
                    self._fed.append(job)
                    self._has_fed = True
                    on_job()
            except StopAsyncIteration:
                ended = True
            except Exception as exc:
                await checkpoint_if_cancelled()
                self.error = exc
                ended = True
            except anyio.get_cancelled_exc_class() as exc:
                await checkpoint_if_cancelled()
                # It ends the input like a StopAsyncIteration would, but truncated is not complete.
                self.error = as_exception(exc, CANCELLED)
                ended = True
            finally:
                self._exhaust()
                # Cancelled by cut(), or with all tasks of the batch.
                self.cut_short = self.cut_short or not ended
                if isinstance(iterator, AsyncGenerator):
                    await self._close_generator(cast("AsyncGenerator[Any]", iterator))

        on_job()

    def wake_feeder(self) -> None:
        """Let the feeder pull, if it waits for room and there is some."""
        if self._room is not None and self.may_pull():
            self._room.set()
            self._room = None

    async def _wait_for_room(self) -> None:
        # Once the input counts as exhausted, there is no room any more, and this is about to be cancelled.
        while self._fed or not self.may_pull():
            self._room = anyio.Event()
            try:
                await self._room.wait()
            except anyio.get_cancelled_exc_class():
                # It is not the input's fault if this task is cancelled natively.
                await checkpoint_if_cancelled()
                await self._pool.loop.forget_cancellations()

    async def _close_generator(self, iterator: AsyncGenerator[Any]) -> None:
        deadline = self._pool.loop.now() + CLOSE_SECONDS
        with anyio.CancelScope(deadline=deadline, shield=True) as scope:
            try:
                await iterator.aclose()
            except Exception as exc:
                self.error = self.error or exc
            except anyio.get_cancelled_exc_class():
                if scope.cancel_called:
                    raise

                await self._pool.loop.forget_cancellations()

    # -- its end

    def cut(self) -> None:
        """Pull no more."""
        if not self.exhausted:
            # An iterator may know that there is no more, even if it has not been asked for it.
            self.cut_short = self._iterator is None or length_hint(self._sized, 1) > 0
            self._exhaust()
            self._feeding.cancel()

    def stop_feeding(self) -> None:
        """Let the feeder end, once the batch is done."""
        self._feeding.cancel()

    def forget_error(self) -> None:
        """Forget what the input has raised, once that was raised to the caller."""
        self.error = None

    def close(self) -> None:
        """Close a generator that was given as input, as the feeder does with an async one."""
        iterator: Any = self._iterator
        if isinstance(iterator, Generator):
            try:
                self._run(iterator.close)
            except BaseException as exc:
                if not is_error(exc):
                    raise

                self.error = self.error or as_exception(exc, CANCELLED)

"""The source of a batch's invocations: pulled from a sync input, or fed from an async one."""

from __future__ import annotations

__all__ = ["InputSource"]

from collections import deque
from collections.abc import AsyncIterable, Callable, Generator, Iterator, Sequence
from contextvars import copy_context
from operator import length_hint
from typing import Any, Generic, TypeVar, cast

from .._eventloop.errors import is_error
from .._invocation import Input, Inputs, Invocation, Mapped, as_invocation
from .._limits.pool import SlotPool
from .._limits.slots import Pool, Slot
from .._runtime.job import Job
from .._runtime.observer import Observer
from .._runtime.outcome import as_exception
from .feeder import CANCELLED, Feeder
from .retry_queue import RetryQueue
from .room import KeyRoom

T = TypeVar("T")

# How many invocations may wait to be retried, per slot, before no new input is pulled.
ASLEEP_PER_SLOT = 8


class InputSource(Generic[T]):
    """
    Makes jobs of inputs, as long as there is room, and returns the next job to a worker.

    A job is *live* from the pull until its result is taken, except while it waits without a worker: for a
    retry, or for a slot of its key. There is *room* for an input while fewer jobs are live than the limit. A
    pulled job that waits for a worker is *ready*.

    Workers pull a sync input, all in the same context; a :class:`Feeder` pulls an async one.

    :param inputs: the inputs
    :param pool: the slots that jobs get
    :param outer: the slot of the invocation that runs the batch; ``None`` outside of an agent
    :param observer: reports each job
    :param retries: the jobs that wait to be retried
    :param limit: how many jobs may be live
    :param wait_from_start: whether the inputs of a sequence count as waiting from the start
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
        """How many jobs hold a slot, wait for one, or have a result that no reader has taken."""
        self.pulled = 0
        self.exhausted = False
        self.is_fresh = False
        """Whether the last :meth:`next_job` has pulled its job in that step."""
        self.cut_short = False
        """Whether pulling stopped before the input was exhausted."""
        self.error: Exception | None = None
        """The exception that the input raised."""
        self.outer = outer
        """The slot of the invocation that runs the batch; ``None`` outside of an agent."""
        self.new_job: Callable[[Invocation[T], int, float, Pool, Slot | None], Job[T]] = Job
        """Makes the job of an invocation. An exception that it raises counts as the input's."""
        self._pool = pool
        self._observer = observer
        self._retries = retries
        self._run = copy_context().run
        self._now = pool.loop.now
        self._iterator: Iterator[Input[T]] | None = None
        self.feeder: Feeder[T] | None = None
        """Pulls an async input."""
        if isinstance(inputs, AsyncIterable):
            self.feeder = Feeder(inputs, pool.loop)
        else:
            self._iterator = iter(inputs)

        # An object that may have a length hint, for whether there is more input.
        self._sized: object = inputs if isinstance(inputs, Mapped) else self._iterator
        # The inputs of a sequence all exist at the call, so their wait begins then.
        self._began = pool.loop.now() if wait_from_start and isinstance(inputs, Sequence) else None
        self._unpulled = 0 if self._began is None else len(cast("Sequence[Any]", inputs))
        if pool.route is not None:
            retries.room = KeyRoom(bounded=self._began is None)

        # Whether pulling a job has to be reported.
        self._reports = self._unpulled > 0 or not observer.only_counts
        # The iterator that workers pull; None once it is exhausted.
        self._to_pull = self._iterator
        # The ready jobs.
        self._ready: deque[Job[T]] = deque()

    def count_unpulled(self, sign: int) -> None:
        """Count the unpulled inputs of a sequence as waiting in the pool (+1), or no more (-1)."""
        self._pool.pending += sign * self._unpulled

    # -- the next job

    @property
    def must_resolve(self) -> bool:
        """Whether a job must be resolved (key, cost, entry of a journal) before it gets a slot."""
        return self._pool.must_resolve or self.new_job is not Job

    def has_work(self) -> bool:
        """Return whether :meth:`next_job` would give a job or pull one; if not, let the feeder pull."""
        if self.feeder is not None:
            self.feeder.wake(self)

        if self._ready or (self._retries.due and self.live < self.limit):
            return True

        return self._to_pull is not None and self.may_pull()

    @property
    def has_ready(self) -> bool:
        """Whether a pulled job waits for a worker."""
        return bool(self._ready)

    def may_pull(self) -> bool:
        """Return whether there is room for one more input."""
        limit = self.limit
        if self.exhausted or self.live >= limit:
            return False

        return self._retries.room is not None or self._retries.count < ASLEEP_PER_SLOT * limit

    def next_job(self) -> Job[T] | None:
        """Return the next job, if there is one: a ready one, one that is due for a retry, or a pulled one."""
        iterator = self._to_pull
        if iterator is None or self._ready or self._retries.count or self.live >= self.limit:
            job = self._next_pulled()
            if job is not None or iterator is None or not self.may_pull():
                return job

        index, began = self.pulled, self._began
        try:
            item = self._run(next, iterator)
            if type(item) is not Invocation:
                item = self._run(as_invocation, item)

            now = self._now() if began is None else began
            job = self.new_job(item, index, now, self._pool, self.outer)
        except StopIteration:
            self.exhaust()
            return None
        except BaseException as exc:
            if not is_error(exc):
                raise

            self.exhaust(as_exception(exc, CANCELLED))
            return None

        self.pulled = index + 1
        self.live += 1
        self.is_fresh = began is None
        if self._reports:
            self._report(job)

        return job

    def _next_pulled(self) -> Job[T] | None:
        """Return the next job that was pulled before: a ready one, or one that is due for a retry."""
        self.is_fresh = False
        if self._ready:
            return self._ready.popleft()

        if self._retries.due and self.live < self.limit:
            job = self._retries.pop()
            self.use_room(job)
            return job

        return None

    def free_room(self, job: Job[T]) -> None:
        """Make room for one more input: a job begins to wait without a worker."""
        if self._retries.room is None or self._retries.room.add_waiting(job.pool):
            self.live -= 1

    def use_room(self, job: Job[T]) -> None:
        """Count a job as live again after its wait."""
        if self._retries.room is None or self._retries.room.remove_waiting(job.pool):
            self.live += 1

    def add_ready(self, job: Job[T]) -> None:
        """Add a ready job. It comes before the next input."""
        self._ready.append(job)

    def put_back(self, job: Job[T]) -> None:
        """Put a job back, before the other ready ones."""
        self._ready.appendleft(job)

    def pop_ready(self) -> list[Job[T]]:
        """Remove and return all ready jobs."""
        jobs = [*self._ready]
        self._ready.clear()
        return jobs

    def feed(self, item: Input[T]) -> None:
        """Take an input that the feeder has pulled."""
        job = self.new_job(as_invocation(item), self.pulled, self._now(), self._pool, self.outer)
        self.pulled += 1
        self.live += 1
        self._report(job)
        self._ready.append(job)

    def exhaust(self, error: Exception | None = None, cut_short: bool = False) -> None:
        """
        Note that the input is over.

        :param error: the exception that the input raised
        :param cut_short: whether inputs may be left
        """
        self.exhausted = True
        self._to_pull = None
        self.error = self.error or error
        self.cut_short = self.cut_short or cut_short

    def _report(self, job: Job[T]) -> None:
        job.report_queued(self._observer)
        if self._unpulled:
            self._unpulled -= 1
            self._pool.pending -= 1

    # -- the end of the input

    def cut(self) -> None:
        """Pull no more."""
        if not self.exhausted:
            # With a length hint of 0, the input was exhausted, although StopIteration was not seen.
            self.exhaust(cut_short=self._iterator is None or length_hint(self._sized, 1) > 0)
            self.stop_feeding()

    def stop_feeding(self) -> None:
        """End the feeder, once the batch is done."""
        if self.feeder is not None:
            self.feeder.cancel()

    def forget_error(self) -> None:
        """Drop the input's exception, once the caller has received it."""
        self.error = None

    def close(self) -> None:
        """Close an input that is a generator. The feeder closes an async one."""
        iterator: Any = self._iterator
        if isinstance(iterator, Generator):
            try:
                self._run(iterator.close)
            except BaseException as exc:
                if not is_error(exc):
                    raise

                self.exhaust(as_exception(exc, CANCELLED))

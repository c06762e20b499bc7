"""
A batch with a journal.

**An input claims an entry** when it is pulled. If the entry holds a kept result, the job ends without an
attempt, and that result is delivered at once. Otherwise the job runs.

**Delivered means committed.** A job that has ended gives its slot back, and its result goes to the journal.
The result is delivered when the journal has committed it. Meanwhile the job does not count as live, so that
short agents do not wait for the disk. At most as many such results as the limit may wait; beyond that, a slow
disk is backpressure.

**When the journal fails**, nothing new is started and running invocations finish. Then the journal tries once
more, and the batch ends with a ``JournalError``.
"""

from __future__ import annotations

__all__ = ["AnyJournal", "Journaled", "Session", "check_journal", "collecting_batch"]

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import anyio

from .._errors import JournalError
from .._invocation import Inputs, Invocation
from .._limits.limiter import Limiter
from .._limits.slots import Pool, Slot
from .._result import InvocationResult, Status
from .._runtime.job import Job
from .._runtime.journaled import Claim, JournaledJob, ReplayedJob
from .._runtime.options import RunOptions
from .batch import Batch
from .bookkeeping import Bookkeeping
from .collect import CollectingBatch
from .ending import RuleTally

T = TypeVar("T")

# How long a cancelled batch waits for the results of ended jobs to be written, in seconds.
CLOSE_SECONDS = 5.0
_NOT_RECORDED = (Status.CANCELLED, Status.SKIPPED)


class Session(Protocol):
    """A journal's side of one batch."""

    def claim(self, invocation: Invocation[Any]) -> Claim:
        """
        Return the entry for an input.

        :raises TypeError: if it needs a key and has none
        :raises ValueError: if another input has its key
        :raises JournalError: if the journal cannot be read
        """
        ...

    def write(self, claim: Claim, result: InvocationResult[Any], on_done: Callable[[bool], object]) -> None:
        """
        Queue a result to be written.

        :param on_done: called with whether it was committed; if not, the journal will not try again
        """
        ...

    def flush(self) -> None:
        """Write all queued results at once; retry a failed write once, for the last time."""

    def release(self, row: int) -> None:
        """Leave an entry to another input."""


class AnyJournal(ABC):
    """A journal, as far as batches know it: a ``Journal`` of ``agentloop.journal``."""

    @abstractmethod
    def begin(self, on_failure: Callable[[JournalError], object]) -> Session:
        """
        Begin to serve a batch.

        :param on_failure: called the first time that results of the batch could not be written
        :raises RuntimeError: if the journal is not open in this event loop
        """


def check_journal(value: object) -> None:
    """Raise ``TypeError`` if a value is no journal."""
    if value is not None and not isinstance(value, AnyJournal):
        raise TypeError(f"journal must be an agentloop.journal.Journal, got {value!r}")


class Recording(Generic[T]):
    """
    Writes the results of a batch into a journal before they are delivered.

    :param batch: the batch
    :param journal: the journal
    :param deliver: takes a result and the row of its entry, once the entry was committed
    :param on_replay: is called for each result of an earlier run
    """

    def __init__(
        self,
        batch: Bookkeeping[T],
        journal: AnyJournal,
        deliver: Callable[[InvocationResult[T], int], object],
        on_replay: Callable[[], object],
    ) -> None:
        self.session = journal.begin(self.fail)
        self.pending = 0
        """How many results are being written."""
        self.error: JournalError | None = None
        """Why the batch was stopped, if the journal has failed."""
        self._batch = batch
        self._deliver = deliver
        self._on_replay = on_replay
        # How many of the results that are being written do not count as live.
        self._uncounted = 0
        # Set once all of them are written, if the batch has ended before.
        self._written: anyio.Event | None = None

    def make_job(
        self, invocation: Invocation[T], index: int, now: float, pool: Pool, outer: Slot | None
    ) -> Job[T]:
        """Make the job of an input. It has ended already if the journal holds its result."""
        claim = self.session.claim(invocation)
        try:
            result = claim.replay(index)
        except BaseException:
            claim.release()
            raise

        if result is None:
            return JournaledJob(invocation, index, now, pool, outer, claim)

        return ReplayedJob(invocation, index, now, pool, outer, claim, result)

    def take(self, job: Job[T], result: InvocationResult[T]) -> None:
        """Take the result of a job that has ended, and deliver it once the journal has committed it."""
        if isinstance(job, ReplayedJob):
            self._on_replay()
            self._deliver(result, job.claim.row)
            return

        assert isinstance(job, JournaledJob)
        if job.claim.error is not None:
            self._give_up(job.claim, result)
        elif result.status in _NOT_RECORDED or not (job.attempts or result.status is Status.ERROR):
            job.claim.release()
            self._deliver(result, 0)
        else:
            self._write(job.claim, result)

    def _write(self, claim: Claim, result: InvocationResult[T]) -> None:
        source = self._batch.source
        counted = self._uncounted >= source.limit
        if counted and self.error is None:
            # No more jobs start before some results are written.
            self.session.flush()

        if not counted:
            self._uncounted += 1
            source.live -= 1
            self._batch.changed()

        self.pending += 1
        self.session.write(claim, result, partial(self._end, claim, result, counted))

    def _end(self, claim: Claim, result: InvocationResult[T], counted: bool, committed: bool) -> None:
        self.pending -= 1
        if not counted:
            self._uncounted -= 1
            self._batch.source.live += 1

        if self._written is not None:
            # The batch has ended.
            claim.release()
            if not self.pending:
                self._written.set()

            return

        if committed:
            self._deliver(result, claim.row)
        else:
            self._give_up(claim, result)

        self._batch.check_done()

    def _give_up(self, claim: Claim, result: InvocationResult[T]) -> None:
        """Add a result that cannot be written to the error that stops the batch."""
        cause = claim.error
        if cause is not None and self.error is None:
            error = JournalError(str(cause))
            error.__cause__ = cause
            self.fail(error)

        assert self.error is not None
        self.error.unwritten.append(result)
        claim.release()
        self._batch.source.live -= 1

    def fail(self, error: JournalError) -> None:
        """Stop the batch, and let it raise an error when it has ended."""
        if self.error is None:
            self.error = error
            self._batch.source.cut()
            self._batch.stop(str(error), error)

        # The batch may be waiting for the second try alone.
        self._batch.check_done()

    def forget_error(self) -> None:
        """Drop the error, once the caller has received it."""
        self.error = None

    async def close(self) -> None:
        """Deliver no more results, and wait until those of ended jobs are written."""
        if self.pending:
            self._written = anyio.Event()
            self.session.flush()
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await self._written.wait()


class Journaled(Batch[T]):
    """
    A batch with a journal. Subclasses decide what to do with each result (``_hand_over``).

    :param inputs: the invocations to run
    :param limiter: bounds how many run at once
    :param options: the settings of all invocations
    :param journal: the journal
    :param on_replay: is called for each result of an earlier run
    """

    def __init__(
        self,
        inputs: Inputs[T],
        limiter: Limiter,
        options: RunOptions,
        journal: AnyJournal,
        on_replay: Callable[[], object],
    ) -> None:
        super().__init__(inputs, limiter, options)
        self.kept = None
        self.recording = Recording(self, journal, self._hand_over, on_replay)
        self.source.new_job = self.recording.make_job

    @property
    def input_error(self) -> Exception | None:
        return self.recording.error or super().input_error

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            await self.recording.close()

    @abstractmethod
    def _hand_over(self, result: InvocationResult[T], row: int) -> None:
        """
        Take a result that was committed. It counts as live until :meth:`_taken`.

        :param row: the row of its entry; 0 without one
        """

    def _deliver(self, job: Job[T], result: InvocationResult[T], now: float) -> None:
        del now
        self.recording.take(job, result)

    def _apply_rule(self, tally: RuleTally, result: InvocationResult[T]) -> None:
        if not result.replayed:
            super()._apply_rule(tally, result)

    def check_done(self) -> None:
        if not self.recording.pending:
            super().check_done()
        elif self.source.exhausted and self._ended == self.source.pulled:
            self.recording.session.flush()


class JournaledCollecting(Journaled[T], CollectingBatch[T]):
    """A batch with a journal that returns its results all at once."""

    def __init__(
        self,
        inputs: Inputs[T],
        limiter: Limiter,
        options: RunOptions,
        journal: AnyJournal,
        on_replay: Callable[[], object],
    ) -> None:
        super().__init__(inputs, limiter, options, journal, on_replay)
        self._committed: list[InvocationResult[T]] = []
        self._rows = array("Q")

    async def run(self) -> None:
        try:
            await super().run()
        except BaseException:
            self._release()
            raise

    def results(self) -> list[InvocationResult[T]]:
        if self.input_error is not None:
            self._release()

        self.kept, self._committed = self._committed, []
        return super().results()

    def _hand_over(self, result: InvocationResult[T], row: int) -> None:
        self._committed.append(result)
        self._rows.append(row)
        self._taken()

    def _release(self) -> None:
        """Leave the entries to a later batch, since the caller of this one gets no result."""
        for row in self._rows:
            self.recording.session.release(row)


def collecting_batch(
    inputs: Inputs[T],
    limiter: Limiter,
    options: RunOptions,
    journal: AnyJournal | None,
    on_replay: Callable[[], object],
) -> CollectingBatch[T]:
    """Return a batch that returns its results all at once, with a journal if there is one."""
    if journal is None:
        return CollectingBatch(inputs, limiter, options)

    return JournaledCollecting(inputs, limiter, options, journal, on_replay)

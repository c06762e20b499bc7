"""The state of a batch, and the transitions of its jobs."""

from __future__ import annotations

__all__ = ["Bookkeeping"]

import math
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

from .._errors import BatchStopped, BudgetSpent
from .._eventloop.context import Inherited
from .._eventloop.deadlines import AttemptScope
from .._eventloop.tasks import Tasks
from .._invocation import Inputs
from .._limits.limiter import Limiter, pool_of
from .._limits.slots import Slot, current_slot
from .._result import InvocationResult
from .._runtime.job import Job
from .._runtime.observer import COUNTED_AT_ONCE
from .._runtime.options import RunOptions
from .._runtime.outcome import Outcome
from .._verdict import VerdictKind
from .by_key import ByKey
from .crew import Crew
from .ending import BUDGET_HINT, FATAL_HINT, PATIENCE_HINT, RULE_HINT, Ending, RuleTally, blame
from .inputs import InputSource
from .retry_queue import RetryQueue
from .timer import Timer

T = TypeVar("T")


class Bookkeeping(Generic[T]):
    """
    The state of a batch: its parts, and how each job goes on after an attempt.

    All methods are synchronous, so that cancellation cannot tear a transition. Subclasses decide what to do
    with each result (``_deliver``).

    :param inputs: the invocations to run
    :param limiter: bounds how many run at once
    :param options: the settings of all invocations
    """

    skips_remaining: ClassVar[bool]
    """Whether a batch that was stopped still pulls the remaining sync input, and skips it."""
    kept: list[InvocationResult[T]] | None = None
    """The list to which results are appended, if they need no other delivery."""

    def __init__(self, inputs: Inputs[T], limiter: Limiter, options: RunOptions) -> None:
        self.options = options
        self.pool = pool_of(limiter)
        self.inherited = Inherited(current_slot)
        self.retries = RetryQueue(self.pool.loop.now)
        self.source = InputSource(
            inputs,
            self.pool,
            current_slot.get(),
            options.observer,
            self.retries,
            limiter.batch_size,
            self.skips_remaining,
        )
        self.crew = Crew(limiter.batch_size)
        self.deadlines = self.pool.loop.batch_deadlines()
        self.ending = Ending(options.config.stop)
        self.by_key: ByKey[T] | None = None
        if self.pool.route is not None:
            self.by_key = ByKey(self.source, self.retries, self.ending, self.pool.loop.now)

        self.timers: list[Timer] = []
        self.tasks: Tasks | None = None
        self.done = False
        self._limiter = limiter
        # The caller's own deadline, and the time of the call.
        self._deadline = math.inf
        self._began = 0.0
        # How many jobs have a result.
        self._ended = 0

    @property
    def input_error(self) -> Exception | None:
        """The exception that the input raised."""
        return self.source.error

    @property
    def cut_short(self) -> bool:
        """Whether pulling stopped before the input was exhausted."""
        return self.source.cut_short

    @property
    def stopped(self) -> BatchStopped | None:
        """The exception to raise once the batch has ended, if inputs were skipped or not pulled."""
        return self.ending.error(self.cut_short)

    # -- the jobs, in the order in which one passes

    @property
    def may_start(self) -> Callable[[], bool] | None:
        """Returns whether a job can start before the reader reads on; ``None`` if that is always so."""
        return None

    @property
    def next_job(self) -> Callable[[], Job[T] | None]:
        """The function that returns the next job to run."""
        return self.source.next_job

    def has_work(self) -> bool:
        """Return whether :meth:`next_job` would return a job; if not, let the feeder pull."""
        return self.source.has_work()

    def retry_or_finish(self, job: Job[T], slot: Slot, scope: AttemptScope, now: float) -> None:
        """Schedule a retry of a job whose attempt has failed, or finish the job."""
        failed = job.failed
        verdict = None if failed is None else failed.verdict
        if failed is None:  # a retry has succeeded
            slot.release(None, True)

        if scope.is_spoilt:
            assert failed is not None
            self.crew.replace_spoilt()
            if self.crew.spoilt >= self.crew.size:
                agent = f"the last one {job.invocation.agent_id!r}"
                self.stop(f"{self.crew.spoilt} agents left a scope open, {agent}", failed.error)
        elif failed is not None and verdict is not None:
            if verdict.kind is VerdictKind.FATAL:
                self._stop_for(job, blame(job, failed), failed.error, FATAL_HINT)
            else:
                # Checked for every error: the agent may have raised its own for an overload of nested work.
                self._lose_patience(job, failed)

            if self.ending.stopped_for(job) is not None:
                if verdict.kind not in (VerdictKind.PERMANENT, VerdictKind.FATAL):
                    self.ending.end_job(job)
            elif job.next_start(now, self._deadline, self.options) is not None:
                self._retry(job, now)
                return

        self.finish(job, now)

    def _retry(self, job: Job[T], now: float) -> None:
        wake_at = job.schedule_retry(self.options.observer, now)
        self.source.free_room(job)
        if self.retries.push(job, wake_at):
            assert self.tasks is not None
            self.tasks.start_soon(self.retries.watch, "agentloop retries")

        # A waiting job makes room for one more input.
        self.changed()

    def _expire(self, job: Job[T], now: float) -> None:
        """End a job that has waited until its total time was up."""
        assert self.options.total is not None
        waiter = self.retries.waiters.get(job)
        if waiter is None:
            self.source.use_room(job)
            job.expire(self.options.total)
            self.finish(job, now)
        elif not waiter.granted:
            job.expire(self.options.total)
            job.pool.withdraw(waiter)

    def finish_cancelled(self, job: Job[T], scope: AttemptScope) -> None:
        """Finish a job whose attempt was cancelled with the batch, or whose error ends the batch."""
        job.cancel(self.ending.reason, scope.cause)
        if scope.is_spoilt:
            self.crew.replace_spoilt()

        self.finish(job, self.pool.loop.now())

    def finish(self, job: Job[T], now: float) -> None:
        """Make the result of a job that gets no further attempt, and deliver it."""
        source, results = self.source, self.kept
        result = job.finish(self.options.observer, now)
        self._ended += 1
        if len(self.options.observer.uncounted) >= COUNTED_AT_ONCE:
            self.options.observer.count()

        if self.pool.must_resolve and (job.bill is not None or job.pool is not self.pool):
            job.settle_and_leave(result, self.pool)

        if results is None:
            self._deliver(job, result, now)
        else:
            # As _deliver() and _taken() do; inlined for speed.
            results.append(result)
            source.live -= 1
            if not self.crew.seeking or source.feeder is not None:
                self.changed()

        if self.ending.tally is not None:
            self._apply_rule(self.ending.tally, result)

        if source.exhausted:
            self.check_done()

    def _deliver(self, job: Job[T], result: InvocationResult[T], now: float) -> None:
        """
        Take the result of a job that ended at ``now``, unless results are :attr:`kept`.

        The job counts as live until :meth:`_taken`.
        """

    def _taken(self) -> None:
        """Count a delivered result as no longer live."""
        self.source.live -= 1
        self.changed()

    def changed(self) -> None:
        """Activate a worker, and wake the feeder, if there is work for them and no other task does it."""
        if not self.done and self.tasks is not None:
            if self.source.feeder is not None:
                self.source.feeder.wake(self.source)

            self.crew.activate()

    def _resized(self) -> None:
        self.source.limit = self._limiter.batch_size + self.pool.all_away
        self.crew.resize(self.source.limit)
        self.changed()

    # -- the end of the batch

    def check_done(self) -> None:
        """End the batch's tasks once the input is exhausted and every pulled job has ended."""
        if self.source.exhausted and self._ended == self.source.pulled and not self.done:
            self.done = True
            self.crew.close()
            self.retries.close()
            self.source.stop_feeding()
            if self.by_key is not None:
                self.by_key.close()

            while self.timers:
                self.timers.pop().stop()

            if self.deadlines is not None:
                self.deadlines.stop()

    def _apply_rule(self, tally: RuleTally, result: InvocationResult[T]) -> None:
        reason = tally.add(result)
        if reason is not None:
            self.stop(reason, tally.error, RULE_HINT, tally.rule.grace_seconds)

    def _lose_patience(self, job: Job[T], failed: Outcome) -> None:
        """Stop if the provider has let nothing succeed for too long."""
        config = self.options.config
        if job.pool.is_hopeless(config.overload_timeout_seconds):
            assert job.pool.admission.provider is not None
            only_timeouts = job.pool.admission.provider.outage.timed_out
            reason = (
                f"nothing has succeeded for {config.overload_timeout_seconds:.10g}s: {blame(job, failed)}"
            )
            hint = (
                f"is timeout_seconds={config.timeout_seconds} too short?" if only_timeouts else PATIENCE_HINT
            )
            self._stop_for(job, reason, failed.error, hint)

    def spend(self, job: Job[T], spent: BudgetSpent) -> None:
        """Stop, since no budget is left to pay the next attempt of a job."""
        self._stop_for(job, f"{job.invocation.agent_id!r} was refused: {spent}", spent, BUDGET_HINT)

    def _stop_for(self, job: Job[T], reason: str, cause: BaseException, hint: str) -> None:
        """Stop all jobs that use the same limiter as a job: the batch, or the jobs of its key."""
        if self.by_key is None:
            self.stop(reason, cause, hint)
            return

        stopped = self.ending.stop_key(job.pool, reason, cause, hint)
        if stopped is None:
            return

        now = self.pool.loop.now()
        self.options.observer.stopped(stopped.reason, now)
        for other in self.by_key.stop(job.pool):
            self.ending.end_job(other)
            self.finish(other, now)

    def stop(
        self,
        reason: str,
        cause: BaseException | None,
        hint: str = "",
        grace_seconds: float | None = None,
    ) -> None:
        """
        Start nothing new and retry nothing; let running invocations finish.

        :param reason: the reason, in words
        :param cause: the reason as an exception, if there is one
        :param hint: how the user lets such a batch go on
        :param grace_seconds: how long running invocations may take before they are cancelled; ``None`` for no
            limit
        """
        stopped = None if self.done else self.ending.stop(reason, cause, hint)
        if stopped is None:
            return

        if self.source.feeder is not None or not self.skips_remaining:
            self.source.cut()

        now = self.pool.loop.now()
        self.options.observer.stopped(stopped.reason, now)
        for job in self._pop_retries():
            self.ending.end_job(job)
            self.finish(job, now)

        for job, waiter in tuple(self.retries.waiters.items()):
            # The task of a granted waiter checks for the stop itself.
            if not waiter.granted:
                job.pool.withdraw(waiter)

        self.check_done()
        if grace_seconds == 0:
            self.cancel(stopped.reason, cause)
        elif grace_seconds is not None:
            self.start_timer(now + grace_seconds, lambda: self.cancel(stopped.reason, cause))

    def cancel(self, reason: str, cause: BaseException | None) -> None:
        """
        Stop, and cancel running invocations. Each invocation still has its result, except those of an async
        input that were not pulled: pulling them could take any time.
        """
        self.stop(reason, cause)
        self.crew.cancel(reason)

    def start_timer(self, at: float, action: Callable[[], object]) -> None:
        """Call a function at a given time, unless the batch is done before."""
        if not self.done and self.tasks is not None:
            timer = Timer(at, action)
            self.timers.append(timer)
            self.tasks.start_soon(timer.run, "agentloop timer")

    def _abandon(self) -> None:
        """End the jobs that a cancelled batch will not start again, so that every invocation has a result."""
        now = self.pool.loop.now()
        if self.by_key is not None:
            self.by_key.abandon()

        for job in (*self.source.pop_ready(), *self._pop_retries()):
            job.cancel(self.ending.reason)
            self.finish(job, now)

    def _pop_retries(self) -> list[Job[T]]:
        jobs = self.retries.pop_all()
        for job in jobs:
            self.source.use_room(job)

        return jobs

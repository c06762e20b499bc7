"""A single invocation, in its caller's task."""

from __future__ import annotations

__all__ = ["Single"]

from contextvars import copy_context
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from .._errors import BatchStopped, LeftOpenError
from .._eventloop.deadlines import AttemptScope
from .._invocation import Invocation
from .._limits.away import come_back
from .._limits.limiter import Limiter, pool_of
from .._limits.lines import Waiter
from .._limits.slots import HELD, Slot, current_slot
from .._result import InvocationResult
from .._verdict import VerdictKind
from .job import Job
from .observer import COUNTED_AT_ONCE
from .options import RunOptions
from .states import QUEUED, RUNNING
from .tracebacks import check_depth

T = TypeVar("T")

_get_slot = current_slot.get

# How many scopes are kept for later invocations of an event loop.
SPARE_SCOPES = 100


class Single(Generic[T]):
    """
    Runs one invocation in one task: wait for a slot, run an attempt, wait to retry, and again.

    :param own_task: whether the task is the library's and not the caller's
    """

    reason = "the caller was cancelled"
    """The reason that a cancelled invocation gives."""
    result: InvocationResult[T] | None = None
    """The result, if it was cancelled or runs in a task of its own."""
    left_open = False
    """Whether the agent has left a cancel scope or a task group open in the task."""
    _scope: anyio.CancelScope | None = None
    # Why nothing is started or retried any more; None while attempts may start.
    _stopped: BatchStopped | None = None
    # As outer; None until _begin(), and in plain cases.
    _outer: Slot | None = None
    _retry_wait: anyio.CancelScope | None = None
    # Its waiter, while it waits for a slot.
    _waiter: Waiter | None = None

    def __init__(
        self, invocation: Invocation[T], limiter: Limiter, options: RunOptions, own_task: bool = False
    ) -> None:
        self._options = options
        self._own_task = own_task
        outer = _get_slot()
        if outer is not None:
            check_depth(outer)

        # As pool_of() does; inlined for speed.
        pool = limiter._pools.state  # pyright: ignore[reportPrivateUsage]  # not for users
        if pool is None or not pool.is_current():
            pool = pool_of(limiter)

        self._pool = pool
        self._job = Job(invocation, 0, pool.loop.now(), pool, outer)

    def enter(self) -> None:
        """
        Join the line, or be refused, before :meth:`run` in a task of its own.

        :raises BaseException: an exception of a user's function that is no ``Exception``; then nothing is run
        """
        self._pool.claim()
        try:
            self._begin()
            if (not self._pool.must_resolve or self._job.resolve()) and self._stopped is None:
                self._join_line(self._job)
        except BaseException:
            self._job.cancel(self.reason)
            self._end(None, self._pool.loop.now())
            raise

    async def run(self) -> InvocationResult[T]:
        """
        Run to the end.

        :raises BaseException: the caller's cancellation, or an agent's error that is no ``Exception``
        :raises LeftOpenError: if the agent has left a scope open in the caller's task
        """
        job, options, pool, own_task = self._job, self._options, self._pool, self._own_task
        loop = pool.loop
        if not own_task:  # else enter() has done this
            # From here on, _end() must run.
            pool.claim()
            if not (job.is_plain and pool.admission.is_open and options.observer.only_counts):
                self._begin()

        scope = loop.spare.pop() if loop.spare else loop.attempt_scope()
        try:
            now, ready = job.queued_at, True
            if own_task:
                ready = self._waiter is not None
            elif pool.must_resolve:
                ready, now = job.resolve(), loop.now()  # in this order: resolving may take some time

            while ready and (self._stopped is None or self._waiter is not None):
                slot = job.next_slot() if job.attempts else job
                if (own_task and self._waiter is not None) or not job.pool.acquire_nowait(slot):
                    granted = await self._wait_in_line(slot)
                    now = loop.now()
                    if not granted:
                        break

                try:
                    before = None if own_task else loop.cancellations_before()
                    now = await job.run_isolated(slot, options, scope, copy_context, now, before)
                finally:
                    scope.leave()

                if job.failures is None or job.failures.last is None:
                    slot.release(None, True)
                    break

                if not self._is_retried(now):
                    break

                await self._wait_to_retry(now)
                now = loop.now()

            if self._stopped is not None and job.state is QUEUED:
                job.end_stopped(self._stopped)

            if not job.waited:
                await cancel_shielded_checkpoint()
        except BaseException:
            job.cancel(self.reason, scope.cause)
            self.result = self._end(scope, loop.now())
            await self._come_back()
            raise

        if scope.is_spoilt and not own_task:
            # An open scope would break the caller's next steps without a visible reason.
            self._end(scope, now)
            raise LeftOpenError(job.invocation.agent_id)

        # No local name for the result: an error in it refers to this frame by its traceback.
        if own_task or not job.is_plain or job.pool is not pool:
            is_away = not own_task and self._outer is not None and self._outer.hold is not HELD
            return await self._end_and_come_back(scope, now) if is_away else self._end(scope, now)

        # As _end() does; inlined for speed.
        if len(loop.spare) < SPARE_SCOPES:
            loop.spare.append(scope)
        else:
            scope.forget()

        pool.users -= 1
        if len(options.observer.uncounted) >= COUNTED_AT_ONCE:
            options.observer.count()

        return job.finish(options.observer, now)

    async def _end_and_come_back(self, scope: AttemptScope, now: float) -> InvocationResult[T]:
        try:
            return self._end(scope, now)
        finally:
            await self._come_back()

    async def _come_back(self) -> None:
        """Wait for a slot for the outer invocation, if it has stepped aside. ``away`` has the theory."""
        if self._outer is not None and not self._own_task:
            await come_back(self._outer)

    def _begin(self) -> None:
        # Kept here, since the job drops an outer slot once its invocation has ended.
        self._outer = self._job.outer
        self._pool.begin_call(self, self._outer)
        if not self._options.observer.only_counts:
            self._job.report_queued(self._options.observer)

    async def run_cancellable(self) -> InvocationResult[T]:
        """Run to the end, or until :meth:`cancel`, which makes a result as well."""
        try:
            with anyio.CancelScope() as self._scope:
                return await self.run()
        except RuntimeError as exc:
            # Leaving this scope fails too, because a scope inside it was left open.
            raise (LeftOpenError(self._job.invocation.agent_id) if self.left_open else exc) from None

        assert self.result is not None
        return self.result

    async def refuse(self, stopped: BatchStopped) -> InvocationResult[T]:
        """Return the result of an invocation that must not begin."""
        await checkpoint()
        self._pool.claim()
        self._begin()
        self._job.end_stopped(stopped)
        return self._end(None, self._pool.loop.now())

    @property
    def outer(self) -> Slot | None:
        """The slot of the invocation that runs this one; ``None`` outside of an agent."""
        return self._job.outer

    @property
    def caller_waits(self) -> bool:
        """Whether the caller waits for the end of the invocation."""
        return not self._own_task

    def wind_down(self, stopped: BatchStopped, until: float | None) -> None:
        """
        Start and retry nothing any more.

        :param stopped: the reason
        :param until: when to cancel a running attempt
        """
        job = self._job
        if self._stopped is None:
            self._stopped = stopped
            if self._waiter is not None and not self._waiter.granted:
                # The task of a granted waiter checks for the stop itself.
                job.end_stopped(stopped)
                job.pool.withdraw(self._waiter)
            elif self._retry_wait is not None:
                self._retry_wait.cancel(stopped.reason)

        # Later, another invocation may use the scope.
        if until is not None and job.state is RUNNING and job.scope is not None:
            job.scope.end_by(until, stopped.reason)

    def may_go_on(self, keys: Any) -> bool:
        """Return whether the invocation waits for anything besides slots of the pools of some keys."""
        job, waiter = self._job, self._waiter
        moves = self._retry_wait is not None or (waiter is not None and waiter.is_over)
        return moves or job.pool.keys is not keys

    def on_block_left(self) -> None:
        """Do nothing: a retry of this invocation is no new work."""

    def cancel(self, reason: str, cause: BaseException) -> None:
        """Cancel the invocation."""
        del cause
        assert self._scope is not None
        self.reason = reason
        self._scope.cancel(reason)

    def _is_retried(self, now: float) -> bool:
        job, failed = self._job, self._job.failed
        if self._stopped is None:
            return job.next_start(now, anyio.current_effective_deadline(), self._options) is not None

        verdict = None if failed is None else failed.verdict
        if verdict is not None and verdict.kind in (VerdictKind.TRANSIENT, VerdictKind.OVERLOAD):
            job.end_stopped(self._stopped)

        return False

    def _end(self, scope: AttemptScope | None, now: float) -> InvocationResult[T]:
        if scope is not None:
            self.left_open = scope.is_spoilt
            if not scope.is_spoilt and len(self._pool.loop.spare) < SPARE_SCOPES:
                self._pool.loop.spare.append(scope)
            else:
                scope.forget()

        job, observer = self._job, self._options.observer
        self._pool.users -= 1
        self._pool.end_call(self, self._outer)
        result = job.finish(observer, now)
        if len(observer.uncounted) >= COUNTED_AT_ONCE:
            observer.count()

        if job.bill is not None or job.pool is not self._pool:
            job.settle_and_leave(result, self._pool)

        if self._own_task:
            self.result = result

        return result

    async def _wait_to_retry(self, now: float) -> None:
        """Wait until the next attempt may begin."""
        wake_at = self._job.schedule_retry(self._options.observer, now)
        loop = self._pool.loop
        try:
            if self._own_task and loop.count_cancellations()():
                await loop.forget_cancellations()

            with anyio.CancelScope() as self._retry_wait:
                await anyio.sleep_until(wake_at)
        finally:
            self._retry_wait = None
            self._job.wake()

    async def _wait_in_line(self, slot: Slot) -> bool:
        """
        Wait for a slot. In a task of its own, the invocation is in line for its first slot already.

        :return: whether the slot was granted; it is not if too many wait, if the wait takes too long, or if
            nothing is started any more
        """
        job = self._job
        try:
            waiter = self._waiter or self._join_line(slot)
            granted = waiter.granted or await job.pool.wait(waiter)
            if waiter.error is not None:
                job.refuse(waiter.error)
                job.pool.withdraw(waiter)
        finally:
            self._waiter = None

        if granted and (self._stopped is not None or job.pool.loop.now() >= job.deadline):
            slot.give_back()
            granted = False

        if not granted and waiter.error is None and job.state is QUEUED and self._stopped is None:
            # It waited for too long.
            is_late, options = job.pool.loop.now() >= job.deadline, self._options
            job.expire(options.total if is_late and options.total is not None else options.queue)

        return granted

    def _join_line(self, slot: Slot) -> Waiter:
        """Join the line for a slot: a bounded one for a first slot that cannot be borrowed."""
        job, until = self._job, self._job.deadline
        self._waiter = waiter = job.join_line(slot)
        if not (job.attempts or waiter.granted or waiter.lender is not None):
            until = min(until, job.queued_at + self._options.queue.seconds)
            full = job.pool.refuse_if_full(waiter)
            if full is not None:
                job.refuse(full)

        waiter.expire_at(until)
        return waiter

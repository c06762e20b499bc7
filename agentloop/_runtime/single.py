"""One invocation, in its caller's task."""

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
from .._limits.slots import Slot, current_slot
from .._result import InvocationResult
from .._verdict import VerdictKind
from .job import Job
from .observer import COUNTED_AT_ONCE
from .options import RunOptions
from .states import QUEUED

T = TypeVar("T")

# How many scopes of attempts are kept for other invocations of an event loop.
SPARE_SCOPES = 100


class Single(Generic[T]):
    """
    Runs one invocation in one task: slot, attempt, wait, and again.

    :param own_task: whether the task is ours and not the caller's
    """

    reason = "the caller was cancelled"
    """Why it is cancelled, if it is."""
    ended: InvocationResult[T] | None = None
    """The result, if it was cancelled or the task is ours."""
    left_open = False
    """Whether the agent has left a cancel scope or a task group open in the task."""
    _scope: anyio.CancelScope | None = None
    # Why nothing is started or retried any more, if so.
    _stopped: BatchStopped | None = None
    _attempt: AttemptScope | None = None
    # The slot of the invocation that runs this one, if one does.
    _caller: Slot | None = None
    _resting: anyio.CancelScope | None = None
    # Its place in line, while it waits for a slot.
    _waiter: Waiter | None = None

    def __init__(
        self, invocation: Invocation[T], limiter: Limiter, options: RunOptions, own_task: bool = False
    ) -> None:
        self._options = options
        self._own_task = own_task
        self._pool = pool = pool_of(limiter)
        self._job = Job(invocation, 0, pool.loop.now(), pool, current_slot.get())

    def enter(self) -> None:
        """
        Stand in line before :meth:`run` does, or be refused, if the task is ours.

        :raises BaseException: what a user's function raised that is no error; then there is nothing to run
        """
        self._pool.claim()
        try:
            self._begin()
            if (not self._pool.selective or self._job.resolve()) and self._stopped is None:
                self._join_line(self._job)
        except BaseException:
            self._job.cancel(self.reason)
            self._end(None, self._pool.loop.now())
            raise

    async def run(self) -> InvocationResult[T]:
        """
        Run to the end.

        :raises BaseException: the caller's cancellation, and what the agent raised that is no ``Exception``
        :raises LeftOpenError: if the agent has left a scope open in the caller's task
        """
        job, options, pool, own_task = self._job, self._options, self._pool, self._own_task
        loop = pool.loop
        if not own_task:  # else enter() has done this
            # From here on it has to come to its end, by _end().
            pool.claim()
            if not (job.is_plain and pool.admission.is_open and options.observer.is_plain):
                self._begin()

        self._attempt = scope = loop.spare.pop() if loop.spare else loop.attempt_scope()
        try:
            now, ready = job.queued_at, True
            if own_task:
                ready = self._waiter is not None
            elif pool.selective:
                ready = job.resolve()
                # Whoever said what it costs may have taken his time.
                now = loop.now()

            while ready and (self._stopped is None or self._waiter is not None):
                slot = job.next_slot() if job.attempts else job
                if (own_task and self._waiter is not None) or not job.pool.acquire_nowait(slot):
                    granted = await self._wait_in_line(slot)
                    now = loop.now()
                    if not granted:
                        break

                try:
                    caller = None if own_task else loop.callers_cancellation()
                    now = await job.run(slot, options, scope, copy_context, now, None, caller)
                finally:
                    scope.leave()

                if job.failures is None or job.failures.last is None:
                    slot.release(None, True)
                    break

                if not self._is_retried(now):
                    break

                await self._rest(now)
                now = loop.now()

            if self._stopped is not None and job.state is QUEUED:
                job.close(self._stopped)

            if not job.waited and not own_task:
                await cancel_shielded_checkpoint()
        except BaseException:
            job.cancel(self.reason, scope.cause)
            self.ended = self._end(scope, loop.now())
            await self._return()
            raise

        if scope.is_spoilt and not own_task:
            # What the caller does next would go wrong in ways that do not show why.
            self._end(scope, now)
            raise LeftOpenError(job.invocation.agent_id)

        # No local name for the result: the traceback of an error in it refers to this frame.
        if own_task or not job.is_plain or job.pool is not pool:
            return await self._end_nested(scope, now)

        # The same as _end() does; a call for every invocation shows.
        self._attempt = None
        if len(loop.spare) < SPARE_SCOPES:
            loop.spare.append(scope)

        pool.users -= 1
        if not options.observer.count_result() % COUNTED_AT_ONCE:
            options.observer.count()

        return job.finish(options.observer, now)

    async def _end_nested(self, scope: AttemptScope, now: float) -> InvocationResult[T]:
        try:
            return self._end(scope, now)
        finally:
            await self._return()

    async def _return(self) -> None:
        """Let the caller have its slot again, if it has stepped aside."""
        if self._caller is not None and not self._own_task:
            await come_back(self._caller)

    def _begin(self) -> None:
        # Kept, since the job forgets it once that invocation has ended.
        self._caller = self._job.outer
        self._pool.begin_call(self, self._caller)
        if not self._options.observer.is_plain:
            self._job.queue(self._options.observer)

    async def run_cancellable(self) -> InvocationResult[T]:
        """Run to the end, or to a call of :meth:`cancel`, which makes a result as well."""
        try:
            with anyio.CancelScope() as self._scope:
                return await self.run()
        except RuntimeError as exc:
            # A scope around one that was left open cannot be left either, and says so.
            raise (LeftOpenError(self._job.invocation.agent_id) if self.left_open else exc) from None

        assert self.ended is not None
        return self.ended

    async def refuse(self, stopped: BatchStopped) -> InvocationResult[T]:
        """Return the result of an invocation that is not to begin."""
        await checkpoint()
        self._pool.claim()
        self._begin()
        self._job.close(stopped)
        return self._end(None, self._pool.loop.now())

    @property
    def outer(self) -> Slot | None:
        """The slot of the invocation that runs this one, if one does."""
        return self._job.outer

    @property
    def holds_caller(self) -> bool:
        """Whether the caller goes on only when it has ended."""
        return not self._own_task

    def wind_down(self, stopped: BatchStopped, until: float | None) -> None:
        """
        Start and retry nothing any more.

        :param stopped: says why
        :param until: when to cancel an attempt that still runs
        """
        job = self._job
        if self._stopped is None:
            self._stopped = stopped
            if self._waiter is not None and not self._waiter.granted:
                # One that has been granted a slot meanwhile finds out by itself.
                job.close(stopped)
                job.pool.withdraw(self._waiter)
            elif self._resting is not None:
                self._resting.cancel(stopped.reason)

        if until is not None and self._attempt is not None:
            self._attempt.end_by(until, stopped.reason)

    def may_go_on(self, keys: Any) -> bool:
        """Return whether it waits for something besides slots of the pools of some keys."""
        job, waiter = self._job, self._waiter
        moves = self._resting is not None or (waiter is not None and waiter.is_over)
        return moves or job.pool.keys is not keys

    def drain(self) -> None:
        """Begin nothing new; what waits to be retried here is not new."""

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
            job.close(self._stopped)

        return False

    def _end(self, scope: AttemptScope | None, now: float) -> InvocationResult[T]:
        # No wind_down() is to find the scope of another invocation.
        self._attempt = None
        if scope is not None:
            self.left_open = scope.is_spoilt
            if not scope.is_spoilt and len(self._pool.loop.spare) < SPARE_SCOPES:
                self._pool.loop.spare.append(scope)

        job, observer = self._job, self._options.observer
        self._pool.users -= 1
        self._pool.end_call(self, self._caller)
        result = job.finish(observer, now)
        if not observer.count_result() % COUNTED_AT_ONCE:
            observer.count()

        if job.bill is not None or job.pool is not self._pool:
            job.settle(result, self._pool)

        if self._own_task:
            self.ended = result

        return result

    async def _rest(self, now: float) -> None:
        """Wait until it is time for the next attempt."""
        wake_at = self._job.rest(self._options.observer, now)
        loop = self._pool.loop
        try:
            if self._own_task and loop.count_cancellations()():
                await loop.forget_cancellations()

            with anyio.CancelScope() as self._resting:
                await anyio.sleep_until(wake_at)
        finally:
            self._resting = None
            self._job.wake()

    async def _wait_in_line(self, slot: Slot) -> bool:
        """
        Wait for a slot, in line already if the task is ours and this is the first one.

        :return: whether it was granted; it is not if there are too many waiting, if it takes too long, or if
            nothing is started any more
        """
        job = self._job
        try:
            waiter = self._waiter or self._join_line(slot)
            granted, limit = waiter.granted, self._options.total
            if not granted:
                with anyio.CancelScope(deadline=job.deadline):
                    granted = await job.pool.wait(waiter)
                    if waiter.error is not None:
                        job.refuse(waiter.error)
                        job.pool.withdraw(waiter)

                    # Else it was refused, or nothing is started any more.
                    limit = self._options.queue if job.state is QUEUED and not job.attempts else None
        finally:
            self._waiter = None

        if granted and self._stopped is not None:
            slot.give_back()
            return False

        if not granted and limit is not None:
            job.expire(limit)

        return granted

    def _join_line(self, slot: Slot) -> Waiter:
        """Stand in line for a slot: in a bounded one, if it is the first slot and there is none to borrow."""
        job = self._job
        self._waiter = waiter = job.join_line(slot)
        if not (job.attempts or waiter.granted or waiter.lender is not None):
            waiter.expire_at(job.queued_at + self._options.queue.seconds)
            full = job.pool.bound(waiter)
            if full is not None:
                job.refuse(full)

        return waiter

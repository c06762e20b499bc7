"""One invocation, in its caller's task."""

from __future__ import annotations

__all__ = ["Single"]

from contextvars import copy_context
from typing import Generic, TypeVar

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint

from .._errors import LeftOpenError
from .._eventloop.deadlines import AttemptScope
from .._invocation import Invocation
from .._limits.limiter import Limiter, pool_of
from .._limits.slots import Slot, current_slot
from .._result import InvocationResult
from .job import Job
from .observer import COUNTED_AT_ONCE
from .options import RunOptions

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

    def __init__(
        self, invocation: Invocation[T], limiter: Limiter, options: RunOptions, own_task: bool = False
    ) -> None:
        self._options = options
        self._own_task = own_task
        self._pool = pool = pool_of(limiter)
        self._job = Job(invocation, 0, pool.loop.now(), pool, current_slot.get())

    async def run(self) -> InvocationResult[T]:
        """
        Run to the end.

        :raises BaseException: the caller's cancellation, and what the agent raised that is no ``Exception``
        :raises LeftOpenError: if the agent has left a scope open in the caller's task
        """
        job, options, pool, own_task = self._job, self._options, self._pool, self._own_task
        loop = pool.loop
        # From here on it has to come to its end, by _end().
        pool.claim()
        scope = loop.spare.pop() if loop.spare else loop.attempt_scope()
        if not options.observer.is_plain:
            job.queue(options.observer)

        try:
            now, ready = job.queued_at, True
            if pool.selective:
                ready = job.resolve()
                # Whoever said what it costs may have taken his time.
                now = loop.now()

            while ready:
                slot = job.next_slot() if job.attempts else job
                if not job.pool.acquire_nowait(slot):
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

                if job.next_start(now, anyio.current_effective_deadline(), options) is None:
                    break

                await self._rest(now)
                now = loop.now()

            if not job.waited and not own_task:
                await cancel_shielded_checkpoint()
        except BaseException:
            job.cancel(self.reason, scope.cause)
            self.ended = self._end(scope, loop.now())
            raise

        if scope.is_spoilt and not own_task:
            # What the caller does next would go wrong in ways that do not show why.
            self._end(scope, now)
            raise LeftOpenError(job.invocation.agent_id)

        # No local name for the result: the traceback of an error in it refers to this frame.
        if own_task or not job.is_plain:
            return self._end(scope, now)

        # The same as _end() does; a call for every invocation shows.
        if len(loop.spare) < SPARE_SCOPES:
            loop.spare.append(scope)

        pool.users -= 1
        if not options.observer.count_result() % COUNTED_AT_ONCE:
            options.observer.count()

        return job.finish(options.observer, now)

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

    def drain(self) -> None:
        """Begin nothing new; what waits to be retried here is not new."""

    def cancel(self, reason: str, cause: BaseException) -> None:
        """Cancel the invocation."""
        del cause
        assert self._scope is not None
        self.reason = reason
        self._scope.cancel(reason)

    def _end(self, scope: AttemptScope, now: float) -> InvocationResult[T]:
        self.left_open = scope.is_spoilt
        if not scope.is_spoilt and len(self._pool.loop.spare) < SPARE_SCOPES:
            self._pool.loop.spare.append(scope)

        job, observer = self._job, self._options.observer
        self._pool.users -= 1
        result = job.finish(observer, now)
        if not observer.count_result() % COUNTED_AT_ONCE:
            observer.count()

        if not job.is_plain:
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

            await anyio.sleep_until(wake_at)
        finally:
            self._job.wake()

    async def _wait_in_line(self, slot: Slot) -> bool:
        """
        Wait for a slot.

        :return: whether it was granted before the total time was up
        """
        job = self._job
        try:
            with anyio.CancelScope(deadline=job.deadline):
                return await job.pool.wait(job.join_line(slot))
        finally:
            job.leave_line()

        assert self._options.total is not None
        job.expire(self._options.total)
        return False

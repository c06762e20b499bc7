"""One invocation, in its caller's task."""

from __future__ import annotations

__all__ = ["Single"]

from contextvars import copy_context
from typing import Generic, TypeVar

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint

from .._errors import LeftOpenError
from .._invocation import Invocation
from .._limits.limiter import Limiter, claim, pool_of
from .._limits.slots import Slot, current_slot
from .._result import InvocationResult
from .attempt import RunOptions, run_attempt
from .attempt_scope import AttemptScope
from .job import Job

T = TypeVar("T")


class Single(Generic[T]):
    """
    Runs one invocation in one task: slot, attempt, wait, and again.

    :param own_task: whether the task is ours and not the caller's
    """

    reason = "the caller was cancelled"
    """Why it is cancelled, if it is."""
    ended: InvocationResult[T] | None = None
    """The result, if it was cancelled."""
    _scope: anyio.CancelScope | None = None

    def __init__(
        self,
        invocation: Invocation[T],
        limiter: Limiter,
        plan: RunOptions,
        own_task: bool = False,
    ) -> None:
        self._limiter = limiter
        self._pool = pool_of(limiter)
        self._plan = plan
        self._outer: Slot | None = current_slot.get()
        self._job = Job(invocation, 0, self._pool.loop.now(), self._pool)
        self._own_task = own_task
        self._waited = False

    @property
    def left_open(self) -> bool:
        """Whether the agent has left a cancel scope or a task group open in the task."""
        return self._job.left_open

    async def run(self) -> InvocationResult[T]:
        """
        Run to the end.

        :raises BaseException: the caller's cancellation, and what the agent raised that is no ``Exception``
        :raises LeftOpenError: if the agent has left a scope open in the caller's task
        """
        job, plan, pool, own_task = self._job, self._plan, self._pool, self._own_task
        observer = plan.observer
        # From here on it has to come to its end, by _end().
        claim(self._limiter, pool)
        if not observer.is_plain:
            observer.queued(job)

        try:
            timer = AttemptScope(pool, pool.loop.alarm)
            caller = None if own_task else pool.loop.callers_cancellation()
            now = job.queued_at
            ready = True
            selective = pool.selective
            if selective:
                ready = job.resolve_limits()
                # Whoever said what it costs may have taken his time.
                now = pool.loop.now()

            while ready:
                slot = job.pool.acquire_nowait(job.costs if selective else (), self._outer)
                if slot is None:
                    slot = await self._wait_in_line()
                    now = pool.loop.now()

                if slot is None:
                    job.expire()
                    break

                try:
                    now = await run_attempt(job, plan, slot, copy_context, caller, self._on_wait, timer, now)
                finally:
                    timer.close()

                if job.verdict is None:
                    break

                wake_at = job.next_start(now, anyio.current_effective_deadline(), plan.config)
                if wake_at is None:
                    break

                await self._rest(wake_at, now)
                now = pool.loop.now()

            if not self._waited and not own_task:
                await cancel_shielded_checkpoint()
        except BaseException:
            job.cancel(self.reason)
            self.ended = self._end(pool.loop.now())
            raise

        if job.left_open and not own_task:
            # What the caller does next would go wrong in ways that do not show why.
            self._end(now)
            raise LeftOpenError(job.invocation.agent_id)

        # No local name for the result: the traceback of an error in it refers to this frame.
        return self._end(now)

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

    def _end(self, now: float) -> InvocationResult[T]:
        job = self._job
        self._pool.users -= 1
        job.leave_pool(self._pool)
        result = self._plan.observer.finish(job, now)
        if job.charges is not None:
            job.pool.settle(job.charges, result)

        return result

    async def _rest(self, wake_at: float, now: float) -> None:
        """Wait until it is time for the next attempt."""
        job, pool = self._job, self._job.pool
        self._plan.observer.retrying(job, now)
        self._waited = True
        pool.asleep += 1
        try:
            if self._own_task and pool.loop.count_cancellations()():
                await pool.loop.forget_cancellations()

            await anyio.sleep_until(wake_at)
        finally:
            pool.asleep -= 1

    async def _wait_in_line(self) -> Slot | None:
        job, pool = self._job, self._job.pool
        self._waited = True
        with anyio.CancelScope(deadline=job.deadline):
            return await pool.wait(pool.enqueue(job.costs, self._outer))

        return None

    def _on_wait(self) -> None:
        self._waited = True

"""One invocation, from the line for a slot to its result."""

from __future__ import annotations

__all__ = ["Job"]

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from .._errors import BatchStopped, DeadlockError
from .._eventloop.deadlines import TimeLimit
from .._eventloop.errors import is_error
from .._invocation import Invocation
from .._limits.lines import Owner, Waiter
from .._limits.slots import HELD, RELEASED, Pool, Slot
from .._result import SUCCESS, Draft, InvocationResult, Status
from .current import Attempt, LaterSlot, Timing, idempotency_key
from .observer import Observer, new_id
from .options import RunOptions
from .outcome import Outcome, as_exception
from .run import Runnable
from .states import ENDED, QUEUED, RETRYING
from .tracebacks import drop_frames

T = TypeVar("T")

# Held while an invocation gets its id: threads of one agent may ask for it at the same time.
_identifying = threading.Lock()


def _make_attempt(
    agent_id: str, number: int, failures: tuple[Exception, ...], make_key: Callable[[], str]
) -> Attempt:
    return Attempt(agent_id, number, failures, make_key())


class Job(Runnable[T]):
    """
    The state of one invocation, from the line for a slot to its result.

    :param invocation: the invocation
    :param index: its place in the input
    :param now: when it began to wait for a slot
    :param pool: the pool that grants its slots
    :param outer: the slot of the invocation that runs it; ``None`` outside of an agent
    """

    def __init__(
        self, invocation: Invocation[T], index: int, now: float, pool: Pool, outer: Slot | None
    ) -> None:
        # As Slot.__init__() does; inlined for speed.
        self.pool = pool
        self.outer = outer
        self.is_plain = outer is None
        self.epoch = pool.admission.epoch
        self.hold = HELD
        self.bill = self.lender = self.lent = self.waiters = None
        self.invocation = invocation
        self.index = index
        self.queued_at = now
        self.state = QUEUED
        self.attempts = self.id = 0
        self.started_at = self.output = self.failures = self.scope = self.total = None
        self.waited = False

    @property
    def wake_at(self) -> float:
        """When its next attempt begins, if it waits to be retried."""
        return -math.inf if self.failures is None else self.failures.wake_at

    @property
    def began_at(self) -> float | None:
        return self.started_at

    def settle_and_leave(self, result: InvocationResult[T], home: Pool) -> None:
        """
        Correct the payment of the last attempt, and leave the pool to which the invocation was routed.

        :param home: the pool of its call, which may have routed it to the pool of its key
        """
        if self.pool is not home:
            self.pool.users -= 1

        if self.bill is not None:
            self.pool.settle(self.bill, result)

    def report_queued(self, observer: Observer) -> None:
        """Report that the invocation waits for its first slot."""
        self.id = observer.queued(self.invocation, self.queued_at)

    def resolve(self) -> bool:
        """
        Find the pool and the cost of the invocation, before its first attempt.

        QUEUED -> QUEUED, or ENDED if that fails.

        :return: whether it can be run
        """
        if self.bill is not None:
            return True

        try:
            if self.pool.route is not None:
                # A routed pool counts as in use from now on.
                self.pool = self.pool.route(self.invocation)
                self.epoch = self.pool.admission.epoch

            self.bill = self.pool.admission.price(self.invocation)
            self.is_plain = self.is_plain and self.bill is None
        except BaseException as exc:
            if not is_error(exc):
                raise

            error = as_exception(exc, f"its cost or its key raised {type(exc).__name__}")
            self._end(Outcome(Status.ERROR, error))
            return False

        return True

    def next_slot(self) -> Slot:
        """Return a new slot for a retry, to be acquired. The job is the slot of its first attempt."""
        if self.bill is not None:
            self.bill = self.bill.again()

        assert self.failures is not None
        agent_id, errors = self.invocation.agent_id, tuple(self.failures.errors)
        make_attempt = partial(_make_attempt, agent_id, self.attempts + 1, errors, self.key_maker())
        return LaterSlot(self.pool, self.outer, self.bill, make_attempt)

    def join_line(self, slot: Slot, owner: Owner | None = None) -> Waiter:
        """
        Join the line for a slot.

        :param owner: called when the wait is over, if no task waits
        """
        self.waited = True
        waiter: Waiter = self.pool.enqueue(slot, owner=owner)
        return waiter

    def refuse(self, error: Exception) -> None:
        """End without a slot; if an attempt failed before, that failure is final. QUEUED -> ENDED."""
        is_mistake = isinstance(error, DeadlockError)
        if self.attempts and not is_mistake:
            self.give_up(str(error))
        else:
            self._end(Outcome(Status.ERROR if is_mistake else Status.SKIPPED, error))

    # -- for its agent

    def attempt(self) -> Attempt:
        return _make_attempt(self.invocation.agent_id, 1, (), self.key_maker())

    def timing(self) -> Timing | None:
        return None if self.scope is None else Timing(self.scope, self.deadline, self.total)

    def key_maker(self) -> Callable[[], str]:
        """
        Return a function that returns the idempotency key, which all attempts share. It does not refer to the
        job. Worker threads may call this too.
        """
        with _identifying:
            self.id = self.id or new_id()

        return partial(idempotency_key, self.id)

    # -- after an attempt

    def next_start(self, now: float, deadline: float, options: RunOptions) -> float | None:
        """
        Decide about a retry.

        :param now: when the attempt failed
        :param deadline: the caller's own deadline
        :return: when the next attempt begins; ``None`` if this failure is final
        """
        # Chunks that were handed over cannot be taken back.
        if self.failures is None or self.failures.progress is not None:
            return None

        pool, config = self.pool, options.config
        hopeless = pool.is_hopeless(config.overload_timeout_seconds)
        return self.failures.next_start(
            self.attempts, now, self.deadline, deadline, config, pool.admission, hopeless
        )

    def schedule_retry(self, observer: Observer, now: float) -> float:
        """
        Begin to wait for the next attempt. RUNNING -> RETRYING.

        :return: when that begins
        """
        failures = self.failures
        assert failures is not None
        assert failures.last is not None
        self.state = RETRYING
        self.waited = True
        self.pool.pending += 1
        if self.bill is not None:
            self.pool.conclude(self.bill)

        failures.begin_wait(now)
        observer.retrying(self.invocation, self.attempts, failures.last, failures.wake_at - now, self.id, now)
        return failures.wake_at

    def wake(self) -> None:
        """Stop waiting for the next attempt. RETRYING -> QUEUED."""
        self.state = QUEUED
        self.pool.pending -= 1
        self.pool.used()

    def give_up(self, reason: str) -> None:
        """Make the last failure final although it would have been retried, and add a note with the reason."""
        assert self.failures is not None
        self.failures.give_up(reason)

    def expire(self, limit: TimeLimit) -> None:
        """End because a time limit passed during a wait. QUEUED, RETRYING -> ENDED."""
        error, failed = limit.error(), self.failed
        error.__cause__ = None if failed is None else failed.error
        self._end(Outcome(Status.TIMEOUT, error))

    def end_stopped(self, stopped: BatchStopped) -> bool:
        """
        End because nothing is started or retried any more, unless the job has ended already.

        :param stopped: the reason
        :return: whether it is skipped
        """
        if self.state is ENDED:
            return False

        if self.attempts:
            self.give_up(f"the batch was stopped: {stopped.reason}")
            return False

        self._end(Outcome(Status.SKIPPED, stopped))
        return True

    def finish(self, observer: Observer, now: float) -> InvocationResult[T]:
        """Report the result and return it. Any -> ENDED."""
        self.state = ENDED
        # A worker may keep the slot for its next job, so this job must not lend it.
        self.hold = RELEASED
        if self.failures is not None or not observer.only_counts:
            return self._finish_any(observer, now)

        # The common case: a success at the first attempt.
        started_at: Any = self.started_at
        latency, queue = (now - started_at) * 1000.0, (started_at - self.queued_at) * 1000.0
        if latency < 0.0:
            latency = 0.0  # the clock went back

        report = observer.report_latency
        report(latency)
        if queue > 0.0:
            report = observer.report_queue
            report(queue)
        else:
            queue = 0.0

        if self.outer is not None:
            self._count_nested(observer, SUCCESS)

        # Without __init__ and its checks, for speed: the values are known to be valid.
        draft = Draft()
        draft.agent_id = self.invocation.agent_id
        draft.status = SUCCESS
        draft.output = self.output
        draft.exception = None
        draft.latency_ms = latency
        draft.queue_ms = queue
        draft.retries = 0
        draft.failures = ()
        draft.index = self.index
        draft.chunks = 0
        draft.first_chunk_ms = None
        draft.replayed = False
        draft.__class__ = InvocationResult
        self.output = None
        result: InvocationResult[T] = draft
        return result

    def _finish_any(self, observer: Observer, now: float) -> InvocationResult[T]:
        """
        Return the result of any invocation.

        An error keeps our frames alive, and with them this job, so the job must not refer to the error.
        """
        failures, failed = self.failures, self.failed
        # The clock may go back, but a duration must not be negative.
        started_at = now if self.started_at is None else self.started_at
        progress = None if failures is None else failures.progress
        first_at = None if progress is None else progress.first_at
        errors = () if failures is None else tuple(failures.errors)
        if failed is None:
            for error in errors:
                drop_frames(error)

        draft = Draft()
        draft.agent_id = self.invocation.agent_id
        draft.status = SUCCESS if failed is None else failed.status
        draft.output = self.output
        draft.exception = None if failed is None else failed.error
        draft.latency_ms = max(0.0, now - started_at) * 1000
        draft.queue_ms = max(0.0, started_at - self.queued_at) * 1000
        draft.retries = max(0, self.attempts - 1)
        draft.failures = errors
        draft.index = self.index
        draft.chunks = 0 if progress is None else progress.chunks
        draft.first_chunk_ms = None if first_at is None else max(0.0, first_at - started_at) * 1000
        draft.replayed = False
        draft.__class__ = InvocationResult
        result: InvocationResult[T] = draft
        self.output = self.failures = None
        observer.ended(self.invocation, result, self.attempts, failures, self.id, now)
        if self.outer is not None:
            self._count_nested(observer, result.status)

        return result

    def _count_nested(self, observer: Observer, status: Status) -> None:
        """Count the invocation if an outer one uses the same limiter."""
        outer, keys = self.outer, self.pool.keys
        pool: Any = self.pool if keys is None else keys.home
        if (outer is not None and outer.hold is HELD and outer.pool is pool) or pool.encloses(outer):
            observer.nested[status] += 1

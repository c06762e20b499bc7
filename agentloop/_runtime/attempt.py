"""The attempts at one invocation: their state, how each begins, and how it has failed."""

from __future__ import annotations

__all__ = ["Attempts"]

import math
from contextvars import Context
from typing import Generic, TypeVar

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from .._errors import InvocationCancelled
from .._eventloop.callers import CallersCancellation
from .._eventloop.deadlines import AttemptScope, TimeLimit
from .._invocation import Invocation
from .._limits.slots import Slot, current_slot
from .._result import Status
from .._verdict import Verdict
from .current import AttemptSlot, LaterSlot, Timing
from .options import RunOptions
from .outcome import Failures, Outcome, leave_scope, outcome_of, without_cancellation
from .states import ENDED, RUNNING, Progress, State
from .tracebacks import trim

T = TypeVar("T")

_set_slot = current_slot.set


class Attempts(AttemptSlot, Generic[T]):
    """
    The attempts at one invocation, one after the other, and the slot of the first of them.

    Most invocations need no other slot, and one object is faster than two. Only its own methods write it.
    """

    invocation: Invocation[T]
    state: State
    attempts: int
    started_at: float | None
    scope: AttemptScope | None
    """The scope that times the last attempt out."""
    total: TimeLimit | None
    """The time limit of all attempts together."""
    output: T | None
    failures: Failures | None
    waited: bool
    """Whether it has waited, in line, in its agent or for a retry, so that other tasks could run."""
    id: int
    """The number of the invocation in events."""

    @property
    def deadline(self) -> float:
        """When all attempts must have ended."""
        if self.total is None or self.started_at is None:
            return math.inf

        return self.started_at + self.total.seconds

    @property
    def failed(self) -> Outcome | None:
        """The outcome of the last attempt; ``None`` after a success."""
        return None if self.failures is None else self.failures.last

    def make_progress(self, now: float) -> Progress:
        """Return the counter of a stream's chunks, when the stream hands over its first one."""
        if self.failures is None:
            self.failures = Failures(self.started_at)

        self.failures.progress = progress = Progress(now)
        return progress

    def _begin(
        self,
        slot: Slot,
        options: RunOptions,
        scope: AttemptScope,
        now: float,
        context: Context | None,
    ) -> bool:
        """
        Begin an attempt. QUEUED, RETRYING -> RUNNING.

        :param context: the context of the agent, if it has one of its own
        :return: whether it has begun; it has not if a scope around the task is cancelled. Then the slot is
            given back
        """
        try:
            deadline, observer = now + options.timeout, options.observer
            if options.total is None:
                may_start = scope.begin(deadline)
            else:
                may_start = self._begin_bounded(deadline, now, scope, options.total)

            if not may_start:
                slot.release()
                return False

            self.scope = scope
            attempts = self.attempts
            self.attempts = attempts + 1
            self.state = RUNNING
            if observer.only_counts and not attempts:
                self.started_at = now
                report = observer.report_in_flight
                report(1)
            else:
                self._report_start(slot, options, scope, now, context)

            if not slot.is_plain and slot.bill is not None:
                slot.pay()
        except BaseException:
            slot.release()
            raise

        return True

    def _begin_bounded(self, deadline: float, now: float, scope: AttemptScope, total: TimeLimit) -> bool:
        """Begin an attempt that the total time limit bounds too."""
        self.total = total
        end = self.deadline if self.attempts else now + total.seconds
        may_start = scope.begin(min(deadline, end))
        # Noted now: later, the clock cannot tell which limit fired, since timers may fire early.
        scope.set_limit(total if end <= deadline else None)
        return may_start

    async def _conclude(
        self,
        slot: Slot,
        options: RunOptions,
        scope: AttemptScope,
        before: int | None,
        caller: CallersCancellation | None,
        raised: BaseException | None,
        context: Context | None = None,
    ) -> float:
        """
        Find out how an attempt has failed, and give its slot back.

        :param before: how often this task was cancelled natively before, if it is the caller's
        :param caller: what exceptions have reached the agent, if any
        :param raised: the exception of the agent; ``None`` if the agent returned and left a scope open
        :param context: the context in which to classify the error, unless that is the current one
        :return: when the attempt ended; the errors are those of :meth:`run_isolated`
        """
        assert scope.scope is not None
        timed_out = scope.scope.cancel_called
        limit, reason = scope.limit or options.limit, scope.reason
        error: Exception | None = None
        verdict: Verdict | None = None
        self.output = None
        try:
            if not (scope.left_open or scope.children):
                raised = leave_scope(scope, raised)

            left_open = scope.left_open or bool(scope.children)
            if raised is not None:
                error = without_cancellation(raised)
                if error is raised:
                    scope.note(error)

            if left_open:
                # A scope that the agent left open may be cancelled too. That is no cancellation of ours.
                cancelled = not scope.begin(math.inf)
                scope.abandon(before is None)
                if cancelled:
                    # That scope may also be shielded. Then a cancellation never reaches the task.
                    await checkpoint_if_cancelled()
            elif raised is not None:
                # An error made out of the caller's cancellation is that cancellation.
                await checkpoint_if_cancelled()

            if before is not None and (caller or CallersCancellation(before)).came(raised):
                if raised is not None and issubclass(type(raised), anyio.get_cancelled_exc_class()):
                    raise raised

                # A native cancellation may not have been delivered yet.
                await checkpoint()
                raise anyio.get_cancelled_exc_class()

            if error is not None:
                trim(error)

            if reason is not None:
                self.cancel(reason, scope.cause)
                return scope.now()

            verdict = self._fail(
                outcome_of(
                    raised,
                    error if error is not None else scope.cause,
                    limit if timed_out or raised is None else None,
                    self.invocation.agent_id if left_open else None,
                    options.config.retry_on_timeout,
                ),
                options,
                context,
            )
            # The noted cause belongs to this attempt, not to a cancellation of the wait for the next one.
            scope.note(None)
        finally:
            # The tracebacks refer to this frame; the frame must not refer back.
            raised = error = None
            slot.release(verdict, False, options.longest_cool_off)

        return scope.now()

    def _fail(self, outcome: Outcome, options: RunOptions, context: Context | None) -> Verdict | None:
        if self.failures is None:
            self.failures = Failures(self.started_at)

        failures = self.failures
        failures.add(outcome)
        config, log = options.config, options.observer.log_classify
        if context is None:
            verdict = failures.classify(config, log)
        else:
            verdict = context.run(failures.classify, config, log)

        if verdict is not None and failures.progress is None:
            outcome.verdict = verdict = self.pool.revise(
                verdict, outcome.error, outcome.status is Status.TIMEOUT
            )

        return verdict

    def _report_start(
        self, slot: Slot, options: RunOptions, scope: AttemptScope, now: float, context: Context | None
    ) -> None:
        if self.attempts == 1:
            self.started_at = now
        else:
            assert isinstance(slot, LaterSlot)
            slot.enter(Timing(scope, self.deadline, self.total))

        if context is not None:
            # Before the agent is called: a hook may ask for the current attempt too.
            context.run(_set_slot, slot)

        attempt_ms, failures = 0.0, self.failures
        if failures is not None:
            attempt_ms = failures.attempt_ms
            failures.begin(now)

        options.observer.started(self.invocation, self.attempts, self.id, now, context, attempt_ms)

    def cancel(self, reason: str, cause: BaseException | None = None) -> None:
        """End because the caller was cancelled. Any -> ENDED."""
        error = InvocationCancelled(reason)
        error.__cause__ = cause
        self._end(Outcome(Status.CANCELLED if self.attempts else Status.SKIPPED, error))

    def _end(self, outcome: Outcome) -> None:
        self.state = ENDED
        if self.failures is None:
            self.failures = Failures(self.started_at)

        self.failures.end(outcome)

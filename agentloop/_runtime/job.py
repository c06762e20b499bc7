"""An invocation on its way: what happened to it so far, and what comes next."""

from __future__ import annotations

__all__ = ["Job", "Progress", "State", "plumbing"]

import enum
import math
import types
from collections.abc import Callable, Generator
from contextvars import Context
from types import CodeType
from typing import Any, Generic, TypeVar

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from .._errors import InvocationCancelled
from .._eventloop.errors import is_error
from .._eventloop.callers import CallersCancellation
from .._eventloop.context import as_coroutine, await_it, wait_for_cancellation
from .._eventloop.deadlines import AttemptScope, TimeLimit
from .._foreign import foreign_code
from .._invocation import Invocation
from .._limits.slots import HELD, Slot, SlotPool, Waiter, current_slot
from .._result import SUCCESS, Draft, InvocationResult, Status
from .._verdict import Verdict
from .observer import COUNTED_AT_ONCE, Observer
from .options import RunOptions
from .outcome import Failures, Outcome, as_exception, drop_frames, outcome_of, without_cancellation
from .workers import Crew

T = TypeVar("T")
FnT = TypeVar("FnT", bound=Callable[..., Any])

_set_slot = current_slot.set
_PLAIN: type[types.CoroutineType[Any, Any, Any]] = types.CoroutineType
_send = _PLAIN.send

_PLUMBING: set[CodeType] = {await_it.__code__}


def plumbing(fn: FnT) -> FnT:
    """Mark a function as one that stands between the loop and an agent, and that tracebacks leave out."""
    _PLUMBING.add(fn.__code__)
    return fn


class Progress:
    """
    How far a stream has come.

    :param first_at: when it handed over the first chunk
    :ivar chunks: how many it has handed over
    """

    __slots__ = ("chunks", "first_at")

    def __init__(self, first_at: float) -> None:
        self.chunks = 0
        self.first_at = first_at


class State(enum.Enum):
    """Where a job is. Each method of :class:`Job` that moves it says from where to where."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    RETRYING = enum.auto()
    ENDED = enum.auto()


QUEUED, RUNNING, RETRYING, ENDED = State


class Job(Slot, Generic[T]):
    """
    One invocation, its attempts one after the other, and the slot of the first of them.

    It is its own first slot because most invocations need no other, and one object for each is faster than
    two. Only its own methods write it.

    :param invocation: what is run
    :param index: its place in the input
    :param now: the time at which it began to wait for a slot
    :param pool: where it gets its slots from
    :param outer: the slot of the invocation that runs it, if one does
    """

    __slots__ = (
        "attempts",
        "deadline",
        "failures",
        "id",
        "index",
        "invocation",
        "output",
        "progress",
        "queued_at",
        "started_at",
        "state",
        "waited",
        "waiter",
    )

    def __init__(
        self, invocation: Invocation[T], index: int, now: float, pool: SlotPool, outer: Slot | None
    ) -> None:
        # As Slot does it; a call for every invocation shows.
        self.pool = pool
        self.outer = outer
        self.bill = None
        self.epoch = pool.admission.epoch
        self.hold = HELD
        self.lender = self.lent = self.waiters = None
        self.invocation = invocation
        self.index = index
        self.queued_at = now
        self.state = QUEUED
        self.attempts = 0
        self.started_at: float | None = None
        # When all its attempts have to be over.
        self.deadline = math.inf
        self.output: T | None = None
        self.failures: Failures | None = None
        self.progress: Progress | None = None
        # Its place in line, while it waits for a slot.
        self.waiter: Waiter | None = None
        # Whether it has let other tasks run.
        self.waited = False
        # What events call it.
        self.id = 0

    @property
    def wake_at(self) -> float:
        """When its next attempt begins, if it waits for that."""
        return -math.inf if self.failures is None else self.failures.wake_at

    @property
    def failed(self) -> Outcome | None:
        """What became of it, unless that was a success."""
        return None if self.failures is None else self.failures.last

    def queue(self, observer: Observer) -> None:
        """Report that it waits for its first slot."""
        self.id = observer.queued(self.invocation, self.queued_at)

    def make_progress(self, now: float) -> Progress:
        """Return what counts the chunks of a stream, which hands over its first one now."""
        self.progress = Progress(now)
        return self.progress

    def resolve(self) -> bool:
        """
        Find out where the invocation gets its slots from, and what it costs, before its first attempt.

        QUEUED -> QUEUED, or ENDED if that fails.

        :return: whether it can be run at all
        """
        if self.bill is not None:
            return True

        try:
            if self.pool.route is not None:
                # In use from now on, as the one that led here is.
                self.pool = self.pool.route(self.invocation)

            self.bill = self.pool.admission.price(self.invocation)
        except BaseException as exc:
            if not is_error(exc):
                raise

            error = as_exception(exc, f"its cost or its key raised {type(exc).__name__}")
            self._end(Outcome(Status.ERROR, error))
            return False

        return True

    def next_slot(self) -> Slot:
        """Return the slot of the next attempt, which is to be acquired."""
        if not self.attempts:
            return self

        if self.bill is not None:
            self.bill = self.bill.again()

        return Slot(self.pool, self.outer, self.bill)

    def join_line(self, slot: Slot) -> Waiter:
        """Stand in line for a slot."""
        self.waited = True
        self.waiter = waiter = self.pool.enqueue(slot)
        return waiter

    def leave_line(self) -> None:
        """Note that it stands in line no more."""
        self.waiter = None

    # -- an attempt

    @plumbing
    @types.coroutine
    def run(
        self,
        slot: Slot,
        options: RunOptions,
        scope: AttemptScope,
        new_context: Callable[[], Context],
        now: float,
        crew: Crew | None = None,
        caller: CallersCancellation | None = None,
    ) -> Generator[Any, Any, float]:
        """
        Run one attempt: call the agent, and take every step of it inside a context of its own. QUEUED,
        RETRYING -> RUNNING. How it has failed, if it has, is in ``failures.last``.

        Context variables that the agent sets stay in there, also for the tasks, threads and callbacks that it
        starts, and a token can be reset in any later step, since all steps share the one context.

        :param slot: is given back in any case
        :param scope: times it out; stays open, if the agent returned, until it is left
        :param new_context: returns the agent's context
        :param now: the time
        :param crew: calls another worker when the agent waits
        :param caller: notices native cancellations of this task, if it is a caller's; in a task of ours only
            the agent can ask for one
        :return: the time at which it ended
        :raises BaseException: the cancellation of an enclosing scope or of the caller's task, and what the
            agent raises that is no ``Exception``; the attempt then has no outcome
        """
        succeeded = False
        verdict: Verdict | None = None
        try:
            deadline, total = now + options.timeout, options.total
            if total is not None:
                if not self.attempts:
                    self.deadline = now + total.seconds

                deadline = min(deadline, self.deadline)

            if not scope.begin(deadline):
                # Once cancelled, nothing starts, not even to its first checkpoint.
                yield from wait_for_cancellation().__await__()

            if total is not None:
                # Remembered, since a timer may fire a moment before its time.
                scope.set_limit(total if deadline == self.deadline else None)

            context = new_context()
            context.run(_set_slot, slot)
            if caller is not None:
                caller.begin()

            first = not self.attempts
            self.attempts += 1
            self.state = RUNNING
            observer = options.observer
            if first:
                self.started_at = now

            if first and observer.is_plain:
                tell = observer.tell_in_flight
                tell(1)
            else:
                self._report_start(options, now, context)

            if slot.bill is not None:
                slot.pay()

            act, invocation = options.act, self.invocation
            coroutine: Any = None
            thrown: BaseException | None = None
            try:
                if act is None:
                    coroutine = context.run(invocation.fn, *invocation.args, **invocation.kwargs)
                else:
                    coroutine = context.run(act, self, slot, options, scope)

                # The plain case first: to ask an abstract class takes longer.
                if type(coroutine) is not _PLAIN:
                    coroutine = as_coroutine(invocation.fn, coroutine)

                # Bound methods are not kept: the collector would look at them as long as the agent waits.
                step = context.run(_send, coroutine, None)
                self.waited = True
                # Most often all workers are at work, or one looks for something to do.
                if crew is not None and crew.can_call and not crew.seeking:
                    crew.call()

                while True:
                    sent: Any = None
                    try:
                        sent = yield step
                    except GeneratorExit:
                        context.run(coroutine.close)
                        raise
                    except BaseException as exc:
                        # Thrown in below, outside of this block: inside, it would become the context of
                        # whatever the agent raises later on, even if it had handled it.
                        thrown = exc

                    try:
                        if thrown is None:
                            step = context.run(_send, coroutine, sent)
                        else:
                            if caller is not None:
                                caller.reaches(coroutine, thrown)

                            step = context.run(coroutine.throw, thrown)
                    finally:
                        # An exception refers to this frame, and trio sends exceptions too.
                        thrown = sent = None
            except BaseException as exc:
                if not isinstance(exc, StopIteration) or coroutine is None:
                    verdict = yield from self._conclude(slot, options, scope, caller, exc).__await__()
                    return slot.pool.loop.now()

                self.output = exc.value

            ended_at = slot.pool.loop.now()
            if scope.children:
                verdict = yield from self._conclude(slot, options, scope, caller, None).__await__()
                return slot.pool.loop.now()

            # It may have been cancelled before the agent returned; and a stream moves the deadline.
            if ended_at >= deadline or act is not None:
                scope.leave()

            succeeded = True
            return ended_at
        finally:
            slot.release(verdict, succeeded, options.longest_hold)

    async def _conclude(
        self,
        slot: Slot,
        options: RunOptions,
        scope: AttemptScope,
        caller: CallersCancellation | None,
        raised: BaseException | None,
    ) -> Verdict | None:
        """
        Find out how an attempt has failed, and leave its scope.

        :param raised: what came out of the agent; ``None`` if it returned and left a scope open
        :return: what the failure means, if that is known
        :raises BaseException: as :meth:`run`
        """
        cancelled_class = anyio.get_cancelled_exc_class()
        assert scope.scope is not None
        timed_out = scope.scope.cancel_called
        left_open = scope.left_open or bool(scope.children)
        limit, reason = scope.limit or options.limit, scope.reason
        error: Exception | None = None
        self.output = None
        try:
            if not left_open:
                if timed_out and issubclass(type(raised), cancelled_class):
                    assert raised is not None
                    # The scope is about to drop it, but trio holds on to it in a cycle: without this,
                    # the frames and arguments of the agent would live until the next collection.
                    raised.__traceback__ = None

                try:
                    if scope.leave(raised):
                        raised = None
                except BaseException as rest:
                    raised = rest

            if raised is not None:
                error = without_cancellation(raised)

            if error is not None and error is raised:
                scope.note(error)

            if left_open:
                # A scope that is still open may be cancelled too, which is the agent's doing.
                cancelled = not scope.begin(math.inf)
                scope.abandon(caller is None)
                if cancelled:
                    # It may also be shielded. Then the cancellation never reaches the task.
                    await checkpoint_if_cancelled()
            elif raised is not None:
                # An error made out of the caller's cancellation is that cancellation.
                await checkpoint_if_cancelled()

            if caller is not None and caller.came(raised):
                if raised is None or not issubclass(type(raised), cancelled_class):
                    # It may still be on its way.
                    await checkpoint()
                    raised = cancelled_class()

                raise raised

            if error is not None:
                _trim(error)

            if reason is not None:
                self.cancel(reason, scope.cause)
                return None

            passed = limit if timed_out or raised is None else None
            agent_id = self.invocation.agent_id if left_open else None
            retried = options.config.retry_on_timeout
            cause = error if error is not None else scope.cause
            self._fail(outcome_of(raised, cause, passed, agent_id, retried))
        finally:
            # Their tracebacks refer to this frame; the frame must not refer back.
            raised = error = cause = None

        assert self.failures is not None
        return self.failures.judge(options.config, options.observer.log_classify)

    def _report_start(self, options: RunOptions, now: float, context: Context) -> None:
        attempt_ms, failures = 0.0, self.failures
        if failures is not None:
            attempt_ms = failures.attempt_ms
            failures.begin(now)

        options.observer.started(self.invocation, self.attempts, self.id, now, context, attempt_ms)

    # -- what comes after it

    def next_start(self, now: float, deadline: float, options: RunOptions) -> float | None:
        """
        Decide about a retry.

        :param now: when the attempt failed
        :param deadline: when the caller's own time is up
        :return: when the next attempt begins; ``None`` if this failure is final
        """
        # What was handed over once cannot be taken back.
        if self.failures is None or self.progress is not None:
            return None

        admission = self.pool.admission
        return self.failures.next_start(
            self.attempts, now, self.deadline, deadline, options.config, admission
        )

    def rest(self, observer: Observer, now: float) -> float:
        """
        Begin to wait for the next attempt. RUNNING -> RETRYING.

        :return: when that begins
        """
        failures = self.failures
        assert failures is not None
        assert failures.last is not None
        self.state = RETRYING
        self.pool.asleep += 1
        failures.rest(now)
        observer.retrying(self.invocation, self.attempts, failures.last, failures.wake_at - now, self.id, now)
        return failures.wake_at

    def wake(self) -> None:
        """Wait for the next attempt no more. RETRYING -> QUEUED."""
        self.state = QUEUED
        self.pool.asleep -= 1

    def give_up(self, reason: str) -> None:
        """Make the last failure final although it would have been retried, and let the error say why."""
        assert self.failures is not None
        self.failures.give_up(reason)

    def expire(self, total: TimeLimit) -> None:
        """End because its total time was up while it waited. QUEUED, RETRYING -> ENDED."""
        error, failed = total.error(), self.failed
        error.__cause__ = None if failed is None else failed.error
        self._end(Outcome(Status.TIMEOUT, error))

    def cancel(self, reason: str, cause: BaseException | None = None) -> None:
        """End because the caller was cancelled. Any -> ENDED."""
        error = InvocationCancelled(reason)
        error.__cause__ = cause
        self._end(Outcome(Status.CANCELLED if self.attempts else Status.SKIPPED, error))

    def skip(self, error: Exception) -> None:
        """End without an attempt. QUEUED -> ENDED."""
        self._end(Outcome(Status.SKIPPED, error))

    def finish(self, observer: Observer, now: float) -> InvocationResult[T]:
        """Return the result, once everybody was told of it. Any -> ENDED."""
        self.state = ENDED
        if not observer.count_result() % COUNTED_AT_ONCE:
            observer.count()

        started_at = self.started_at
        if (
            started_at is None
            or self.failures is not None
            or self.progress is not None
            or not observer.is_plain
        ):
            return self._finish(observer, now)

        # Most invocations succeed at once, and there is nothing else to know about them.
        latency, queue = (now - started_at) * 1000.0, (started_at - self.queued_at) * 1000.0
        if latency < 0.0:
            latency = 0.0  # the clock went back

        tell = observer.tell_latency
        tell(latency)
        if queue > 0.0:
            tell = observer.tell_queue
            tell(queue)
        else:
            queue = 0.0

        # Made without a call, and without checking what cannot be wrong: both show.
        draft: Any = Draft()
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
        draft.__class__ = InvocationResult
        self.output = None
        result: InvocationResult[T] = draft
        return result

    def _finish(self, observer: Observer, now: float) -> InvocationResult[T]:
        """
        Return the result of any invocation.

        A frame of ours can stay alive with an error that was raised below it, and so with this job: it must
        not refer back to the error.
        """
        failures, failed, progress = self.failures, self.failed, self.progress
        # A clock that goes back makes no duration negative, which no figure could hold.
        started_at = now if self.started_at is None else self.started_at
        first_at = None if progress is None else progress.first_at
        errors = () if failures is None else tuple(failures.errors)
        if failed is None:
            for error in errors:
                drop_frames(error)

        result = InvocationResult(
            self.invocation.agent_id,
            SUCCESS if failed is None else failed.status,
            self.output,
            None if failed is None else failed.error,
            max(0.0, now - started_at) * 1000,
            max(0.0, started_at - self.queued_at) * 1000,
            max(0, self.attempts - 1),
            errors,
            self.index,
            0 if progress is None else progress.chunks,
            None if first_at is None else max(0.0, first_at - started_at) * 1000,
        )
        self.output = self.failures = None
        observer.ended(self.invocation, result, self.attempts, failures, self.id, now)
        return result

    def _fail(self, outcome: Outcome) -> None:
        if self.failures is None:
            self.failures = Failures(self.started_at)

        self.failures.add(outcome)

    def _end(self, outcome: Outcome) -> None:
        self.state = ENDED
        if self.failures is None:
            self.failures = Failures(self.started_at)

        self.failures.end(outcome)


def _trim(exc: BaseException) -> None:
    """Let the traceback begin in the agent: shorter to read, and no reference back to our own frames."""
    # Of an exception that does not let it be set, a frozen dataclass, say, the traceback keeps our frames.
    with foreign_code:
        traceback = exc.__traceback__
        while traceback is not None and traceback.tb_frame.f_code in _PLUMBING:
            traceback = traceback.tb_next

        exc.__traceback__ = traceback

"""An invocation on its way: what happened to it so far, and what comes next."""

from __future__ import annotations

__all__ = ["Job"]

import inspect
import math
import random
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from .._config import LoopConfig
from .._errors import InvocationCancelled, InvocationTimeout, describe
from .._eventloop.backend import is_error
from .._foreign import foreign_code
from .._invocation import Invocation
from .._limits.rates import Charge
from .._limits.slots import Slot, SlotPool, Waiter
from .._result import SKIPPED, SUCCESS, InvocationResult, Status
from .._verdict import Verdict, VerdictKind

T = TypeVar("T")

_TRANSIENT = Verdict(VerdictKind.TRANSIENT)
_PERMANENT = Verdict(VerdictKind.PERMANENT)

# How many exceptions are looked at that an exception was caused by, or has as members.
CHAIN = 100


class Job(Generic[T]):
    """
    The state of one invocation. Nothing in here waits.

    :param invocation: what is run
    :param index: its place in the input
    :param now: the time at which it began to wait for a slot
    :param pool: where it gets its slots from
    """

    # What every invocation needs is in slots, which are quick to read; what most never need, in the class.
    __slots__ = (
        "__dict__",
        "attempt_at",
        "attempts",
        "charges",
        "chunks",
        "deadline",
        "error",
        "index",
        "invocation",
        "output",
        "pool",
        "queued_at",
        "slot",
        "started_at",
        "status",
        "verdict",
    )

    total_counts = False
    total_seconds = math.inf
    counted_retries = 0
    overloaded_at: float | None = None
    wake_at = -math.inf
    expired = False
    waiter: Waiter | None = None
    failures: list[Exception] | None = None
    # What each attempt costs.
    costs: tuple[float, ...] = ()
    id = 0
    pending_attempt_ms = 0.0
    made_of_cancellation: Exception | None = None
    # Whether the agent left a cancel scope or a task group open in its task.
    left_open = False
    # Of a stream only.
    first_chunk_at: float | None = None
    chunk_limit: tuple[type[InvocationTimeout], float] | None = None

    def __init__(self, invocation: Invocation[T], index: int, now: float, pool: SlotPool) -> None:
        self.invocation = invocation
        self.index = index
        self.queued_at = now
        self.pool = pool
        self.started_at: float | None = None
        self.attempt_at: float | None = None
        self.deadline = math.inf
        self.attempts = 0
        self.status = SKIPPED
        self.output: T | None = None
        self.error: BaseException | None = None
        self.verdict: Verdict | None = None
        self.slot: Slot | None = None
        # What the last attempt has paid.
        self.charges: list[Charge] | None = None
        # How many of a stream were handed over.
        self.chunks = 0

    def resolve_limits(self) -> bool:
        """
        Find out where the invocation gets its slots from, and what it costs, before its first attempt.

        :return: whether it can be run at all
        """
        try:
            if self.pool.route is not None:
                # In use from now on, as the one that led here is.
                self.pool = self.pool.route(self.invocation)

            self.costs = self.pool.price(self.invocation)
        except BaseException as exc:
            if not is_error(exc):
                raise

            self.status = Status.ERROR
            self.error = as_exception(exc, f"its cost or its key raised {type(exc).__name__}")
            return False

        return True

    def leave_pool(self, first: SlotPool) -> None:
        """
        Say that the invocation has ended to the pool that it was led to.

        :param first: the pool that led there, which its call keeps in use
        """
        if self.pool is not first:
            self.pool.users -= 1

    def bound(self, now: float, deadline: float, total: float) -> float:
        """
        Bound an attempt by the time that all of them may take together.

        :param now: when it begins
        :param deadline: when it has to be over for its own sake
        :param total: how long all of them may take
        :return: when it has to be over
        """
        if not self.attempts:
            self.total_seconds = total
            self.deadline = now + total

        # Remembered, since a timer may fire a moment before its time.
        self.total_counts = self.deadline <= deadline
        return min(self.deadline, deadline)

    def fail(self, status: Status, error: Exception) -> None:
        """End the attempt with an error."""
        self.status = status
        self.error = error
        if self.failures is None:
            self.failures = []

        self.failures.append(error)

    def time_out(self, config: LoopConfig, cause: BaseException | None) -> None:
        """End the attempt because its time was up, with what the agent made of that, if anything."""
        timeout = config.timeout_seconds
        seconds = self.total_seconds if self.total_counts or timeout is None else timeout
        error = InvocationTimeout(seconds, self.total_counts)
        if self.chunk_limit is not None:
            kind, seconds = self.chunk_limit
            error = kind(seconds)

        error.__cause__ = cause or self.made_of_cancellation
        self.fail(Status.TIMEOUT, error)

    def expire(self) -> None:
        """End the invocation because its total time was up while it waited to be retried."""
        error = InvocationTimeout(self.total_seconds, True)
        error.__cause__ = self.error
        self.expired = True
        self.status = Status.TIMEOUT
        self.error = error

    def cancel(self, reason: str) -> None:
        """End the invocation because its caller was cancelled."""
        self.status = Status.CANCELLED if self.attempts else Status.SKIPPED
        self.error = InvocationCancelled(reason)
        self.error.__cause__ = self.made_of_cancellation

    def skip(self, error: Exception) -> None:
        """End the invocation without having started it."""
        self.status = Status.SKIPPED
        self.error = error

    def judge(self, config: LoopConfig, log: Callable[[object], object]) -> None:
        """
        Find out what the failure of the last attempt means.

        :param log: given ``config.classify`` if that raises, while the exception is handled
        """
        error = self.error
        self.verdict = None
        if self.left_open:
            self.verdict = _PERMANENT
        elif self.status is Status.TIMEOUT:
            again = config.retry_on_timeout and not self.total_counts
            self.verdict = _TRANSIENT if again else _PERMANENT
        elif self.status is Status.ERROR:
            assert error is not None
            try:
                verdict: Any = config.classify(cast("Exception", error))
                if not isinstance(verdict, Verdict):
                    if inspect.iscoroutine(verdict):
                        verdict.close()

                    raise TypeError(
                        f"classify must be a plain function that returns a Verdict, got {verdict!r}"
                    )

                self.verdict = verdict
            except BaseException as exc:
                if not is_error(exc):
                    raise

                log(config.classify)
                _note(error, f"not retried: classify failed with {describe(exc)}")
                self.verdict = _PERMANENT

    def next_start(self, now: float, deadline: float, config: LoopConfig) -> float | None:
        """
        Decide about a retry.

        :param now: the time at which the attempt failed
        :param deadline: when the caller's own time is up; a wait beyond it would only lose the error
        :return: the time of the next attempt; ``None`` if this failure is final
        """
        verdict = self.verdict
        if verdict is None or verdict.kind in (VerdictKind.PERMANENT, VerdictKind.FATAL):
            return None

        # What was handed over once cannot be taken back.
        if config.max_retries == 0 or self.chunks:
            return None

        backoff = config.backoff
        overload = verdict.kind is VerdictKind.OVERLOAD
        if not overload and self.counted_retries >= config.max_retries:
            return None

        if overload and self.overloaded_at is None:
            self.overloaded_at = now

        asked = verdict.retry_after
        wake_at = now + backoff.wait(self.attempts - 1, asked, random)
        if asked is not None and asked > backoff.max_retry_after_seconds:
            limit = f"max_retry_after_seconds={backoff.max_retry_after_seconds:.10g}"
            self.give_up(f"the server asked to wait {asked:.10g}s, which is more than {limit}")
        elif wake_at >= self.deadline:
            self.give_up(f"total_timeout_seconds={self.total_seconds:.10g} would pass during the wait")
        elif wake_at >= deadline:
            self.give_up("the caller's deadline would pass during the wait")
        elif overload and self._impatient(wake_at, config.overload_timeout_seconds):
            self.give_up(f"overload_timeout_seconds={config.overload_timeout_seconds} would pass")
        elif self.pool.ledger is not None and not self.pool.ledger.may_retry(now):
            self.give_up("the retry budget of the limiter is used up, since too many attempts fail")
        else:
            self.counted_retries += not overload
            self.wake_at = wake_at
            return wake_at

        return None

    def _impatient(self, wake_at: float, patience: float | None) -> bool:
        assert self.overloaded_at is not None
        return patience is not None and wake_at > self.overloaded_at + patience

    def give_up(self, reason: str) -> None:
        """Make the last failure final although it would have been retried, and let the error say why."""
        assert self.error is not None
        _note(self.error, f"not retried: {reason}")

    def result(self, now: float) -> InvocationResult[T]:
        """
        Return what became of the invocation, which ended at ``now``, and forget it.

        A frame of ours can stay alive with an error that was raised below it, and so with this job: it must
        not refer back to the error.
        """
        started_at = self.started_at
        # A clock that goes back makes no duration negative, which no figure could hold.
        if started_at is None:
            latency, queue = 0.0, max(0.0, now - self.queued_at)
        else:
            latency, queue = max(0.0, now - started_at), max(0.0, started_at - self.queued_at)

        first_chunk = None
        if self.first_chunk_at is not None and started_at is not None:
            first_chunk = max(0.0, self.first_chunk_at - started_at) * 1000

        failures = tuple(self.failures) if self.failures else ()
        if failures and self.status is SUCCESS:
            for error in failures:
                _drop_frames(error)

        result = InvocationResult(
            self.invocation.agent_id,
            self.status,
            self.output,
            self.error,
            latency * 1000,
            queue * 1000,
            max(0, self.attempts - 1),
            failures,
            self.index,
            self.chunks,
            first_chunk,
        )
        self.output = None
        self.error = None
        self.failures = None
        self.made_of_cancellation = None
        return result


def as_exception(exc: BaseException, text: str) -> Exception:
    """
    Return an error of a user's plain function as an exception, which a cancellation is not.

    :param text: what to say of a cancellation
    """
    if isinstance(exc, Exception):
        return exc

    error = InvocationCancelled(text)
    error.__cause__ = exc
    return error


def _drop_frames(exc: BaseException) -> None:
    """Forget the tracebacks of an exception, and with them what the frames hold."""
    seen: dict[int, BaseException] = {}
    todo: list[BaseException | None] = [exc]
    while todo and len(seen) < CHAIN:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue

        seen[id(one)] = one
        # It may not let its attributes be set, or read.
        with foreign_code:
            one.__traceback__ = None
            todo += [one.__cause__, one.__context__]
            if issubclass(type(one), BaseExceptionGroup):
                todo += cast("BaseExceptionGroup[BaseException]", one).exceptions


def _note(exc: BaseException, note: str) -> None:
    # An exception that takes no notes is data all the same.
    with foreign_code:
        # One object may be raised by many attempts; say a thing once.
        if note not in getattr(exc, "__notes__", ()):
            exc.add_note(note)

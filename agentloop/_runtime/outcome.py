"""The outcome of a failed attempt, as a value."""

from __future__ import annotations

__all__ = ["Failures", "Outcome", "as_exception", "leave_scope", "outcome_of", "without_cancellation"]

import inspect
import math
import random
from collections.abc import Callable
from typing import Any, TypeVar, cast

import anyio

from .._config import LoopConfig
from .._errors import InvocationCancelled, LeftOpenError, describe
from .._eventloop.deadlines import AttemptScope, TimeLimit
from .._eventloop.errors import is_error
from .._limits.admission import Admission
from .._result import Status
from .._verdict import Verdict, VerdictKind
from .states import Progress
from .tracebacks import add_note

ErrorT = TypeVar("ErrorT", bound=Exception)

_TRANSIENT = Verdict(VerdictKind.TRANSIENT)
_PERMANENT = Verdict(VerdictKind.PERMANENT)


class Outcome:
    """
    The outcome of an attempt, or of an invocation without one, that is no success.

    :param status: ``ERROR``, ``TIMEOUT``, ``CANCELLED`` or ``SKIPPED``
    :param error: the reason
    :param verdict: the judgement of the error; absent where none is needed
    """

    __slots__ = ("error", "status", "verdict")

    def __init__(self, status: Status, error: Exception, verdict: Verdict | None = None) -> None:
        self.status = status
        self.error = error
        self.verdict = verdict


def outcome_of(
    raised: BaseException | None,
    error: Exception | None,
    limit: TimeLimit | None,
    left_open_by: str | None,
    is_retried: bool,
) -> Outcome:
    """
    Return the outcome of a failed attempt. It has a verdict already if that needs no ``classify``.

    :param raised: the exception of the attempt; ``None`` for our own cancellation
    :param error: the errors in the exception, without cancellations
    :param limit: the time limit that has passed, if one has
    :param left_open_by: the agent's id, if the agent left a scope open
    :param is_retried: whether a time-out of a single attempt is retried
    """
    if left_open_by is not None:
        return Outcome(Status.ERROR, _caused(LeftOpenError(left_open_by), raised), _PERMANENT)

    if limit is not None:
        verdict = _TRANSIENT if is_retried and not limit.is_total else _PERMANENT
        return Outcome(Status.TIMEOUT, _caused(limit.error(), error), verdict)

    if error is not None:
        return Outcome(Status.ERROR, error)

    return Outcome(
        Status.CANCELLED, _caused(InvocationCancelled("the agent was cancelled from within"), raised)
    )


def _caused(error: ErrorT, cause: BaseException | None) -> ErrorT:
    error.__cause__ = cause
    return error


def leave_scope(scope: AttemptScope, raised: BaseException | None) -> BaseException | None:
    """
    Leave the scope of an attempt that has failed.

    :param raised: the exception of the attempt
    :return: the exception that leaves the scope; ``None`` for the scope's own cancellation
    """
    assert scope.scope is not None
    if scope.scope.cancel_called and issubclass(type(raised), anyio.get_cancelled_exc_class()):
        assert raised is not None
        # The scope is about to drop the exception, but trio keeps it in a cycle: its traceback would keep the
        # frames and arguments of the agent alive until the next collection.
        raised.__traceback__ = None

    try:
        if scope.leave(raised):
            raised = None
    except BaseException as rest:
        raised = rest

    try:
        return raised
    finally:
        # The traceback refers to this frame; the frame must not refer back.
        del raised


def without_cancellation(exc: BaseException) -> Exception | None:
    """
    Return the errors in a group that has cancellations among them, or ``None`` for a bare cancellation.

    :raises BaseException: ``exc``, if it is or holds anything else
    """
    if isinstance(exc, Exception):
        return exc

    # type() rather than isinstance(), here and elsewhere: `__class__` may be a property that raises.
    if issubclass(type(exc), anyio.get_cancelled_exc_class()):
        return None

    if issubclass(type(exc), BaseExceptionGroup):
        rest = cast("BaseExceptionGroup[BaseException]", exc).split(anyio.get_cancelled_exc_class())[1]
        if rest is None or isinstance(rest, Exception):
            return rest

    raise exc


class Failures:
    """
    The failures of an invocation so far, and the time of its next attempt.

    :param began: when its first attempt began
    :ivar errors: the exception of each failed attempt
    :ivar last: the outcome of the last attempt; ``None`` if it succeeded
    :ivar wake_at: when the next attempt begins
    :ivar attempt_at: when the running attempt began; ``None`` during a wait
    :ivar attempt_ms: how long the attempt before a wait took
    :ivar progress: the chunks of the last attempt, if it is of a stream and has handed over one
    """

    __slots__ = (
        "_counted",
        "_overloaded_at",
        "attempt_at",
        "attempt_ms",
        "errors",
        "last",
        "progress",
        "wake_at",
    )

    def __init__(self, began: float | None) -> None:
        self.errors: list[Exception] = []
        self.last: Outcome | None = None
        # The number of retries, without those after an overload; and the time of the first overload.
        self._counted = 0
        self._overloaded_at: float | None = None
        self.wake_at = -math.inf
        self.attempt_at = began
        self.attempt_ms = 0.0
        self.progress: Progress | None = None

    def begin(self, now: float) -> None:
        """Note that another attempt begins."""
        self.last = None
        self.attempt_at = now

    def add(self, outcome: Outcome) -> None:
        """Add the failure of an attempt."""
        self.last = outcome
        self.errors.append(outcome.error)

    def end(self, outcome: Outcome) -> None:
        """Note the outcome of an invocation that gets no further attempt."""
        self.last = outcome

    def classify(self, config: LoopConfig, log: Callable[[object], object]) -> Verdict | None:
        """
        Return the verdict on the failure of the last attempt, if it is judged.

        :param log: called with ``config.classify`` if that raises, while the exception is handled
        """
        last = self.last
        assert last is not None
        if last.status is not Status.ERROR or last.verdict is not None:
            return last.verdict

        try:
            verdict: Any = config.classify(last.error)
            if not isinstance(verdict, Verdict):
                if inspect.iscoroutine(verdict):
                    verdict.close()

                raise TypeError(f"classify must be a plain function that returns a Verdict, got {verdict!r}")

            last.verdict = verdict
        except BaseException as exc:
            if not is_error(exc):
                raise

            log(config.classify)
            add_note(last.error, f"not retried: classify failed with {describe(exc)}")
            last.verdict = _PERMANENT

        return last.verdict

    def next_start(
        self,
        attempts: int,
        now: float,
        total_deadline: float,
        deadline: float,
        config: LoopConfig,
        admission: Admission,
        hopeless: bool,
    ) -> float | None:
        """
        Decide about a retry.

        :param attempts: how many attempts there were
        :param now: when the last one failed
        :param total_deadline: when the time for all attempts is up
        :param deadline: the caller's own deadline; a wait beyond it would only lose the error
        :param hopeless: whether nothing has succeeded for longer than an overload is retried
        :return: when the next attempt begins; ``None`` if this failure is final
        """
        last, backoff = self.last, config.backoff
        verdict = None if last is None else last.verdict
        if verdict is None or verdict.kind in (VerdictKind.PERMANENT, VerdictKind.FATAL):
            return None

        overload = verdict.kind is VerdictKind.OVERLOAD
        if config.max_retries == 0 or (not overload and self._counted >= config.max_retries):
            return None

        if overload and self._overloaded_at is None:
            self._overloaded_at = now

        asked = verdict.retry_after
        wake_at = now + backoff.wait(attempts - 1, asked, random)
        if asked is not None and asked > backoff.max_retry_after_seconds:
            limit = f"max_retry_after_seconds={backoff.max_retry_after_seconds:.10g}"
            self.give_up(f"the server asked to wait {asked:.10g}s, which is more than {limit}")
        elif wake_at >= total_deadline:
            self.give_up(
                f"total_timeout_seconds={config.total_timeout_seconds:.10g} would pass during the wait"
            )
        elif wake_at >= deadline:
            self.give_up("the caller's deadline would pass during the wait")
        elif overload and self._is_impatient(wake_at, config.overload_timeout_seconds):
            self.give_up(f"overload_timeout_seconds={config.overload_timeout_seconds} would pass")
        elif overload and hopeless:
            seconds = f"overload_timeout_seconds={config.overload_timeout_seconds:.10g}"
            self.give_up(f"the provider has let nothing succeed for longer than {seconds}")
        elif not overload and not admission.may_retry(now):
            self.give_up("the retry budget of the limiter is used up, since too many attempts fail")
        else:
            self._counted += not overload
            self.wake_at = wake_at
            return wake_at

        return None

    def begin_wait(self, now: float) -> None:
        """Note that the wait for the next attempt begins."""
        began, self.attempt_at = self.attempt_at, None
        self.attempt_ms = 0.0 if began is None else max(0.0, now - began) * 1000

    def give_up(self, reason: str) -> None:
        """Make the last failure final although it would have been retried, and add a note with the reason."""
        assert self.last is not None
        add_note(self.last.error, f"not retried: {reason}")

    def _is_impatient(self, wake_at: float, patience: float | None) -> bool:
        assert self._overloaded_at is not None
        return patience is not None and wake_at > self._overloaded_at + patience


def as_exception(exc: BaseException, text: str) -> Exception:
    """
    Return an error of a user's plain function as an ``Exception``; a cancellation is wrapped in one.

    :param text: the message for a cancellation
    """
    return exc if isinstance(exc, Exception) else _caused(InvocationCancelled(text), exc)

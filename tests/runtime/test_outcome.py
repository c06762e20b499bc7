"""How an attempt has failed, as a value, and what follows from it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import anyio
import pytest
from agents import stray_cancellation

from agentloop import (
    AgentLoop,
    Backoff,
    Event,
    FirstChunkTimeout,
    IdleTimeout,
    InvocationCancelled,
    InvocationTimeout,
    LeftOpenError,
    Limiter,
    LoopConfig,
    ResultEvent,
    RetryBudget,
    Status,
    Verdict,
    VerdictKind,
)
from agentloop._eventloop.deadlines import TimeLimit
from agentloop._limits.admission import Admission
from agentloop._limits.retry_budget import RetryLedger
from agentloop._runtime.outcome import Failures, Outcome, as_exception, outcome_of, without_cancellation
from agentloop._runtime.tracebacks import CHAIN, add_note, drop_frames
from agentloop.testing import FakeAgent

TRANSIENT, OVERLOAD, PERMANENT, FATAL = map(Verdict, VerdictKind)

EACH = TimeLimit(InvocationTimeout, 5)
FIRST = TimeLimit(FirstChunkTimeout, 5)
IDLE = TimeLimit(IdleTimeout, 5)
TOTAL = TimeLimit(InvocationTimeout, 5, is_total=True)

ERROR = OSError("x")
GROUP = ExceptionGroup("all failed", [ERROR])
# As asyncio's and trio's are: no Exception.
CANCELLED: Any = type("Cancelled", (BaseException,), {})()
MIXED = BaseExceptionGroup("one failed", [ERROR, CANCELLED])
REST = ExceptionGroup("one failed", [ERROR])


@pytest.mark.parametrize(
    ("raised", "error", "limit", "status", "text", "verdict", "cause"),
    [
        # The agent's own errors. What they mean, classify says.
        (ERROR, ERROR, None, Status.ERROR, "x", None, None),
        (GROUP, GROUP, None, Status.ERROR, "all failed (1 sub-exception)", None, None),
        (MIXED, REST, None, Status.ERROR, "one failed (1 sub-exception)", None, None),
        # A cancellation that nobody but the agent has asked for.
        (CANCELLED, None, None, Status.CANCELLED, "the agent was cancelled from within", None, CANCELLED),
        # The agent was cancelled because its time was up.
        (None, None, EACH, Status.TIMEOUT, "Timeout after 5s", TRANSIENT, None),
        (None, None, TOTAL, Status.TIMEOUT, "Timeout after 5s in total", PERMANENT, None),
        (None, None, FIRST, Status.TIMEOUT, "No first chunk after 5s", TRANSIENT, None),
        (None, None, IDLE, Status.TIMEOUT, "No chunk for 5s", TRANSIENT, None),
        # It has made an error out of that.
        (ERROR, ERROR, EACH, Status.TIMEOUT, "Timeout after 5s", TRANSIENT, ERROR),
        (MIXED, REST, TOTAL, Status.TIMEOUT, "Timeout after 5s in total", PERMANENT, REST),
        # It has noted that error, and the cancellation went on.
        (None, ERROR, IDLE, Status.TIMEOUT, "No chunk for 5s", TRANSIENT, ERROR),
        (CANCELLED, None, EACH, Status.TIMEOUT, "Timeout after 5s", TRANSIENT, None),
    ],
)
def test_outcome_follows_from_what_was_raised_and_which_time_was_up(
    raised: BaseException | None,
    error: Exception | None,
    limit: TimeLimit | None,
    status: Status,
    text: str,
    verdict: Verdict | None,
    cause: BaseException | None,
) -> None:
    outcome = outcome_of(raised, error, limit, None, True)
    assert (outcome.status, str(outcome.error), outcome.verdict) == (status, text, verdict)
    assert outcome.error.__cause__ is cause
    if status is Status.ERROR:
        assert outcome.error is error
    elif status is Status.CANCELLED:
        assert type(outcome.error) is InvocationCancelled
    else:
        assert limit is not None
        assert type(outcome.error) is limit.kind


@pytest.mark.parametrize("raised", [None, ERROR, CANCELLED, MIXED])
@pytest.mark.parametrize("limit", [None, EACH, TOTAL])
def test_agent_that_left_a_scope_open_has_failed_whatever_else_has_happened(
    raised: BaseException | None, limit: TimeLimit | None
) -> None:
    outcome = outcome_of(raised, ERROR, limit, "writer", True)
    assert (outcome.status, outcome.verdict) == (Status.ERROR, PERMANENT)
    assert isinstance(outcome.error, LeftOpenError)
    assert outcome.error.agent_id == "writer"
    assert outcome.error.__cause__ is raised


@pytest.mark.parametrize("limit", [EACH, FIRST, IDLE, TOTAL])
def test_time_out_is_final_where_time_outs_are_not_retried(limit: TimeLimit) -> None:
    assert outcome_of(None, None, limit, None, False).verdict == PERMANENT


async def test_timer_that_fires_a_moment_early_is_still_the_total_time_out() -> None:
    class SlowClockLimiter(Limiter):
        """Reads the time a moment late, so that a timer seems to fire before its time."""

        def _make_pool(self) -> Any:
            pool = super()._make_pool()
            now = pool.loop.now
            pool.loop.now = lambda: now() - 1e-9
            return pool

    config = LoopConfig(
        timeout_seconds=None, total_timeout_seconds=5, backoff=Backoff(initial_seconds=0, jitter="none")
    )
    result = await AgentLoop(config, limiter=SlowClockLimiter(1)).run_single("a", anyio.sleep, 9)
    assert (result.error, result.retries) == ("Timeout after 5s in total", 0)
    assert result.latency_ms == pytest.approx(5000)
    assert not hasattr(result.exception, "__notes__")


async def test_cancelled_wait_is_not_caused_by_the_failure_before_it() -> None:
    events: list[Event] = []
    loop = AgentLoop(LoopConfig(backoff=Backoff(initial_seconds=9, jitter="none")), on_event=events.append)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_single, "a", FakeAgent(OSError()))
        await anyio.sleep(1)
        group.cancel_scope.cancel()

    assert isinstance(events[-1], ResultEvent)
    result = events[-1].result
    assert isinstance(result.exception, InvocationCancelled)
    assert result.exception.__cause__ is None
    assert [type(failure) for failure in result.failures] == [OSError]


async def test_stop_iteration_that_calling_an_agent_raises_is_its_error() -> None:
    def agent() -> Any:
        return next(iter(()))

    result = await AgentLoop(LoopConfig(max_retries=0)).run_single("a", agent)
    assert result.status is Status.ERROR
    assert isinstance(result.exception, StopIteration)


# --- errors among cancellations


async def test_errors_are_told_from_the_cancellations_among_them() -> None:
    cancelled = await stray_cancellation()
    assert without_cancellation(cancelled) is None
    assert without_cancellation(ERROR) is ERROR
    assert without_cancellation(GROUP) is GROUP
    assert without_cancellation(BaseExceptionGroup("", [cancelled, cancelled])) is None
    rest = without_cancellation(
        BaseExceptionGroup("outer", [cancelled, BaseExceptionGroup("inner", [ERROR, cancelled])])
    )
    assert pytest.RaisesGroup(pytest.RaisesGroup(OSError, match="inner"), match="outer").matches(rest)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_interrupt_among_errors_is_raised(interrupt: type[BaseException]) -> None:
    for raised in (
        interrupt(),
        BaseExceptionGroup("", [ERROR, interrupt()]),
        BaseExceptionGroup("", [await stray_cancellation(), interrupt()]),
    ):
        with pytest.raises(BaseException) as caught:
            without_cancellation(raised)

        assert caught.value is raised


def test_cancellation_of_a_plain_function_becomes_an_exception() -> None:
    assert as_exception(ERROR, "no matter") is ERROR
    error = as_exception(CANCELLED, "its cost was cancelled")
    assert isinstance(error, InvocationCancelled)
    assert (str(error), error.__cause__) == ("its cost was cancelled", CANCELLED)


# --- what a failure means


def failures(error: Exception = ERROR, verdict: Verdict | None = None) -> Failures:
    """Return what is known after a first attempt that has failed."""
    known = Failures(0)
    known.add(Outcome(Status.ERROR, error, verdict))
    return known


def test_classify_judges_an_error_once() -> None:
    judged: list[Exception] = []

    def classify(exc: Exception) -> Verdict:
        judged.append(exc)
        return OVERLOAD

    config, known = LoopConfig(classify=classify), failures()
    assert [known.classify(config, pytest.fail) for _ in range(2)] == [OVERLOAD] * 2
    assert judged == [ERROR]


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome(Status.TIMEOUT, EACH.error(), TRANSIENT), TRANSIENT),
        (Outcome(Status.TIMEOUT, TOTAL.error(), PERMANENT), PERMANENT),
        (Outcome(Status.ERROR, LeftOpenError("a"), PERMANENT), PERMANENT),
        (Outcome(Status.CANCELLED, InvocationCancelled("x")), None),
    ],
)
def test_classify_is_not_asked_where_the_outcome_says_what_it_means(
    outcome: Outcome, verdict: Verdict | None
) -> None:
    known = Failures(0)
    known.add(outcome)
    assert known.classify(LoopConfig(classify=pytest.fail), pytest.fail) == verdict


async def judge_later() -> Verdict:
    return TRANSIENT


@pytest.mark.parametrize(
    ("classify", "failed_with"),
    [
        (lambda exc: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda exc: None, "TypeError: classify must be a plain function that returns a Verdict, got None"),
        (lambda exc: judge_later(), "TypeError: classify must be a plain function"),
    ],
)
def test_classify_that_fails_makes_the_failure_final_and_says_so(classify: Any, failed_with: str) -> None:
    logged: list[object] = []
    error = OSError("x")
    config, known = LoopConfig(classify=classify), failures(error)
    assert [known.classify(config, logged.append) for _ in range(2)] == [PERMANENT] * 2
    assert (logged, len(error.__notes__)) == ([classify], 1)
    assert error.__notes__[0].startswith(f"not retried: classify failed with {failed_with}")


def test_interrupt_in_classify_is_raised() -> None:
    def classify(exc: Exception) -> Verdict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failures().classify(LoopConfig(classify=classify), pytest.fail)


# --- whether it is retried, and when

PLAIN = Backoff(initial_seconds=1, jitter="none", max_retry_after_seconds=60)


def next_start(
    known: Failures,
    *,
    attempts: int = 1,
    now: float = 10,
    total: float = math.inf,
    caller: float = math.inf,
    admission: Admission | None = None,
    hopeless: bool = False,
    **config: Any,
) -> float | None:
    settings = LoopConfig(**{"backoff": PLAIN, "total_timeout_seconds": 100} | config)
    return known.next_start(attempts, now, total, caller, settings, admission or Admission(), hopeless)


@pytest.mark.parametrize(
    ("verdict", "attempts", "config", "at"),
    [
        (TRANSIENT, 1, {}, 11),
        (TRANSIENT, 2, {}, 12),
        (TRANSIENT, 3, {}, 14),
        (OVERLOAD, 1, {}, 11),
        (Verdict(VerdictKind.TRANSIENT, retry_after=7), 1, {}, 17),
        (Verdict(VerdictKind.OVERLOAD, retry_after=0.5), 1, {}, 11),
        (Verdict(VerdictKind.OVERLOAD, retry_after=60), 1, {}, 70),
        (TRANSIENT, 1, {"backoff": Backoff(initial_seconds=0)}, 10),
        (PERMANENT, 1, {}, None),
        (FATAL, 1, {}, None),
        (None, 1, {}, None),
        (TRANSIENT, 1, {"max_retries": 0}, None),
        (OVERLOAD, 1, {"max_retries": 0}, None),
    ],
)
def test_next_attempt_begins_when_verdict_and_backoff_say(
    verdict: Verdict | None, attempts: int, config: dict[str, Any], at: float | None
) -> None:
    error = OSError("x")
    known = failures(error, verdict)
    assert next_start(known, attempts=attempts, **config) == at
    assert known.wake_at == (-math.inf if at is None else at)
    # Where nothing would have been retried, there is nothing to explain.
    assert not hasattr(error, "__notes__")


def test_invocation_that_succeeded_or_was_cancelled_is_not_tried_again() -> None:
    known = Failures(0)
    assert next_start(known) is None
    known.end(Outcome(Status.CANCELLED, InvocationCancelled("x")))
    assert next_start(known) is None


@pytest.mark.parametrize(
    ("verdict", "why_not", "note"),
    [
        (TRANSIENT, {"total": 11}, "total_timeout_seconds=100 would pass during the wait"),
        (TRANSIENT, {"caller": 11}, "the caller's deadline would pass during the wait"),
        (
            Verdict(VerdictKind.TRANSIENT, retry_after=60.5),
            {},
            "the server asked to wait 60.5s, which is more than max_retry_after_seconds=60",
        ),
        (OVERLOAD, {"overload_timeout_seconds": 0.5}, "overload_timeout_seconds=0.5 would pass"),
        (
            OVERLOAD,
            {"hopeless": True},
            "the provider has let nothing succeed for longer than overload_timeout_seconds=600",
        ),
        (
            TRANSIENT,
            {"admission": Admission(ledger=RetryLedger(RetryBudget(ratio=0, min_per_second=0)))},
            "the retry budget of the limiter is used up, since too many attempts fail",
        ),
    ],
)
def test_retry_that_cannot_be_says_why(verdict: Verdict, why_not: dict[str, Any], note: str) -> None:
    error = OSError("x")
    known = failures(error, verdict)
    assert next_start(known, **why_not) is None
    assert (error.__notes__, known.wake_at) == ([f"not retried: {note}"], -math.inf)


def test_time_limit_that_the_wait_just_keeps_is_no_reason_against_a_retry() -> None:
    assert next_start(failures(verdict=TRANSIENT), total=11.5, caller=11.5) == 11
    assert next_start(failures(verdict=OVERLOAD), overload_timeout_seconds=1) == 11
    # An attempt that failed otherwise has nothing to do with the patience for overload.
    assert next_start(failures(verdict=TRANSIENT), overload_timeout_seconds=0.5, hopeless=True) == 11


def test_retry_that_does_not_begin_leaves_the_budget_alone() -> None:
    ledger = RetryLedger(RetryBudget(ratio=0, min_per_second=0.1, window_seconds=10))
    admission = Admission(ledger=ledger)
    for why_not in ({"total": 11}, {"caller": 11}, {"max_retries": 0}):
        assert next_start(failures(OSError("x"), TRANSIENT), admission=admission, **why_not) is None

    assert next_start(failures(verdict=OVERLOAD), admission=admission) == 11
    assert next_start(failures(verdict=TRANSIENT), admission=admission) == 11
    assert next_start(failures(OSError("x"), TRANSIENT), admission=admission) is None


def test_retries_after_an_overload_do_not_count() -> None:
    known = Failures(0)
    begins: list[float | None] = []
    for attempts, verdict in enumerate((TRANSIENT, OVERLOAD, OVERLOAD, TRANSIENT, TRANSIENT), 1):
        known.add(Outcome(Status.ERROR, ERROR, verdict))
        begins.append(next_start(known, attempts=attempts, max_retries=2))

    assert (begins, known.errors) == ([11, 12, 14, 18, None], [ERROR] * 5)


def test_patience_with_overload_counts_from_the_first_one() -> None:
    known, error = Failures(0), OSError("x")
    known.add(Outcome(Status.ERROR, error, OVERLOAD))
    assert next_start(known, now=10, overload_timeout_seconds=5) == 11
    known.add(Outcome(Status.ERROR, error, OVERLOAD))
    assert next_start(known, now=13, overload_timeout_seconds=5, attempts=2) == 15
    known.add(Outcome(Status.ERROR, error, OVERLOAD))
    assert next_start(known, now=15, overload_timeout_seconds=5) is None


def test_time_of_the_attempt_before_a_wait_is_kept() -> None:
    known = failures()
    known.begin_wait(2)
    assert (known.attempt_at, known.attempt_ms) == (None, 2000)
    known.begin(5)
    assert (known.last, known.attempt_at) == (None, 5)
    # The clock went back.
    known.begin_wait(4)
    assert known.attempt_ms == 0


# --- what is written to an exception


def test_note_is_added_once() -> None:
    error = OSError("x")
    for text in ("a", "b", "a"):
        add_note(error, text)

    assert error.__notes__ == ["a", "b"]


def test_exception_that_takes_no_notes_is_left_alone() -> None:
    class Closed(Exception):
        def add_note(self, text: str) -> None:
            raise RuntimeError

    add_note(Closed(), "a")


def raised(exc: BaseException) -> Any:
    try:
        raise exc
    except BaseException as caught:
        return caught


def test_frames_are_dropped_from_causes_contexts_and_members() -> None:
    cause, context, member = (raised(OSError(name)) for name in ("cause", "context", "member"))
    group = raised(ExceptionGroup("x", [member]))
    group.__cause__, member.__context__ = cause, context
    # It leads back to where it began.
    context.__cause__ = group
    drop_frames(group)
    assert [exc.__traceback__ for exc in (group, cause, context, member)] == [None] * 4


def test_frames_of_a_very_long_chain_are_dropped_from_its_beginning_alone() -> None:
    chain = [raised(OSError(place)) for place in range(CHAIN + 1)]
    for exc, cause in itertools.pairwise(chain):
        exc.__cause__ = cause

    drop_frames(chain[0])
    assert [exc.__traceback__ is None for exc in chain] == [True] * CHAIN + [False]

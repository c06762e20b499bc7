"""One attempt: called, timed, and told apart from what surrounds it."""

from __future__ import annotations

__all__ = ["Act", "RunOptions", "plumbing", "run_attempt"]

import math
from collections.abc import Awaitable, Callable
from contextvars import Context
from types import CodeType
from typing import Any, TypeAlias, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from .._config import LoopConfig
from .._errors import InvocationCancelled, LeftOpenError
from .._eventloop.callers import CallersCancellation
from .._eventloop.context import await_it, call_in_context, wait_for_cancellation
from .._foreign import foreign_code
from .._limits.slots import Slot, SlotPool, current_slot
from .._result import SUCCESS, Status
from .attempt_scope import AttemptScope
from .job import Job
from .observer import Observer

FnT = TypeVar("FnT", bound=Callable[..., Any])
ErrorT = TypeVar("ErrorT", bound=Exception)

_set_slot = current_slot.set

Act: TypeAlias = Callable[
    [Job[Any], "RunOptions", Context, anyio.CancelScope, Callable[[], object]], Awaitable[Any]
]
"""
What an attempt consists of: given the job, whose slot it may use, the plan, the context to run the agent in,
the scope that times it out, and what to call when it waits.
"""


class RunOptions:
    """
    What holds for every invocation of a call.

    :param config: the settings
    :param observer: is told what happens
    :param act: what is done with the agent; if absent, it is called, and what it returns awaited
    """

    __slots__ = ("act", "config", "observer", "timeout", "total")

    def __init__(self, config: LoopConfig, observer: Observer, act: Act | None = None) -> None:
        self.config = config
        self.timeout = math.inf if config.timeout_seconds is None else config.timeout_seconds
        self.total = config.total_timeout_seconds
        self.observer = observer
        # To call the agent and await what it returns needs no more than a context.
        self.act = act


_PLUMBING: set[CodeType] = {call_in_context.__code__, await_it.__code__}


def plumbing(fn: FnT) -> FnT:
    """Mark a function as one that stands between the loop and an agent, and that tracebacks leave out."""
    _PLUMBING.add(fn.__code__)
    return fn


@plumbing
async def run_attempt(
    job: Job[Any],
    plan: RunOptions,
    slot: Slot,
    new_context: Callable[[], Context],
    caller: CallersCancellation | None,
    on_wait: Callable[[], object],
    timer: AttemptScope,
    now: float,
) -> float:
    """
    Run one attempt and tell the job how it ended. The slot is given back in any case.

    :param new_context: gives the context for the agent, which is its own
    :param caller: notices native cancellations of this task, if it is a caller's; in a task of ours only the
        agent can ask for one
    :param on_wait: called when the agent waits for the first time, or oftener
    :param timer: times the attempt out; stays open, if the agent returned, until it is closed
    :param now: the time
    :return: the time at which it ended
    :raises BaseException: the cancellation of an enclosing scope or of the caller's task, and what the agent
        raises that is no ``Exception``; the attempt then has no outcome
    """
    first = job.attempts == 0
    if not first:
        job.verdict = None

    job.slot = slot
    try:
        deadline = now + plan.timeout
        if plan.total is not None:
            deadline = job.bound(now, deadline, plan.total)

        fresh = timer.scope is None
        scope = timer.open(deadline)
        # While it was open nothing was awaited since this was looked at the last time.
        if fresh and slot.pool.loop.is_cancelled_around(scope):
            # Once cancelled, nothing starts, not even to its first checkpoint.
            await wait_for_cancellation()

        context = new_context()
        context.run(_set_slot, slot)
        if caller is not None:
            caller.begin()

        job.attempts += 1
        if first:
            job.started_at = now

        observer = plan.observer
        if first and observer.is_plain:
            job.attempt_at = now
            tell = observer.tell_in_flight
            tell(1)
        else:
            observer.started(job, now, context)

        if slot.charges is not None:
            job.charges, slot.charges = slot.charges, None
            slot.pool.pay(job.charges)

        pool, act = slot.pool, plan.act
        try:
            if act is None:
                invocation = job.invocation
                fn: Any = invocation.fn
                output = await call_in_context(
                    context, fn, invocation.args, invocation.kwargs, on_wait, caller
                )
            else:
                output = await act(job, plan, context, scope, on_wait)
        except BaseException as exc:
            await _conclude(job, plan, pool, caller, timer, exc)
        else:
            ended_at = pool.loop.now()
            if not pool.loop.is_left_open(scope):
                # It may have been cancelled before the agent returned; and a stream moves the deadline.
                if ended_at >= deadline or act is not None:
                    timer.close()

                job.status = SUCCESS
                job.output = output
                if not first:
                    job.error = None

                return ended_at

            await _conclude(job, plan, pool, caller, timer, None)

        job.judge(plan.config, plan.observer.log_classify)
        return pool.loop.now()
    finally:
        # A stream may be without one while it waits for its reader.
        held = job.slot
        if held is not None:
            job.slot = None
            if job.status is SUCCESS:
                held.release(None, True)
            else:
                held.release(job.verdict, False, plan.config.backoff.max_retry_after_seconds)


async def _conclude(
    job: Job[Any],
    plan: RunOptions,
    pool: SlotPool,
    caller: CallersCancellation | None,
    timer: AttemptScope,
    raised: BaseException | None,
) -> None:
    """
    Tell a job how an attempt has failed, and leave its scope.

    :param raised: what came out of the agent; ``None`` if it returned and left a scope open
    :raises BaseException: as :func:`run_attempt`
    """
    scope, cancelled_class = timer.scope, anyio.get_cancelled_exc_class()
    assert scope is not None
    timed_out = scope.cancel_called
    error: Exception | None = None
    try:
        job.left_open = job.left_open or pool.loop.is_left_open(scope)
        if not job.left_open:
            # Only the type is asked, here and below: `__class__` may be a property that raises.
            if timed_out and issubclass(type(raised), cancelled_class):
                assert raised is not None
                # The scope is about to drop it, but trio holds on to it in a cycle: without this,
                # the frames and arguments of the agent would live until the next collection.
                raised.__traceback__ = None

            try:
                if timer.close(raised):
                    raised = None
            except BaseException as rest:
                raised = rest

        if raised is not None:
            error = raised if isinstance(raised, Exception) else _without_cancellation(raised)

        if error is not None and error is raised:
            job.made_of_cancellation = error

        if job.left_open:
            # A scope that is still open may be cancelled too, which is the agent's doing.
            cancelled = pool.loop.is_cancelled_around(scope)
            timer.abandon(caller is None)
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
            if error is raised:
                job.made_of_cancellation = None

        if job.left_open:
            job.fail(Status.ERROR, _from(LeftOpenError(job.invocation.agent_id), raised))
        elif timed_out or raised is None:
            job.time_out(plan.config, error)
        elif error is not None:
            job.fail(Status.ERROR, error)
        else:
            stray = InvocationCancelled("the agent was cancelled from within")
            job.fail(Status.CANCELLED, _from(stray, raised))
    finally:
        # Their tracebacks refer to this frame; the frame must not refer back.
        raised = error = None


def _from(error: ErrorT, cause: BaseException | None) -> ErrorT:
    error.__cause__ = cause
    return error


def _without_cancellation(exc: BaseException) -> Exception | None:
    """
    Return the errors in a group that has cancellations among them, or ``None`` for a bare cancellation.

    :raises BaseException: ``exc``, if it is or holds anything else
    """
    if isinstance(exc, anyio.get_cancelled_exc_class()):
        return None

    if issubclass(type(exc), BaseExceptionGroup):
        rest = cast("BaseExceptionGroup[BaseException]", exc).split(anyio.get_cancelled_exc_class())[1]
        if rest is None or isinstance(rest, Exception):
            return rest

    raise exc


def _trim(exc: BaseException) -> None:
    """Let the traceback begin in the agent: shorter to read, and no reference back to our own frames."""
    # Of an exception that does not let it be set, a frozen dataclass, say, the traceback keeps our frames.
    with foreign_code:
        traceback = exc.__traceback__
        while traceback is not None and traceback.tb_frame.f_code in _PLUMBING:
            traceback = traceback.tb_next

        exc.__traceback__ = traceback

"""
The two ways to run an attempt, which keep apart the context variables that agents set.

**Isolated**: inside a context of the attempt's own. A task cannot change its context, so every step of the
agent is a call of ``Context.run``. That takes up to a tenth of the time of a short attempt, and a
twentieth of the memory of one that waits.

**Directly**: inside the context of the task, which is a worker of a batch. Most agents set no context
variable, so the next one finds those that the batch was called with. Each attempt makes sure of that when it
ends (:class:`Inherited`). Once an agent has changed a variable, the batch runs all attempts isolated, and
other workers take the place of these. A batch that calls other functions of the user in its workers too
(``on_event``, costs, keys) isolates from the start, since these would see the variables that agents set.

A single invocation runs in its caller's task, whose variables it must not change: it is isolated, and so are
streams, whose agents run in a step of the reader.
"""

from __future__ import annotations

__all__ = ["Runnable"]

import types
from collections.abc import Callable, Generator
from contextvars import Context, copy_context
from typing import Any, TypeVar

from .._eventloop.callers import CallersCancellation
from .._eventloop.context import Inherited, as_coroutine, resumable, wait_for_cancellation
from .._eventloop.deadlines import AttemptScope
from .._limits.slots import Slot, current_slot
from .attempt import Attempts
from .options import RunOptions
from .states import RUNNING
from .tracebacks import plumbing

T = TypeVar("T")

_set_slot = current_slot.set
# The type of the object that an async function returns.
_PLAIN: Any = types.CoroutineType
_GENERATOR: type[types.GeneratorType[Any, Any, Any]] = types.GeneratorType
_COROUTINE: type[types.CoroutineType[Any, Any, Any]] = types.CoroutineType
_send_to_generator: Callable[[Any, Any], Any] = _GENERATOR.send
_send_to_coroutine: Callable[[Any, Any], Any] = _COROUTINE.send
# The last step of an agent that has returned.
_DONE = object()


class Runnable(Attempts[T]):
    """Attempts that can be run. Only their own methods write them."""

    @plumbing
    async def run_directly(
        self, slot: Slot, options: RunOptions, scope: AttemptScope, inherited: Inherited, now: float
    ) -> float:
        """
        Run one attempt inside the context of the current task, which has its inherited variables.

        The other parameters, the return value and the errors are those of :meth:`run_isolated`.

        :param inherited: the variables; noted as lost if the agent changes one
        """
        # Few local names: this frame waits with the agent.
        _set_slot(slot)
        if self.attempts or not (slot.is_plain and options.only_timeout):
            begun = self._begin(slot, options, scope, now, None)
        else:
            # As _begin() does; inlined for speed.
            try:
                begun = scope.begin(now + options.timeout)
            except BaseException:
                slot.release()
                raise

            if begun:
                self.scope = scope
                self.attempts = 1
                self.state = RUNNING
                self.started_at = now
                options.observer.report_in_flight(1)
            else:
                slot.release()

        if not begun:
            await wait_for_cancellation()

        fn, args, kwargs = self.invocation.fn, self.invocation.args, self.invocation.kwargs
        try:
            coroutine: Any = fn(*args, **kwargs) if kwargs else fn(*args)
            if type(coroutine) is not _PLAIN:
                coroutine = as_coroutine(fn, coroutine)

            self.output = await coroutine
        except BaseException as exc:
            try:
                # The user's function that judges the error is outside of the agent.
                return await self._conclude(slot, options, scope, None, None, exc, inherited.context.copy())
            finally:
                inherited.check()

        # As check() does; inlined for speed.
        if len(copy_context()) != inherited.count:
            inherited.check()

        for var, value in inherited.values:
            if var.get() is not value:
                inherited.check()

        ended_at = scope.now()
        # The scope may have been cancelled before the agent returned.
        if ended_at >= scope.until and not scope.children:
            scope.leave()

        if scope.children:
            ended_at = await self._conclude(slot, options, scope, None, None, None)

        return ended_at

    @plumbing
    @types.coroutine
    def run_isolated(
        self,
        slot: Slot,
        options: RunOptions,
        scope: AttemptScope,
        new_context: Callable[[], Context],
        now: float,
        before: int | None = None,
    ) -> Generator[Any, Any, float]:
        """
        Run one attempt, with every step of the agent inside a context of its own.

        :param slot: its slot; given back if the attempt fails, left to the caller if it succeeds
        :param scope: times the attempt out; stays open if the agent returned
        :param before: how often this task was cancelled natively before, if it is the caller's
        :return: when it ended; ``failures.last`` holds the outcome of a failure
        :raises BaseException: cancellation of the caller, or an agent's error that is no ``Exception``
        """
        context = new_context()
        if not self._begin(slot, options, scope, now, context):
            yield from wait_for_cancellation().__await__()

        caller: CallersCancellation | None = None
        ended_at: float | None = None
        run = options.run
        try:
            if run is None:
                agent, send = self._steps(slot), _send_to_generator
            else:
                agent, send = run(self, slot, options, scope), _send_to_coroutine

            step = context.run(send, agent, None)
            if step is not _DONE:
                self.waited = True

            # No bound methods in local names: the collector would visit them as long as the agent waits.
            while step is not _DONE:
                try:
                    sent = yield step
                except GeneratorExit:
                    context.run(agent.close)
                    raise
                except BaseException as exc:
                    # Thrown below: in here, the agent's later exceptions would have it as their context.
                    thrown = exc
                else:
                    try:
                        step = context.run(send, agent, sent)
                    finally:
                        sent = None  # exceptions refer to this frame, and trio sends some

                    continue

                try:
                    if before is not None:
                        caller = caller or CallersCancellation(before)
                        caller.reaches(agent, thrown)

                    step = context.run(agent.throw, thrown)
                finally:
                    del thrown
        except StopIteration as stop:
            # Of a stream, which returns nothing, or of a function that has raised this itself.
            if stop.value is not None:
                ended_at = yield from self._conclude(
                    slot, options, scope, before, caller, stop.value
                ).__await__()
        except BaseException as exc:
            ended_at = yield from self._conclude(slot, options, scope, before, caller, exc).__await__()

        if ended_at is None:
            ended_at = scope.now()
            # The scope may have been cancelled before the agent returned; and a stream moves the deadline.
            if (ended_at >= scope.until or run is not None) and not scope.children:
                scope.leave()

            if scope.children:
                ended_at = yield from self._conclude(slot, options, scope, before, caller, None).__await__()

        return ended_at

    @plumbing
    @resumable
    def _steps(self, slot: Slot) -> Generator[Any, Any, StopIteration | None]:
        """
        Call the agent, note its output, and yield ``_DONE``.

        To return would end ``Context.run`` by a StopIteration. To raise and catch it takes a quarter of the
        time of :meth:`run_isolated`, with an agent that waits once.

        :return: a StopIteration of the user's function, which a generator cannot raise
        """
        _set_slot(slot)
        fn, args, kwargs = self.invocation.fn, self.invocation.args, self.invocation.kwargs
        failure: StopIteration | None = None
        try:
            coroutine: Any = fn(*args, **kwargs) if kwargs else fn(*args)
        except StopIteration as exc:
            failure = exc
        else:
            if type(coroutine) is not _PLAIN:
                coroutine = as_coroutine(fn, coroutine)

            self.output = yield from coroutine
            yield _DONE

        return failure

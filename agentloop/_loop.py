"""The public class that runs agents."""

from __future__ import annotations

__all__ = ["AgentLoop"]

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import ParamSpec, Self, TypeVar, Unpack, cast

import attrs

from . import _validators as must
from ._batch.journaled import AnyJournal, check_journal, collecting_batch
from ._config import ConfigChanges, LoopConfig
from ._events import ChunkEvent, Event, ResultEvent
from ._invocation import Inputs, Invocation, StreamInputs, check_inputs, make_invocation
from ._limits.keyed import check_concurrency
from ._limits.limiter import Limiter, LoopStatistics
from ._metrics.recorder import MetricsRecorder
from ._misuse import OfOneProcess, name_parameters
from ._result import InvocationResult
from ._runtime.lifetime import Lifetime
from ._runtime.observer import Observer, Sink
from ._runtime.options import RunOptions
from ._runtime.single import Single
from ._stream.read import BatchReader, StreamBatch, completion_batch
from ._stream.stream import AgentStream, Streaming

P = ParamSpec("P")
T = TypeVar("T")


@name_parameters(settings=LoopConfig)
class AgentLoop(OfOneProcess, since="its limits hold in one process"):
    """
    Runs agents: async callables that are slow, fail, hang and get rate-limited.

    A loop can be made anywhere, inside an event loop or not, and serve several runs in turn, on either
    backend. ``async with loop:`` is optional. It gives the loop a lifetime, as a task group has one:
    leaving the block waits for running invocations, leaving it by an exception cancels them, and afterwards
    the loop refuses new work.

    :param config: the settings; the defaults of :class:`LoopConfig` if absent
    :param limiter: the limiter to share with other loops; one of ``config.max_concurrency`` if absent
    :param metrics: the recorder to share with other loops; a new one if absent
    :param on_event: a plain function that is given each :data:`Event`, at once and in the task where it
        happened, so it should be quick; or several, which are called in turn. An error of one harms neither a
        run nor the others; the first error of each is logged
    :raises TypeError: if a parameter is of the wrong type
    :raises ValueError: if ``config.max_concurrency`` would be ignored: it is neither the default nor the
        limiter's
    """

    def __init__(
        self,
        config: LoopConfig | None = None,
        *,
        limiter: Limiter | None = None,
        metrics: MetricsRecorder | None = None,
        on_event: Callable[[Event], object] | Iterable[Callable[[Event], object]] | None = None,
    ) -> None:
        for name, value, kind in (
            ("config", config, LoopConfig),
            ("limiter", limiter, Limiter),
            ("metrics", metrics, MetricsRecorder),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")

        self._config = LoopConfig() if config is None else config
        if limiter is not None:
            check_concurrency(self._config.max_concurrency, limiter)

        self._limiter = Limiter(self._config.max_concurrency) if limiter is None else limiter
        self._metrics = MetricsRecorder() if metrics is None else metrics
        self._lifetime = Lifetime(self._limiter)
        functions = must.plain_functions("on_event", on_event)
        self._sink = Sink(functions) if functions else None
        if self._sink is not None:
            self._limiter.tell(self._sink)

        self._options = self._make_options()

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<AgentLoop {now.running} running, {now.waiting} waiting, limit {now.max_concurrency}>"

    @property
    def config(self) -> LoopConfig:
        """The settings."""
        return self._config

    @property
    def limiter(self) -> Limiter:
        """The limiter, which says how many invocations may run at once."""
        return self._limiter

    @property
    def metrics(self) -> MetricsRecorder:
        """The recorder of all results."""
        return self._metrics

    def with_config(self, **changes: Unpack[ConfigChanges]) -> AgentLoop:
        """
        Return a view of this loop with changed settings. It shares limiter, metrics, events and lifetime.

        :param changes: fields of :class:`LoopConfig` by name
        :raises TypeError: if there is no such field, or a value is of the wrong type
        :raises ValueError: if a value is out of its range, or ``max_concurrency`` is changed, which is
            the shared limiter's: set ``loop.limiter.max_concurrency``, or make another loop
        """
        config = attrs.evolve(self._config, **changes)
        if config.max_concurrency != self._config.max_concurrency:
            raise ValueError(
                "max_concurrency cannot differ in a view, which shares the limiter: "
                "set loop.limiter.max_concurrency, or make another AgentLoop"
            )

        # Copied, not constructed: __init__ would refuse a limiter that has been resized since.
        view = AgentLoop.__new__(AgentLoop)
        vars(view).update(vars(self))
        view._config = config
        view._options = view._make_options()
        return view

    def _make_options(self) -> RunOptions:
        metrics = self._metrics if self._config.collect_metrics else None
        return RunOptions(self._config, Observer(metrics, self._sink, self._lifetime.nested))

    def statistics(self) -> LoopStatistics:
        """Return the state at this moment."""
        now, life = self._limiter.statistics(), self._lifetime
        of_calls = life.drained is not None, life.replayed, dict(life.nested)
        return LoopStatistics(now.running, now.waiting, now.max_concurrency, *of_calls)

    def get_latency_stats(self) -> dict[str, float]:
        """
        Return ``p50_ms``, ``p95_ms``, ``p99_ms``, ``mean_ms`` and ``count`` of the latencies so far, in
        milliseconds; all of them 0 before the first.
        """
        latency = self._metrics.snapshot().latency
        return {name: getattr(latency, name) for name in ("p50_ms", "p95_ms", "p99_ms", "mean_ms", "count")}

    def reset_metrics(self) -> None:
        """Forget all measurements."""
        self._metrics.reset()

    async def run_single(
        self, agent_id: str, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> InvocationResult[T]:
        """
        Run one invocation: wait for a slot, call ``fn``, time it out, retry it.

        The agent runs in the caller's task, in a context of its own. Cancelling the caller, natively too
        (asyncio's ``Task.cancel()``), cancels the agent and propagates, even if the agent suppresses it.

        :param agent_id: a name for it, which the result carries
        :param fn: an async function, or any callable that returns an awaitable
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: the result; a failure is data
        :raises TypeError: if ``fn`` cannot be called
        :raises LeftOpenError: if the agent has left a cancel scope or a task group open in the caller's task
        :raises LoopClosed: if the loop's ``async with`` block has been left
        """
        lifetime = self._lifetime
        stopped = lifetime.check() if lifetime.is_left or lifetime.drained is not None else None
        # CPython specializes the call of a class that passes each argument of __init__.
        single = Single(make_invocation(agent_id, fn, args, kwargs), self._limiter, self._options, False)
        if stopped is not None:
            return await single.refuse(stopped)

        if lifetime.tasks is not None:
            with lifetime.call(single):
                return await single.run_cancellable()

        lifetime.outside[single] = None  # as call() does; inlined for speed
        try:
            return await single.run()
        finally:
            del lifetime.outside[single]

    async def run_all(
        self, invocations: Inputs[T], *, journal: AnyJournal | None = None
    ) -> list[InvocationResult[T]]:
        """
        Run every invocation and return the results in input order.

        After a fatal verdict nothing new is started and nothing is retried: running invocations finish, and
        all other results are ``SKIPPED``. When the input itself raises, running invocations finish, and
        then the input's exception is raised. Cancelling the caller cancels everything and propagates.

        :param invocations: a sync or async iterable of invocations or ``(agent_id, fn, args, kwargs)``
            tuples, pulled as slots get free
        :param journal: an open ``agentloop.journal.Journal``; results that it holds are not computed again
        :return: exactly one result per input
        :raises TypeError: if ``invocations`` is no iterable, or an input is neither an :class:`Invocation`
            nor a 4-tuple
        :raises BatchStopped: if the batch was stopped before an async input was read to its end; its
            ``results`` are those of the inputs that were pulled
        :raises JournalError: if the journal cannot be read or written, after running invocations have ended
        :raises LoopClosed: if the loop's ``async with`` block has been left
        """
        check_inputs(invocations)
        check_journal(journal)
        stopped, replayed = self._lifetime.check(), self._lifetime.count_replayed
        batch = collecting_batch(invocations, self._limiter, self._options, journal, replayed)
        if stopped is not None:
            batch.wind_down(stopped, None)

        with self._lifetime.call(batch):
            await batch.run()

        return batch.results()

    def as_completed(
        self, invocations: Inputs[T], *, journal: AnyJournal | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[InvocationResult[T]], None]:
        """
        Run every invocation and give the results as they come::

            async with loop.as_completed(invocations) as results:
                async for result in results:
                    ...

        The input is pulled lazily: no more than ``max_concurrency`` invocations run, wait for a slot or have
        a result that was not read, so a reader that stops reading stops new starts. (Invocations that wait
        to be retried do not count; there are at most eight times as many of them.) Leaving the block cancels
        running invocations and waits for them. Being cancelled while waiting for a result loses none.

        After a fatal verdict nothing new is started and no more input is pulled. When the results of all
        invocations that were pulled have been read, :exc:`BatchStopped` is raised if some of them were
        skipped, or if there was more input. When the input itself raises, its exception is raised after the
        last result.

        :param invocations: a sync or async iterable of invocations or ``(agent_id, fn, args, kwargs)`` tuples
        :param journal: as in :meth:`run_all`; results that are being written do not count as live
        :return: an async context manager that gives an async iterable of results in completion order
        :raises TypeError: if ``invocations`` is no iterable; while iterating, if an input is neither an
            :class:`Invocation` nor a 4-tuple
        :raises BatchStopped: while iterating, after the last result, if the batch was stopped by a fatal
            verdict, or since the loop was left, before all inputs were run
        :raises JournalError: while iterating, after the last result
        :raises LoopClosed: on entering, if the loop's ``async with`` block has been left
        """
        check_inputs(invocations)
        check_journal(journal)
        replayed = self._lifetime.count_replayed
        return BatchReader(
            "as_completed",
            lambda: completion_batch(invocations, self._limiter, self._options, journal, replayed),
            self._lifetime,
        )

    def run_streaming(
        self, agent_id: str, stream_fn: Callable[P, AsyncIterable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> AgentStream[T]:
        """
        Run one invocation and give its chunks while it runs::

            async with loop.run_streaming("writer", write, "a haiku") as stream:
                async for chunk in stream:
                    ...

        A failure before the first chunk is retried like any other; afterwards it is raised to the reader,
        after the chunks that came before it. The agent holds its slot until it has ended, also while it waits
        for a slow reader; ``total_timeout_seconds`` bounds that. In the other time-outs (each attempt's
        ``timeout_seconds``, ``first_chunk_timeout_seconds``, ``idle_timeout_seconds`` between chunks) the
        time that the reader takes does not count.

        Inside ``async with loop:`` the agent's task belongs to the loop and not to the task that reads. The
        stream can then be read in an async generator, be left by another task, and be left in any order.

        :param agent_id: a name for it, which the result carries
        :param stream_fn: an async generator function, or any callable that returns an async iterable, whose
            iterator is closed if it has an ``aclose()``
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :return: the stream, which begins when its ``async with`` block is entered
        :raises TypeError: if ``stream_fn`` cannot be called
        :raises LoopClosed: on entering, if the loop's ``async with`` block has been left
        """
        invocation = Invocation[T](agent_id, stream_fn, args, kwargs)
        return AgentStream(
            agent_id,
            lambda: Streaming[T](invocation, self._limiter, self._options),
            self._lifetime,
        )

    def stream_all(
        self, invocations: StreamInputs[T]
    ) -> AbstractAsyncContextManager[AsyncIterator[ChunkEvent[T] | ResultEvent], None]:
        """
        Run many streams at once and give the chunks of all, as they come::

            async with loop.stream_all(Invocation.map(write, topics)) as events:
                async for event in events:
                    match event:
                        case ChunkEvent(invocation, chunk):
                            ...
                        case ResultEvent(invocation, result):
                            ...

        The chunks of each invocation come in order, and after the last of them its result, whether it failed
        or not. The input is pulled lazily, as in :meth:`as_completed`, and all streams together are at most a
        small buffer ahead of the reader. Leaving the block cancels running streams and waits for them. Being
        cancelled while waiting for an event loses none.

        :param invocations: a sync or async iterable of invocations of async generator functions,
            or ``(agent_id, stream_fn, args, kwargs)`` tuples
        :return: an async context manager that gives an async iterable of events
        :raises TypeError: as :meth:`as_completed`
        :raises BatchStopped: as :meth:`as_completed`
        :raises LoopClosed: as :meth:`as_completed`
        """
        check_inputs(invocations)
        return BatchReader(
            "stream_all",
            lambda: StreamBatch[T](cast("Inputs[None]", invocations), self._limiter, self._options),
            self._lifetime,
        )

    def drain(self, reason: str = "drained", *, grace_seconds: float | None = None) -> None:
        """
        Start nothing new and retry nothing any more, for good: in all calls of this loop and of its views,
        those made later too. Other loops on its limiter go on. Running invocations may finish, with all the
        work that they give to this loop, and open streams are read to their end. Invocations that wait are
        ``SKIPPED``, or end with their last failure and a note that says so.

        Batches end as :exc:`BatchStopped` describes; a stream entered later raises that. Drained twice, the
        first reason holds, and the shorter grace. Any task of the event loop may call this.

        :param reason: why, for results and events
        :param grace_seconds: after how many seconds running invocations are cancelled; ``None`` for never
        :raises TypeError: if a value is of the wrong type
        :raises ValueError: if ``grace_seconds`` is negative or not finite
        :raises RuntimeError: if the loop is in use in the event loop of another thread
        """
        self._lifetime.drain(reason, grace_seconds)

    async def __aenter__(self) -> Self:
        await self._lifetime.enter()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._lifetime.leave(exc)

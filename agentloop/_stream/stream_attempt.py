"""One attempt of a stream: runs the agent, and sends its chunks."""

from __future__ import annotations

__all__ = ["StartSoon", "carry"]

import inspect
import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._errors import FirstChunkTimeout, IdleTimeout, not_async
from .._eventloop.deadlines import AttemptScope, TimeLimit
from .._limits.away import lend_to_reader
from .._limits.slots import Slot, current_slot
from .._metrics.histogram import Histogram
from .._runtime.job import Job
from .._runtime.options import RunOptions
from .._runtime.states import Progress
from .._runtime.tracebacks import plumbing
from .channel import Channel

ItemT = TypeVar("ItemT")

StartSoon: TypeAlias = Callable[[Callable[[], Coroutine[Any, Any, None]], str], None]
"""Starts a task with a name, beside the one that runs the agent."""

CLOSE_SECONDS = 5.0
"""How long an agent's generator may take to close when its stream ends early."""
ADVANCES = 3
"""How often a generator is advanced that yields instead of closing."""
GAPS_KEPT_AT_MOST = 200
"""How many gaps between chunks are kept until they are counted."""


def carry(
    channel: Channel[ItemT],
    as_item: Callable[[Job[Any], Any], ItemT],
    start_soon: StartSoon,
    job: Job[Any],
    slot: Slot,
    options: RunOptions,
    scope: AttemptScope,
) -> Coroutine[Any, Any, None]:
    """
    Call the agent, and send its chunks until it ends.

    :param as_item: makes the item for the channel from a chunk
    :param start_soon: starts the task that watches for idleness
    :param slot: the slot; given back while the agent waits for a reader that may need it
    :param scope: the scope of the attempt
    """
    return _StreamAttempt(channel, as_item, start_soon, job, slot, options, scope).run()


class _StreamAttempt(Generic[ItemT]):
    def __init__(
        self,
        channel: Channel[ItemT],
        as_item: Callable[[Job[Any], Any], ItemT],
        start_soon: StartSoon,
        job: Job[Any],
        slot: Slot,
        options: RunOptions,
        scope: AttemptScope,
    ) -> None:
        assert scope.scope is not None
        self._pool = slot.pool
        self._channel = channel
        self._as_item = as_item
        self._start_soon = start_soon
        self._job = job
        self._slot = slot
        self._options = options
        self._attempt = scope
        self._scope = scope.scope
        config = options.config
        self._idle_seconds = config.idle_timeout_seconds
        now = self._pool.loop.now()
        # The deadline of the attempt. Time during which it waits for its reader is added.
        self._end = now + options.timeout
        # Since when the agent has yielded nothing, without waits for its reader.
        self._idle_since = math.inf
        self._gaps: Histogram | None = None
        # Gaps in seconds that are not counted yet: counting many at once is faster.
        self._gaps_kept: list[float] = []
        self._watching: anyio.CancelScope | None = None
        self._closing = anyio.CancelScope()
        first_seconds = config.first_chunk_timeout_seconds
        self._awaits_first = first_seconds is not None and now + first_seconds < self._scope.deadline
        if first_seconds is not None and self._awaits_first:
            self._scope.deadline = now + first_seconds
            scope.set_limit(TimeLimit(FirstChunkTimeout, first_seconds))

    @plumbing
    async def run(self) -> None:
        current_slot.set(self._slot)
        channel, job, as_item = self._channel, self._job, self._as_item
        now, gaps = self._pool.loop.now, self._gaps_kept
        progress: Progress | None = None
        failure: BaseException | None = None
        error: Exception | None = None
        # Whether the agent was ended early, since the reader has left.
        cut_short = False
        # The scope for closing is entered first: a generator that is suspended at a yield may have scopes
        # open within it. A scope that is entered later would lie within those, and they would end first.
        ended = False
        self._attempt.closing = self._closing
        try:
            with self._closing:
                iterator = self._open()
                next_chunk: Callable[[], Awaitable[Any]] = iterator.__anext__
                step = next_chunk
                channel.enter()
                try:
                    while not cut_short:
                        chunk = await step()
                        if progress is not None:
                            at = now()
                            gaps.append(at - self._idle_since)
                            self._idle_since = at
                            if len(gaps) >= GAPS_KEPT_AT_MOST:
                                self._count_gaps()
                        else:
                            progress = self._first_chunk()

                        progress.chunks += 1
                        step = next_chunk
                        if channel.send(as_item(job, chunk), progress.chunks):
                            step = await self._wait_for_reader(iterator)
                            cut_short = channel.abandoned
                except StopAsyncIteration:
                    pass
                except BaseException as exc:
                    failure = exc
                finally:
                    # A thrown exception refers to this frame by its traceback; the frame must not refer back.
                    del step
                    channel.leave()

                self._end_timers()
                error = await self._close(iterator)
                ended = True
        except RuntimeError as exc:
            if not ended:
                raise

            # The agent left a scope open in ours. Trio forgets that when our scope is left.
            self._attempt.note(self._attempt.cause, left_open=True)
            failure = failure or exc
        finally:
            self._attempt.closing = None

        if self._closing.cancelled_caught:
            error = self._attempt.cause

        try:
            if failure is not None:
                self._attempt.note(error)
                raise failure

            if cut_short:
                # The agent yielded in a shielded scope of its own, so its generator had to be closed first.
                self._attempt.note(error)
                await checkpoint_if_cancelled()

            if error is not None:
                raise error
        finally:
            # The tracebacks refer to this frame; the frame must not refer back.
            del failure, error

    def _end_timers(self) -> None:
        """Stop the timers of the attempt, before the generator is closed, and count the gaps."""
        self._scope.deadline = math.inf
        if self._watching is not None:
            self._watching.cancel()

        if self._gaps is not None:
            self._count_gaps()
            self._options.observer.streamed(self._gaps)

    def _count_gaps(self) -> None:
        if self._gaps is not None:
            self._gaps.add_all([seconds * 1000.0 for seconds in self._gaps_kept])

        self._gaps_kept.clear()

    def _open(self) -> AsyncIterator[Any]:
        invocation = self._job.invocation
        returned: object = invocation.fn(*invocation.args, **invocation.kwargs)
        if isinstance(returned, AsyncIterable):
            return aiter(returned)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]

        message = (
            f"{invocation.fn!r} returned a {type(returned).__name__}, which `async for` cannot iterate over: "
            "pass an async generator function"
        )
        if inspect.iscoroutine(returned):
            returned.close()
            raise TypeError(message)

        raise not_async(message)

    def _first_chunk(self) -> Progress:
        job, now = self._job, self._pool.loop.now()
        progress = job.make_progress(now)
        self._pool.answered(self._slot)
        self._idle_since = now
        self._gaps = self._options.observer.first_chunk(job.invocation, job.id, now)
        if self._awaits_first:
            self._set_deadline(self._end)

        if self._idle_seconds is not None:
            self._watching = anyio.CancelScope()
            self._start_soon(self._watch, "agentloop watch")

        return progress

    def _set_deadline(self, end: float) -> None:
        """Time the attempt out at ``end``, or when the invocation's total time is up."""
        total_end = self._job.deadline
        self._scope.deadline = min(total_end, end)
        # An agent that yields once more after its time was up must not change the reason of the time-out.
        if not self._scope.cancel_called:
            self._attempt.set_limit(self._options.total if total_end <= end else None)

    def _is_cancelled_by_agent(self) -> bool:
        """Return whether the agent yielded in a scope that is cancelled."""
        self._closing.shield = True
        cancelled = anyio.current_effective_deadline() == -math.inf
        self._closing.shield = False
        return cancelled

    async def _wait_for_reader(self, iterator: AsyncIterator[Any]) -> Callable[[], Awaitable[Any]]:
        """
        Wait until the buffer has room for another chunk.

        :return: the function that advances the agent then
        """
        cancelled: BaseException | None = None
        try:
            await self._wait_for_room()
        except anyio.get_cancelled_exc_class() as exc:
            if not isinstance(iterator, AsyncGenerator) or not self._is_cancelled_by_agent():
                raise

            # A waiting agent would get the cancellation, so an agent suspended at a yield gets it too.
            cancelled = exc

        try:
            return (
                iterator.__anext__ if cancelled is None else partial(cast("Any", iterator).athrow, cancelled)
            )
        finally:
            # The traceback refers to this frame; the frame must not refer back.
            del cancelled

    async def _wait_for_room(self) -> None:
        pool, slot = self._pool, self._slot
        began = pool.loop.now()
        self._idle_since = math.inf
        self._set_deadline(math.inf)
        pool.begin_stall(slot)
        try:
            await lend_to_reader(slot, self._channel.wait_for_room)
        finally:
            pool.end_stall(slot)
            self._idle_since = pool.loop.now()
            self._end += self._idle_since - began
            self._set_deadline(self._end)

    async def _watch(self) -> None:
        """
        Cancel an agent that yields nothing for too long.

        This is a task, because setting a timer for every chunk costs more than all other work of a chunk.
        """
        assert self._watching is not None
        assert self._idle_seconds is not None
        with self._watching:
            while True:
                now = self._pool.loop.now()
                if now >= self._idle_since + self._idle_seconds:
                    break

                await anyio.sleep_until(min(self._idle_since, now) + self._idle_seconds)

            if not self._scope.cancel_called:
                self._attempt.set_limit(TimeLimit(IdleTimeout, self._idle_seconds))
                self._scope.cancel("idle")

    async def _close(self, iterator: AsyncIterator[Any]) -> Exception | None:
        """
        Close the agent's generator, if it has not ended.

        :return: the error of closing, if there was one
        """
        aclose = getattr(iterator, "aclose", None)
        if aclose is None or getattr(iterator, "ag_frame", iterator) is None:
            return None

        self._closing.shield = True
        self._closing.deadline = self._pool.loop.now() + CLOSE_SECONDS
        error: Exception | None = None
        try:
            await aclose()
        except BaseExceptionGroup as exc:
            # A task group that the generator yields in puts our GeneratorExit into a group.
            rest = exc.split(GeneratorExit)[1]
            if rest is not None and not isinstance(rest, Exception):
                raise

            error = rest
        except Exception as exc:
            error = exc
        except anyio.get_cancelled_exc_class():
            # On asyncio the scope may not catch its cancellation if an outer scope is cancelled too.
            if self._closing.cancel_called:
                seconds = f"{CLOSE_SECONDS:.10g}s"
                late = TimeoutError(f"the agent's generator took longer than {seconds} to close")
                self._attempt.note(late)

            raise

        # aclose() and athrow() have no effect on a generator that has yielded instead of closing. Advancing
        # it runs the code that is left.
        for _ in range(ADVANCES):
            if getattr(iterator, "ag_frame", None) is None:
                break

            try:
                await anext(iterator)
            except (Exception, GeneratorExit):
                break

        return error

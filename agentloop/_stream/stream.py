"""A stream: the chunks of an agent, read while the agent runs."""

from __future__ import annotations

__all__ = ["AgentStream", "Streaming"]

from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import anyio

from .._batch.timer import Timer
from .._errors import BatchStopped
from .._invocation import Invocation
from .._limits.limiter import Limiter
from .._limits.slots import Slot
from .._result import InvocationResult
from .._runtime.job import Job
from .._runtime.lifetime import Lifetime
from .._runtime.options import RunOptions
from .._runtime.single import Single
from .channel import Channel
from .reader import Reader
from .stream_attempt import StartSoon, carry

T = TypeVar("T")


def _as_it_is(_: Job[Any], chunk: T) -> T:
    return chunk


class Streaming(Generic[T]):
    """Runs one invocation, and sends its chunks to a reader."""

    def __init__(
        self,
        invocation: Invocation[Any],
        limiter: Limiter,
        options: RunOptions,
    ) -> None:
        self.result: InvocationResult[None] | None = None
        self._options = RunOptions(options.config, options.observer)
        self._single: Single[None] = Single(invocation, limiter, self._options, own_task=True)
        # Last, since a channel must be closed: a limiter that is in use elsewhere raises above.
        self.channel: Channel[T] = Channel()
        self.scope = anyio.CancelScope()
        self._timers: list[Timer] = []
        self._start_soon: StartSoon | None = None

    @property
    def call(self) -> object:
        return self._single

    @property
    def left_open(self) -> bool:
        return self._single.left_open

    @property
    def outer(self) -> Slot | None:
        return self._single.outer

    def begin(self, start_soon: StartSoon) -> None:
        try:
            self._single.enter()
        except BaseException:
            self.end()
            raise

        self._start_soon = start_soon
        self._options.run = partial(carry, self.channel, _as_it_is, start_soon)

    def run(self) -> Coroutine[Any, Any, object]:
        return self._single.run()

    def end(self) -> None:
        # Taken out of their objects to avoid cycles: the result may refer to a frame of the task, which
        # refers to the Single, and the options refer to the task's owner, which refers to this object.
        self.result, self._single.result = self._single.result, None
        self._options.run = self._start_soon = None
        while self._timers:
            self._timers.pop().stop()

        self.channel.close()

    def leave(self) -> None:
        self._cancel("the block that reads the stream was left")

    def wind_down(self, stopped: BatchStopped, until: float | None) -> None:
        self._single.wind_down(stopped, None)
        if until is not None and self._start_soon is not None:
            timer = Timer(until, lambda: self._cancel(stopped.reason))
            self._timers.append(timer)
            self._start_soon(timer.run, "agentloop timer")

    def refuse(self, stopped: BatchStopped) -> None:
        self.channel.close()
        raise stopped.with_traceback(None)

    def on_block_left(self) -> None:
        self.channel.limit_patience(lambda: self._cancel("the loop was left, and the stream was not read"))

    def cancel(self, reason: str, cause: BaseException) -> None:
        del cause  # the reason names it
        self._cancel(reason)

    def drop(self) -> None:
        self.channel.drop()

    def _cancel(self, reason: str) -> None:
        if not self.scope.cancel_called:
            self._single.reason = reason
            self.scope.cancel(reason)
            self.channel.abandon()


class AgentStream(Reader[T, Streaming[T]]):
    """
    The chunks of an agent: an async context manager, and an async iterable of chunks inside it::

        async with loop.run_streaming("writer", write, "a haiku") as stream:
            async for chunk in stream:
                ...

    The agent runs in a task of its own, at most a small buffer ahead of its reader. Its exception reaches the
    reader as the same object, after the chunks that it yielded before. A time-out raises an
    :exc:`InvocationTimeout`, of which :exc:`FirstChunkTimeout` and :exc:`IdleTimeout` are kinds; a
    cancellation from within, or with the loop, an :exc:`InvocationCancelled`. Being cancelled while waiting
    for a chunk loses none. Leaving the block, by any path, cancels an agent that still runs, and waits until
    its generator is closed. A generator that is suspended at a ``yield`` has five seconds for its cleanup.
    """

    _usage = "write `async with loop.run_streaming(...) as stream:` around `async for chunk in stream:`"
    _kind = "stream"
    _source = "the agent"

    def __init__(self, agent_id: str, make: Callable[[], Streaming[T]], lifetime: Lifetime) -> None:
        super().__init__(make, lifetime)
        self._agent_id = agent_id
        self._result: InvocationResult[None] | None = None
        self._raised_at: TracebackType | None = None
        self._raised = False

    def __repr__(self) -> str:
        state = "not entered"
        if self._producer is not None:
            result = self._take_result()
            state = "running" if result is None else f"{result.status} after {result.chunks} chunks"

        return f"<AgentStream {self._agent_id!r} {state}>"

    @property
    def result(self) -> InvocationResult[None]:
        """
        The result of the invocation. Its ``output`` is ``None``, since the reader has the chunks.

        :raises RuntimeError: while the agent may still run; at the end of the block it does not
        """
        result = self._take_result()
        if result is None:
            raise RuntimeError(
                "a stream has its result when it has ended: read it after the `async with` block"
            )

        return result

    def _take_result(self) -> InvocationResult[None] | None:
        """Return the result, if the agent has ended."""
        streaming = self._producer
        if streaming is not None and streaming.result is not None:
            # Taken out to avoid a cycle: the frames of an error refer to the Streaming.
            self._result, streaming.result = streaming.result, None

        return self._result

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(exc_type, exc, traceback)
        finally:
            self._take_result()
            if self._raised and exc is None:
                # The error was handled in the block. Its traceback has the reader's frame, with the stream.
                self._forget_readers()

    def _forget_readers(self) -> None:
        error = self.result.exception
        assert error is not None
        with suppress(Exception):
            error.__traceback__ = self._raised_at

    def _error(self) -> BaseException | None:
        error = self.result.exception
        if error is None:
            return None

        if not self._raised:
            self._raised = True
            self._raised_at = error.__traceback__

        # The same object each time, without the frames of earlier raises.
        return error.with_traceback(self._raised_at)

"""One attempt of a stream: what an agent yields, chunk by chunk."""

from __future__ import annotations

__all__ = ["carry"]

import inspect
import math
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextvars import Context
from typing import Any, Generic, TypeVar

import anyio

from ._attempt import plumbing
from ._channel import Channel
from ._config import LoopConfig
from ._context import call_in_context
from ._errors import FirstChunkTimeout, IdleTimeout, InvocationTimeout
from ._job import Job
from ._pool import current_slot

ItemT = TypeVar("ItemT")

CLOSE_SECONDS = 5.0
"""How long an agent's generator may take to close when its stream ends early."""
CLOSE_TRIES = 3
"""How often a generator that goes on to yield is told to close."""

_NOTHING: dict[str, Any] = {}


def carry(
    channel: Channel[ItemT],
    as_item: Callable[[Job[Any], Any], ItemT],
    job: Job[Any],
    config: LoopConfig,
    context: Context,
    scope: anyio.CancelScope,
    on_wait: Callable[[], object],
) -> Awaitable[None]:
    """
    Call the agent, and hand over what it yields until it ends.

    :param as_item: makes of a chunk what the channel carries
    :param context: what every step of the agent is taken in
    :param scope: the attempt's scope, whose deadline is set anew for each wait
    :param on_wait: called whenever the agent waits
    """
    return _Carriage(channel, as_item, job, config, context, scope, on_wait).run()


class _Carriage(Generic[ItemT]):
    def __init__(
        self,
        channel: Channel[ItemT],
        as_item: Callable[[Job[Any], Any], ItemT],
        job: Job[Any],
        config: LoopConfig,
        context: Context,
        scope: anyio.CancelScope,
        on_wait: Callable[[], object],
    ) -> None:
        assert job.slot is not None
        self._pool = job.slot.pool
        self._channel = channel
        self._as_item = as_item
        self._job = job
        self._context = context
        self._scope = scope
        self._on_wait = on_wait
        self._config = config
        self._deadline = scope.deadline
        self._began = self._pool.now()
        timeout = config.timeout_seconds
        # When the attempt has to be over. The time for which its reader lets it wait is added.
        self._end = math.inf if timeout is None else self._began + timeout
        self._waiting = False

    @plumbing
    async def run(self) -> None:
        iterator = self._context.run(self._open)
        try:
            await self._pull(iterator)
        except BaseException:
            if not self._waiting:
                # The timer of an earlier wait has no part in this, whatever the clock says by now.
                self._scope.deadline = math.inf

            self._job.made_of_cancellation = await self._close(iterator)
            raise

        error = await self._close(iterator)
        if error is not None:
            raise error

    def _open(self) -> AsyncIterator[Any]:
        invocation = self._job.invocation
        returned: Any = invocation.fn(*invocation.args, **invocation.kwargs)
        if isinstance(returned, AsyncIterable):
            iterable: AsyncIterable[Any] = returned
            return aiter(iterable)

        if inspect.iscoroutine(returned):
            returned.close()

        raise TypeError(
            f"{invocation.fn!r} returned a {type(returned).__name__}, which `async for` cannot iterate over: "
            "pass an async generator function"
        )

    @plumbing
    async def _pull(self, iterator: AsyncIterator[Any]) -> None:
        channel, job, context = self._channel, self._job, self._context
        while True:
            self._waiting = False
            try:
                chunk = await call_in_context(context, iterator.__anext__, (), _NOTHING, self._on_agent_wait)
            except StopAsyncIteration:
                return

            if not job.chunks:
                job.first_chunk_at = self._pool.now()

            job.chunks += 1
            channel.put(self._as_item(job, chunk))
            if channel.full:
                self._waiting = False
                await self._wait_for_reader()

    def _on_agent_wait(self) -> None:
        self._waiting = True
        job, since = self._job, self._began
        kind: type[InvocationTimeout] = FirstChunkTimeout
        seconds = self._config.first_chunk_timeout_seconds
        if job.chunks:
            kind, seconds = IdleTimeout, self._config.idle_timeout_seconds
            if seconds is not None:
                since = self._pool.now()

        deadline = min(job.deadline, self._end)
        job.total_counts = job.deadline <= self._end
        job.chunk_limit = None
        if seconds is not None and since + seconds < deadline:
            deadline = since + seconds
            job.total_counts = False
            job.chunk_limit = (kind, seconds)

        self._set_deadline(deadline)
        self._on_wait()

    async def _wait_for_reader(self) -> None:
        pool, job, slot = self._pool, self._job, self._job.slot
        assert slot is not None
        began = pool.now()
        job.total_counts = True
        job.chunk_limit = None
        self._set_deadline(job.deadline)
        self._on_wait()
        if slot.lender is None:
            await self._channel.wait_for_room()
        else:
            # The reader is itself an agent, and may run something else before it reads on: it needs back
            # the slot that it has lent, or both would wait for each other.
            outer, job.slot = slot.outer, None
            slot.release()
            await self._channel.wait_for_room()
            invocation = job.invocation
            slot = pool.acquire_nowait(invocation, outer)
            job.slot = slot or await pool.wait(pool.enqueue(invocation, outer))
            self._context.run(current_slot.set, job.slot)

        self._end += pool.now() - began

    def _set_deadline(self, deadline: float) -> None:
        if deadline != self._deadline:
            self._scope.deadline = self._deadline = deadline

    async def _close(self, iterator: AsyncIterator[Any]) -> Exception | None:
        """
        Close the agent's generator, if it has not ended.

        :return: what went wrong with that
        """
        aclose = getattr(iterator, "aclose", None)
        if aclose is None or getattr(iterator, "ag_frame", iterator) is None:
            return None

        error: Exception | None = None
        with anyio.CancelScope(deadline=self._pool.now() + CLOSE_SECONDS, shield=True) as scope:
            for _ in range(CLOSE_TRIES):
                try:
                    await call_in_context(self._context, aclose, (), _NOTHING, self._on_wait)
                except Exception as exc:
                    error = error or exc
                else:
                    break

        if scope.cancelled_caught:
            error = TimeoutError(f"the agent's generator took longer than {CLOSE_SECONDS:.10g}s to close")

        return error

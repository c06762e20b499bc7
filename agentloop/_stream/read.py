"""Batches whose results are read while they run."""

from __future__ import annotations

__all__ = ["BatchReader", "StreamBatch", "completion_batch"]

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar, cast

import anyio

from .._batch.batch import Batch
from .._batch.journaled import AnyJournal, Journaled
from .._errors import BatchStopped, LoopClosed
from .._events import ChunkEvent, ResultEvent
from .._invocation import Inputs
from .._limits.limiter import Limiter
from .._result import InvocationResult
from .._runtime.job import Job
from .._runtime.lifetime import Lifetime
from .._runtime.observer import new_id
from .._runtime.options import RunOptions
from .channel import Channel
from .reader import Reader
from .stream_attempt import StartSoon, carry

T = TypeVar("T")
ItemT = TypeVar("ItemT")


class ReadBatch(Batch[T], Generic[T, ItemT]):
    """A batch that sends items to a reader."""

    skips_remaining = False

    def __init__(self, inputs: Inputs[T], limiter: Limiter, options: RunOptions) -> None:
        super().__init__(inputs, limiter, options)
        self.channel: Channel[ItemT] = Channel(self._item_taken)
        self.scope = anyio.CancelScope()

    @property
    def call(self) -> object:
        return self

    @property
    def left_open(self) -> bool:
        """Whether an agent has left a scope open in the producing task; agents run in tasks of the batch."""
        return False

    def begin(self, start_soon: StartSoon) -> None:
        """Prepare to run."""

    def _item_taken(self, item: ItemT) -> None:
        if not isinstance(cast("object", item), ChunkEvent):
            # A result is the last item of its invocation.
            self._taken()

    def refuse(self, stopped: BatchStopped) -> None:
        """Skip everything."""
        self.wind_down(stopped, None)

    def end(self) -> None:
        """End the channel for the reader."""
        self.channel.close()

    def drop(self) -> None:
        """Drop the items that no reader will take any more."""
        self.channel.drop()
        # The traceback of an error refers to the reader's frame, which refers to this object.
        self.source.forget_error()

    def leave(self) -> None:
        """Cancel all."""
        reason = "the block that reads the results was left"
        self.ending.cancel(reason)
        self.scope.cancel(reason)
        self.channel.abandon()

    def on_block_left(self) -> None:
        """Start nothing new, and wait for the reader for a limited time."""
        self.stop("the loop was left", LoopClosed("the loop was left"))
        self.channel.limit_patience(
            lambda: self.cancel("the results were not read", LoopClosed("the loop was left"))
        )

    def cancel(self, reason: str, cause: BaseException | None) -> None:
        """Cancel running invocations; each started invocation still has its result."""
        super().cancel(reason, cause)
        self.channel.abandon()


class CompletionBatch(ReadBatch[T, InvocationResult[T]]):
    """A batch that sends its results to a reader."""

    def _deliver(self, job: Job[T], result: InvocationResult[T], now: float) -> None:
        del job, now  # the result names its invocation
        self.channel.send(result)


class JournaledCompletion(Journaled[T], CompletionBatch[T]):
    """A batch with a journal that sends its results to a reader."""

    def __init__(
        self,
        inputs: Inputs[T],
        limiter: Limiter,
        options: RunOptions,
        journal: AnyJournal,
        on_replay: Callable[[], object],
    ) -> None:
        super().__init__(inputs, limiter, options, journal, on_replay)
        # The rows of the entries that hold unread results.
        self._rows: dict[int, int] = {}

    def _hand_over(self, result: InvocationResult[T], row: int) -> None:
        self._rows[result.index] = row
        self.channel.send(result)

    def _item_taken(self, item: InvocationResult[T]) -> None:
        del self._rows[item.index]
        super()._item_taken(item)

    def drop(self) -> None:
        """Drop the unread results, and leave their entries to a later batch."""
        for result in self.channel.drop():
            self.recording.session.release(self._rows[result.index])

        super().drop()
        self.recording.forget_error()


def completion_batch(
    inputs: Inputs[T],
    limiter: Limiter,
    options: RunOptions,
    journal: AnyJournal | None,
    on_replay: Callable[[], object],
) -> CompletionBatch[T]:
    """Return a batch that sends its results to a reader, with a journal if there is one."""
    if journal is None:
        return CompletionBatch(inputs, limiter, options)

    return JournaledCompletion(inputs, limiter, options, journal, on_replay)


class StreamBatch(ReadBatch[None, ChunkEvent[T] | ResultEvent]):
    """
    A batch of streams that sends the chunks of all to a reader, and each result after its last chunk.

    A stream begins when there is room for its chunks.
    """

    def begin(self, start_soon: StartSoon) -> None:
        """Prepare to run."""
        run = partial(carry, self.channel, _chunk_event, start_soon)
        self.options = RunOptions(self.options.config, self.options.observer, run)

    def end(self) -> None:
        """End the channel for the reader."""
        super().end()
        # It refers to the task's owner, which refers to this object.
        self.options.run = None

    def stop(
        self,
        reason: str,
        cause: BaseException | None,
        hint: str = "",
        grace_seconds: float | None = None,
    ) -> None:
        super().stop(reason, cause, hint, grace_seconds)
        self.changed()

    def has_work(self) -> bool:
        # Skipping a job takes no room.
        if not super().has_work():
            return False

        has_room = self.ending.stopped is not None or self.channel.has_room(self.changed)
        if not has_room and self.by_key is not None:
            self.by_key.check_unused()

        return has_room

    @property
    def may_start(self) -> Callable[[], bool] | None:
        # Only an agent can need the slot of its own stream before it reads on.
        return None if self.outer is None else self._may_start

    def _may_start(self) -> bool:
        return self.channel.has_room(self.changed) and (self.crew.seeking > 0 or self.crew.can_activate)

    @property
    def next_job(self) -> Callable[[], Job[None] | None]:
        return lambda: self.source.next_job() if self.has_work() else None

    def _deliver(self, job: Job[None], result: InvocationResult[None], now: float) -> None:
        # With the same id and time as the event of the sink.
        self.channel.send(ResultEvent(job.invocation, result, job.id or new_id(), now))


def _chunk_event(job: Job[Any], chunk: T) -> ChunkEvent[T]:
    return ChunkEvent(job.invocation, chunk, job.index)


class BatchReader(Reader[ItemT, ReadBatch[Any, ItemT]]):
    """Reads the items of a batch."""

    _kind = "batch"
    _source = "the input"

    def __init__(self, verb: str, make: Callable[[], ReadBatch[Any, ItemT]], lifetime: Lifetime) -> None:
        super().__init__(make, lifetime)
        self._verb = verb
        self._usage = f"write `async with loop.{verb}(...) as results:` around `async for ... in results:`"

    def __repr__(self) -> str:
        return f"<{self._verb} {f'not entered: {self._usage}' if self._producer is None else 'entered'}>"

    def _error(self) -> BaseException | None:
        batch = self._entered()
        if batch.input_error is not None:
            return batch.input_error

        # A batch that was cut short must not look complete.
        return None if batch.stopped is None else batch.stopped.with_traceback(None)

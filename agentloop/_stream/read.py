"""A batch that is read while it runs."""

from __future__ import annotations

__all__ = ["BatchReader", "StreamBatch", "completing"]

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
    """A batch that hands items to a reader as they come."""

    skips_remaining = False

    def __init__(self, inputs: Inputs[T], limiter: Limiter, options: RunOptions) -> None:
        super().__init__(inputs, limiter, options)
        self.channel: Channel[ItemT] = Channel(self._item_taken)
        self.scope = anyio.CancelScope()

    @property
    def left_open(self) -> bool:
        """Whether an agent has left a scope open in the producing task; agents run in tasks of the batch."""
        return False

    def begin(self, start_soon: StartSoon) -> None:
        """Prepare to run."""

    def _item_taken(self, item: ItemT) -> None:
        if not isinstance(cast("object", item), ChunkEvent):
            # It is the last item of its invocation.
            self._taken()

    def refuse(self, stopped: BatchStopped) -> None:
        """Skip everything."""
        self.wind_down(stopped, None)

    def end(self) -> None:
        """Say that no item will come any more."""
        self.channel.close()

    def drop(self) -> None:
        """Drop the items that no reader will take any more."""
        self.channel.drop()
        # The traceback of an error refers to the reader's frame, which refers to this.
        self.source.forget_error()

    def leave(self) -> None:
        """Cancel all."""
        reason = "the block that reads the results was left"
        self.ending.cancel(reason)
        self.scope.cancel(reason)
        self.channel.abandon()

    def drain(self) -> None:
        """Start nothing new, and be patient with the reader for a limited time only."""
        self.stop("the loop was left", LoopClosed("the loop was left"))
        self.channel.limit_patience(lambda: self.cancel("nobody read", LoopClosed("the loop was left")))

    def cancel(self, reason: str, cause: BaseException | None) -> None:
        """Cancel what runs; each invocation that was started still has its result."""
        super().cancel(reason, cause)
        self.channel.abandon()


class CompletionBatch(ReadBatch[T, InvocationResult[T]]):
    """A batch that hands over its results."""

    def _deliver(self, job: Job[T], result: InvocationResult[T], now: float) -> None:
        del job, now  # the result says whose it is
        self.channel.send(result)


class JournaledCompletion(Journaled[T], CompletionBatch[T]):
    """A batch with a journal that hands over its results."""

    def __init__(
        self,
        inputs: Inputs[T],
        limiter: Limiter,
        options: RunOptions,
        journal: AnyJournal,
        on_replay: Callable[[], object],
    ) -> None:
        super().__init__(inputs, limiter, options, journal, on_replay)
        # Of the results that were not read: which entries hold them.
        self._rows: dict[int, int] = {}

    def _hand_over(self, result: InvocationResult[T], row: int) -> None:
        self._rows[result.index] = row
        self.channel.send(result)

    def _item_taken(self, item: InvocationResult[T]) -> None:
        del self._rows[item.index]
        super()._item_taken(item)

    def drop(self) -> None:
        """Drop the results that no reader will take any more, and leave their entries to a later batch."""
        for result in self.channel.drop():
            self.recording.session.release(self._rows[result.index])

        super().drop()
        self.recording.forget_error()


def completing(
    inputs: Inputs[T],
    limiter: Limiter,
    options: RunOptions,
    journal: AnyJournal | None,
    on_replay: Callable[[], object],
) -> CompletionBatch[T]:
    """Return a batch that hands over its results, with a journal if there is one."""
    if journal is None:
        return CompletionBatch(inputs, limiter, options)

    return JournaledCompletion(inputs, limiter, options, journal, on_replay)


class StreamBatch(ReadBatch[None, ChunkEvent[T] | ResultEvent]):
    """
    A batch of streams, which hands over the chunks of all, and each one's result after its last chunk.

    A stream begins when there is room for what it yields.
    """

    def begin(self, start_soon: StartSoon) -> None:
        """Prepare to run."""
        act = partial(carry, self.channel, _chunk_event, start_soon)
        self.options = RunOptions(self.options.config, self.options.observer, act)

    def end(self) -> None:
        """Say that no item will come any more."""
        super().end()
        # It refers to the task's owner, which refers to this.
        self.options.act = None

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
        # To give up what does not begin any more takes no room.
        if not super().has_work():
            return False

        return self.ending.stopped is not None or self.channel.has_room(self.changed)

    @property
    def next_job(self) -> Callable[[], Job[None] | None]:
        return lambda: self.source.next_job() if self.has_work() else None

    def _deliver(self, job: Job[None], result: InvocationResult[None], now: float) -> None:
        # The same as an event sink is given, if there is one.
        self.channel.send(ResultEvent(job.invocation, result, job.id or new_id(), now))


def _chunk_event(job: Job[Any], chunk: T) -> ChunkEvent[T]:
    return ChunkEvent(job.invocation, chunk, job.index)


class BatchReader(Reader[ItemT, ReadBatch[Any, ItemT]]):
    """Reads what a batch hands over."""

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

        # What is cut short must not look complete.
        return None if batch.stopped is None else batch.stopped.with_traceback(None)

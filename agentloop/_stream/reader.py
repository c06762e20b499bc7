"""The reader's side of a stream or a batch."""

from __future__ import annotations

__all__ = ["Reader"]

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import ClassVar, Generic, Self, TypeVar

import anyio

from .._limits.away import lend_to_call
from .._misuse import EnteredOnly
from .._runtime.lifetime import Lifetime
from .channel import Channel
from .producer import Background, Producer

ItemT = TypeVar("ItemT")
ProducerT = TypeVar("ProducerT", bound=Producer)


class Reader(EnteredOnly, Generic[ItemT, ProducerT]):
    """
    An async context manager that runs a producer, and an async iterable of its items inside the block.

    Subclasses provide the error to raise after the last item.
    """

    _kind: ClassVar[str]
    """The name in error messages of the object that is read."""
    _source: ClassVar[str]
    """The name in error messages of the source of the error after the last item."""

    def __init__(self, make: Callable[[], ProducerT], lifetime: Lifetime) -> None:
        self._make = make
        self._lifetime = lifetime
        self._producer: ProducerT | None = None
        self._background: Background | None = None

    async def __aenter__(self) -> Self:
        if self._producer is not None:
            raise RuntimeError(f"a {self._kind} can be read in one `async with` block only")

        stopped = self._lifetime.check()
        producer = self._make()
        if stopped is not None:
            producer.refuse(stopped)

        self._producer = producer
        self._background = Background(self._producer, self._lifetime)
        await self._background.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._background is not None
        await self._background.stop(exc)

    def __aiter__(self) -> AsyncIterator[ItemT]:
        self._entered()
        return self

    async def __anext__(self) -> ItemT:
        """
        Wait for an item. Being cancelled, also natively, loses none.

        :raises BaseException: after the last item: the exception that ended the producer, or the subclass's
            error
        """
        producer = self._entered()
        channel: Channel[ItemT] = producer.channel
        try:
            outer = producer.outer
            if outer is not None and channel.is_empty:
                # The agent goes on when it has a slot; only then is the item taken.
                await lend_to_call(producer.call, outer, channel.wait_for_item)

            return await channel.receive()
        except anyio.EndOfStream:
            pass

        assert self._background is not None
        self._background.raise_failure()
        error = self._error()
        try:
            if isinstance(error, StopAsyncIteration):
                raise RuntimeError(f"{self._source} raised StopAsyncIteration") from error

            raise StopAsyncIteration if error is None else error
        finally:
            # The traceback refers to this frame, so the frame must not lead back to the error.
            del error, channel, producer, self

    @abstractmethod
    def _error(self) -> BaseException | None:
        """Return the error to raise after the last item, with the traceback to start from."""

    def _entered(self) -> ProducerT:
        if self._producer is None:
            raise RuntimeError(self._usage)

        return self._producer

"""The task of a batch that pulls an async input."""

from __future__ import annotations

__all__ = ["CANCELLED", "Fed", "Feeder"]

from collections.abc import AsyncGenerator, AsyncIterable, Callable
from typing import Any, Generic, Protocol, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._eventloop.loop import EventLoop
from .._invocation import Input
from .._runtime.outcome import as_exception

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

# How long an input that is an async generator may take to close, in seconds.
CLOSE_SECONDS = 5.0
CANCELLED = "the input was cancelled from within"


class Fed(Protocol[T_contra]):
    """The receiver of the items: an :class:`InputSource`."""

    @property
    def has_ready(self) -> bool: ...
    def may_pull(self) -> bool: ...
    def feed(self, item: Input[T_contra]) -> None: ...
    def exhaust(self, error: Exception | None = None, cut_short: bool = False) -> None: ...


class Feeder(Generic[T]):
    """
    Pulls an async input in one task, since a generator may hold scopes open that belong to the task that
    advances it. It pulls when no item that it pulled waits for a worker, and there is room for more.

    :param stream: the input
    :param loop: the event loop
    """

    def __init__(self, stream: AsyncIterable[Input[T]], loop: EventLoop) -> None:
        self._stream = stream
        self._loop = loop
        self._scope = anyio.CancelScope()
        self._room: anyio.Event | None = None

    def cancel(self) -> None:
        """Pull no more, and close the input."""
        self._scope.cancel()

    def wake(self, source: Fed[T]) -> None:
        """Let the feeder check again whether there is room."""
        if self._room is not None and source.may_pull():
            self._room.set()
            self._room = None

    async def run(self, source: Fed[T], on_item: Callable[[], object]) -> None:
        """
        Pull the input to its end.

        :param on_item: called for each item, and at the end
        """
        self._room = None
        error: Exception | None = None
        with self._scope:
            iterator, ended = aiter(self._stream), False
            try:
                while True:
                    await self._wait_for_room(source)
                    source.feed(await anext(iterator))
                    on_item()
            except StopAsyncIteration:
                ended = True
            except Exception as exc:
                await checkpoint_if_cancelled()
                error, ended = exc, True
            except anyio.get_cancelled_exc_class() as exc:
                await checkpoint_if_cancelled()
                # A stray cancellation ends the input, but the input was truncated, so it counts as an error.
                error, ended = as_exception(exc, CANCELLED), True
            finally:
                # Cancelled by cancel(), or with all tasks of the batch.
                source.exhaust(error, cut_short=not ended)
                # Its traceback refers to this frame; the frame must not refer back.
                error = None
                if isinstance(iterator, AsyncGenerator):
                    await self._close(source, cast("AsyncGenerator[Any]", iterator))

        on_item()

    async def _wait_for_room(self, source: Fed[T]) -> None:
        # Once the input counts as exhausted, there is no room, and this task is about to be cancelled.
        while source.has_ready or not source.may_pull():
            self._room = anyio.Event()
            try:
                await self._room.wait()
            except anyio.get_cancelled_exc_class():
                # A native cancellation of this task is no error of the input.
                await checkpoint_if_cancelled()
                await self._loop.forget_cancellations()

    async def _close(self, source: Fed[T], iterator: AsyncGenerator[Any]) -> None:
        deadline = self._loop.now() + CLOSE_SECONDS
        with anyio.CancelScope(deadline=deadline, shield=True) as scope:
            try:
                await iterator.aclose()
            except Exception as exc:
                source.exhaust(exc)
            except anyio.get_cancelled_exc_class():
                if scope.cancel_called:
                    raise

                await self._loop.forget_cancellations()

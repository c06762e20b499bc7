"""A task that produces what another one reads."""

from __future__ import annotations

__all__ = ["Background", "Producer"]

from collections.abc import Coroutine
from typing import Any, Protocol

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._errors import InvocationCancelled
from .._eventloop.tasks import LOST, Tasks
from .._limits.slots import current_slot
from .._runtime.lifetime import Call, Lifetime
from .channel import Channel
from .stream_attempt import StartSoon


class Producer(Call, Protocol):
    """What produces."""

    @property
    def channel(self) -> Channel[Any]:
        """Where the items are."""
        ...

    @property
    def scope(self) -> anyio.CancelScope:
        """What :meth:`leave` and :meth:`cancel` cancel."""
        ...

    def begin(self, start_soon: StartSoon) -> None:
        """
        Prepare to run.

        :param start_soon: starts a task beside the one that produces, which must not raise
        """

    def run(self) -> Coroutine[Any, Any, object]:
        """
        Return what produces everything. When it returns or raises, nothing of it is left that will not end by
        itself.
        """
        ...

    def end(self) -> None:
        """Tell the reader that nothing comes any more, and keep nothing that was for running."""

    def leave(self) -> None:
        """Cancel what runs, since its reader has left."""

    def drop(self) -> None:
        """Drop what was not read."""

    @property
    def left_open(self) -> bool:
        """Whether an agent has left a cancel scope or a task group open in the task that produces."""
        ...


class Background:
    """
    Runs a producer beside the task that reads.

    The producer's task belongs to the loop where that has been entered, so that the reader's task then enters
    no scope; otherwise to a task group that the reader's block opens.
    """

    name = "agentloop producer"

    def __init__(self, producer: Producer, lifetime: Lifetime) -> None:
        self.scope = producer.scope
        """What cancels the producer."""
        self.run = producer.run
        """Runs the producer."""
        self._producer = producer
        self._lifetime = lifetime
        self._reader_slot = current_slot.get()
        # The reader's task group, if it has opened one.
        self._own: Tasks | None = None
        self._tasks: Tasks | None = None
        self._ended = anyio.Event()
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """
        Start the task.

        :raises InvocationCancelled: if the task belongs to the loop, and was cancelled before it began
        """
        tasks = self._lifetime.tasks
        if tasks is None:
            tasks = Tasks()
            await tasks.__aenter__()
            self._own = tasks
        else:
            self._lifetime.begin(self)

        self._tasks = tasks
        self._producer.begin(tasks.start_soon)
        tasks.start_once(self)
        if self._own is not None:
            return

        # The end of a task of the loop cancels the loop's block, but not a reader in another task.
        try:
            if await tasks.wait_begun(self):
                raise InvocationCancelled(LOST)
        except BaseException as exc:
            await self.stop(exc)
            raise

    async def stop(self, exc: BaseException | None) -> None:
        """
        Cancel the producer and wait for its end, also if this is cancelled meanwhile.

        :param exc: what the reader's block is left by
        :raises BaseException: what ended the producer, unless it is an ``Exception``
        :raises InvocationCancelled: if the reader was cancelled because one of the tasks was, natively
        """
        self._producer.leave()
        lost = False
        try:
            if self._own is not None:
                lost = await self._own.leave(exc)
            else:
                await self._wait_ended()
        finally:
            self._producer.drop()
            if self._failure is not exc:
                self.raise_failure()

        if lost:
            raise InvocationCancelled(LOST) from exc

    async def _wait_ended(self) -> None:
        """Wait for the end of a task of the loop, also if this is cancelled: as a task group does."""
        cancelled: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not self._ended.is_set():
                try:
                    await self._ended.wait()
                except anyio.get_cancelled_exc_class() as native:
                    cancelled = native

        if cancelled is not None:
            raise cancelled

        await checkpoint_if_cancelled()

    def raise_failure(self) -> None:
        """Raise what ended the producer, such as a ``KeyboardInterrupt`` from an agent."""
        if self._failure is not None:
            self._lifetime.failure = None
            try:
                raise self._failure
            finally:
                # The traceback refers to this frame; the frame must not refer back.
                del self

    def drain(self) -> None:
        """Begin nothing new, since nobody might be reading; but an agent that runs is waited for anyway."""
        if self._reader_slot is None or self._reader_slot.is_released:
            self._producer.drain()

    def cancel(self, reason: str, cause: BaseException) -> None:
        """Cancel what runs; each invocation that was started still has its result."""
        self._producer.cancel(reason, cause)

    def lost(self) -> None:
        """Cancel the producer, whose task was cancelled before it began."""
        self._producer.leave()

    def failed(self, exc: BaseException) -> None:
        """Keep what ended the producer for the reader, or else for the one that leaves the loop."""
        # A scope around the one that was left open cannot be left, and says so.
        if self._producer.left_open and isinstance(exc, RuntimeError):
            return

        self._failure = exc
        if self._own is not None:
            # The reader may wait for something else; leaving the block raises the failure.
            self._own.cancel()
        else:
            self._lifetime.failure = exc

    def ended(self) -> None:
        """Tell the reader that the producer has ended."""
        if self._producer.left_open:
            assert self._tasks is not None
            self._tasks.spoil()

        self._producer.end()
        self._ended.set()
        if self._own is None:
            self._lifetime.end(self)

"""A task that produces items for a reader in another task."""

from __future__ import annotations

__all__ = ["Background", "Producer"]

from collections.abc import Coroutine
from typing import Any, Protocol

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._errors import BatchStopped, InvocationCancelled
from .._eventloop.loop import kind_of_loop
from .._eventloop.tasks import LOST, Tasks
from .._limits.slots import Slot, current_slot
from .._runtime.lifetime import Call, Lifetime
from .channel import Channel
from .stream_attempt import StartSoon

NAME = "agentloop producer"


class Producer(Call, Protocol):
    """The source of the items: a stream or a batch."""

    @property
    def channel(self) -> Channel[Any]:
        """The buffer of the items."""
        ...

    @property
    def call(self) -> object:
        """The call that is read."""
        ...

    @property
    def scope(self) -> anyio.CancelScope:
        """The scope that :meth:`leave` and :meth:`cancel` cancel."""
        ...

    def begin(self, start_soon: StartSoon) -> None:
        """
        Prepare to run.

        :param start_soon: starts a task beside the producing one; the task must not raise
        :raises BaseException: an exception of a user's function that is no ``Exception``; then nothing is run
        """

    def run(self) -> Coroutine[Any, Any, object]:
        """
        Return the coroutine that produces all items. When it returns or raises, every task that it leaves
        ends by itself.
        """
        ...

    def end(self) -> None:
        """End the channel for the reader, and drop all references that only running needs."""

    def refuse(self, stopped: BatchStopped) -> None:
        """
        Start nothing, since the loop has been drained.

        :raises BatchStopped: ``stopped``, if the reader would get no item
        """

    def leave(self) -> None:
        """Cancel running invocations, since the reader has left."""

    def drop(self) -> None:
        """Drop the unread items."""

    @property
    def left_open(self) -> bool:
        """Whether an agent has left a cancel scope or a task group open in the producing task."""
        ...


class Background:
    """
    Runs a producer beside the reader's task.

    If the loop has been entered, the producer's task belongs to the loop, and the reader's task enters no
    scope. Otherwise the reader's block opens a task group for it.
    """

    def __init__(self, producer: Producer, lifetime: Lifetime) -> None:
        self._producer = producer
        self._lifetime = lifetime
        self._kind = kind_of_loop()
        self._reader_slot = current_slot.get()
        # The tasks of the loop, or else a task group that the reader opens.
        self._tasks = lifetime.tasks or Tasks()
        self._is_loops = lifetime.tasks is not None
        self._begun = False
        self._ended = anyio.Event()
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """
        Start the task.

        :raises BaseException: an exception of the producer's ``begin()``
        :raises InvocationCancelled: if the task belongs to the loop, and was cancelled before it began
        """
        self._lifetime.begin(self)
        try:
            self._producer.begin(self._tasks.start_soon)
        except BaseException:
            self._lifetime.end(self)
            raise

        if not self._is_loops:
            await self._tasks.__aenter__()

        self._task = self._run()
        self._tasks.start_once(self._task, NAME)
        if not self._is_loops:
            return

        # The end of a loop's task cancels the loop's block, but not a reader in another task.
        try:
            if await self._was_lost():
                raise InvocationCancelled(LOST)
        except BaseException as exc:
            await self.stop(exc)
            raise

    async def stop(self, exc: BaseException | None) -> None:
        """
        Cancel the producer and wait for its end, also if this is cancelled meanwhile.

        :param exc: the exception that leaves the reader's block
        :raises BaseException: the exception that ended the producer, unless it is an ``Exception``
        :raises InvocationCancelled: if the reader was cancelled by a native cancellation of one of the tasks
        """
        self._producer.leave()
        lost = False
        try:
            if self._is_loops:
                await self._wait_ended()
            else:
                try:
                    await self._was_lost()
                except anyio.get_cancelled_exc_class() as native:
                    exc = native

                lost = await self._tasks.leave(exc)
        finally:
            self._producer.drop()
            if self._failure is not exc:
                self.raise_failure()

        if lost:
            raise InvocationCancelled(LOST) from exc

    async def _wait_ended(self) -> None:
        """Wait for the end of the loop's task, also if this is cancelled, as a task group does."""
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
        """Raise the exception that ended the producer, such as a ``KeyboardInterrupt`` of an agent."""
        if self._failure is not None:
            self._lifetime.failure = None
            try:
                raise self._failure
            finally:
                # The traceback refers to this frame; the frame must not refer back.
                del self

    def on_block_left(self) -> None:
        """Start nothing new, since there may be no reader; running agents finish."""
        if self._reader_slot is None or self._reader_slot.is_released:
            self._producer.on_block_left()

    @property
    def outer(self) -> Slot | None:
        """The slot of the reading invocation; ``None`` outside of an agent."""
        return self._producer.outer

    def wind_down(self, stopped: BatchStopped, until: float | None) -> None:
        """Start and retry nothing any more, and cancel running invocations at a given time."""
        self._producer.wind_down(stopped, until)

    def cancel(self, reason: str, cause: BaseException) -> None:
        """Cancel running invocations; each started invocation still has its result."""
        self._producer.cancel(reason, cause)

    async def _was_lost(self) -> bool:
        """
        Wait until the producer's task has begun, and return whether the first one was lost.

        On asyncio a task that is cancelled natively before its first step never runs, and AnyIO cancels its
        group. Then the producer is cancelled and given to another task, which ends it.
        """
        cancelled: BaseException | None = None
        lost = False
        while not self._begun and self._kind.loses_tasks:
            cancelled = await self._kind.let_tasks_begin() or cancelled
            if not self._begun:
                lost = True
                self._producer.leave()
                self._tasks.start_once(self._task, NAME)

        try:
            if cancelled is not None:
                raise cancelled
        finally:
            # Its traceback refers to this frame; the frame must not refer back.
            del cancelled

        return lost

    async def _run(self) -> None:
        self._begun = True
        cancellations = self._kind.count_cancellations()
        with self._tasks.running():
            try:
                with self._producer.scope:
                    await self._producer.run()

                if cancellations():
                    await self._kind.forget_cancellations()
            except anyio.get_cancelled_exc_class():
                # A late cancellation that an agent requested from a callback ends only this task.
                await checkpoint_if_cancelled()
                await self._kind.forget_cancellations()
            except BaseException as exc:
                # Leaving a scope around the open one raises this RuntimeError.
                if not self._producer.left_open or not isinstance(exc, RuntimeError):
                    self._fail(exc)
            finally:
                if self._producer.left_open:
                    self._tasks.spoil()

                self._producer.end()
                self._ended.set()
                self._lifetime.end(self)

        await self._tasks.park()

    def _fail(self, exc: BaseException) -> None:
        self._failure = exc
        if self._is_loops:
            self._lifetime.failure = exc
        else:
            # The reader may be waiting elsewhere; leaving the block raises the failure.
            self._tasks.cancel()

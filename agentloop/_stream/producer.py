"""A task that produces what another one reads."""

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
        :raises BaseException: what a user's function raised that is no error; then nothing is left to run
        """

    def run(self) -> Coroutine[Any, Any, object]:
        """
        Return what produces everything. When it returns or raises, nothing of it is left that will not end by
        itself.
        """
        ...

    def end(self) -> None:
        """Tell the reader that nothing comes any more, and keep nothing that was for running."""

    def refuse(self, stopped: BatchStopped) -> None:
        """
        Begin nothing, since the loop has been drained.

        :raises BatchStopped: ``stopped``, if there would be nothing to read at all
        """

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

    def __init__(self, producer: Producer, lifetime: Lifetime) -> None:
        self._producer = producer
        self._lifetime = lifetime
        self._kind = kind_of_loop()
        self._reader_slot = current_slot.get()
        # Those of the loop, or else a task group that the reader has opened.
        self._tasks = lifetime.tasks or Tasks()
        self._is_loops = lifetime.tasks is not None
        self._begun = False
        self._ended = anyio.Event()
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """
        Start the task.

        :raises BaseException: what the producer's preparation raised
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

        # The end of a task of the loop cancels the loop's block, but not a reader in another task.
        try:
            if await self._was_lost():
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

    @property
    def outer(self) -> Slot | None:
        """The slot of the invocation that reads, if one does."""
        return self._producer.outer

    def wind_down(self, stopped: BatchStopped, until: float | None) -> None:
        """Start and retry nothing any more, and cancel at a time what still runs."""
        self._producer.wind_down(stopped, until)

    def cancel(self, reason: str, cause: BaseException) -> None:
        """Cancel what runs; each invocation that was started still has its result."""
        self._producer.cancel(reason, cause)

    async def _was_lost(self) -> bool:
        """
        Wait until the task has begun, and return whether it was another one at first.

        On asyncio a task that is cancelled natively before its first step never runs, and AnyIO cancels its
        group. So that the producer comes to its end all the same, it is cancelled and given to another task.
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
                # One that an agent asked for, from a callback that came late, ends nothing but this task.
                await checkpoint_if_cancelled()
                await self._kind.forget_cancellations()
            except BaseException as exc:
                # A scope around the one that was left open cannot be left, and says so.
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
            # The reader may wait for something else; leaving the block raises the failure.
            self._tasks.cancel()

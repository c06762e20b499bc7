"""A task that produces what another one reads."""

from __future__ import annotations

__all__ = ["Background", "Producer"]

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._errors import InvocationCancelled
from .._eventloop.loop import kind_of_loop
from .._eventloop.tasks import LOST, Tasks
from .._limits.slots import current_slot
from .channel import Channel
from .lifetime import Call, Lifetime
from .stream_attempt import StartSoon


class Producer(Call, Protocol):
    """What produces."""

    @property
    def channel(self) -> Channel[Any]:
        """Where the items are."""
        ...

    async def produce(self, start_soon: StartSoon) -> None:
        """
        Produce everything. When it returns or raises, nothing of it is left that will not end by itself.

        :param start_soon: starts a task beside this one, which must not raise
        """

    def taken(self, item: Any) -> None:
        """Take notice that the reader has an item."""

    def end(self) -> None:
        """Tell the reader that nothing comes any more."""

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
        self._tasks: Tasks | None = None
        self._begun = False
        self._ended = anyio.Event()
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """
        Start the task.

        :raises InvocationCancelled: if the task belongs to the loop, and was cancelled before it began
        """
        if not self._lifetime.is_open:
            tasks = Tasks()
            await tasks.__aenter__()
            self._tasks = tasks
            self._start_soon(self._run, "agentloop producer")
            return

        self._lifetime.begin(self)
        self._start_soon(self._run, "agentloop producer")
        # The end of a task of the loop cancels the loop's block, but not a reader in another task.
        try:
            await self._kind.let_tasks_begin()
            if not self._begun and self._kind.loses_tasks:
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
        lost: bool | None = False
        try:
            if self._tasks is None:
                # As in a task group: also a cancelled reader waits until nothing of it is left.
                cancelled: BaseException | None = None
                with anyio.CancelScope(shield=True):
                    while not self._ended.is_set():
                        try:
                            if self._begun or not self._kind.loses_tasks:
                                await self._ended.wait()
                            else:
                                await self._end_early()
                        except anyio.get_cancelled_exc_class() as native:
                            cancelled = native

                if cancelled is not None:
                    raise cancelled

                await checkpoint_if_cancelled()
            elif isinstance(exc, anyio.get_cancelled_exc_class()):
                lost = await self._tasks.__aexit__(type(exc), exc, exc.__traceback__)
            else:
                # The tasks raise nothing, so what left the body goes on as the object that it is.
                await self._tasks.__aexit__(None, None, None)
        finally:
            if not self._ended.is_set():
                # All tasks of the group have ended, and this one never began.
                await self._end_early()

            self._producer.drop()
            if self._failure is not exc:
                self.raise_failure()

        if lost:
            raise InvocationCancelled(LOST) from exc

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

    def _start_soon(self, task: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        if self._tasks is None:
            self._lifetime.start_soon(task, name)
        else:
            self._tasks.start_soon(task, name)

    async def _run(self) -> None:
        self._begun = True
        cancellations = self._kind.count_cancellations()
        try:
            await self._producer.produce(self._start_soon)
            if cancellations():
                await self._kind.forget_cancellations()
        except anyio.get_cancelled_exc_class():
            # One that an agent asked for, from a callback that came late, ends this task and nothing else.
            await checkpoint_if_cancelled()
            await self._kind.forget_cancellations()
        except BaseException as exc:
            # A scope around the one that was left open cannot be left, and says so.
            if not self._producer.left_open or not isinstance(exc, RuntimeError):
                self._fail(exc)
        finally:
            if self._producer.left_open:
                (self._tasks or self._lifetime).spoil()

            self._end()

    async def _end_early(self) -> None:
        """Let each invocation have its result, in place of a task that was cancelled before it began."""
        try:
            # It has been left, so nothing starts.
            await self._producer.produce(self._start_soon)
        finally:
            self._end()

    def _end(self) -> None:
        self._producer.end()
        self._ended.set()
        if self._tasks is None:
            self._lifetime.end(self)

    def _fail(self, exc: BaseException) -> None:
        self._failure = exc
        if self._tasks is not None:
            # The reader may wait for something else; leaving the block raises the failure.
            self._tasks.cancel()
        else:
            self._lifetime.failure = exc

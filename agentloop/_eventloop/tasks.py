"""The library's own tasks, which survive native cancellations and open scopes."""

from __future__ import annotations

__all__ = ["LOST", "Tasks"]

from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from .callers import CallersCancellation
from .loop import kind_of_loop

# How long the tasks in a task group that an agent left open may take to end, in seconds.
CLOSE_SECONDS = 5.0
# The reason for the end of a batch or a stream whose task was cancelled natively before it could begin.
LOST = "one of its own tasks was cancelled from outside"


class Tasks:
    """
    A task group of tasks that run the code of users.

    A task that is cancelled natively (asyncio's ``Task.cancel()``), and by no scope around it, calls its
    function again: an agent may cancel all tasks that it does not know. The first exception of a task cancels
    the others, and is kept in :attr:`failure`.

    An agent that leaves a cancel scope or a task group open in a task spoils it: AnyIO and trio raise an
    error when the task ends, which would cancel the others. So a spoilt task parks until the block was left
    and all other tasks have ended, and that error is dropped.

    :param context: the context that each task starts with a copy of; by default the current one
    """

    def __init__(self, context: Context | None = None) -> None:
        self._context = context
        self._kind = kind_of_loop()
        self._group = anyio.create_task_group()
        self._cancellations: Callable[[], int] = int
        self._cancelled_before = 0
        # How many tasks have begun and not ended, without the spoilt ones.
        self._running = 0
        # How many tasks were started.
        self._started = 0
        self._spoilt: set[int] = set()
        self._left = False
        self._changed: anyio.Event | None = None
        self.failure: BaseException | None = None
        """The first exception of a task."""

    async def __aenter__(self) -> Self:
        self._cancellations = self._kind.count_cancellations()
        self._cancelled_before = self._cancellations()
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._left = True
        self._notify()
        before = self._kind.callers_cancellations()
        caller = None if before is None else CallersCancellation(before)
        try:
            leaving = self._group.__aexit__(exc_type, exc, traceback)
            return await (leaving if caller is None else caller.watch(leaving))
        except BaseExceptionGroup as group:
            # The tasks raise nothing of their own, so each RuntimeError comes from the end of a spoilt task.
            await checkpoint_if_cancelled()
            rest = group.split(RuntimeError)[1]
            if rest is not None:
                raise rest from None
        finally:
            was_native = caller is not None and caller.take() is not None

        # AnyIO drops a native cancellation of this task if there are errors to raise, and may take it back.
        if was_native or self._cancellations() > self._cancelled_before:
            raise anyio.get_cancelled_exc_class()

        return None

    async def leave(self, exc: BaseException | None) -> bool:
        """
        Wait for the tasks at the end of the block. This raises no exception that left the block: the caller
        raises the same object itself.

        :param exc: the exception that left the block
        :return: whether a native cancellation of one of the tasks has cancelled the block
        """
        if isinstance(exc, anyio.get_cancelled_exc_class()):
            # AnyIO may take a native cancellation of the caller's for its own, and suppress it, if it came in
            # the same step as the cancellation of a scope in the block.
            was_cancelled = self._group.cancel_scope.cancel_called
            return bool(await self.__aexit__(type(exc), exc, exc.__traceback__)) and was_cancelled

        await self.__aexit__(None, None, None)
        return False

    def cancel(self) -> None:
        """Cancel all tasks."""
        self._group.cancel_scope.cancel()

    def start_soon(self, task: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Start a task."""
        self._started += 1
        self._in_context(lambda: self._group.start_soon(self._run, task, name=name))

    def start_once(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task for a coroutine that counts itself as :meth:`running`, and parks."""
        self._started += 1
        self._in_context(lambda: self._group.create_task(coroutine, name=name))

    def _in_context(self, start: Callable[[], object]) -> None:
        if self._context is None:
            start()
        else:
            # A copy: an eager task factory calls the task at once, which may start others.
            self._context.copy().run(start)

    @contextmanager
    def running(self) -> Generator[None]:
        """Count the current task as running, during the block."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._notify()

    def spoil(self) -> None:
        """Note that an agent left a scope open in the current task, whose function is about to end."""
        self._spoilt.add(anyio.get_current_task().id)

    def enter(self) -> None:
        """Count the current task as :meth:`running`, until :meth:`leave_by`."""
        self._running += 1

    async def leave_by(self, exc: BaseException | None) -> bool:
        """
        Count the current task as ended, and park.

        :param exc: the exception that ended it; kept in :attr:`failure`, unless it is a cancellation
        :return: whether to suppress the exception
        """
        cancelled = exc is not None and issubclass(type(exc), anyio.get_cancelled_exc_class())
        spoilt = self._is_spoilt()
        # Leaving a scope around the open one raises a RuntimeError.
        if exc is not None and not cancelled and not (spoilt and isinstance(exc, RuntimeError)):
            self.failure = self.failure or exc
            self.cancel()

        self._running -= 1
        self._notify()
        if cancelled and not spoilt:
            return False

        await self.park()
        return True

    async def go_on(self) -> None:
        """Go on in a task that was cancelled, unless a scope around it was cancelled."""
        await checkpoint_if_cancelled()
        await self._kind.forget_cancellations()

    async def _run(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.enter()
        try:
            while True:
                try:
                    await task()
                    break
                except anyio.get_cancelled_exc_class():
                    await self.go_on()
        except BaseException as exc:
            if not await self.leave_by(exc):
                raise
        else:
            await self.leave_by(None)

    def _is_spoilt(self) -> bool:
        return bool(self._spoilt) and anyio.get_current_task().id in self._spoilt

    def _notify(self) -> None:
        if self._changed is not None and self._left and not self._running:
            self._changed.set()
            self._changed = None

    async def park(self) -> None:
        """Wait until the block was left and all other tasks have ended, if the current task is spoilt."""
        if not self._is_spoilt():
            return

        # The agent's open scope may have been cancelled, or may be at any time.
        with anyio.CancelScope(shield=True):
            while True:
                try:
                    # A task that was just started begins during the checkpoint.
                    started = self._started
                    await checkpoint()
                    await checkpoint()
                    if self._started > started:
                        continue

                    if self._left and not self._running:
                        break

                    if self._changed is None:
                        self._changed = anyio.Event()

                    await self._changed.wait()
                except anyio.get_cancelled_exc_class():
                    await self._kind.forget_cancellations()

        # The scope around the agent was cancelled, and so were the tasks in a task group that it left open.
        me = anyio.get_current_task().id
        until = anyio.current_time() + CLOSE_SECONDS
        with anyio.CancelScope(shield=True):
            # There is no event for the end of these tasks.
            while anyio.current_time() < until and any(
                task.parent_id == me for task in anyio.get_running_tasks()
            ):
                try:
                    await anyio.sleep(0.01)
                except anyio.get_cancelled_exc_class():
                    await self._kind.forget_cancellations()

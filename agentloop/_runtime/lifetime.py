"""The lifetime that ``async with loop:`` gives a loop."""

from __future__ import annotations

__all__ = ["Call", "Lifetime"]

from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

import anyio

from .._errors import InvocationCancelled, LoopClosed
from .._eventloop.tasks import LOST, Tasks
from .._limits.limiter import Limiter, pool_of
from .._limits.slots import current_slot


class Call(Protocol):
    """Something in progress that a loop waits for, or ends, when it is left."""

    def drain(self) -> None:
        """Begin nothing new that nobody waits for; go on with what runs."""

    def cancel(self, reason: str, cause: BaseException) -> None:
        """Cancel what runs."""


class Lifetime:
    """
    Keeps account of the calls in progress, and owns the tasks whose readers may live elsewhere.

    A loop that was never entered has no lifetime: then nothing is kept account of, and nothing refused.

    :param limiter: the limiter whose running invocations may still make calls while the loop is being left
    """

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self.tasks: Tasks | None = None
        """The tasks that belong to the loop, while it is open."""
        self._task_id = 0
        self.is_left = False
        """Whether the block has been left."""
        self._calls: dict[Call, None] = {}
        self._idle: anyio.Event | None = None
        self.failure: BaseException | None = None
        """What ended a batch, such as an agent's ``KeyboardInterrupt``, until its reader has raised it."""

    def check(self) -> None:
        """
        Refuse new work once the block has been left.

        :raises LoopClosed: unless the work is that of an invocation which is still running
        """
        if self.is_left and not pool_of(self._limiter).encloses(current_slot.get()):
            raise LoopClosed(
                "this loop's `async with` block has been left, so it takes no new work: "
                "call it inside the block, or enter the loop again"
            )

    @contextmanager
    def call(self, call: Call) -> Generator[None]:
        """Count a call as in progress within the block."""
        self.begin(call)
        try:
            yield
        finally:
            self.end(call)

    def begin(self, call: Call) -> None:
        """Count a call as in progress."""
        self._calls[call] = None

    def end(self, call: Call) -> None:
        """Count a call as ended."""
        del self._calls[call]
        if not self._calls and self._idle is not None:
            self._idle.set()

    async def enter(self) -> None:
        """
        Begin.

        :raises RuntimeError: if it has begun already
        """
        if self.tasks is not None:
            raise RuntimeError("this loop has been entered already: one `async with` at a time")

        tasks = Tasks()
        await tasks.__aenter__()
        self.tasks = tasks
        self._task_id = anyio.get_current_task().id
        self.is_left = False

    async def leave(self, exc: BaseException | None) -> None:
        """
        Wait for what runs; cancel it if the block was left by an exception, or is cancelled meanwhile.

        :raises RuntimeError: if another task entered
        :raises InvocationCancelled: if the block was cancelled because a task of the loop was, natively
        """
        tasks = self.tasks
        assert tasks is not None
        if anyio.get_current_task().id != self._task_id:
            raise RuntimeError("a loop must be left by the task that entered it")

        self.is_left = True
        lost = False
        try:
            if exc is not None:
                self._cancel(exc)

            for call in tuple(self._calls):
                call.drain()

            await self._wait_idle()
        except BaseException as cancelled:
            self._cancel(cancelled)
            with anyio.CancelScope(shield=True):
                await self._wait_idle()

            exc = cancelled
            raise
        finally:
            self.tasks = None
            lost = await tasks.leave(exc)
            failure, self.failure = self.failure, None
            if failure is not None and failure is not exc:
                raise failure

            if lost:
                raise InvocationCancelled(LOST) from exc

    def _cancel(self, cause: BaseException) -> None:
        cancelled = isinstance(cause, anyio.get_cancelled_exc_class())
        reason = "the loop was cancelled" if cancelled else f"the loop was left by {type(cause).__name__}"
        for call in tuple(self._calls):
            call.cancel(reason, cause)

    async def _wait_idle(self) -> None:
        while self._calls:
            self._idle = anyio.Event()
            await self._idle.wait()

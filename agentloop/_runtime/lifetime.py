"""The lifetime that ``async with loop:`` gives a loop."""

from __future__ import annotations

__all__ = ["Call", "Lifetime"]

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

import anyio

from .. import _validators as must
from .._errors import BatchStopped, InvocationCancelled, LoopClosed
from .._eventloop.tasks import LOST, Tasks
from .._limits.limiter import Limiter, own_pool, pool_of
from .._limits.slots import Slot, current_slot
from .._result import Status


class Call(Protocol):
    """A call in progress. A loop waits for it, or ends it, when the loop's block is left."""

    @property
    def outer(self) -> Slot | None:
        """The slot of the invocation that made the call; ``None`` outside of an agent."""
        ...

    def on_block_left(self) -> None:
        """The loop's block is left: start no invocation that no caller waits for; let running ones finish."""

    def wind_down(self, stopped: BatchStopped, until: float | None) -> None:
        """Start and retry nothing any more, and cancel running invocations at a given time."""

    def cancel(self, reason: str, cause: BaseException) -> None:
        """Cancel running invocations."""


class Lifetime:
    """
    Tracks the calls in progress, and owns the tasks of streams whose readers may be other tasks.

    A loop that was never entered does not wait for calls and does not refuse any. It can be drained.

    :param limiter: the loop's limiter; its running invocations may make calls while the block is being left
    """

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self.tasks: Tasks | None = None
        """The tasks that belong to the loop, while it is open."""
        self._task_id = 0
        self.is_left: bool = False
        """Whether the block has been left."""
        self._calls: dict[Call, None] = {}
        self.outside: dict[Call, None] = {}
        """The calls in progress that were made outside of the block."""
        self.drained: BatchStopped | None = None
        """Why the loop was drained; ``None`` if it was not."""
        self.replayed: int = 0
        """How many results came out of a journal."""
        self.nested: Counter[Status] = Counter()
        """How many nested invocations have ended, by status."""
        self._idle: anyio.Event | None = None
        self.failure: BaseException | None = None
        """An exception that ended a batch, such as ``KeyboardInterrupt``, until its reader has raised it."""

    def count_replayed(self) -> None:
        """Count a result that came out of a journal."""
        self.replayed += 1

    @property
    def refuses(self) -> bool:
        """Whether new work is refused, except from running invocations."""
        return self.is_left or self.drained is not None

    def check(self) -> BatchStopped | None:
        """
        Refuse new work once the block has been left or the loop was drained, except from running invocations.

        :return: the reason if the work must be skipped, else ``None``
        :raises LoopClosed: if the block has been left
        """
        if not self.refuses or pool_of(self._limiter).encloses(current_slot.get()):
            return None

        if self.is_left:
            raise LoopClosed(
                "this loop's `async with` block has been left, so it takes no new work: "
                "call it inside the block, or enter the loop again"
            )

        return self.drained

    def drain(self, reason: str, grace_seconds: float | None) -> None:
        """
        Let all calls start and retry nothing any more, now and later.

        :param grace_seconds: after how many seconds running invocations are cancelled; ``None`` for never
        :raises TypeError: if a value is of the wrong type
        :raises ValueError: if ``grace_seconds`` is negative or not finite
        :raises RuntimeError: if the calls are made in the event loop of another thread
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be of type str, got {reason!r}")

        must.check_number("grace_seconds", grace_seconds, minimum=0, optional=True, finite=True)
        pool = own_pool(self._limiter, "a loop in use can be drained")
        self.drained = self.drained or BatchStopped(reason)
        for call in (*self._calls, *self.outside):
            assert pool is not None
            until = None if grace_seconds is None else pool.loop.now() + grace_seconds
            # A running invocation needs its nested work to finish.
            if not pool.encloses(call.outer):
                call.wind_down(self.drained, until)

    @contextmanager
    def call(self, call: Call) -> Generator[None]:
        """Count a call as in progress."""
        self.begin(call)
        try:
            yield
        finally:
            self.end(call)

    def begin(self, call: Call) -> None:
        """Count a call as in progress, within the block if that has been entered."""
        (self.outside if self.tasks is None else self._calls)[call] = None

    def end(self, call: Call) -> None:
        """Count a call as ended."""
        if call in self.outside:
            del self.outside[call]
            return

        del self._calls[call]
        if not self._calls and self._idle is not None:
            self._idle.set()

    async def enter(self) -> None:
        """
        Open the lifetime. :raises RuntimeError: if it is open already
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
        Wait for the calls in progress; cancel them if an exception left the block, or the wait is cancelled.

        :raises RuntimeError: if another task entered the block
        :raises InvocationCancelled: if the block was cancelled by a native cancellation of one of its tasks
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
                call.on_block_left()

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

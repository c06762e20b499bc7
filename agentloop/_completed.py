"""A batch whose results are read as they come."""

from __future__ import annotations

__all__ = ["Completed", "Completing"]

from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from ._batch import Batch
from ._config import LoopConfig
from ._errors import LoopClosed
from ._invocation import Inputs
from ._lifetime import Lifetime
from ._limiter import Limiter
from ._pool import current_slot
from ._result import InvocationResult

T = TypeVar("T")


class Completing(Batch[T]):
    """A batch that hands its results to a reader as they come."""

    _keep_rest = False

    def __init__(
        self,
        inputs: Inputs[T],
        limiter: Limiter,
        config: LoopConfig,
        record: Callable[[InvocationResult[Any]], None] | None,
    ) -> None:
        super().__init__(inputs, limiter, config, record)
        self._ready: deque[InvocationResult[T]] = deque()
        self._arrived = anyio.Event()
        self._ended = False

    async def take(self) -> InvocationResult[T] | None:
        """
        Wait for a result. Cancellation, native cancellation too, loses none.

        :return: the next result; ``None`` when the batch has ended and all were taken
        """
        await checkpoint_if_cancelled()
        while not self._ready:
            if self._ended:
                return None

            if self._arrived.is_set():
                self._arrived = anyio.Event()

            await self._arrived.wait()

        # Nothing waits from here on, so what was taken is also returned.
        result = self._ready.popleft()
        self._taken()
        return result

    def forget(self) -> None:
        """Drop the results that nobody will take any more."""
        self._ready.clear()

    def end(self) -> None:
        """Say that no result will come any more."""
        self._ended = True
        self._arrived.set()

    def _deliver(self, result: InvocationResult[T]) -> None:
        self._ready.append(result)
        self._arrived.set()


class Completed(Generic[T]):
    """
    An async context manager that gives the results of a batch in the order of completion.

    The batch runs in a task of its own, which belongs to the loop where that has been entered, so that the
    reader's task then enters no scope; otherwise to a task group that the block opens.
    """

    def __init__(self, make: Callable[[], Completing[T]], lifetime: Lifetime) -> None:
        self._make = make
        self._lifetime = lifetime
        self._batch: Completing[T] | None = None
        self._group: TaskGroup | None = None
        self._failure: BaseException | None = None
        self._owned = False
        self._nested = False
        self._closed_by: str | None = None

    async def __aenter__(self) -> Self:
        if self._batch is not None:
            raise RuntimeError("the results of a batch can be read in one `async with` block only")

        self._lifetime.check()
        self._nested = current_slot.get() is not None
        self._batch = self._make()
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        if self._lifetime.is_open:
            self._owned = True
            self._lifetime.begin(self)
            self._lifetime.start_soon(self._run, "agentloop batch")
        else:
            self._group = anyio.create_task_group()
            await self._group.__aenter__()
            self._group.start_soon(self._run, name="agentloop batch")

        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed_by = self._closed_by or "the block that reads the results was left"
        self._scope.cancel(self._closed_by)
        assert self._batch is not None
        try:
            if self._group is None:
                # As in a task group: also a cancelled reader waits until nothing of it is left.
                with anyio.CancelScope(shield=True):
                    await self._ended.wait()

                await checkpoint_if_cancelled()
            elif isinstance(exc, anyio.get_cancelled_exc_class()):
                await self._group.__aexit__(exc_type, exc, traceback)
            else:
                # Nothing in the group raises, so what left the body goes on as the object that it is.
                await self._group.__aexit__(None, None, None)
        finally:
            self._batch.forget()
            if self._failure is not exc:
                self._raise_failure()

    def __aiter__(self) -> AsyncIterator[InvocationResult[T]]:
        self._entered()
        return self

    async def __anext__(self) -> InvocationResult[T]:
        batch = self._entered()
        result = await batch.take()
        if result is not None:
            return result

        self._raise_failure()
        error = batch.input_error
        if isinstance(error, StopAsyncIteration):
            raise RuntimeError("the input raised StopAsyncIteration") from error

        if error is not None:
            raise error

        # What is cut short must not look complete.
        if not batch.complete:
            raise LoopClosed(
                f"{self._closed_by or 'the loop was cancelled'} before all inputs of this batch were run"
            )

        raise StopAsyncIteration

    def _entered(self) -> Completing[T]:
        if self._batch is None:
            raise RuntimeError(
                "write `async with loop.as_completed(...) as results:` around `async for result in results:`"
            )

        return self._batch

    def _raise_failure(self) -> None:
        """Raise what ended the batch, such as a ``KeyboardInterrupt`` from an agent."""
        if self._failure is not None:
            self._lifetime.failure = None
            raise self._failure

    def close(self) -> None:
        """Start nothing new, since nobody might be reading; but an agent that runs is waited for anyway."""
        if not self._nested:
            self._stop("the loop was left")

    def cancel(self, reason: str, cause: BaseException) -> None:
        """Cancel what runs; each invocation that was started still has its result."""
        self._stop(reason)
        assert self._batch is not None
        self._batch.cancel(reason, cause)

    def _stop(self, reason: str) -> None:
        if self._closed_by is None:
            self._closed_by = reason
            assert self._batch is not None
            self._batch.stop(reason, LoopClosed(reason))

    async def _run(self) -> None:
        assert self._batch is not None
        try:
            with self._scope:
                await self._batch.run()
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            self._failure = exc
            if self._group is not None:
                # The reader may wait for something else; leaving the block raises the failure.
                self._group.cancel_scope.cancel()
            else:
                self._lifetime.failure = exc
        finally:
            self._batch.end()
            self._ended.set()
            if self._owned:
                self._lifetime.end(self)

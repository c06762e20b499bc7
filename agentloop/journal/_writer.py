"""The task that writes the results of batches, many in one commit."""

from __future__ import annotations

__all__ = ["Writer"]

import os
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread

from .._errors import InvocationCancelled, JournalError
from .._eventloop.tasks import LOST, Tasks
from ._claims import Claims
from ._codec import Codec
from ._file import Group, JournalFile
from ._session import Writing

# How long a result waits for others to be committed with it: each commit waits for the disk, which takes some
# milliseconds for any size.
LINGER_SECONDS = 0.02
MOST_ROWS = 1000


class Writer:
    """
    Writes the results of batches, and reports each commit to its batch.

    It has a task of its own, which goes on when a batch is cancelled. The task waits for a result, and then
    ``LINGER_SECONDS`` for more, unless a batch waits for its commits alone.

    :param file: the file
    :param codec: encodes and decodes outputs
    :param keep: the statuses of results that are kept
    """

    def __init__(self, file: JournalFile, codec: Codec, keep: frozenset[str]) -> None:
        self.file = file
        self.codec = codec
        self.claims: Claims | None = None
        """Tracks the taken entries, while the file is open."""
        self.replayed = 0
        self.written = 0
        self._keep = keep
        self._tasks: Tasks | None = None
        self._process = 0
        self._queue: list[Writing] = []
        # The results that are being written.
        self._group: tuple[list[Writing], Group] | None = None
        self._closing = False
        self._hurried = False
        self._woken: anyio.Event | None = None

    def check(self) -> None:
        """
        Raise an error after the block, or in another process.

        :raises RuntimeError: in either case
        """
        if self._closing:
            raise RuntimeError("the `async with` block of this journal has been left")

        if os.getpid() != self._process:
            raise RuntimeError("this journal was opened by another process: open one after the fork")

    def count_replayed(self) -> None:
        """Count a result of an earlier run."""
        self.replayed += 1

    def enqueue(self, writing: Writing) -> None:
        """Queue a result to be written."""
        if self.claims is None:
            error = JournalError(f"{self.file.path}: the `async with` block of this journal has been left")
            self._fail([writing], error)
        else:
            self._queue.append(writing)
            # In between, the task lingers. Waking it for each result would cost more than the result.
            if len(self._queue) in (1, MOST_ROWS):
                self._wake()

    def flush(self) -> None:
        """Write all queued results at once."""
        self._hurried = True
        self._wake()

    # -- opening and closing

    async def open(self) -> None:
        """
        Open the file and start the task.

        :raises JournalError: if the file cannot be used
        """
        self._process = os.getpid()
        try:
            await _insist(self.file.open)
            assert self.file.reader is not None
            tasks = await Tasks().__aenter__()
        except BaseException:
            await _insist(self.file.close, "not begun")
            raise

        self.claims = Claims(self.file.reader, self.file.last_row, self._keep)
        self._tasks = tasks
        tasks.start_soon(self._write, "agentloop journal")

    async def close(self, exc: BaseException | None) -> None:
        """
        Write the queued results, end the task and close the file.

        :param exc: the exception that leaves the block
        :raises InvocationCancelled: if the block was cancelled by a native cancellation of the task
        """
        assert self._tasks is not None
        self._closing = True
        self._wake()
        lost = False
        try:
            lost = await self._tasks.leave(exc)
        finally:
            await self._finish("ended" if exc is None else type(exc).__name__)

        if lost:
            raise InvocationCancelled(LOST) from exc

    async def _finish(self, outcome: str) -> None:
        cancelled: BaseException | None = None
        while self._queue or self._group:
            try:
                await self._write_group()
            except anyio.get_cancelled_exc_class() as native:
                # The group was committed in spite of it, and is delivered in the next turn.
                cancelled = native

        self.claims = None
        await _insist(self.file.close, outcome)
        _raise(cancelled)

    def _wake(self) -> None:
        if self._woken is not None:
            self._woken.set()

    async def _write(self) -> None:
        """Write groups of results until the block is left."""
        # Shielded, so that a commit that has begun is finished.
        with anyio.CancelScope(shield=True):
            while not self._closing:
                if not (self._queue or self._group):
                    self._hurried = False
                    await self._wait()
                elif not self._hurried:
                    with anyio.move_on_after(LINGER_SECONDS):
                        while not (self._hurried or self._closing or len(self._queue) >= MOST_ROWS):
                            await self._wait()

                    self._hurried = True
                else:
                    await self._write_group()

    async def _wait(self) -> None:
        self._woken = anyio.Event()
        await self._woken.wait()

    async def _write_group(self) -> None:
        if self._group is None:
            writings, self._queue = self._queue[:MOST_ROWS], self._queue[MOST_ROWS:]
            self._group = writings, Group([writing.row for writing in writings])
            self._hurried = bool(self._queue)

        writings, group = self._group
        error: JournalError | None = None
        try:
            await _insist(self.file.commit, group)
        except JournalError as exc:
            error = exc

        self._group = None
        if error is not None:
            self._fail(writings, error)
            return

        self.written += len(writings)
        for writing in writings:
            writing.claim.end()
            writing.on_done(True)

    def _fail(self, writings: list[Writing], error: JournalError) -> None:
        """Return unwritten results to their batches, which try once more; after a second failure, give up."""
        failed = {writing.session: None for writing in writings if not writing.session.has_failed}
        given_up = [writing for writing in writings if writing.session not in failed]
        held = [writing for writing in (*writings, *self._queue) if writing.session in failed]
        self._queue = [writing for writing in self._queue if writing.session not in failed]
        for writing in held:
            writing.session.hold(writing)

        for session in failed:
            session.fail(error)

        for writing in given_up:
            writing.on_done(False)


async def _insist(fn: Callable[..., object], *args: Any) -> None:
    """
    Call a function in a worker thread and wait for its end, also if this is cancelled meanwhile.

    :param fn: the function; called again after a native cancellation, and must then wait for the first call
    """
    cancelled: BaseException | None = None
    with anyio.CancelScope(shield=True):
        while True:
            try:
                # Not the default limiter, since agents' threads may hold all of its tokens.
                await anyio.to_thread.run_sync(fn, *args, limiter=anyio.CapacityLimiter(1))
                break
            except anyio.get_cancelled_exc_class() as native:
                cancelled = native

    _raise(cancelled)


def _raise(cancelled: BaseException | None) -> None:
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            # The traceback refers to this frame; the frame must not refer back.
            del cancelled

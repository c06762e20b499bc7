"""How a batch ends, and why."""

from __future__ import annotations

__all__ = ["FATAL_HINT", "Ending"]

from typing import Any

from .._errors import BatchStopped
from .._runtime.job import Job
from .._runtime.states import ENDED

# What to do about a batch that one failure has stopped.
FATAL_HINT = "a classify= that does not judge the error FATAL lets a batch go on"


class Ending:
    """
    The one place that knows whether a batch was stopped, by what, and what that leaves to raise.

    A batch can be stopped for any number of reasons; the first one wins. From then on no job is started and
    none is retried.
    """

    def __init__(self) -> None:
        self.stopped: BatchStopped | None = None
        """Why nothing is started any more, if so."""
        self._cancelled_by = "the batch was cancelled"
        self._has_skipped = False
        self._complete = False

    @property
    def reason(self) -> str:
        """Why what still runs is cancelled, if it is."""
        return self._cancelled_by if self.stopped is None else self.stopped.reason

    def stop(self, reason: str, cause: BaseException, hint: str = "") -> BatchStopped | None:
        """
        Stop the batch.

        :param reason: what stops it, in words
        :param cause: the same, as an exception
        :param hint: what to do to have it go on
        :return: the exception that says so; ``None`` if it was stopped before
        """
        if self.stopped is not None:
            return None

        self.stopped = BatchStopped(reason, hint)
        self.stopped.__cause__ = cause
        return self.stopped

    def cancel(self, reason: str) -> None:
        """Say why the batch is cancelled, in case nothing has stopped it before."""
        self._cancelled_by = reason

    def complete(self) -> None:
        """Note that every input that was pulled has its result."""
        self._complete = True

    def close(self, job: Job[Any]) -> None:
        """Make final what a stopped batch does not start or retry, unless it has ended by itself."""
        if self.stopped is None or job.state is ENDED:
            return

        if job.attempts:
            job.give_up(f"the batch was stopped: {self.stopped.reason}")
        else:
            self._has_skipped = True
            job.skip(self.stopped)

    def error(self, cut_short: bool) -> BatchStopped | None:
        """
        Return what to raise once the batch has ended, if inputs were skipped or not pulled.

        :param cut_short: whether inputs were not pulled
        """
        if self._complete:
            return self.stopped if cut_short or self._has_skipped else None

        return BatchStopped(self.reason)

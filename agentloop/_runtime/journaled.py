"""Jobs of a batch with a journal."""

from __future__ import annotations

__all__ = ["Claim", "JournaledJob", "ReplayedJob"]

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from .._invocation import Invocation
from .._limits.slots import Pool, Slot
from .._result import InvocationResult, Status
from .job import Job
from .observer import Observer
from .outcome import Outcome
from .states import ENDED

T = TypeVar("T")


class Claim(Protocol):
    """The journal's entry for an input: one of an earlier run, or a new one."""

    @property
    def error(self) -> Exception | None:
        """The error that stops the batch, if the output cannot be written."""
        ...

    @property
    def row(self) -> int:
        """The row of the entry, once it was written."""
        ...

    def replay(self, index: int) -> InvocationResult[Any] | None:
        """Return the result of the entry, if its status is one that the journal keeps."""
        ...

    def idempotency_key(self) -> str:
        """Return the idempotency key of the invocation. Worker threads may call this too."""
        ...

    def encode(self, output: Any) -> Exception | None:
        """
        Encode the output now, since the caller may change it later.

        :return: the error of an output that cannot be encoded, if it concerns this input alone
        """
        ...

    def release(self) -> None:
        """Leave the entry to another input."""


class JournaledJob(Job[T]):
    """
    A job whose result will be written into a journal.

    :param claim: the entry
    """

    def __init__(
        self,
        invocation: Invocation[T],
        index: int,
        now: float,
        pool: Pool,
        outer: Slot | None,
        claim: Claim,
    ) -> None:
        super().__init__(invocation, index, now, pool, outer)
        self.claim = claim

    def key_maker(self) -> Callable[[], str]:
        # It changes once the result was recorded, and a task may outlive the attempt.
        key = self.claim.idempotency_key()
        return lambda: key

    def finish(self, observer: Observer, now: float) -> InvocationResult[T]:
        """Return the result. An output that cannot be encoded makes it an ``ERROR``. Any -> ENDED."""
        if self.attempts and self.failed is None:
            error = self.claim.encode(self.output)
            if error is not None:
                self.output = None
                self._end(Outcome(Status.ERROR, error))

        return super().finish(observer, now)


class ReplayedJob(Job[T]):
    """
    A job that ended in an earlier run: it needs no slot, and is reported only as a :class:`ResultEvent`.

    :param claim: the entry
    :param result: the result in the entry
    """

    __slots__ = ("claim",)
    output: Any
    """The result."""

    def __init__(
        self,
        invocation: Invocation[T],
        index: int,
        now: float,
        pool: Pool,
        outer: Slot | None,
        claim: Claim,
        result: InvocationResult[T],
    ) -> None:
        super().__init__(invocation, index, now, pool, outer)
        self.state = ENDED
        self.claim = claim
        self.output = result

    def report_queued(self, observer: Observer) -> None:
        """Report nothing."""

    def resolve(self) -> bool:
        return False

    def finish(self, observer: Observer, now: float) -> InvocationResult[T]:
        """Return the result."""
        result: InvocationResult[T] = self.output
        observer.replayed(self.invocation, result, now)
        return result

"""The results of invocations."""

__all__ = ["SUCCESS", "Draft", "InvocationResult", "Status"]

import enum
from typing import Any, Generic, TypeVar, cast

import attrs

from ._errors import describe
from ._invocation import Referable, draft_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Status(enum.StrEnum):
    """How an invocation ended."""

    SUCCESS = "success"
    """The agent returned."""

    ERROR = "error"
    """The agent raised, and was not retried any more; or it was refused before it could start."""

    TIMEOUT = "timeout"
    """The agent was still running when its time was up."""

    CANCELLED = "cancelled"
    """The agent ended by a cancellation that its caller did not request."""

    SKIPPED = "skipped"
    """The agent was not started, because the batch had been stopped."""


# Looking up a member of an enumeration is slow on CPython 3.11.
SUCCESS = Status.SUCCESS


@attrs.frozen
class InvocationResult(Referable, Generic[T_co]):
    """
    The result of one invocation. Times are in milliseconds of the event loop's clock.

    :param agent_id: the name that the invocation was given
    :param status: how it ended
    :param output: the agent's return value; ``None`` without one
    :param exception: the exception of the last attempt, the object itself; ``None`` on success
    :param latency_ms: from the first start to the end, with retries and the waits between them
    :param queue_ms: the wait for the first slot, from the time when the input was pulled, or from the start
        of :meth:`AgentLoop.run_all` if that was given a sequence
    :param retries: how many retries were made
    :param failures: the exception of each failed attempt, in order
    :param index: the place in the batch's input; 0 for a single invocation
    :param chunks: how many chunks a stream yielded
    :param first_chunk_ms: from the first start to the first chunk of a stream; ``None`` without one
    :param replayed: whether it comes from a journal, and the agent was not run
    """

    agent_id: str
    status: Status
    output: T_co | None = None
    exception: BaseException | None = None
    latency_ms: float = 0.0
    queue_ms: float = 0.0
    retries: int = 0
    failures: tuple[Exception, ...] = ()
    index: int = 0
    chunks: int = 0
    first_chunk_ms: float | None = None
    replayed: bool = False

    @property
    def success(self) -> bool:
        """
        Whether the agent returned.

        Type checkers cannot conclude from it that ``output`` is not ``None``: a property tells them nothing
        about its siblings. :meth:`unwrap` returns the output with the type that the agent returns.
        """
        return self.status is Status.SUCCESS

    @property
    def error(self) -> str | None:
        """
        The exception as a line: ``"ValueError: boom"``, ``"Timeout after 0.5s"``; ``None`` without one.

        It is one line of at most 1,000 printable characters (``str.isprintable``): line ends, control
        characters and the spaces around them become one space, half a surrogate pair becomes U+FFFD.
        """
        exc = self.exception
        return None if exc is None else describe(exc, named=self.status is not Status.TIMEOUT)

    def to_dict(self) -> dict[str, Any]:
        """
        Return the fields as a plain dict for JSON lines, ``json.dumps(result.to_dict())``.

        ``error`` replaces ``exception``, and ``failures`` are such lines too, each with its type. ``output``
        is the object itself, so it must be one that JSON can carry.
        """
        return {
            "agent_id": self.agent_id,
            "status": self.status.value,
            "output": self.output,
            "error": self.error,
            "latency_ms": self.latency_ms,
            "queue_ms": self.queue_ms,
            "retries": self.retries,
            "failures": [describe(failure) for failure in self.failures],
            "index": self.index,
            "chunks": self.chunks,
            "first_chunk_ms": self.first_chunk_ms,
            "replayed": self.replayed,
        }

    def unwrap(self) -> T_co:
        """
        Return the output.

        :raises BaseException: the object of ``exception``, if there is one
        """
        if self.exception is None:
            return cast("T_co", self.output)

        try:
            raise self.exception
        finally:
            # The traceback now refers to this frame; the frame must not refer back to the exception.
            del self


Draft = draft_of(InvocationResult)

"""The errors that the library itself raises or puts into results."""

__all__ = [
    "AgentLoopError",
    "BatchStopped",
    "FirstChunkTimeout",
    "IdleTimeout",
    "InvocationCancelled",
    "InvocationTimeout",
    "LeftOpenError",
    "LoopClosed",
    "NotAsyncError",
    "describe",
]

from typing import Any

# How long a reason may be, in characters.
REASON_LENGTH = 500


def describe(exc: BaseException) -> str:
    """Return the type and the text of an exception, whatever its own ``__str__`` does."""
    try:
        text = str(exc)
    except Exception:
        text = ""

    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


class AgentLoopError(Exception):
    """The base of every error that is this library's own."""


class InvocationTimeout(AgentLoopError, TimeoutError):
    """
    An invocation was still running when its time was up.

    Where an error of the agent's own came out of the time-out (a failing ``finally``, a wrapped
    cancellation), it is the ``__cause__``.

    :param seconds: the time that was allowed, in seconds
    :param total: whether it was ``total_timeout_seconds`` (all attempts and the waits between them)
        rather than ``timeout_seconds`` (one attempt)
    """

    _text = "Timeout after {:.10g}s"

    def __init__(self, seconds: float, total: bool = False) -> None:
        # One argument: OSError, which a TimeoutError is, takes two for an errno and its text.
        super().__init__(seconds)
        self.seconds = seconds
        self.total = total

    def __str__(self) -> str:
        return self._text.format(self.seconds) + (" in total" if self.total else "")


class FirstChunkTimeout(InvocationTimeout):
    """A stream yielded nothing within ``first_chunk_timeout_seconds``."""

    _text = "No first chunk after {:.10g}s"


class IdleTimeout(InvocationTimeout):
    """A stream yielded nothing for ``idle_timeout_seconds`` after a chunk."""

    _text = "No chunk for {:.10g}s"


class InvocationCancelled(AgentLoopError):
    """
    An invocation ended by a cancellation that its caller did not ask for.

    Its ``__cause__`` is the cancellation that came out of the agent, where one did.
    """


class BatchStopped(AgentLoopError):
    """
    A batch was stopped before all of its inputs were run.

    It is the exception of each ``SKIPPED`` result of the batch: one object for all of them. It is raised too
    where results are missing: by ``as_completed()`` and ``stream_all()`` after the last result, and by
    ``run_all()`` if an async input was not read to its end. Its ``__cause__`` is the error that stopped the
    batch.

    :param reason: why the batch was stopped
    :param hint: what to do to have it go on, if there is anything
    """

    results: list[Any]
    """The results that there are, of a ``run_all()`` that raised this; else empty."""

    def __init__(self, reason: str, hint: str = "") -> None:
        reason = reason if len(reason) <= REASON_LENGTH else f"{reason[: REASON_LENGTH - 3]}..."
        super().__init__(reason, hint)
        self.reason = reason
        self.hint = hint
        self.results = []

    def __str__(self) -> str:
        return f"the batch was stopped: {self.reason}" + (f" ({self.hint})" if self.hint else "")


class LeftOpenError(AgentLoopError, RuntimeError):
    """
    An agent has ended and left a cancel scope or a task group open in its task.

    :param agent_id: which one
    """

    def __init__(self, agent_id: str) -> None:
        super().__init__(agent_id)
        self.agent_id = agent_id

    def __str__(self) -> str:
        return (
            f"{self.agent_id!r} has left a cancel scope or a task group open in its task: "
            "use `async with`, or close it before the agent ends"
        )


class NotAsyncError(AgentLoopError, TypeError):
    """An agent is no async function: its return value cannot be awaited, or cannot be iterated."""


class LoopClosed(AgentLoopError, RuntimeError):
    """New work was given to a loop whose ``async with`` block had been left."""

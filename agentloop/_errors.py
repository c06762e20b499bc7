"""The errors that the library itself raises or puts into results."""

__all__ = [
    "AgentLoopError",
    "BatchStopped",
    "FirstChunkTimeout",
    "IdleTimeout",
    "InvocationCancelled",
    "InvocationTimeout",
    "LoopClosed",
    "describe",
]


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
    An invocation was not started because its batch had been stopped.

    Its ``__cause__`` is the error that stopped the batch.
    """


class LoopClosed(AgentLoopError, RuntimeError):
    """New work was given to a loop whose ``async with`` block had been left."""

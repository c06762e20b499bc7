"""The library's own errors, raised or put into results."""

__all__ = [
    "AgentLoopError",
    "BatchStopped",
    "BudgetSpent",
    "DeadlockError",
    "FirstChunkTimeout",
    "IdleTimeout",
    "InvocationCancelled",
    "InvocationTimeout",
    "JournalError",
    "JournalInUse",
    "JournalMismatch",
    "JournaledError",
    "LeftOpenError",
    "LoopClosed",
    "QueueFull",
    "QueueTimeout",
    "describe",
    "is_not_async",
    "not_async",
]

import unicodedata
from typing import Any

from ._foreign import foreign_code

# How long the reason of a stop may be, in characters.
_REASON_CHARACTERS = 500
_MOST_CHARACTERS = 1000
# Cleaning makes a text shorter, so more characters are read than kept. The end of a long text is not read.
_READ_CHARACTERS = 4 * _MOST_CHARACTERS
# The name that type itself stores: a metaclass can make __name__ a property.
_name_of_type = vars(type)["__name__"].__get__


def describe(exc: BaseException, *, named: bool = True) -> str:
    """
    Return the type and the text of an exception as one line of at most 1,000 printable characters. Any
    ``__str__`` is safe, even one that raises. The cost does not depend on the length of the text.

    :param exc: the exception
    :param named: whether the type precedes the text; the type always replaces a missing text
    """
    text = ""
    with foreign_code:
        # By str's own method, since a subclass may override it.
        text = str.__getitem__(str(exc), slice(_READ_CHARACTERS + 1))

    name, line = _one_line(_name_of_type(type(exc))), _one_line(text)
    # The line of a JournaledError begins with the type of the original error.
    named = named and type(exc) is not JournaledError
    return _clip(f"{name}: {line}" if named and line else line or name)


def _one_line(text: str) -> str:
    shown = text[:_READ_CHARACTERS]
    if not shown.isprintable():
        shown = " ".join("".join(map(_printable, shown)).split())

    return _clip(shown if len(text) <= _READ_CHARACTERS else f"{shown}...")


def _clip(line: str) -> str:
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS - 3]}..."


def _printable(character: str) -> str:
    """Return a character, or its replacement in a printable line."""
    if character.isprintable():
        return character

    category = unicodedata.category(character)
    if category == "Cf":
        return ""  # joiners, direction marks and similar have no width

    # Half surrogates, private and unassigned characters; else separators and control characters.
    return "\N{REPLACEMENT CHARACTER}" if category in ("Cs", "Co", "Cn") else " "


class AgentLoopError(Exception):
    """The base of all errors of this library."""

    # The value of the VerdictKind of all errors of a class, or of one error. None leaves it to the response.
    # An error with such a value is no sign of an outage.
    _verdict: str | None = None


class InvocationTimeout(AgentLoopError, TimeoutError):
    """
    An invocation was still running when its time was up.

    If the time-out led to an error of the agent's own (a failing ``finally``, a wrapped cancellation), that
    is the ``__cause__``.

    :param seconds: the time limit, in seconds
    :param total: whether it was ``total_timeout_seconds`` (all attempts and the waits between them)
        rather than ``timeout_seconds`` (one attempt)
    """

    _verdict = "transient"
    _text = "Timeout after {:.10g}s"

    def __init__(self, seconds: float, total: bool = False) -> None:
        # One argument: TimeoutError is an OSError, which takes two arguments for an errno and its text.
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


class QueueTimeout(InvocationTimeout):
    """An invocation was granted no slot within ``queue_timeout_seconds``, and so never began."""

    _text = "No slot after {:.10g}s"


class QueueFull(AgentLoopError):
    """
    An invocation never began, since ``max_waiting`` others were waiting for a slot of the :class:`Limiter`.

    :param waiting: how many were waiting
    :param retry_after_seconds: an estimate of the seconds until it would have begun; ``None`` without an
        estimate. :class:`Limiter` describes the computation
    """

    _verdict = "transient"

    def __init__(self, waiting: int, retry_after_seconds: float | None = None) -> None:
        super().__init__(waiting, retry_after_seconds)
        self.waiting = waiting
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        seconds = self.retry_after_seconds
        return f"max_waiting={self.waiting} invocations are waiting already" + (
            "" if seconds is None else f", try again in {seconds:.3g}s"
        )


class InvocationCancelled(AgentLoopError):
    """
    An invocation ended by a cancellation that its caller did not request.

    Its ``__cause__`` is the cancellation that the agent raised, if it did.
    """

    _verdict = "transient"


class BatchStopped(AgentLoopError):
    """
    A batch was stopped before all of its inputs were run.

    It is the exception of each ``SKIPPED`` result of the batch: one object for all of them. It is raised too
    if results are missing: by ``as_completed()`` and ``stream_all()`` after the last result, and by
    ``run_all()`` if an async input was not read to its end. Its ``__cause__`` is the error that stopped the
    batch.

    :param reason: why the batch was stopped
    :param hint: how the user lets such a batch go on, if that is possible
    """

    _verdict = "permanent"

    results: list[Any]
    """The results of the pulled inputs, if ``run_all()`` raised this; else empty."""

    def __init__(self, reason: str, hint: str = "") -> None:
        reason = reason if len(reason) <= _REASON_CHARACTERS else f"{reason[: _REASON_CHARACTERS - 3]}..."
        super().__init__(reason, hint)
        self.reason = reason
        self.hint = hint
        self.results = []

    def __str__(self) -> str:
        return f"the batch was stopped: {self.reason}" + (f" ({self.hint})" if self.hint else "")


class BudgetSpent(AgentLoopError):
    """
    An invocation costs more than the remainder of a budget, and no running attempt may still give something
    back.

    It is the exception of a ``SKIPPED`` result, and the ``__cause__`` of the :exc:`BatchStopped` of a batch.

    :param cost: the cost of the invocation
    :param remaining: the remainder of the budget; negative if it was overdrawn
    :param limit: the whole budget
    """

    _verdict = "permanent"

    def __init__(self, cost: float, remaining: float, limit: float) -> None:
        super().__init__(cost, remaining, limit)
        self.cost = cost
        self.remaining = remaining
        self.limit = limit

    def __str__(self) -> str:
        left = f"{self.remaining:.10g} is left of a budget of {self.limit:.10g}"
        return f"a cost of {self.cost:.10g} cannot be paid any more: {left}"


class LeftOpenError(AgentLoopError, RuntimeError):
    """
    An agent has ended and left a cancel scope or a task group open in its task.

    :param agent_id: the id of the agent
    """

    _verdict = "permanent"

    def __init__(self, agent_id: str) -> None:
        super().__init__(agent_id)
        self.agent_id = agent_id

    def __str__(self) -> str:
        return (
            f"{self.agent_id!r} has left a cancel scope or a task group open in its task: "
            "use `async with`, or close it before the agent ends"
        )


class DeadlockError(AgentLoopError, RuntimeError):
    """
    Agents under two keys of a ``KeyedLimiter`` wait for each other's slots.

    :param key: the key of the agent that gets this error, since it was about to wait for ever
    :param other: the key whose slots are all held by agents that wait for ``key``
    """

    _verdict = "permanent"

    def __init__(self, key: object, other: object) -> None:
        super().__init__(key, other)
        self.key = key
        self.other = other

    def __str__(self) -> str:
        return (
            f"an agent under the key {self.key!r} runs one under {self.other!r}, whose slots are all held by "
            f"agents that wait for {self.key!r} in turn: give both one key, or run them in one order"
        )


class LoopClosed(AgentLoopError, RuntimeError):
    """New work was given to a loop whose ``async with`` block had been left."""

    _verdict = "permanent"


class JournalError(AgentLoopError):
    """
    A journal cannot be read or written, or an output cannot be encoded.

    The message names the file, the problem and a remedy.
    """

    _verdict = "permanent"

    unwritten: list[Any]
    """The results that are not in the file and were not delivered."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.unwritten = []


class JournalInUse(JournalError):
    """Another process, or another ``Journal`` in this one, has the file open."""


class JournalMismatch(JournalError):
    """
    A journal holds results of another ``version``.

    :param path: the file
    :param found: the version in the file, as JSON
    :param given: the version that was given, as JSON
    """

    def __init__(self, path: str, found: str, given: str) -> None:
        super().__init__(path, found, given)
        self.path = path
        self.found = found
        self.given = given

    def __str__(self) -> str:
        return (
            f"{self.path} holds results of version {self.found}, and version={self.given} was given: take "
            'another file, or open this one with changed="keep", which counts them as results of the new '
            'version, or with changed="rerun", which runs all of them again'
        )


class JournaledError(AgentLoopError):
    """
    The error of an agent in an earlier run: a journal has the line of the error, not the object.

    :param line: the line of ``InvocationResult.error``, such as ``"ValueError: boom"``
    """

    _verdict = "permanent"


def not_async(message: str) -> TypeError:
    """Make the error of an agent that is no async function. It is fatal: every call would fail."""
    error = TypeError(message)
    vars(error)[_NOT_ASYNC] = True
    return error


def is_not_async(exc: BaseException) -> bool:
    """Return whether an exception was made by :func:`not_async`."""
    return type(exc) is TypeError and _NOT_ASYNC in vars(exc)


_NOT_ASYNC = "agentloop.not_async"

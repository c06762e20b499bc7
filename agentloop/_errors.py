"""The errors that the library itself raises or puts into results."""

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
# Cleaning makes a text shorter, so more than that is looked at; the rest of a long text costs nothing.
_READ_CHARACTERS = 4 * _MOST_CHARACTERS
# A metaclass can make a property of __name__; this is what type itself stores.
_name_of_type = vars(type)["__name__"].__get__


def describe(exc: BaseException, *, named: bool = True) -> str:
    """
    Return the type and the text of an exception as one line of at most 1,000 printable characters, whatever
    its own ``__str__`` does. The cost does not depend on the length of the text.

    :param exc: the exception
    :param named: whether the type precedes the text; a missing text is replaced by the type in any case
    """
    text = ""
    with foreign_code:
        # The slice of str: the text may be of a subclass with another one.
        text = str.__getitem__(str(exc), slice(_READ_CHARACTERS + 1))

    name, line = _one_line(_name_of_type(type(exc))), _one_line(text)
    # The line of an error of an earlier run begins with the type that it had then.
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
    """Return a character, or what stands for it in a line that is meant to be read."""
    if character.isprintable():
        return character

    category = unicodedata.category(character)
    if category == "Cf":
        return ""  # joiners, marks of direction and the like have no width

    # Half surrogates, private and unassigned characters; else separators and control characters.
    return "\N{REPLACEMENT CHARACTER}" if category in ("Cs", "Co", "Cn") else " "


class AgentLoopError(Exception):
    """The base of every error that is this library's own."""

    # The value of its VerdictKind, of the class or of one error. None leaves it to the response it tells of.
    # An error with such a value does not speak of the provider.
    _verdict: str | None = None


class InvocationTimeout(AgentLoopError, TimeoutError):
    """
    An invocation was still running when its time was up.

    Where an error of the agent's own came out of the time-out (a failing ``finally``, a wrapped
    cancellation), it is the ``__cause__``.

    :param seconds: the time that was allowed, in seconds
    :param total: whether it was ``total_timeout_seconds`` (all attempts and the waits between them)
        rather than ``timeout_seconds`` (one attempt)
    """

    _verdict = "transient"
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


class QueueTimeout(InvocationTimeout):
    """An invocation was granted no slot within ``queue_timeout_seconds``, and so never began."""

    _text = "No slot after {:.10g}s"


class QueueFull(AgentLoopError):
    """
    An invocation never began, since ``Limiter(max_waiting=...)`` others were waiting for a slot already.

    :param waiting: how many were waiting
    :param retry_after_seconds: in about how many seconds it would have begun, had it been let in; ``None``
        if nobody knows. :class:`Limiter` says how that is computed
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
    An invocation ended by a cancellation that its caller did not ask for.

    Its ``__cause__`` is the cancellation that came out of the agent, where one did.
    """

    _verdict = "transient"


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

    _verdict = "permanent"

    results: list[Any]
    """The results that there are, of a ``run_all()`` that raised this; else empty."""

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
    An invocation costs more than is left of a budget, and no attempt that runs may still give something back.

    It is the exception of a ``SKIPPED`` result, and the ``__cause__`` of the :exc:`BatchStopped` of a batch.

    :param cost: what the invocation costs
    :param remaining: what was left; negative if more had been spent than there was
    :param limit: how much there was in the beginning
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

    :param agent_id: which one
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
    Agents under two keys of a ``KeyedLimiter`` wait for a slot that the other one has.

    :param key: of the agent that gets this error, since it was about to wait for ever
    :param other: whose slots are all taken by agents that wait in the same way
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

    The message says which file, what happened, and what can be done.
    """

    _verdict = "permanent"

    unwritten: list[Any]
    """The results that the file does not hold, and that were not delivered otherwise."""

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
    What an agent raised in an earlier run, as a journal knows it: the line of the error, not the object.

    :param line: ``"ValueError: boom"``, as ``InvocationResult.error`` has it
    """

    _verdict = "permanent"


def not_async(message: str) -> TypeError:
    """Make the error of an agent that is no async function: every other call of it would fail likewise."""
    error = TypeError(message)
    vars(error)[_NOT_ASYNC] = True
    return error


def is_not_async(exc: BaseException) -> bool:
    """Return whether an exception was made by :func:`not_async`."""
    return type(exc) is TypeError and _NOT_ASYNC in vars(exc)


_NOT_ASYNC = "agentloop.not_async"

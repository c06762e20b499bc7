"""Errors on their way from a worker process to the caller."""

from __future__ import annotations

__all__ = ["RemoteError", "WorkerLost", "pack_error", "unpack_error"]

import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import attrs

from agentloop import AgentLoopError, Verdict, classify, response_status

from ._pickles import dumps, loads

# How many exceptions travel with one: its causes, its contexts and the members of its groups.
_MOST_ERRORS = 50
_MOST_CHARACTERS = 20_000


class WorkerLost(AgentLoopError, ConnectionError):
    """
    A remote call has no process to run in.

    Either its processes died each time it ran, the last time without another call in the same process, or
    there has been no process at all for ``patience_seconds``.

    :param text: what happened
    :param deaths: how many processes have died while they ran the call
    """

    def __init__(self, text: str, deaths: int = 0) -> None:
        # One argument: OSError takes two for an errno and its text.
        super().__init__(text)
        self.deaths = deaths
        # A call that kills its process would kill the next one too. Having no process is an outage.
        self._verdict = "permanent" if deaths else None


class RemoteError(AgentLoopError):
    """
    What a remote agent raised, if that cannot be pickled: what is known of the error, not the object.

    ``classify`` judges it as the error itself.

    :param kind: the qualified name of the error's type, ``openai.RateLimitError``
    :param text: what ``str()`` of the error gave
    :param status_code: the status of the response that the error tells of, as ``response_status`` reads it:
        an HTTP status, the name of a gRPC status, or ``None``
    :param verdict: what ``classify`` makes of the error
    """

    def __init__(self, kind: str, text: str, status_code: int | str | None, verdict: Verdict) -> None:
        super().__init__(kind, text, status_code, verdict)
        self.kind = kind
        self.text = text
        self.status_code = status_code
        self.retry_after: float | None = verdict.retry_after
        self.retry_after_seconds: float | None = verdict.retry_after
        """How many seconds the server asked to wait; ``None`` if it did not."""
        self.headers: dict[str, str] = (
            {} if verdict.retry_after is None else {"retry-after": f"{verdict.retry_after!r}"}
        )
        # classify reads the status and the Retry-After of this error too, but no type and no body.
        if classify(self) != verdict:
            self._verdict = verdict.kind.value

    def code(self) -> SimpleNamespace:
        """Return the status as gRPC's errors do: an object whose ``name`` it is."""
        return SimpleNamespace(name=self.status_code)

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


@attrs.frozen
class _Link:
    """
    One exception, and those that hang on it.

    :param error: the pickled exception; ``None`` if that does not work
    :param fallback: a pickled :class:`RemoteError`
    """

    error: bytes | None
    fallback: bytes
    cause: _Link | None = None
    context: _Link | None = None
    hides_context: bool = False
    members: tuple[_Link, ...] = ()

    def unpack(self) -> BaseException:
        error = self._unpack_alone()
        error.__cause__ = None if self.cause is None else self.cause.unpack()
        error.__context__ = None if self.context is None else self.context.unpack()
        error.__suppress_context__ = self.hides_context
        return error

    def _unpack_alone(self) -> BaseException:
        if self.members:
            text: str = loads(self.fallback).text
            return BaseExceptionGroup(text, [member.unpack() for member in self.members])

        try:
            error = loads(self.error or self.fallback)
        except Exception:
            # Its module may be missing here.
            error = loads(self.fallback)

        return error if isinstance(error, BaseException) else loads(self.fallback)


def _pack(exc: BaseException, left: Iterator[object]) -> _Link | None:
    """
    Return an exception with those that hang on it; ``None`` if that would be too many.

    :param left: yields as often as there may be one more
    """
    if next(left, None) is None:
        return None

    kind = type(exc)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    error = cast("Exception", exc)  # classify looks at anything
    fallback = dumps(RemoteError(name, _text_of(exc), response_status(exc), classify(error)))
    if isinstance(exc, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", exc)
        members = [_pack(member, left) for member in group.exceptions]
        return _Link(None, fallback, members=tuple(filter(None, members)))

    cause, context = exc.__cause__ or _inner_of(exc), exc.__context__
    link = _Link(
        None,
        fallback,
        None if cause is None else _pack(cause, left),
        # An error that is raised from another has it as its context too.
        None if context is None or context is cause else _pack(context, left),
        exc.__suppress_context__,
    )
    try:
        whole = attrs.evolve(link, error=dumps(exc))
        if _is_alike(exc, whole.unpack()):
            return whole

    except Exception:
        pass

    if isinstance(exc, OSError) and cause is None:
        # A RemoteError is no OSError, and it is those that speak of the network.
        link = attrs.evolve(link, cause=_pack(OSError(exc.errno, exc.strerror), left))

    return link


def _inner_of(exc: BaseException) -> BaseException | None:
    """Return the cause of an exception where azure-core has it."""
    inner = getattr(exc, "inner_exception", None)
    return inner if isinstance(inner, BaseException) else None


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc.message if isinstance(exc, BaseExceptionGroup) else exc)[:_MOST_CHARACTERS]
    except Exception:
        return ""


def _is_alike(exc: BaseException, other: BaseException) -> bool:
    """Return whether an exception has come back as what it was, in all that the loop reads."""
    here, there = classify(cast("Exception", exc)), classify(cast("Exception", other))
    # A wait until a date has got shorter meanwhile.
    return (
        type(exc) is type(other)
        and here.kind is there.kind
        and (here.retry_after is None) is (there.retry_after is None)
        and response_status(exc) == response_status(other)
    )


def pack_error(exc: BaseException, where: str) -> bytes:
    """
    Return an exception as bytes, with its causes and its traceback as text.

    :param where: the process that raised it
    """
    lines = "".join(traceback.format_exception(exc))[-_MOST_CHARACTERS:]
    return dumps((_pack(exc, iter(range(_MOST_ERRORS))), f"raised in {where}:\n{lines.rstrip()}"))


def unpack_error(data: bytes) -> BaseException:
    """Return an exception that another process has packed. A note has the traceback there."""
    link, note = loads(data)
    error: BaseException = link.unpack()
    error.add_note(note)
    return error

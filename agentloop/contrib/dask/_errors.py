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

# At most so many exceptions travel together: an error, its causes, contexts and members of groups.
_MOST_ERRORS = 50
_MOST_CHARACTERS = 20_000


class WorkerLost(AgentLoopError, ConnectionError):
    """
    A remote call has no process to run in.

    Either its process died each time it ran, at the last resend without another call in the same process, or
    there has been no process at all for ``patience_seconds``.

    :param text: what happened
    :param deaths: how many processes have died while they ran the call
    """

    def __init__(self, text: str, deaths: int = 0) -> None:
        # Not two arguments: OSError would take them for an errno and its text.
        super().__init__(text)
        self.deaths = deaths
        # A call that has killed its processes would kill the next one too. No process at all is an outage.
        self._verdict = "permanent" if deaths else None


class RemoteError(AgentLoopError):
    """
    Stands for an error of a remote agent that cannot be pickled.

    ``classify`` gives it the verdict of the original error.

    :param kind: the qualified name of the error's type, ``openai.RateLimitError``
    :param text: ``str()`` of the error
    :param status_code: ``response_status`` of the error: an HTTP status, the name of a gRPC status, or
        ``None``
    :param verdict: the verdict of ``classify``
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
        # classify reads the status and the Retry-After here too; the original's type and body are missing.
        if classify(self) != verdict:
            self._verdict = verdict.kind.value

    def code(self) -> SimpleNamespace:
        """Return the status in the form of gRPC's errors: an object with a ``name``."""
        return SimpleNamespace(name=self.status_code)

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


@attrs.frozen
class _PackedError:
    """
    One exception with its cause, context and members.

    :param error: the pickled exception; ``None`` if it does not pickle
    :param fallback: a pickled :class:`RemoteError`
    """

    error: bytes | None
    fallback: bytes
    cause: _PackedError | None = None
    context: _PackedError | None = None
    hides_context: bool = False
    members: tuple[_PackedError, ...] = ()

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


def _pack(exc: BaseException, left: Iterator[object]) -> _PackedError | None:
    """
    Pack an exception with its cause, context and members; return ``None`` once ``left`` is exhausted.

    :param left: yields one item for each exception that may still be packed
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
        return _PackedError(None, fallback, members=tuple(filter(None, members)))

    cause, context = exc.__cause__ or _inner_of(exc), exc.__context__
    packed = _PackedError(
        None,
        fallback,
        None if cause is None else _pack(cause, left),
        # An error that was raised from another has it as cause and as context.
        None if context is None or context is cause else _pack(context, left),
        exc.__suppress_context__,
    )
    try:
        whole = attrs.evolve(packed, error=dumps(exc))
        if _is_alike(exc, whole.unpack()):
            return whole

    except Exception:
        pass

    if isinstance(exc, OSError) and cause is None:
        # A RemoteError is no OSError, but only an OSError in the chain is a sign of an outage.
        packed = attrs.evolve(packed, cause=_pack(OSError(exc.errno, exc.strerror), left))

    return packed


def _inner_of(exc: BaseException) -> BaseException | None:
    """Return the cause of an exception of azure-core, which keeps it in an attribute."""
    inner = getattr(exc, "inner_exception", None)
    return inner if isinstance(inner, BaseException) else None


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc.message if isinstance(exc, BaseExceptionGroup) else exc)[:_MOST_CHARACTERS]
    except Exception:
        return ""


def _is_alike(exc: BaseException, other: BaseException) -> bool:
    """Return whether an unpickled exception is like the original in everything that the loop reads."""
    here, there = classify(cast("Exception", exc)), classify(cast("Exception", other))
    # Do not compare the seconds: the wait until a date gets shorter meanwhile.
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
    """Return an exception that another process has packed, with its traceback as a note."""
    packed, note = loads(data)
    error: BaseException = packed.unpack()
    error.add_note(note)
    return error

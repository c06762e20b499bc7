"""What a failure means: whether to retry it, and whether others should hear of it."""

from __future__ import annotations

__all__ = ["Verdict", "VerdictKind", "classify"]

import datetime
import email.utils
import enum
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import attrs

from . import _validators as must


class VerdictKind(enum.StrEnum):
    """What to do about a failed attempt."""

    TRANSIENT = "transient"
    """Retry after a backoff."""

    OVERLOAD = "overload"
    """Retry after a backoff, and tell the limiter that the provider has too much to do."""

    PERMANENT = "permanent"
    """Do not retry."""

    FATAL = "fatal"
    """Do not retry, and stop the batch: every other invocation would fail in the same way."""


@attrs.frozen
class Verdict:
    """
    The judgement of one failed attempt.

    :param kind: what to do
    :param retry_after: how many seconds the server asked to wait; ``None`` if it did not
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if ``retry_after`` is negative or not finite
    """

    kind: VerdictKind = attrs.field(validator=must.instance(VerdictKind))
    retry_after: float | None = attrs.field(
        default=None, validator=must.number(minimum=0, optional=True, finite=True)
    )


_PROGRAMMING_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    NameError,
    NotImplementedError,
    TypeError,
)
_TRANSIENT_STATUSES = (408, 409, 425)
_OVERLOAD_STATUSES = (429, 529)
# From what can be retried to what can not: a group is as bad as the worst error in it.
_GRAVITY = (VerdictKind.TRANSIENT, VerdictKind.OVERLOAD, VerdictKind.PERMANENT, VerdictKind.FATAL)


def classify(exc: Exception) -> Verdict:
    """
    Judge an exception by what it carries, without knowing the library it comes from.

    An HTTP status is read from ``status_code``, ``status`` or ``response.status_code``: 429 and 529, and
    503 with a Retry-After, are overload; 408, 409, 425 and other 5xx are transient; 401 is fatal; other
    4xx are permanent. Without a status, ``TypeError AttributeError NameError ImportError AssertionError
    NotImplementedError`` are permanent and everything else is transient. An exception group is judged by
    the gravest of its members.

    A Retry-After is read from ``response.headers`` or ``headers`` in its three forms: ``retry-after-ms``,
    seconds, and an HTTP date (RFC 9110, section 10.2.3). Zero, a time in the past and garbage are no
    Retry-After.

    :param exc: what the attempt raised
    :return: the verdict; this function never raises
    """
    if isinstance(exc, ExceptionGroup):
        return _classify_group(cast("ExceptionGroup[Exception]", exc))

    status = _http_status(exc)
    if status is None:
        kind = VerdictKind.PERMANENT if isinstance(exc, _PROGRAMMING_ERRORS) else VerdictKind.TRANSIENT
        return Verdict(kind)

    headers = _retry_headers(exc)
    if status in _OVERLOAD_STATUSES or (status == 503 and headers):
        kind = VerdictKind.OVERLOAD
    elif status in _TRANSIENT_STATUSES or not 400 <= status < 500:
        kind = VerdictKind.TRANSIENT
    elif status == 401:
        kind = VerdictKind.FATAL
    else:
        kind = VerdictKind.PERMANENT

    return Verdict(kind, _retry_after(headers))


def _classify_group(group: ExceptionGroup[Exception]) -> Verdict:
    verdicts = [classify(exc) for exc in group.exceptions]
    kind = max((verdict.kind for verdict in verdicts), key=_GRAVITY.index)
    waits = [verdict.retry_after for verdict in verdicts if verdict.retry_after is not None]
    return Verdict(kind, max(waits, default=None))


def _read(source: object, name: str) -> Any:
    # An exception's attribute may be a property of somebody else's class, and fail in any way.
    try:
        return getattr(source, name, None)
    except Exception:
        return None


def _http_status(exc: Exception) -> int | None:
    for value in (
        _read(exc, "status_code"),
        _read(exc, "status"),
        _read(_read(exc, "response"), "status_code"),
    ):
        # By type() and not by isinstance(), which asks an unbound proxy for a class that it cannot tell.
        if issubclass(type(value), int) and type(value) is not bool and 100 <= value <= 599:
            return int(value)

    return None


def _retry_headers(exc: Exception) -> dict[str, str]:
    """Return the Retry-After headers that there are, by their lower-case names."""
    for source in (_read(exc, "response"), exc):
        headers = _read(source, "headers")
        try:
            pairs: Iterable[tuple[Any, Any]] = headers.items() if hasattr(headers, "items") else headers
            found = {
                name: _text(value)
                for key, value in pairs
                if (name := _text(key).lower()) in ("retry-after-ms", "retry-after")
            }
        except Exception:
            continue

        if found:
            return found

    return {}


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the headers ask for; ``None`` where they make no sense."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name)
        if value is None or "_" in value:
            continue

        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                # A date is the server's wall clock, so it is compared with ours.
                date = email.utils.parsedate_to_datetime(value)
                if date.tzinfo is None:
                    # The asctime form names no zone, and means Greenwich like the others.
                    date = date.replace(tzinfo=datetime.UTC)

                seconds = date.timestamp() - time.time()
            except (ValueError, OverflowError, OSError):
                continue

        if seconds > 0 and math.isfinite(seconds):
            return seconds

    return None

"""What a failure means: whether to retry it, and whether others should hear of it."""

from __future__ import annotations

__all__ = ["Verdict", "VerdictKind", "classify"]

import datetime
import email.utils
import enum
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import attrs

from . import _validators as must
from ._errors import is_not_async
from ._foreign import foreign_code, read_attribute


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
    RecursionError,
    TypeError,
)
_TRANSIENT_STATUSES = (408, 409, 425)
_OVERLOAD_STATUSES = (429, 529)
# From what can be retried to what can not: a group is as bad as the worst error in it.
_GRAVITY = (VerdictKind.TRANSIENT, VerdictKind.OVERLOAD, VerdictKind.PERMANENT, VerdictKind.FATAL)
_MOST_MEMBERS = 10_000
_MOST_HEADERS = 1000
# The longest date of RFC 9110 has 33 characters.
_MOST_CHARACTERS = 100
# Not what a subclass may have put in its place: this tuple is finite and never changes.
_exceptions_of = vars(BaseExceptionGroup)["exceptions"].__get__


def classify(exc: Exception) -> Verdict:
    """
    Judge an exception by what it carries, without knowing the library it comes from.

    An HTTP status is read from ``status_code``, ``status`` or ``response.status_code``: 429 and 529, and
    503 with a Retry-After, are overload; 408, 409, 425 and other 5xx are transient; 401 is fatal; other
    4xx are permanent. Without a status, ``TypeError AttributeError NameError ImportError AssertionError
    NotImplementedError RecursionError`` are permanent and everything else is transient. A function that is
    not async is fatal: it would fail for every input. An exception group is judged by the
    gravest of its members, at whatever depth; at most 10,000 of them are looked at.

    A Retry-After is read from ``response.headers`` or ``headers`` in its three forms: ``retry-after-ms``,
    seconds, and an HTTP date (RFC 9110, section 10.2.3). Zero, a time in the past and garbage are no
    Retry-After, and neither is what stands behind the first 1,000 headers or is longer than 100 characters.

    :param exc: what the attempt raised
    :return: the verdict; this function never raises and takes bounded time, whatever attributes ``exc`` has
    """
    if not _is(exc, BaseExceptionGroup):
        return _classify_one(exc)

    verdicts = [_classify_one(member) for member in islice(_members(exc), _MOST_MEMBERS)]
    kind = max((verdict.kind for verdict in verdicts), key=_GRAVITY.index)
    waits = [verdict.retry_after for verdict in verdicts if verdict.retry_after is not None]
    return Verdict(kind, max(waits, default=None))


def _members(exc: BaseException) -> Iterator[BaseException]:
    """Yield the errors that a group holds at any depth, each object once."""
    seen: set[int] = set()
    left = [exc]
    while left:
        exc = left.pop()
        if id(exc) not in seen:
            seen.add(id(exc))
            if _is(exc, BaseExceptionGroup):
                left.extend(_exceptions_of(exc))
            else:
                yield exc


def _is(value: object, kinds: type | tuple[type, ...]) -> bool:
    # Not isinstance(), which asks the value itself for its class: that may be a property that raises.
    return issubclass(type(value), kinds)


def _classify_one(exc: BaseException) -> Verdict:
    status = _http_status(exc)
    if status is None:
        if is_not_async(exc):
            return Verdict(VerdictKind.FATAL)

        return Verdict(VerdictKind.PERMANENT if _is(exc, _PROGRAMMING_ERRORS) else VerdictKind.TRANSIENT)

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


def _http_status(exc: BaseException) -> int | None:
    for value in (
        read_attribute(exc, "status_code"),
        read_attribute(exc, "status"),
        read_attribute(read_attribute(exc, "response"), "status_code"),
    ):
        if _is(value, int) and type(value) is not bool:
            status = int.__index__(value)  # whatever a subclass says instead
            if 100 <= status <= 599:
                return status

    return None


def _retry_headers(exc: BaseException) -> dict[str, str]:
    """Return the Retry-After headers that there are, by their lower-case names."""
    for source in (read_attribute(exc, "response"), exc):
        headers = read_attribute(source, "headers")
        found: dict[str, str] = {}
        with foreign_code:
            pairs: Iterable[tuple[Any, Any]] = headers.items() if hasattr(headers, "items") else headers
            for key, value in islice(pairs, _MOST_HEADERS):
                name = _text(key).lower()
                if name in ("retry-after-ms", "retry-after"):
                    found[name] = _text(value)

        if found:
            return found

    return {}


def _text(value: Any) -> str:
    """Return the name or the value of a header; an empty text if it is longer than any that counts."""
    if _is(value, bytes):
        text = bytes.__getitem__(value, slice(_MOST_CHARACTERS + 1)).decode("latin-1")
    elif _is(value, (str, int, float)):
        text = str.__getitem__(str(value), slice(_MOST_CHARACTERS + 1))
    else:
        text = ""

    return text if len(text) <= _MOST_CHARACTERS else ""


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
            except Exception:
                continue

        if seconds > 0 and math.isfinite(seconds):
            return seconds

    return None

"""The judgement of failures: whether to retry, slow down or stop."""

from __future__ import annotations

__all__ = ["Verdict", "VerdictKind", "classify"]

import datetime
import email.utils
import enum
import math
import re
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping

import attrs

from . import _validators as must
from ._errors import BatchStopped, is_not_async
from ._foreign import read_attribute
from ._signs import (
    MOST_ERRORS,
    cause_of,
    error_bodies,
    is_of,
    is_plain,
    members,
    own_verdict,
    response_headers,
    response_status,
    retry_delays,
    text_of,
)


class VerdictKind(enum.StrEnum):
    """The consequence of a failed attempt."""

    TRANSIENT = "transient"
    """Retry after a backoff."""

    OVERLOAD = "overload"
    """Retry after a backoff, and let the limiter slow down: the provider is overloaded."""

    PERMANENT = "permanent"
    """Do not retry."""

    FATAL = "fatal"
    """Do not retry, and stop the batch: every other invocation would fail in the same way."""


@attrs.frozen
class Verdict:
    """
    The judgement of one failed attempt.

    :param kind: the consequence
    :param retry_after: the server's Retry-After, in seconds; ``None`` without one
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if ``retry_after`` is negative or not finite
    """

    kind: VerdictKind = attrs.field(validator=must.instance(VerdictKind))
    retry_after: float | None = attrs.field(
        default=None, validator=must.number(minimum=0, optional=True, finite=True)
    )


# From the mildest to the gravest: a group is judged by its gravest error.
_GRAVITY = TRANSIENT, OVERLOAD, PERMANENT, FATAL = tuple(VerdictKind)
_TRANSIENT, _PERMANENT = Verdict(TRANSIENT), Verdict(PERMANENT)
_PERMANENT_TYPES = (
    AssertionError,
    AttributeError,
    FileNotFoundError,
    ImportError,
    NameError,
    NotImplementedError,
    PermissionError,
    RecursionError,
    TypeError,
    ssl.SSLCertVerificationError,
)
_NAME_FIELDS = ("type", "code", "status")
# Names in the body of a response with any status, the gravest first, and in one without an error status.
_NAMES = {
    FATAL: {
        "account_deactivated",
        "authentication_error",
        "billing_hard_limit_reached",
        "billing_not_active",
        "insufficient_quota",
        "invalid_api_key",
        "unrecognizedclientexception",
    },
    OVERLOAD: {"resource_exhausted", "throttlingexception", "toomanyrequestsexception"},
}
_NAMES_WITHOUT_STATUS = {
    OVERLOAD: {"429", "503", "529", "overloaded_error", "rate_limit_error", "rate_limit_exceeded"},
    PERMANENT: {
        "context_length_exceeded",
        "invalid_request_error",
        "not_found_error",
        "permission_error",
        "request_too_large",
    },
}
# Verdicts by status; other 5xx are transient, and all others permanent.
_STATUSES = {
    FATAL: (401, 402, "UNAUTHENTICATED"),
    OVERLOAD: (429, 498, 529, "RESOURCE_EXHAUSTED"),
    PERMANENT: (501, 505),
    TRANSIENT: (
        *(408, 409, 425, 499),
        *("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN"),
    ),
}
_OVERLOAD_WITH_RETRY_AFTER = (403, 413, 503)
_MOST_CAUSES = 5
# No server asks for a wait of 30 years, so a number from here on is a Unix time.
_FIRST_UNIX_TIME = 1e9
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_RESET_HEADER = re.compile(r"x-ratelimit-reset-.+|anthropic-ratelimit-.+-reset")
_DURATION = re.compile(r"(\d+(?:\.\d*)?)(ms|[smhd])", re.ASCII)


def classify(exc: Exception) -> Verdict:
    """
    Judge an exception by its attributes, without knowing the library that it comes from.

    1. The status is read as :func:`response_status` does. A status below 300 counts as none.
    2. Names in the body come before the status. The body is ``body``, ``error`` or ``details``, if that is a
       mapping, or botocore's ``response["Error"]``. The names are its ``type``, ``code`` and ``status``, at
       the top and under ``error``, in any case. ``insufficient_quota billing_hard_limit_reached
       billing_not_active account_deactivated invalid_api_key authentication_error
       UnrecognizedClientException`` are fatal. ``ThrottlingException TooManyRequestsException
       RESOURCE_EXHAUSTED`` are overload. Without a status, ``overloaded_error rate_limit_error
       rate_limit_exceeded 429 503 529`` are overload, ``invalid_request_error context_length_exceeded
       not_found_error permission_error request_too_large`` are permanent, and any other name is transient.
    3. By status, 401 and 402 are fatal. 429, 498 and 529 are overload, and so are 403, 413 and 503 with a
       Retry-After. 408, 409, 425, 499 and other 5xx are transient. 501, 505, 3xx and other 4xx are permanent.
       Of gRPC, ``UNAUTHENTICATED`` is fatal, ``RESOURCE_EXHAUSTED`` overload, ``UNAVAILABLE DEADLINE_EXCEEDED
       ABORTED INTERNAL UNKNOWN CANCELLED`` transient, and the rest permanent.
    4. The header ``x-should-retry: false`` makes transient and overload permanent, and ``true`` makes
       permanent transient.
    5. Without a status and a name, ``TypeError AttributeError NameError ImportError AssertionError
       NotImplementedError RecursionError FileNotFoundError PermissionError ssl.SSLCertVerificationError`` are
       permanent. Any other error is judged by the first of its causes with a status or a name, at most five
       steps down: ``__cause__``, azure-core's ``inner_exception`` or tenacity's ``last_attempt``. Else it is
       transient.

    A function that is not async is fatal: it would fail for every input. An exception group is judged by the
    gravest of its members, at any depth. At most 10,000 exceptions are read. ``BatchStopped`` is
    judged as its cause, and is permanent without one; ``LoopClosed`` is permanent.

    ``retry_after`` is read from the headers of the response or of the exception: ``retry-after-ms``, or
    ``retry-after`` as seconds, as an HTTP date (RFC 9110, section 10.2.3) or as a Unix time. Of an overload
    without these it is the longest of each ``x-ratelimit-reset-*`` and ``anthropic-ratelimit-*-reset`` whose
    ``remaining`` is 0, and of the ``retryDelay`` of a ``google.rpc.RetryInfo`` in the body. Zero, a time in
    the past and garbage are no Retry-After, and neither are headers after the first 1,000, or values of more
    than 100 characters.

    :param exc: the exception of the attempt
    :return: the verdict; this function never raises and takes bounded time, for any attributes of ``exc``
    """
    if is_plain(exc):
        return _PERMANENT if isinstance(exc, _PERMANENT_TYPES) else _TRANSIENT

    return _Judgement().of_all(exc, _MOST_CAUSES, set()) or Verdict(TRANSIENT)


class _Judgement:
    """One judgement of an exception, which reads a bounded number of exceptions."""

    def __init__(self) -> None:
        self._left = iter(range(MOST_ERRORS))
        # Members may share their causes, which are then judged with the first of them.
        self._causes: set[int] = set()
        self._stops: set[int] = set()

    def of_all(self, exc: BaseException, steps: int, seen: set[int]) -> Verdict | None:
        """
        Judge an exception, or all of a group.

        :param steps: how many causes may follow each other
        :param seen: the ids of the exceptions to leave out
        :return: the verdict, or ``None`` if all exceptions are left out
        """
        return _gravest(self._of_one(error, steps) for error in self._members(exc, seen))

    def _members(self, exc: BaseException, seen: set[int]) -> Iterator[BaseException]:
        for error in members(exc, seen):
            if next(self._left, None) is None:
                return

            yield error

    def _of_one(self, exc: BaseException, steps: int) -> Verdict:
        verdict = self._told(exc, steps)
        if verdict is not None:
            return verdict

        if is_not_async(exc):
            return Verdict(FATAL)

        if is_of(exc, _PERMANENT_TYPES):
            return Verdict(PERMANENT)

        while verdict is None and steps > 0 and (cause := cause_of(exc)) is not None:
            exc, steps = cause, steps - 1
            verdict = _gravest(self._told(error, steps) for error in self._members(cause, self._causes))

        return verdict or Verdict(TRANSIENT)

    def _told(self, exc: BaseException, steps: int) -> Verdict | None:
        """Judge an error of this library, or any by status or body; return ``None`` without these."""
        if is_of(exc, BatchStopped):
            cause = cause_of(exc)
            if cause is None or steps == 0:
                return Verdict(PERMANENT)

            return self.of_all(cause, steps - 1, self._stops) or Verdict(TRANSIENT)

        own = own_verdict(exc)
        if own in _GRAVITY:
            wait = _number(text_of(read_attribute(exc, "retry_after_seconds")))
            return Verdict(VerdictKind(own), _positive(wait))

        return _by_response(exc)


def _gravest(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """Return the gravest kind with the longest wait among the verdicts."""
    found = [verdict for verdict in verdicts if verdict is not None]
    if len(found) <= 1:
        return found[0] if found else None

    waits = [verdict.retry_after for verdict in found if verdict.retry_after is not None]
    return Verdict(max((verdict.kind for verdict in found), key=_GRAVITY.index), max(waits, default=None))


# --- the response


def _by_response(exc: BaseException) -> Verdict | None:
    status = response_status(exc)
    if isinstance(status, int) and status < 300:
        status = None

    bodies = error_bodies(exc)
    names = {text_of(body.get(field)).lower() for body in bodies for field in _NAME_FIELDS} - {""}
    if status is None and not names:
        return None

    headers = response_headers(exc)
    kind = _by_name(names, _NAMES)
    if kind is None:
        kind = _by_status(status, headers) if status else _by_name(names, _NAMES_WITHOUT_STATUS) or TRANSIENT

    should_retry = headers.get("x-should-retry", "").strip().lower()
    if should_retry == "false" and kind is not FATAL:
        kind = PERMANENT
    elif should_retry == "true" and kind is PERMANENT:
        kind = TRANSIENT

    wait = _retry_after(headers)
    if kind is OVERLOAD and not _has_retry_after(headers):
        waits = [*_resets(headers), *map(_duration, retry_delays(exc, bodies))]
        wait = max((seconds for seconds in waits if seconds is not None), default=None)

    return Verdict(kind, wait)


def _by_name(names: set[str], table: Mapping[VerdictKind, set[str]]) -> VerdictKind | None:
    return next((kind for kind, listed in table.items() if not listed.isdisjoint(names)), None)


def _by_status(status: int | str, headers: Mapping[str, str]) -> VerdictKind:
    if status in _OVERLOAD_WITH_RETRY_AFTER and _has_retry_after(headers):
        return OVERLOAD

    for kind, statuses in _STATUSES.items():
        if status in statuses:
            return kind

    return TRANSIENT if isinstance(status, int) and status >= 500 else PERMANENT


# --- the waits that a server asks for


def _has_retry_after(headers: Mapping[str, str]) -> bool:
    return "retry-after" in headers or "retry-after-ms" in headers


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After; ``None`` if it cannot be read."""
    milliseconds = _positive(_number(headers.get("retry-after-ms", "")) / 1000)
    return milliseconds or _seconds(headers.get("retry-after", ""))


def _resets(headers: Mapping[str, str]) -> Iterator[float | None]:
    """Yield the seconds until the reset of each used-up limit."""
    for name, text in headers.items():
        remaining = headers.get(name.replace("reset", "remaining"), "")
        if _RESET_HEADER.fullmatch(name) and _number(remaining) <= 0:
            yield _duration(text) or _seconds(text)


def _seconds(text: str) -> float | None:
    """Return the seconds until a time: given in seconds, as Unix time, HTTP date or RFC 3339."""
    number = _positive(_number(text))
    if number is not None and number < _FIRST_UNIX_TIME:
        return number

    try:
        # A date is of the server's wall clock, so it is compared with the local one.
        return _positive((number or _timestamp(text)) - time.time())
    except Exception:
        return None


def _timestamp(text: str) -> float:
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError:
        date = email.utils.parsedate_to_datetime(text)

    # The asctime form names no zone, and is in UTC like the others.
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


def _duration(text: str) -> float | None:
    """Return the seconds of a duration such as ``6m0s`` or ``120ms``; ``None`` for any other text."""
    parts = _DURATION.findall(text)
    if "".join(map("".join, parts)) != text.strip():
        return None

    return _positive(sum(float(number) * _UNITS[unit] for number, unit in parts))


def _number(text: str) -> float:
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _positive(number: float) -> float | None:
    return number if 0 < number < math.inf else None

"""Reads the response behind an exception, without knowing the library of the exception."""

from __future__ import annotations

__all__ = [
    "MOST_ERRORS",
    "cause_of",
    "error_bodies",
    "is_of",
    "is_plain",
    "is_sign_of_outage",
    "members",
    "own_verdict",
    "response_headers",
    "response_status",
    "retry_delays",
    "text_of",
]

import builtins
import errno
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

from ._errors import AgentLoopError
from ._foreign import foreign_code, read_attribute
from ._validators import close_coroutine

# How many exceptions of groups and of chains of causes are read, and how many items of a mapping.
MOST_ERRORS = 10_000
_MOST_ITEMS = 1000
# The longest date of RFC 9110 has 33 characters.
_MOST_CHARACTERS = 100
_MOST_BITS = 3 * _MOST_CHARACTERS
_STATUS_FIELDS = ("status_code", "status", "http_status", "code")
_BODY_FIELDS = ("body", "error", "details")
_READ_FIELDS = {"type", "code", "status", "error", "details"}
_READ_HEADERS = ("retry-after", "x-should-retry", "x-ratelimit-re", "anthropic-ratelimit-")
# The names of google.rpc.Code; the first six are 5xx in HTTP.
_GRPC_5XX = ("DATA_LOSS", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNIMPLEMENTED", "UNKNOWN")
_GRPC_STATUSES = {
    *_GRPC_5XX,
    *("ABORTED", "ALREADY_EXISTS", "CANCELLED", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND"),
    *("OUT_OF_RANGE", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED"),
}
_FILE_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_FILE_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE}
_FILE_ERRNOS.add(getattr(errno, "EDQUOT", errno.ENOSPC))  # missing on Windows
# The stored values: a subclass may have properties of these names.
_exceptions_of = vars(BaseExceptionGroup)["exceptions"].__get__
_cause_of = vars(BaseException)["__cause__"].__get__
_context_of = vars(BaseException)["__context__"].__get__
_errno_of = vars(OSError)["errno"].__get__


_GROUPS = (BaseExceptionGroup, ExceptionGroup)
_PLAIN_TYPES = {kind for kind in vars(builtins).values() if isinstance(kind, type) and kind not in _GROUPS}


def is_plain(exc: BaseException) -> bool:
    """Return whether an exception is one of Python's own, without attributes, cause or members."""
    return type(exc) in _PLAIN_TYPES and not exc.__dict__ and _cause_of(exc) is None


def is_of(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Return whether a value is of a type, without reading its ``__class__``, which may raise."""
    return issubclass(type(value), kinds)


# --- the status


def response_status(exc: BaseException) -> int | str | None:
    """
    Return the status of the response behind an exception.

    The status is read from ``status_code``, ``status``, ``http_status`` or ``code``, then from
    ``response.status_code``, ``response.status`` or ``response["ResponseMetadata"]["HTTPStatusCode"]``, each
    an int, a member of ``HTTPStatus`` or three digits. gRPC's method ``code()`` is called. No SDK is
    imported. A ``classify`` of your own can use it.

    :param exc: the exception; its causes are not read
    :return: an HTTP status, the name of a gRPC status, or ``None`` if there is no status; this function never
        raises and takes bounded time, for any attributes of ``exc``
    """
    if is_plain(exc):
        return None  # the most frequent case

    for field in _STATUS_FIELDS:
        status = _status(read_attribute(exc, field))
        if status is not None:
            return status

    code = read_attribute(exc, "code")
    if callable(code) and not is_of(code, type):
        name = read_attribute(_call(code), "name")
        if type(name) is str and name in _GRPC_STATUSES:
            return name

    response = read_attribute(exc, "response")
    for field in _STATUS_FIELDS[:2]:
        status = _status(read_attribute(response, field))
        if status is not None:
            return status

    return _status(_item(_item(response, "ResponseMetadata"), "HTTPStatusCode"))


def _status(value: object) -> int | None:
    if type(value) is bool or not is_of(value, (int, str)):
        return None

    digits = text_of(value)
    is_number = len(digits) == 3 and digits.isascii() and digits.isdigit()
    return int(digits) if is_number and "100" <= digits <= "599" else None


def _call(method: Any) -> Any:
    """Return the result of a foreign method; ``None`` if it raises or is async."""
    with foreign_code:
        value = method()
        return None if close_coroutine(value) else value


# --- the body


def error_bodies(exc: BaseException) -> list[dict[str, Any]]:
    """Return the mappings that describe the error, with the fields that are read here in lower case."""
    sources = [read_attribute(exc, field) for field in _BODY_FIELDS]
    sources.append(_item(read_attribute(exc, "response"), "Error"))
    bodies = [_fields(source) for source in sources if source is not None]
    return bodies + [_fields(body["error"]) for body in bodies if "error" in body]


def retry_delays(exc: BaseException, bodies: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the delay of each ``google.rpc.RetryInfo``, in JSON or as an object, as ``41s``."""
    for details in (read_attribute(exc, "details"), *(body.get("details") for body in bodies)):
        if is_of(details, (list, tuple)):
            for detail in _first(details):
                yield text_of(_item(detail, "retryDelay"))
                delay = read_attribute(detail, "retry_delay")
                seconds, nanos = (text_of(read_attribute(delay, name)) for name in ("seconds", "nanos"))
                yield f"{seconds}.{nanos or 0:0>9}s"


def _item(source: object, key: str) -> Any:
    """Return an item of a mapping; ``None`` if it is missing, or reading it raises."""
    if source is not None:
        with foreign_code:
            if issubclass(type(source), Mapping):
                return cast("Mapping[str, Any]", source).get(key)

    return None


def _fields(source: object) -> dict[str, Any]:
    """Return the items of a mapping that are read here, with lower-case names."""
    found: dict[str, Any] = {}
    with foreign_code:
        if issubclass(type(source), Mapping):
            for key, value in _first(cast("Mapping[Any, Any]", source).items()):
                name = text_of(key).lower()
                if name in _READ_FIELDS:
                    found.setdefault(name, value)

    return found


# --- the headers


def response_headers(exc: BaseException) -> dict[str, str]:
    """Return the headers about retries, with lower-case names; those of the response first."""
    response = read_attribute(exc, "response")
    found: dict[str, str] = {}
    for headers in (
        read_attribute(response, "headers"),
        read_attribute(exc, "headers"),
        _item(_item(response, "ResponseMetadata"), "HTTPHeaders"),
    ):
        if headers is None:
            continue

        with foreign_code:
            for key, value in _first(headers.items() if hasattr(headers, "items") else headers):
                name = text_of(key).lower()
                if name.startswith(_READ_HEADERS):
                    found.setdefault(name, text_of(value))

    return found


def text_of(value: object) -> str:
    """Return a name or a value as text; empty if it is no text or number, or longer than 100 characters."""
    text = ""
    # By the methods of the types themselves, since a subclass may override them.
    if is_of(value, str):
        text = str.__getitem__(cast("str", value), slice(_MOST_CHARACTERS + 1))
    elif is_of(value, bytes):
        text = bytes.__getitem__(cast("bytes", value), slice(_MOST_CHARACTERS + 1)).decode("latin-1")
    elif is_of(value, int):
        number = int.__index__(cast("int", value))
        text = str(number) if number.bit_length() <= _MOST_BITS else ""
    elif is_of(value, float):
        text = float.__repr__(cast("float", value))

    return text if len(text) <= _MOST_CHARACTERS else ""


def _first(source: Any) -> Iterator[Any]:
    return islice(source, _MOST_ITEMS)


# --- groups and causes


def members(exc: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """
    Yield the errors in a group at any depth, each object once; for another error, the error itself.

    :param seen: the ids of errors to leave out; the ids of the yielded errors are added
    """
    left = [exc]
    while left:
        exc = left.pop()
        if id(exc) not in seen:
            seen.add(id(exc))
            if is_of(exc, BaseExceptionGroup):
                left.extend(_exceptions_of(exc))
            else:
                yield exc


def cause_of(exc: BaseException) -> BaseException | None:
    """Return the cause of an exception: ``__cause__``, or that of azure-core, or tenacity's last attempt."""
    cause = _cause_of(exc)
    if cause is None:
        cause = read_attribute(exc, "inner_exception")

    if cause is None:
        attempt = read_attribute(exc, "last_attempt")
        # exception() would wait for an unfinished attempt.
        if attempt is not None and _call(read_attribute(attempt, "done")) is True:
            cause = _call(read_attribute(attempt, "exception"))

    return cause if is_of(cause, BaseException) else None


def is_sign_of_outage(exc: BaseException) -> bool:
    """
    Return whether a failure is a sign of trouble at the provider.

    Such a failure has the status 408 or 5xx, or is an ``OSError`` that is not about files. The exceptions in
    its ``__cause__`` and ``__context__`` and in its group count too. An error of this library with a verdict
    of its own, such as the time-out of a nested call, is no such sign, and neither are its causes. This
    function never raises and takes bounded time.
    """
    if is_plain(exc) and not isinstance(exc, OSError) and exc.__context__ is None:
        return False  # the most frequent case

    seen: set[int] = set()
    left: list[BaseException | None] = [exc]
    while left and len(seen) < MOST_ERRORS:
        error = left.pop()
        if error is None or id(error) in seen or own_verdict(error) is not None:
            continue

        seen.add(id(error))
        status = response_status(error)
        is_bad = status == 408 or status >= 500 if isinstance(status, int) else status in _GRPC_5XX
        if is_bad or _is_about_network(error):
            return True

        if is_of(error, BaseExceptionGroup):
            left.extend(_exceptions_of(error))

        # Some clients raise their own error while they handle a network error, or hide that by `from None`.
        left += [_context_of(error), cause_of(error)]

    return False


def own_verdict(exc: BaseException) -> str | None:
    """Return the verdict kind that an error of this library carries, if any."""
    verdict = read_attribute(exc, "_verdict") if is_of(exc, AgentLoopError) else None
    return verdict if type(verdict) is str else None


def _is_about_network(exc: BaseException) -> bool:
    if not is_of(exc, OSError) or is_of(exc, _FILE_ERRORS):
        return False

    number = _errno_of(exc)
    return type(number) is not int or number not in _FILE_ERRNOS

"""What an exception tells of a response, read without knowing the library that it comes from."""

from __future__ import annotations

__all__ = [
    "GRPC",
    "MOST_ERRORS",
    "is_of",
    "members",
    "own_verdict",
    "read_item",
    "response_status",
    "speaks_of_provider",
]

import errno
from collections.abc import Iterator, Mapping
from typing import Any, cast

from ._errors import AgentLoopError
from ._foreign import foreign_code, read_attribute
from ._validators import close_coroutine

# How many exceptions of groups and of chains of causes are looked at.
MOST_ERRORS = 10_000
_STATUS_FIELDS = ("status_code", "status", "http_status", "code")
# The names of gRPC's statuses, and the HTTP status of each (google.rpc.Code).
GRPC = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}
_FILE_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_FILE_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE}
_FILE_ERRNOS.add(getattr(errno, "EDQUOT", errno.ENOSPC))  # missing on Windows
# What the exceptions themselves store: a subclass may have put properties in place of these.
_exceptions_of = vars(BaseExceptionGroup)["exceptions"].__get__
_cause_of = vars(BaseException)["__cause__"].__get__
_context_of = vars(BaseException)["__context__"].__get__
_errno_of = vars(OSError)["errno"].__get__


def is_of(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Return whether a value is of a type, without asking the value: its ``__class__`` may raise."""
    return issubclass(type(value), kinds)


def response_status(exc: BaseException) -> int | str | None:
    """
    Return the status of the response that an exception tells of: an HTTP status, or the name of a gRPC one.

    It is read from ``status_code``, ``status``, ``http_status`` or ``code``, which gRPC makes a method, from
    ``response.status_code`` or ``response.status``, or from
    ``response["ResponseMetadata"]["HTTPStatusCode"]``. It may be an int or three digits. So the exceptions of
    httpx, openai, anthropic, aiohttp, botocore, google-genai, google-api-core, grpc and azure-core are
    understood, and none of these libraries is imported. A ``classify`` of your own may ask for it.

    :param exc: the exception; its causes are not looked at
    :return: the status, or ``None`` if there is none. This function never raises and takes bounded time
    """
    for field in _STATUS_FIELDS:
        status = _status(read_attribute(exc, field))
        if status is not None:
            return status

    response = read_attribute(exc, "response")
    for field in _STATUS_FIELDS[:2]:
        status = _status(read_attribute(response, field))
        if status is not None:
            return status

    return _status(read_item(read_item(response, "ResponseMetadata"), "HTTPStatusCode"))


def _status(value: object) -> int | str | None:
    """Return the status that a value is, if it is one."""
    if value is None or type(value) is bool:
        return None

    if is_of(value, int):
        # What it is, whatever a subclass says instead.
        number = int.__index__(cast("int", value))
        return number if 100 <= number <= 599 else None

    if is_of(value, str):
        digits = str.__getitem__(cast("str", value), slice(4))
        return _status(int(digits)) if len(digits) == 3 and digits.isascii() and digits.isdigit() else None

    name = None
    with foreign_code:
        if callable(value) and not is_of(value, type):
            code: object = value()
            if not close_coroutine(code):
                name = read_attribute(code, "name")

    return name if type(name) is str and name in GRPC else None


def read_item(source: object, key: str) -> Any:
    """Return an item of a mapping; ``None`` if it is missing, or cannot be had."""
    with foreign_code:
        if issubclass(type(source), Mapping):
            return cast("Mapping[str, Any]", source).get(key)

    return None


def members(exc: BaseException) -> Iterator[BaseException]:
    """Yield the errors that a group holds at any depth, each object once; of another error, itself."""
    seen: set[int] = set()
    left = [exc]
    while left:
        exc = left.pop()
        if id(exc) not in seen:
            seen.add(id(exc))
            if is_of(exc, BaseExceptionGroup):
                left.extend(_exceptions_of(exc))
            else:
                yield exc


def speaks_of_provider(exc: BaseException) -> bool:
    """
    Return whether a failure is one that a provider in trouble causes.

    Such a failure has the status 408 or 5xx, or is an ``OSError`` that is not about files. The exceptions in
    its ``__cause__`` and ``__context__`` and in its group count too. An error of this library with a verdict
    of its own, such as the time-out of a nested call, says nothing about a provider, and neither do its
    causes. This function never raises and takes bounded time.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [exc]
    while left and len(seen) < MOST_ERRORS:
        error = left.pop()
        if error is None or id(error) in seen or own_verdict(error) is not None:
            continue

        seen.add(id(error))
        status = response_status(error)
        status = GRPC.get(status, 0) if isinstance(status, str) else status or 0
        if status == 408 or status >= 500 or _is_about_network(error):
            return True

        if is_of(error, BaseExceptionGroup):
            left.extend(_exceptions_of(error))

        left += [_context_of(error), _cause_of(error)]

    return False


def own_verdict(exc: BaseException) -> str | None:
    """Return what kind of verdict an error of this library says it deserves, if it says so."""
    verdict = read_attribute(exc, "_verdict") if is_of(exc, AgentLoopError) else None
    return verdict if type(verdict) is str else None


def _is_about_network(exc: BaseException) -> bool:
    if not is_of(exc, OSError) or is_of(exc, _FILE_ERRORS):
        return False

    number = _errno_of(exc)
    return type(number) is not int or number not in _FILE_ERRNOS

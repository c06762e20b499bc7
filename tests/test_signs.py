"""What an exception tells of a response and of a provider. Nothing in here needs an event loop."""

import errno
import ssl
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from agentloop import BatchStopped, IdleTimeout, InvocationTimeout, LoopClosed, response_status
from agentloop._signs import is_sign_of_outage
from agentloop.testing import FakeHTTPError


class ResponseError(Exception):
    """What a client or a framework makes of a failure."""

    def __init__(self, *args: object, **attributes: object) -> None:
        super().__init__(*args)
        vars(self).update(attributes)


def rpc_error(name: str) -> Exception:
    return ResponseError(name, code=lambda: SimpleNamespace(name=name))


def caused_by(cause: BaseException) -> Exception:
    error = ResponseError()
    error.__cause__ = cause
    return error


def on_handling(context: BaseException) -> Exception:
    error = ResponseError()
    error.__context__ = context
    return error


def inside(inner: BaseException) -> Exception:
    return ResponseError(inner_exception=inner)  # as azure-core keeps it


def grouped(member: Exception) -> Exception:
    return ExceptionGroup("several", [ValueError(), ExceptionGroup("inner", [member])])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FakeHTTPError(429), 429),
        (ResponseError(status=HTTPStatus.NOT_FOUND), 404),
        (ResponseError(code="503"), 503),
        (rpc_error("UNAVAILABLE"), "UNAVAILABLE"),
        (rpc_error("OK"), None),
        (ResponseError(response={"ResponseMetadata": {"HTTPStatusCode": 400}}), 400),
        (ResponseError(status_code=None, response=SimpleNamespace(status=500)), 500),
        (ResponseError(status_code=401, status=402, code=403), 401),
        (ResponseError(status=100, code=503), 100),
        (ResponseError(status=599), 599),
        (ResponseError(code=1006), None),
        (caused_by(FakeHTTPError(429)), None),
        (ValueError(), None),
    ],
    ids=range(13),
)
def test_status_of_a_response_is_read_from_an_exception(error: Exception, status: object) -> None:
    found = response_status(error)
    assert found == status
    assert type(found) is type(status)


every_wrapping = pytest.mark.parametrize("wrap", [lambda exc: exc, caused_by, on_handling, inside, grouped])


@every_wrapping
@pytest.mark.parametrize(
    "error",
    [
        *(FakeHTTPError(408), FakeHTTPError(500), FakeHTTPError(503), FakeHTTPError(529)),
        *(rpc_error("UNAVAILABLE"), rpc_error("DEADLINE_EXCEEDED"), rpc_error("INTERNAL")),
        *(rpc_error("UNKNOWN"), ConnectionRefusedError(), TimeoutError()),
        *(OSError(errno.ENETUNREACH, "no network"), OSError("no number"), ssl.SSLError()),
    ],
    ids=repr,
)
def test_bad_status_or_network_error_speaks_of_the_provider(wrap: Any, error: Exception) -> None:
    assert is_sign_of_outage(wrap(error))
    assert is_sign_of_outage(wrap(wrap(error)))


@every_wrapping
@pytest.mark.parametrize(
    "error",
    [
        *(ValueError(), FakeHTTPError(429), FakeHTTPError(404), rpc_error("RESOURCE_EXHAUSTED")),
        *(FileExistsError(), FileNotFoundError(), IsADirectoryError(), NotADirectoryError()),
        *(PermissionError(), InvocationTimeout(5), IdleTimeout(5), BatchStopped("spent"), LoopClosed()),
        *(OSError(number, "") for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)),
    ],
    ids=repr,
)
def test_any_other_error_does_not_speak_of_the_provider(wrap: Any, error: Exception) -> None:
    assert not is_sign_of_outage(wrap(error))


def test_cause_of_an_error_of_the_library_and_causes_without_an_end_speak_of_nobody() -> None:
    stopped = BatchStopped("too many failures")
    stopped.__cause__ = ConnectionError()
    assert not is_sign_of_outage(stopped)
    error = ResponseError()
    error.__cause__ = caused_by(error)
    assert not is_sign_of_outage(error)


def test_number_of_causes_that_are_looked_at_is_bounded() -> None:
    error: Exception = ConnectionError()
    for _ in range(10_000):
        error = caused_by(error)

    assert not is_sign_of_outage(error)
    assert error.__cause__ is not None
    assert is_sign_of_outage(error.__cause__)

"""What a failure means. Nothing in here needs an event loop."""

import asyncio
import copy
import email.message
import email.utils
import http
import itertools
import math
import pickle
import re
import ssl
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType, SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentloop import (
    AgentLoopError,
    BatchStopped,
    IdleTimeout,
    InvocationCancelled,
    InvocationTimeout,
    LeftOpenError,
    LoopClosed,
    Verdict,
    VerdictKind,
    classify,
)
from agentloop._errors import not_async
from agentloop.journal import JournaledError, JournalError

TRANSIENT, OVERLOAD, PERMANENT, FATAL = VerdictKind

ATTRIBUTES = [
    *("status_code", "status", "http_status", "code", "response", "headers", "body", "error", "details"),
    *("inner_exception", "last_attempt", "__cause__", "__class__"),
]
# The date that RFC 9110 writes in each of its three forms (section 5.6.7).
RFC_DATE = 784111777
HTTP_DATES = ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]


class HTTPError(Exception):
    """An error with whatever attributes a client library may give to it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(", ".join(attributes))
        vars(self).update(attributes)


class Broken:
    """An object of which nothing can be read."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        return "Broken()"


def named(value: object) -> str:
    """Return a test id that is the same in every run."""
    return re.sub(r" at 0x\w+", "", repr(value))[:60]


DOWN = HTTPError(status=503)


def with_headers(headers: Any, status: int = 429) -> HTTPError:
    return HTTPError(response=SimpleNamespace(status_code=status, headers=headers))


def retry_after(headers: Any) -> float | None:
    return classify(with_headers(headers)).retry_after


# --- the verdict


def test_verdict_kinds_are_those_of_the_contract() -> None:
    assert [str(kind) for kind in VerdictKind] == ["transient", "overload", "permanent", "fatal"]


def test_verdict_is_a_frozen_value() -> None:
    verdict = Verdict(OVERLOAD, 5)
    assert verdict == Verdict(OVERLOAD, retry_after=5) != Verdict(OVERLOAD)
    assert Verdict(TRANSIENT).retry_after is None
    assert pickle.loads(pickle.dumps(verdict)) == verdict
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        verdict.retry_after = None


@pytest.mark.parametrize("kind", ["transient", None, 0, VerdictKind], ids=named)
def test_verdict_of_no_kind_is_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match=f"^kind must be of type VerdictKind, got {re.escape(repr(kind))}$"):
        Verdict(kind)


@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        (True, TypeError, "a number or None, got True"),
        ("5", TypeError, "a number or None, got '5'"),
        (math.nan, ValueError, "a number, got nan"),
        (-1, ValueError, "at least 0, got -1 (None means no limit)"),
        (math.inf, ValueError, "finite, got inf"),
    ],
    ids=named,
)
def test_bad_retry_after_is_refused_by_name(value: Any, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=f"^retry_after must be {re.escape(rule)}$"):
        Verdict(TRANSIENT, value)


# --- the table


KIND_OF_STATUS = {
    **dict.fromkeys([401, 402], FATAL),
    **dict.fromkeys([429, 498, 529], OVERLOAD),
    **dict.fromkeys([408, 409, 425, 499, 500, 502, 503, 504, 520, 599], TRANSIENT),
    **dict.fromkeys([300, 302, 304, 400, 403, 404, 410, 413, 422, 451, 501, 505], PERMANENT),
    **dict.fromkeys([100, 200, 204, 299], TRANSIENT),
}
GRPC_TRANSIENT = "UNAVAILABLE DEADLINE_EXCEEDED ABORTED INTERNAL UNKNOWN CANCELLED"
GRPC_PERMANENT = (
    "INVALID_ARGUMENT NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED FAILED_PRECONDITION OUT_OF_RANGE "
    "UNIMPLEMENTED DATA_LOSS"
)
KIND_OF_GRPC_STATUS = {
    "RESOURCE_EXHAUSTED": OVERLOAD,
    "UNAUTHENTICATED": FATAL,
    **dict.fromkeys(GRPC_TRANSIENT.split(), TRANSIENT),
    **dict.fromkeys(GRPC_PERMANENT.split(), PERMANENT),
}


def rpc_error(name: object) -> HTTPError:
    return HTTPError(code=lambda: SimpleNamespace(name=name), details=lambda: "no mapping")


@pytest.mark.parametrize(("status", "kind"), KIND_OF_STATUS.items())
def test_status_decides_wherever_it_is_found(status: int, kind: VerdictKind) -> None:
    for value in (status, str(status)):
        for exc in (
            HTTPError(status_code=value),
            HTTPError(status=value),
            HTTPError(http_status=value),
            HTTPError(code=value),
            HTTPError(response=SimpleNamespace(status_code=value)),
            HTTPError(response=SimpleNamespace(status=value)),
            HTTPError(response={"ResponseMetadata": {"HTTPStatusCode": value}}),
        ):
            assert classify(exc) == Verdict(kind)


@pytest.mark.parametrize(("name", "kind"), KIND_OF_GRPC_STATUS.items())
def test_status_of_grpc_decides(name: str, kind: VerdictKind) -> None:
    assert classify(rpc_error(name)) == Verdict(kind)


@pytest.mark.parametrize("status", [403, 413, 503])
def test_refusal_with_a_retry_after_is_overload(status: int) -> None:
    for headers in ({"Retry-After": "5"}, {"retry-after-ms": "5000"}):
        assert classify(with_headers(headers, status)) == Verdict(OVERLOAD, 5)

    assert classify(with_headers({"Retry-After": "0"}, status)) == Verdict(OVERLOAD)
    assert classify(with_headers({"Date": "today"}, status)) == Verdict(KIND_OF_STATUS[status])


@pytest.mark.parametrize("status", [400, 401, 408, 500])
def test_retry_after_is_reported_with_every_status_and_changes_no_other_kind(status: int) -> None:
    plain = classify(HTTPError(status_code=status))
    assert classify(with_headers({"Retry-After": "5"}, status)) == attrs.evolve(plain, retry_after=5)


@pytest.mark.parametrize(
    "error",
    [
        *(AssertionError, AttributeError, ImportError, ModuleNotFoundError, NameError, UnboundLocalError),
        *(NotImplementedError, RecursionError, TypeError, FileNotFoundError, PermissionError),
        ssl.SSLCertVerificationError,
    ],
)
def test_error_that_comes_again_is_permanent(error: type[Exception]) -> None:
    assert classify(error("bug")) == Verdict(PERMANENT)


@pytest.mark.parametrize(
    "error",
    [
        *(ConnectionError, ConnectionResetError, BrokenPipeError, TimeoutError, OSError, IsADirectoryError),
        *(ssl.SSLError, EOFError, Exception, KeyError, RuntimeError, ValueError, ZeroDivisionError),
    ],
)
def test_any_other_error_is_transient(error: type[Exception]) -> None:
    assert classify(error("bad luck")) == Verdict(TRANSIENT)


# --- what the body says

FATAL_NAMES = [
    *("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"),
    *("invalid_api_key", "authentication_error", "UnrecognizedClientException"),
]
OVERLOAD_NAMES = ["ThrottlingException", "TooManyRequestsException", "RESOURCE_EXHAUSTED"]
NAMES_WITHOUT_STATUS = {
    **dict.fromkeys(["overloaded_error", "rate_limit_error", "rate_limit_exceeded"], OVERLOAD),
    **dict.fromkeys(["429", "503", "529", 429, 503, 529], OVERLOAD),
    **dict.fromkeys(["invalid_request_error", "context_length_exceeded", "not_found_error"], PERMANENT),
    **dict.fromkeys(["permission_error", "request_too_large"], PERMANENT),
    **dict.fromkeys(["api_error", "unheard_of", 500], TRANSIENT),
}


def with_body(name: object, **attributes: Any) -> Iterator[Exception]:
    """Yield an error for each place where a body may have a name."""
    for field, key in itertools.product(["type", "code", "status"], [str.lower, str.upper, str.title]):
        body = {"message": "no", key(field): name}
        for attribute in ("body", "error", "details"):
            yield HTTPError(**attributes, **{attribute: body})
            yield HTTPError(**attributes, **{attribute: {"type": "error", key("error"): body}})
            yield HTTPError(**attributes, **{attribute: MappingProxyType(body)})

        if "response" not in attributes:
            yield HTTPError(**attributes, response={"Error": body})


@pytest.mark.parametrize(
    ("name", "kind"),
    [*zip(FATAL_NAMES, itertools.repeat(FATAL)), *zip(OVERLOAD_NAMES, itertools.repeat(OVERLOAD))],
)
def test_name_in_a_body_of_any_status_decides(name: str, kind: VerdictKind) -> None:
    for text in (name, name.upper(), name.lower(), name.encode()):
        for exc in (*with_body(text), *with_body(text, status_code=400), *with_body(text, status=500)):
            assert classify(exc) == Verdict(kind)


@pytest.mark.parametrize(("name", "kind"), NAMES_WITHOUT_STATUS.items(), ids=named)
def test_name_in_a_body_without_a_status_or_with_a_good_one_decides(name: object, kind: VerdictKind) -> None:
    good = SimpleNamespace(status_code=200)
    for exc in (*with_body(name), *with_body(name, status_code=200), *with_body(name, response=good)):
        assert classify(exc) == Verdict(kind)


@pytest.mark.parametrize("name", NAMES_WITHOUT_STATUS, ids=named)
def test_other_name_in_a_body_with_a_bad_status_changes_nothing(name: object) -> None:
    for status in (404, 429, 500):
        assert {classify(exc).kind for exc in with_body(name, status_code=status)} == {KIND_OF_STATUS[status]}


@pytest.mark.parametrize(
    "body",
    [
        None,
        "insufficient_quota",
        ["insufficient_quota"],
        {"message": "insufficient_quota"},
        {"type": None, "code": "", "status": []},
        {"error": {"error": {"type": "insufficient_quota"}}},
        {"error": "insufficient_quota"},
        {"type": "insufficient_quota" + " " * 100, "code": 10**400},
        SimpleNamespace(type="insufficient_quota"),
    ],
    ids=named,
)
def test_body_without_a_name_says_nothing(body: object) -> None:
    error = AssertionError()
    error.body = error.error = error.details = body
    assert classify(error) == Verdict(PERMANENT)
    assert classify(HTTPError(response={"Error": body})) == Verdict(TRANSIENT)


# --- what the header x-should-retry says


@pytest.mark.parametrize(
    ("status", "value", "kind"),
    [
        *((429, "false", PERMANENT), (500, "false", PERMANENT), (400, "false", PERMANENT)),
        *((401, "false", FATAL), (400, "true", TRANSIENT), (501, "TRUE", TRANSIENT)),
        *((429, "true", OVERLOAD), (500, "true", TRANSIENT), (401, "true", FATAL), (400, "1", PERMANENT)),
        (500, "", TRANSIENT),
    ],
)
def test_server_says_whether_a_retry_is_worth_it(status: int, value: str, kind: VerdictKind) -> None:
    assert classify(with_headers({"X-Should-Retry": value}, status)) == Verdict(kind)


# --- what the causes say


def carrying(error: Exception, **attributes: Any) -> Exception:
    for name, value in attributes.items():
        setattr(error, name, value)

    return error


def caused_by(cause: BaseException | None, *, error: Exception | None = None, steps: int = 1) -> Exception:
    for _ in range(steps):
        error = error or HTTPError()
        error.__cause__, cause, error = cause, error, None

    assert isinstance(cause, Exception)
    return cause


def group_of(*members: Exception) -> Exception:
    return ExceptionGroup("several", members)


def endless(error: Exception) -> Exception:
    """Make an error the cause of its cause."""
    return carrying(error, __cause__=caused_by(error))


def attempt(*, done: object = True, raised: object = HTTPError(status=401)) -> Exception:
    """Return an error like tenacity's ``RetryError``."""
    return HTTPError(last_attempt=SimpleNamespace(done=lambda: done, exception=lambda: raised))


@pytest.mark.parametrize(
    "cause",
    [HTTPError(status=429), rpc_error("RESOURCE_EXHAUSTED"), HTTPError(body={"type": "overloaded_error"})],
    ids=named,
)
def test_error_without_a_status_is_judged_by_its_causes(cause: Exception) -> None:
    for steps in range(1, 6):
        assert classify(caused_by(cause, steps=steps)) == Verdict(OVERLOAD)

    assert classify(caused_by(cause, steps=6)) == Verdict(TRANSIENT)


UNAUTHORIZED, BUSY = HTTPError(status=401), HTTPError(status=429)
IN_AZURE = HTTPError(inner_exception=UNAUTHORIZED)
NO_RETRY = {"x-should-retry": "false"}
NO_QUOTA = {"code": "insufficient_quota"}
SEVERAL_NAMES = {"type": "invalid_request_error", "code": "rate_limit_exceeded"}
OTHERS: list[tuple[str, Exception, VerdictKind]] = [
    ("status comes before the type", carrying(TypeError(), status_code=429), OVERLOAD),
    ("good status leaves the type", carrying(TypeError(), status_code=200), PERMANENT),
    ("name comes before the type", carrying(TypeError(), body={"type": "api_error"}), TRANSIENT),
    ("graver name of two", HTTPError(body=SEVERAL_NAMES), OVERLOAD),
    ("gravest name of three", HTTPError(body={**SEVERAL_NAMES, "status": "invalid_api_key"}), FATAL),
    ("graver name within", HTTPError(body={"type": "ThrottlingException", "error": NO_QUOTA}), FATAL),
    ("no retry", HTTPError(headers=NO_RETRY, body={"type": "overloaded_error"}), PERMANENT),
    ("no retry, fatal", HTTPError(headers=NO_RETRY, body={"type": "insufficient_quota"}), FATAL),
    ("own status first", caused_by(UNAUTHORIZED, error=HTTPError(status=500)), TRANSIENT),
    ("permanent type first", caused_by(HTTPError(status=500), error=TypeError()), PERMANENT),
    ("cause of a permanent type", caused_by(TypeError()), TRANSIENT),
    ("cause of any type", caused_by(ValueError()), TRANSIENT),
    ("cause that is an interrupt", caused_by(KeyboardInterrupt()), TRANSIENT),
    ("raised while another was handled", carrying(HTTPError(), __context__=UNAUTHORIZED), TRANSIENT),
    ("causes without an end", endless(HTTPError()), TRANSIENT),
    ("group that is a cause", caused_by(group_of(DOWN, group_of(UNAUTHORIZED), TypeError())), FATAL),
    ("member with a cause", group_of(TypeError(), caused_by(UNAUTHORIZED)), FATAL),
    ("cause of azure-core", HTTPError(inner_exception=UNAUTHORIZED), FATAL),
    ("no cause of azure-core", HTTPError(inner_exception="401"), TRANSIENT),
    ("cause before that of azure-core", caused_by(BUSY, error=IN_AZURE), OVERLOAD),
    ("last attempt of tenacity", attempt(), FATAL),
    ("cause with a last attempt", caused_by(attempt(raised=HTTPError(status=429))), OVERLOAD),
    ("attempt that runs", attempt(done=False), TRANSIENT),
    ("attempt that runs in its way", attempt(done=1), TRANSIENT),
    ("attempt that raised a text", attempt(raised="401"), TRANSIENT),
    ("attempt that raised nothing", attempt(raised=None), TRANSIENT),
    ("no attempt", HTTPError(last_attempt=5), TRANSIENT),
    ("broken attempt", HTTPError(last_attempt=Broken()), TRANSIENT),
    ("cause before a last attempt", caused_by(ValueError(), error=attempt()), TRANSIENT),
]


@pytest.mark.parametrize(
    ("error", "kind"), [row[1:] for row in OTHERS], ids=[row[0].replace(" ", "_") for row in OTHERS]
)
def test_what_is_said_first_and_gravest_decides(error: Exception, kind: VerdictKind) -> None:
    assert classify(error) == Verdict(kind)


# --- the errors of the library


class Queued(AgentLoopError):
    """An error that says what kind of verdict it deserves, and when to come back."""

    _verdict = "transient"

    def __init__(self, seconds: object = 7.5) -> None:
        self.retry_after_seconds = seconds


def stopped(cause: BaseException | None) -> Exception:
    return caused_by(cause, error=BatchStopped("why"))


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (InvocationTimeout(5), Verdict(TRANSIENT)),
        (IdleTimeout(5), Verdict(TRANSIENT)),
        (caused_by(HTTPError(status=401), error=InvocationTimeout(5)), Verdict(TRANSIENT)),
        (InvocationCancelled("why"), Verdict(TRANSIENT)),
        (LoopClosed(), Verdict(PERMANENT)),
        (JournalError("full"), Verdict(PERMANENT)),
        (JournaledError("ConnectionError: gone"), Verdict(PERMANENT)),
        (LeftOpenError("agent"), Verdict(PERMANENT)),
        (caused_by(LoopClosed()), Verdict(PERMANENT)),
        (caused_by(with_headers({"Retry-After": "5"})), Verdict(OVERLOAD, 5)),
        (Queued(), Verdict(TRANSIENT, 7.5)),
        (Queued(None), Verdict(TRANSIENT)),
        (Queued(-1), Verdict(TRANSIENT)),
        (type("Odd", (Queued,), {"_verdict": "odd"})(), Verdict(TRANSIENT)),
        (type("Hostile", (Queued,), {"_verdict": Broken()})(), Verdict(TRANSIENT)),
        (type("Remote", (AgentLoopError,), {"status": 429})(), Verdict(OVERLOAD)),
        (stopped(None), Verdict(PERMANENT)),
        (stopped(HTTPError(status=401)), Verdict(FATAL)),
        (stopped(HTTPError(status=500)), Verdict(TRANSIENT)),
        (stopped(ValueError()), Verdict(TRANSIENT)),
        (stopped(TypeError()), Verdict(PERMANENT)),
        (stopped(stopped(with_headers({"Retry-After": "5"}))), Verdict(OVERLOAD, 5)),
        (stopped(stopped(None)), Verdict(PERMANENT)),
        (stopped(group_of(ValueError(), HTTPError(status=401))), Verdict(FATAL)),
        (caused_by(stopped(HTTPError(status=401))), Verdict(FATAL)),
        (group_of(stopped(DOWN), stopped(DOWN)), Verdict(TRANSIENT)),
        (not_async("give an async function"), Verdict(FATAL)),
        (endless(BatchStopped("why")), Verdict(TRANSIENT)),
    ],
    ids=range(28),
)
def test_own_error_says_what_it_means_and_so_does_its_cause(error: Exception, verdict: Verdict) -> None:
    assert classify(error) == verdict


# --- attributes of all sorts


class Proxy:
    """An object that does not even tell its class."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("this proxy is bound to nothing")


NOT_FOUND = SimpleNamespace(status_code=404)
OF_CLIENT = SimpleNamespace(status_code=401)


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"status_code": 401, "status": 429, "response": NOT_FOUND}, FATAL),
        ({"status": 429, "response": NOT_FOUND}, OVERLOAD),
        ({"status_code": None, "status": "4290", "response": OF_CLIENT}, FATAL),
        ({"status_code": True, "status": 0, "response": OF_CLIENT}, FATAL),
        ({"status": http.HTTPStatus.TOO_MANY_REQUESTS}, OVERLOAD),
        ({"status_code": http.HTTPStatus.UNAUTHORIZED}, FATAL),
        ({"response": None}, TRANSIENT),
        ({"status_code": 429, "headers": None, "response": None}, OVERLOAD),
        ({"response": Broken(), "headers": Broken()}, TRANSIENT),
        ({"status": 429, "response": Broken(), "headers": Broken()}, OVERLOAD),
        ({"status_code": Proxy(), "headers": Proxy()}, TRANSIENT),
    ],
    ids=range(11),
)
def test_first_attribute_that_is_a_status_decides(attributes: dict[str, Any], kind: VerdictKind) -> None:
    assert classify(HTTPError(**attributes)) == Verdict(kind)


@pytest.mark.parametrize(
    "value",
    [
        *(None, b"429", "4290", "42", "099", "600", " 429", "4.9", "٤٢٩", "²²²", HTTPError, True, False),
        *(429.0, 0, -1, 99, 600, 10**400, "UNAVAILABLE", [429], math.nan, object()),
    ],
    ids=named,
)
def test_value_that_is_no_http_status_is_no_status(value: Any) -> None:
    for exc in (
        HTTPError(status_code=value),
        HTTPError(status=value),
        HTTPError(code=value),
        HTTPError(response=SimpleNamespace(status_code=value)),
        rpc_error(value),
    ):
        assert classify(exc) == Verdict(TRANSIENT)


async def coroutine() -> Any:
    return SimpleNamespace(name="UNAVAILABLE")


def generator() -> Any:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    "code", [coroutine, generator, HTTPError, Broken(), lambda _: 429, lambda: 429], ids=range(6)
)
def test_code_that_gives_no_status_of_grpc_is_no_status(code: object) -> None:
    assert classify(HTTPError(code=code, response=SimpleNamespace(status=429))) == Verdict(OVERLOAD)


@pytest.mark.parametrize(
    "raised", [KeyError(), asyncio.CancelledError(), GeneratorExit(), BaseExceptionGroup("", [Exception()])]
)
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_that_raises_whatever_it_likes_is_not_there(name: str, raised: BaseException) -> None:
    def get(_: object) -> Any:
        raise raised

    hostile = type("Hostile", (Exception,), {name: property(get)})
    with_status = type("Hostile", (Exception,), {"status": 429, name: property(get)})
    assert classify(hostile()) == Verdict(TRANSIENT)
    assert classify(with_status()) == Verdict(TRANSIENT if name == "status" else OVERLOAD)
    assert classify(HTTPError(status=429, response=hostile())) == Verdict(OVERLOAD)
    assert classify(group_of(hostile(), HTTPError(status=404))) == Verdict(PERMANENT)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", ["status_code", "headers"])
def test_interrupt_while_an_attribute_is_read_propagates(name: str, interrupt: type[BaseException]) -> None:
    def get(_: object) -> Any:
        raise interrupt

    hostile = type("Hostile", (Exception,), {"status": 429, name: property(get)})
    with pytest.raises(interrupt):
        classify(hostile())


def test_status_is_the_int_that_it_is_whatever_its_class_says() -> None:
    def refuse(*_: object) -> Any:
        raise asyncio.CancelledError

    names = ("__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__int__", "__index__", "__hash__", "__bool__")
    odd = type("Odd", (int,), dict.fromkeys(names, refuse))
    assert classify(HTTPError(status_code=odd(503), headers={"Retry-After": "5"})) == Verdict(OVERLOAD, 5)
    assert classify(HTTPError(status_code=odd(10**400))) == Verdict(TRANSIENT)


def test_judging_changes_nothing_about_the_error() -> None:
    error = with_headers({"Retry-After": "5"})
    before = copy.deepcopy(vars(error))
    assert classify(error) == classify(error)
    assert vars(error) == before


# --- headers of all sorts


def message(*pairs: tuple[str, str]) -> email.message.Message:
    headers = email.message.Message()
    for name, value in pairs:
        headers[name] = value

    return headers


@pytest.mark.parametrize(
    "headers",
    [
        *({"Retry-After": "7"}, {"retry-after": "7"}, {"RETRY-AFTER": "7"}, {b"Retry-After": b"7"}),
        *({"Retry-After": 7}, {"Retry-After": 7.0}, {"X": "1", "Retry-After": "7", 3: None}),
        *([("X", "1"), ("Retry-After", "7")], ((b"x", b"1"), (b"retry-after", b"7"))),
        *([["Retry-After", "7"]], message(("X", "1"), ("Retry-After", "7"))),
    ],
    ids=named,
)
def test_headers_are_read_in_every_shape(headers: Any) -> None:
    assert retry_after(headers) == 7
    assert classify(HTTPError(status=429, headers=headers)) == Verdict(OVERLOAD, 7)


@pytest.mark.parametrize(
    "headers",
    [
        *(None, "Retry-After: 7", b"Retry-After: 7", 7, [], {}, ["Retry-After"], [("Retry-After",)]),
        *([("Retry-After", "7", "8")], {"Retry-After": Broken()}, {"Retry-After": None}),
        *({"Retry-After": ["7"]}, {Broken: "7"}, SimpleNamespace(items=None)),
        *(SimpleNamespace(items=lambda: 5), Broken(), object()),
    ],
    ids=named,
)
def test_headers_that_make_no_sense_are_no_headers(headers: Any) -> None:
    assert classify(with_headers(headers)) == Verdict(OVERLOAD)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"Retry-After": "5"}, 5), (None, 7), ({}, 7), ({"Date": "today"}, 7), (Broken(), 7), (5, 7)],
    ids=named,
)
def test_headers_of_the_error_are_read_after_those_of_the_response(headers: Any, seconds: int) -> None:
    response = SimpleNamespace(headers=headers)
    error = HTTPError(status=429, headers={"Retry-After": "7"}, response=response)
    assert classify(error).retry_after == seconds


def test_headers_are_read_as_far_as_they_can_be() -> None:
    def pairs() -> Iterator[Any]:
        yield "Retry-After", "7"
        raise asyncio.CancelledError

    assert retry_after(pairs()) == 7


def test_headers_without_an_end_are_read_for_a_while() -> None:
    read = itertools.count()

    def endless() -> Iterator[Any]:
        while True:
            yield f"X-{next(read)}", "1"

    assert retry_after(endless()) is None
    assert next(read) <= 1000
    assert retry_after(SimpleNamespace(items=endless)) is None


def test_headers_of_botocore_are_read() -> None:
    metadata = {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "7"}}
    assert classify(HTTPError(response={"ResponseMetadata": metadata})) == Verdict(OVERLOAD, 7)


LONG = 10**6


@pytest.mark.parametrize(
    "value",
    [
        *("9" * LONG, b"9" * LONG, "," * LONG, "1:" * LONG, " " * LONG + "5", HTTP_DATES[0] + "(" * LONG),
        HTTP_DATES[0].replace("1994", "9" * LONG),
        HTTP_DATES[0].replace("GMT", "+" + "9" * LONG),
        10**LONG,
    ],
    ids=range(9),
)
def test_retry_after_that_is_too_long_for_one_is_none(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(text: str) -> Any:
        raise AssertionError(f"{len(text)} characters were parsed")

    monkeypatch.setattr(email.utils, "parsedate_to_datetime", parse)
    assert retry_after({"Retry-After": value}) is None
    assert retry_after({"Retry-After": "5", "X" * LONG: "1", b"X" * LONG: "1"}) == 5


# --- the forms of Retry-After


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "120"}, 120),
        ({"Retry-After": " 120 "}, 120),
        ({"Retry-After": "0.25"}, 0.25),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"Retry-After-Ms": "0.5"}, 0.0005),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "9", "retry-after-ms": "soon"}, 9),
        ({"retry-after": "9", "retry-after-ms": "0"}, 9),
        ({"retry-after": "9", "retry-after-ms": "nan"}, 9),
        ({"retry-after": "soon", "retry-after-ms": "1500"}, 1.5),
        ([("Retry-After", "5"), ("retry-after", "7")], 5),
        ([("Retry-After", "7"), ("a", "b", "c")], 7),
        ([("X", "1")] * 999 + [("Retry-After", "7")], 7),
    ],
    ids=named,
)
def test_retry_after_is_read_in_milliseconds_and_seconds(headers: Any, seconds: float) -> None:
    assert retry_after(headers) == seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    """Stop the wall clock half a minute before the date of the RFC."""
    now = RFC_DATE - 30.0
    monkeypatch.setattr(time, "time", lambda: now)
    return now


@pytest.fixture(params=["UTC", "EST+5"])
def time_zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not hasattr(time, "tzset"):
        pytest.skip("this platform cannot change its time zone")

    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("date", [*HTTP_DATES, "1994-11-06T08:49:37Z"])
@pytest.mark.usefixtures("now", "time_zone")
def test_retry_after_is_read_as_a_date_of_the_servers_clock_in_every_time_zone(date: str) -> None:
    assert retry_after({"Retry-After": date}) == 30


@pytest.mark.parametrize(
    "value",
    [
        *("0", "0.0", "-0", "-5", "nan", "-nan", "inf", "-inf", "Infinity", "1e999", "", " ", "soon", "5s"),
        *("5, 5", "0x10", "1_0"),
        "Sun, 06 Nov 1994 08:49:07 GMT",
        "Sun, 06 Nov 1994 08:49:06 GMT",
        "Thu, 01 Jan 1970 00:00:00 GMT",
        "Sun, 99 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 99999 08:49:37 GMT",
        "Sun, 06 Nov 9999999999999999999999 08:49:37 GMT",
        "Sun, 06 Nov , 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37 +9999999999",
        "Sun, 06 Nov 1994",
        "tomorrow at noon or so, please",
    ],
    ids=named,
)
@pytest.mark.parametrize("name", ["Retry-After", "retry-after-ms"])
@pytest.mark.usefixtures("now")
def test_retry_after_that_asks_for_no_wait_is_none(name: str, value: str) -> None:
    assert retry_after({name: value}) is None


def test_unix_time_is_told_from_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert retry_after({"Retry-After": "2000000060"}) == 60
    assert retry_after({"Retry-After": "1999999999"}) is None
    assert retry_after({"Retry-After": "1000000000"}) is None
    assert retry_after({"Retry-After": "999999999"}) == 999_999_999


# --- the waits of an overload without a Retry-After


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("1s", 1), ("6m0s", 360), ("120ms", 0.12), ("1h2m3.5s", 3723.5), ("1d", 86400), (" 20s ", 20)),
        *(("20", 20), ("1994-11-06T08:49:37Z", 30), ("1994-11-06T09:49:37.500+01:00", 30.5)),
        *(("1994-11-06T08:49:06Z", None), ("0s", None), ("1s soon", None), ("5 s", None), ("s", None)),
        *(("-5s", None), ("5us", None), ("9" * 90 + "d", float("9" * 90) * 86400), ("٣s", None)),
        ("", None),
    ],
    ids=named,
)
@pytest.mark.usefixtures("now")
def test_reset_of_a_limit_that_is_used_up_is_waited_for(text: str, seconds: float | None) -> None:
    for family in ("x-ratelimit-{}-requests", "anthropic-ratelimit-input-tokens-{}"):
        headers = {family.format("remaining"): "0", family.format("reset"): text}
        assert retry_after(headers) == seconds
        assert classify(with_headers(headers, 498)) == Verdict(OVERLOAD, seconds)


@pytest.mark.parametrize("remaining", ["1", "0.5", "", "none", "nan", "0_0"])
def test_reset_of_a_limit_that_is_not_used_up_is_not_waited_for(remaining: str) -> None:
    assert retry_after({"x-ratelimit-reset-tokens": "5s", "x-ratelimit-remaining-tokens": remaining}) is None
    assert retry_after({"x-ratelimit-reset-tokens": "5s", "x-ratelimit-remaining-requests": "0"}) is None


@pytest.mark.parametrize(
    ("first", "seconds"),
    [({}, 5), *(({"retry-after": text}, number) for text, number in [("7", 7), ("0", None), ("soon", None)])],
)
def test_longest_reset_is_waited_for_without_a_retry_after(
    first: dict[str, str], seconds: float | None
) -> None:
    resets = {"x-ratelimit-reset-a": "1s", "X-RateLimit-Reset-B": "5s", "x-ratelimit-reset-c": "3s"}
    remaining = {f"x-ratelimit-remaining-{name}": "0" for name in "abc"}
    assert retry_after({**first, **resets, **remaining}) == seconds


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "41.5s"}


@pytest.mark.parametrize(
    "details",
    [
        [RETRY_INFO],
        ({"reason": "quota"}, RETRY_INFO, {**RETRY_INFO, "retryDelay": "3s"}),
        [None, SimpleNamespace(retry_delay=SimpleNamespace(seconds=41, nanos=500_000_000)), Broken()],
    ],
    ids=range(3),
)
def test_retry_info_of_google_is_waited_for(details: Any) -> None:
    body = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": details}}
    assert classify(HTTPError(code=429, details=body)) == Verdict(OVERLOAD, 41.5)
    assert classify(HTTPError(body={"details": details}, status=429)) == Verdict(OVERLOAD, 41.5)
    assert classify(HTTPError(code=429, details=details)) == Verdict(OVERLOAD, 41.5)


@pytest.mark.parametrize(
    ("detail", "seconds"),
    [
        *(({"retryDelay": delay}, None) for delay in (41, "soon", "-41s", Broken())),
        ({}, None),
        *(
            (SimpleNamespace(retry_delay=delay), seconds)
            for delay, seconds in [
                (None, None),
                (SimpleNamespace(seconds="x", nanos=Broken()), None),
                (SimpleNamespace(seconds=0, nanos=0), None),
                (SimpleNamespace(seconds=0, nanos=5_000_000), 0.005),
                (timedelta(seconds=41), 41),
            ]
        ),
    ],
    ids=range(10),
)
def test_retry_info_is_whole_seconds_or_less_than_one(detail: object, seconds: float | None) -> None:
    assert classify(HTTPError(code=429, details=[detail])) == Verdict(OVERLOAD, seconds)


def test_only_an_overload_waits_for_a_reset_or_retry_info() -> None:
    headers = {"x-ratelimit-reset-a": "5s", "x-ratelimit-remaining-a": "0"}
    for status in (400, 401, 500):
        error = HTTPError(status=status, headers=headers, details=[RETRY_INFO])
        assert classify(error) == Verdict(KIND_OF_STATUS[status])


# --- groups


def test_group_is_judged_by_its_gravest_member() -> None:
    members = {
        TRANSIENT: ConnectionError(),
        OVERLOAD: HTTPError(status=429),
        PERMANENT: HTTPError(status=404),
        FATAL: HTTPError(status=401),
    }
    for last, kind in enumerate(VerdictKind, 1):
        group = list(members.values())[:last]
        for order in (group, group[::-1]):
            assert classify(ExceptionGroup("several", order)).kind is kind


def test_group_waits_as_long_as_the_most_patient_member_asks() -> None:
    inner = group_of(with_headers({"Retry-After": "9"}, 503), TimeoutError())
    group = group_of(with_headers({"Retry-After": "3"}), inner, HTTPError(status=429))
    assert classify(group) == Verdict(OVERLOAD, 9)


def test_group_as_deep_as_memory_allows_counts_as_what_is_in_it() -> None:
    error: Exception = TypeError()
    for _ in range(20_000):
        error = group_of(error)

    assert classify(group_of(TimeoutError(), error)) == Verdict(PERMANENT)


class Counted(Exception):
    """Counts how often its status was asked for."""

    def __init__(self, status: int | None, asked: list[int]) -> None:
        self.status, self.asked = status, asked

    @property
    def status_code(self) -> int | None:
        self.asked.append(1)
        return self.status


def test_error_that_is_in_many_groups_is_judged_once() -> None:
    asked: list[int] = []
    error: Exception = Counted(404, asked)
    for _ in range(100):
        error = group_of(error, error)

    assert classify(error) == Verdict(PERMANENT)
    assert len(asked) == 1


def test_group_that_pretends_to_have_no_end_is_judged_by_what_it_was_made_of() -> None:
    class Endless(ExceptionGroup[Exception]):
        @property
        def exceptions(self) -> Any:
            return (Endless("again", [ValueError()]),)

    assert classify(Endless("again", [TypeError()])) == Verdict(PERMANENT)


def test_group_without_an_end_in_sight_is_judged_by_ten_thousand_of_its_members() -> None:
    members = [ValueError() for _ in range(10_001)]
    assert classify(group_of(TypeError(), *members)) == Verdict(TRANSIENT)
    assert classify(group_of(*members, TypeError())) == Verdict(PERMANENT)


# --- hostile objects


class Hostile(Exception):
    """An error and everything that is in it: asked for anything, it gives more of its like, or raises."""

    asked = 0
    """How often any of them was asked for anything."""

    def __init__(self, answers: list[Any]) -> None:
        super().__init__()
        vars(self)["answers"] = itertools.cycle(answers)

    def _answer(self) -> Any:
        Hostile.asked += 1
        answer = next(vars(self)["answers"])
        if isinstance(answer, BaseException) and not isinstance(answer, Hostile):
            raise answer

        return self if answer is ... else answer

    def __getattr__(self, name: str) -> Any:
        return self._answer()

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield "retry-after", self._answer()

    def __call__(self) -> Any:
        return self._answer()

    def __str__(self) -> str:
        raise AssertionError("the text of a foreign object was asked for")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"{type(self).__name__}(...)")


class HostileMapping(Hostile, Mapping[Any, Any]):
    """A mapping without an end."""

    def __getitem__(self, key: Any) -> Any:
        return self._answer()

    def __len__(self) -> int:
        raise AssertionError("the length of a mapping without an end was asked for")

    def keys(self) -> Any:
        return self

    def items(self) -> Any:
        return self


plain_answers = st.sampled_from(
    [
        *(..., None, 429, "503", b"x", "X" * 1000, 10**1000, math.nan, KeyError()),
        *(asyncio.CancelledError(), {}, []),
    ]
)


def hostile_of(answers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    kinds = st.sampled_from([Hostile, HostileMapping])
    return st.builds(lambda kind, given: kind(given), kinds, st.lists(answers, min_size=1, max_size=3))


hostile_errors = hostile_of(st.recursive(plain_answers, hostile_of, max_leaves=6))
# Three sources of headers and eight of bodies, at most 1,000 items of each; details are in all bodies.
MOST_ASKED = 20_000


@given(hostile_errors)
@example(HostileMapping([...]))
@example(Hostile([...]))
def test_hostile_error_or_cause_is_asked_a_bounded_number_of_times(error: Exception) -> None:
    for steps in (0, 3):
        Hostile.asked = 0
        assert isinstance(classify(caused_by(error, steps=steps)), Verdict)
        assert Hostile.asked <= (6 if steps else 1) * MOST_ASKED


def test_causes_that_members_of_a_group_share_are_judged_once() -> None:
    asked: list[int] = []
    cause = group_of(*(Counted(None, asked) for _ in range(100)))
    assert classify(group_of(*(caused_by(cause) for _ in range(100)))) == Verdict(TRANSIENT)
    assert classify(group_of(*(stopped(cause) for _ in range(100)))) == Verdict(TRANSIENT)
    assert len(asked) == 200


def test_number_of_errors_that_are_looked_at_includes_causes() -> None:
    several = [caused_by(ValueError()) for _ in range(5_000)]
    assert classify(group_of(HTTPError(status=401), *several)) == Verdict(TRANSIENT)
    assert classify(group_of(HTTPError(status=401), *several[1:])) == Verdict(FATAL)


def test_judging_adds_nothing_to_a_mapping_that_makes_its_items() -> None:
    response: Any = defaultdict(dict)
    assert classify(HTTPError(response=response)) == Verdict(TRANSIENT)
    assert not response


# --- fuzz


DATE_PARTS = (
    "Sun, Sunday, Sun 06 Nov 1994 94 06-Nov-94 08:49:37 8.49 24:60:61 : , . - GMT +0000 -0000 1_0 1e5 ² ٣"
)
texts = st.one_of(
    st.text([*map(chr, range(256)), "٣", "\u2028", "\ud800"], max_size=20),
    st.lists(st.sampled_from([*DATE_PARTS.split(), "", "\x00", "9" * 30]), max_size=8).map(" ".join),
    st.floats().map(str),
    st.datetimes().map(lambda at: at.strftime("%a, %d %b %Y %H:%M:%S GMT")),
)
scalars = st.one_of(
    texts,
    texts.map(lambda text: text.encode("utf-8", "replace")),
    st.integers(),
    st.floats(),
    st.sampled_from([None, True, False, Broken()]),
)
names = st.sampled_from(
    [
        *("Retry-After", "retry-after-ms", b"retry-after", "Date"),
        *("x-ratelimit-reset-a", "x-ratelimit-remaining-a"),
    ]
)
headers_of_all_sorts = st.one_of(
    st.dictionaries(names, scalars, max_size=3),
    st.lists(st.tuples(names | scalars, scalars), max_size=3),
    st.lists(scalars, max_size=2),
    scalars,
)
statuses = st.sampled_from([429, 503, 500, 404, 401]) | scalars
responses = st.builds(SimpleNamespace, status_code=statuses, headers=headers_of_all_sorts) | scalars
bodies = st.dictionaries(
    st.sampled_from(["type", "code", "status", "error", "details"]) | scalars,
    scalars | st.dictionaries(st.sampled_from(["type", "code"]), scalars) | st.lists(scalars, max_size=2),
    max_size=3,
)
errors = st.fixed_dictionaries(
    {},
    optional={
        "status_code": statuses,
        "code": statuses,
        "body": bodies | scalars,
        "details": bodies | scalars,
        "headers": headers_of_all_sorts,
        "response": responses,
    },
).map(lambda attributes: HTTPError(**attributes))


@given(texts, st.sampled_from(["Retry-After", "retry-after-ms"]))
@example("Sun, 06 Nov , 08:49:37 GMT", "Retry-After")
@example("9" * 5000, "Retry-After")
def test_any_header_text_gives_a_verdict(text: str, name: str) -> None:
    verdict = classify(with_headers({name: text}))
    assert verdict.kind is OVERLOAD
    assert verdict.retry_after is None or 0 < verdict.retry_after < math.inf


@given(st.lists(errors, min_size=1, max_size=3))
def test_any_group_gives_the_gravest_verdict(group: list[Exception]) -> None:
    verdicts = [classify(error).kind for error in group]
    assert list(VerdictKind).index(classify(ExceptionGroup("several", group)).kind) == max(
        map(list(VerdictKind).index, verdicts)
    )

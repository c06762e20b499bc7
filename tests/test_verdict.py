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
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentloop import Verdict, VerdictKind, classify

TRANSIENT, OVERLOAD, PERMANENT, FATAL = VerdictKind

# The date that RFC 9110 writes in each of its three forms (section 5.6.7).
RFC_DATE = 784111777
HTTP_DATES = [
    "Sun, 06 Nov 1994 08:49:37 GMT",
    "Sunday, 06-Nov-94 08:49:37 GMT",
    "Sun Nov  6 08:49:37 1994",
]


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


class BrokenStatus(Exception):
    @property
    def status_code(self) -> int:
        raise RuntimeError("the response was closed")


class BrokenResponse(Exception):
    """As httpx does: reading a request or response that is not set raises."""

    status = 503

    @property
    def response(self) -> Any:
        raise RuntimeError("the response was not set")

    @property
    def headers(self) -> Any:
        raise RuntimeError("the response was not set")


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


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, OVERLOAD),
        (529, OVERLOAD),
        (408, TRANSIENT),
        (409, TRANSIENT),
        (425, TRANSIENT),
        (500, TRANSIENT),
        (502, TRANSIENT),
        (503, TRANSIENT),
        (504, TRANSIENT),
        (599, TRANSIENT),
        (401, FATAL),
        (400, PERMANENT),
        (402, PERMANENT),
        (403, PERMANENT),
        (404, PERMANENT),
        (410, PERMANENT),
        (413, PERMANENT),
        (422, PERMANENT),
        (499, PERMANENT),
        (302, TRANSIENT),
    ],
)
def test_status_decides_wherever_it_is_found(status: int, kind: VerdictKind) -> None:
    for exc in (
        HTTPError(status_code=status),
        HTTPError(status=status),
        HTTPError(response=SimpleNamespace(status_code=status)),
    ):
        assert classify(exc) == Verdict(kind)


def test_503_with_a_retry_after_is_overload() -> None:
    assert classify(with_headers({"Retry-After": "5"}, 503)) == Verdict(OVERLOAD, 5)
    assert classify(with_headers({"Retry-After": "0"}, 503)) == Verdict(OVERLOAD)
    assert classify(with_headers({"Date": "today"}, 503)) == Verdict(TRANSIENT)


@pytest.mark.parametrize("status", [400, 401, 408, 500])
def test_retry_after_is_reported_with_every_status_and_changes_no_other_kind(status: int) -> None:
    plain = classify(HTTPError(status_code=status))
    assert classify(with_headers({"Retry-After": "5"}, status)) == attrs.evolve(plain, retry_after=5)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError,
        AttributeError,
        ImportError,
        ModuleNotFoundError,
        NameError,
        UnboundLocalError,
        NotImplementedError,
        RecursionError,
        TypeError,
    ],
)
def test_programming_error_is_permanent(error: type[Exception]) -> None:
    assert classify(error("bug")) == Verdict(PERMANENT)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError,
        ConnectionResetError,
        BrokenPipeError,
        TimeoutError,
        OSError,
        EOFError,
        Exception,
        KeyError,
        RuntimeError,
        ValueError,
        ZeroDivisionError,
    ],
)
def test_any_other_error_is_transient(error: type[Exception]) -> None:
    assert classify(error("bad luck")) == Verdict(TRANSIENT)


def test_status_wins_over_the_type_of_the_error() -> None:
    error = TypeError("of a client that translates badly")
    error.status_code = 429
    assert classify(error).kind is OVERLOAD


# --- attributes of all sorts


def test_status_code_comes_before_status_and_that_before_the_response() -> None:
    response = SimpleNamespace(status_code=404)
    assert classify(HTTPError(status_code=401, status=429, response=response)).kind is FATAL
    assert classify(HTTPError(status=429, response=response)).kind is OVERLOAD


def test_attribute_that_is_no_status_is_passed_over_for_the_next() -> None:
    response = SimpleNamespace(status_code=401)
    assert classify(HTTPError(status_code=None, status="429", response=response)).kind is FATAL
    assert classify(HTTPError(status_code=True, status=0, response=response)).kind is FATAL


@pytest.mark.parametrize(
    "value",
    [
        None,
        "429",
        b"429",
        True,
        False,
        429.0,
        0,
        -1,
        99,
        600,
        10**400,
        "UNAVAILABLE",
        [429],
        math.nan,
        object(),
    ],
    ids=named,
)
def test_value_that_is_no_http_status_is_no_status(value: Any) -> None:
    for exc in (
        HTTPError(status_code=value),
        HTTPError(status=value),
        HTTPError(response=SimpleNamespace(status_code=value)),
    ):
        assert classify(exc) == Verdict(TRANSIENT)


def test_status_may_be_an_enum() -> None:
    assert classify(HTTPError(status=http.HTTPStatus.TOO_MANY_REQUESTS)).kind is OVERLOAD
    assert classify(HTTPError(status_code=http.HTTPStatus.UNAUTHORIZED)).kind is FATAL


def test_attribute_that_raises_is_an_attribute_that_is_not_there() -> None:
    assert classify(BrokenStatus()) == Verdict(TRANSIENT)
    assert classify(BrokenResponse()) == Verdict(TRANSIENT)
    assert classify(HTTPError(response=None)) == Verdict(TRANSIENT)
    assert classify(HTTPError(status_code=429, headers=None, response=None)) == Verdict(OVERLOAD)


def test_object_of_which_nothing_can_be_read_says_nothing() -> None:
    assert classify(HTTPError(response=Broken(), headers=Broken())) == Verdict(TRANSIENT)
    assert classify(HTTPError(status=429, response=Broken(), headers=Broken())) == Verdict(OVERLOAD)


def test_status_that_does_not_even_tell_its_class_is_no_status() -> None:
    class Proxy:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("this proxy is bound to nothing")

    assert classify(HTTPError(status_code=Proxy(), headers=Proxy())) == Verdict(TRANSIENT)


@pytest.mark.parametrize(
    "raised", [KeyError(), asyncio.CancelledError(), GeneratorExit(), BaseExceptionGroup("", [Exception()])]
)
@pytest.mark.parametrize("name", ["status_code", "status", "response", "headers", "__class__"])
def test_attribute_that_raises_whatever_it_likes_is_not_there(name: str, raised: BaseException) -> None:
    def get(_: object) -> Any:
        raise raised

    hostile = type("Hostile", (Exception,), {name: property(get)})
    assert classify(hostile()) == Verdict(TRANSIENT)
    assert classify(HTTPError(status=429, response=hostile())) == Verdict(OVERLOAD)
    assert classify(ExceptionGroup("", [hostile(), HTTPError(status=404)])) == Verdict(PERMANENT)


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
        {"Retry-After": "7"},
        {"retry-after": "7"},
        {"RETRY-AFTER": "7"},
        {b"Retry-After": b"7"},
        {"Retry-After": 7},
        {"Retry-After": 7.0},
        {"X": "1", "Retry-After": "7", 3: None},
        [("X", "1"), ("Retry-After", "7")],
        ((b"x", b"1"), (b"retry-after", b"7")),
        [["Retry-After", "7"]],
        message(("X", "1"), ("Retry-After", "7")),
    ],
    ids=named,
)
def test_headers_are_read_in_every_shape(headers: Any) -> None:
    assert retry_after(headers) == 7
    assert classify(HTTPError(status=429, headers=headers)) == Verdict(OVERLOAD, 7)


@pytest.mark.parametrize(
    "headers",
    [
        None,
        "Retry-After: 7",
        b"Retry-After: 7",
        7,
        [],
        {},
        ["Retry-After"],
        [("Retry-After",)],
        [("Retry-After", "7", "8")],
        {"Retry-After": Broken()},
        {"Retry-After": None},
        {"Retry-After": ["7"]},
        {Broken: "7"},
        SimpleNamespace(items=None),
        SimpleNamespace(items=lambda: 5),
        Broken(),
        object(),
    ],
    ids=named,
)
def test_headers_that_make_no_sense_are_no_headers(headers: Any) -> None:
    assert classify(with_headers(headers)) == Verdict(OVERLOAD)


def test_headers_of_the_response_come_before_those_of_the_error() -> None:
    response = SimpleNamespace(headers={"Retry-After": "5"})
    assert classify(HTTPError(status=429, headers={"Retry-After": "7"}, response=response)).retry_after == 5


@pytest.mark.parametrize("useless", [None, {}, {"Date": "today"}, Broken(), 5], ids=named)
def test_headers_of_the_error_are_read_where_the_response_has_no_retry_after(useless: Any) -> None:
    response = SimpleNamespace(headers=useless)
    assert classify(HTTPError(status=429, headers={"Retry-After": "7"}, response=response)).retry_after == 7


def test_headers_are_read_as_far_as_they_can_be() -> None:
    def pairs() -> Iterator[Any]:
        yield "Retry-After", "7"
        raise asyncio.CancelledError

    assert retry_after(pairs()) == 7
    assert retry_after([("Retry-After", "7"), ("a", "b", "c")]) == 7


def test_headers_without_an_end_are_read_for_a_while() -> None:
    read = itertools.count()

    def endless() -> Iterator[Any]:
        while True:
            yield f"X-{next(read)}", "1"

    assert retry_after(endless()) is None
    assert next(read) <= 1000
    assert retry_after(SimpleNamespace(items=endless)) is None
    assert retry_after([("X", "1")] * 999 + [("Retry-After", "7")]) == 7


LONG = 10**6


@pytest.mark.parametrize(
    "value",
    [
        "9" * LONG,
        b"9" * LONG,
        "," * LONG,
        "1:" * LONG,
        " " * LONG + "5",
        HTTP_DATES[0] + "(" * LONG,
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
    ],
    ids=named,
)
def test_retry_after_is_read_in_milliseconds_and_seconds(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "0",
        "0.0",
        "-0",
        "-5",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "Infinity",
        "1e999",
        "",
        " ",
        "soon",
        "5s",
        "5, 5",
        "0x10",
    ],
    ids=named,
)
@pytest.mark.parametrize("name", ["Retry-After", "retry-after-ms"])
def test_retry_after_that_asks_for_no_wait_is_none(name: str, value: str) -> None:
    assert retry_after({name: value}) is None


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    """Stop the wall clock half a minute before the date of the RFC."""
    now = RFC_DATE - 30.0
    monkeypatch.setattr(time, "time", lambda: now)
    return now


@pytest.mark.parametrize("date", HTTP_DATES)
@pytest.mark.usefixtures("now")
def test_retry_after_is_read_as_a_date_of_the_servers_clock(date: str) -> None:
    assert retry_after({"Retry-After": date}) == 30


@pytest.fixture
def far_from_greenwich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not hasattr(time, "tzset"):
        pytest.skip("this platform cannot change its time zone")

    monkeypatch.setenv("TZ", "EST+5")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("date", HTTP_DATES)
@pytest.mark.usefixtures("now", "far_from_greenwich")
def test_date_means_the_same_in_every_time_zone(date: str) -> None:
    assert retry_after({"Retry-After": date}) == 30


@pytest.mark.parametrize(
    "date",
    [
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
)
@pytest.mark.usefixtures("now")
def test_date_that_is_past_or_garbage_is_none(date: str) -> None:
    assert retry_after({"Retry-After": date}) is None


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
    group = ExceptionGroup(
        "several",
        [
            with_headers({"Retry-After": "3"}),
            ExceptionGroup("inner", [with_headers({"Retry-After": "9"}, 503), TimeoutError()]),
            HTTPError(status=429),
        ],
    )
    assert classify(group) == Verdict(OVERLOAD, 9)


def test_nested_group_counts_as_its_members_do() -> None:
    error: Exception = TypeError()
    for depth in range(100):
        error = ExceptionGroup(f"level {depth}", [error])

    assert classify(ExceptionGroup("outer", [TimeoutError(), error])) == Verdict(PERMANENT)


def test_group_as_deep_as_memory_allows_is_judged_by_what_is_in_it() -> None:
    error: Exception = HTTPError(status=401)
    for _ in range(100_000):
        error = ExceptionGroup("deeper", [error])

    assert classify(error) == Verdict(FATAL)


def test_error_that_is_in_many_groups_is_judged_once() -> None:
    asked = 0

    class Counted(Exception):
        @property
        def status_code(self) -> int:
            nonlocal asked
            asked += 1
            return 404

    error: Exception = Counted()
    for _ in range(100):
        error = ExceptionGroup("twice", [error, error])

    assert classify(error) == Verdict(PERMANENT)
    assert asked == 1


def test_group_that_pretends_to_have_no_end_is_judged_by_what_it_was_made_of() -> None:
    class Endless(ExceptionGroup[Exception]):
        @property
        def exceptions(self) -> Any:
            return (Endless("again", [ValueError()]),)

    assert classify(Endless("again", [TypeError()])) == Verdict(PERMANENT)


def test_group_without_an_end_in_sight_is_judged_by_ten_thousand_of_its_members() -> None:
    members = [ValueError() for _ in range(10_001)]
    assert classify(ExceptionGroup("many", [TypeError(), *members])) == Verdict(TRANSIENT)
    assert classify(ExceptionGroup("many", [*members, TypeError()])) == Verdict(PERMANENT)


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
names = st.sampled_from(["Retry-After", "retry-after-ms", b"retry-after", "Date"])
headers_of_all_sorts = st.one_of(
    st.dictionaries(names, scalars, max_size=3),
    st.lists(st.tuples(names | scalars, scalars), max_size=3),
    st.lists(scalars, max_size=2),
    scalars,
)
statuses = st.sampled_from([429, 503, 500, 404, 401]) | scalars
responses = st.builds(SimpleNamespace, status_code=statuses, headers=headers_of_all_sorts) | scalars
errors = st.fixed_dictionaries(
    {},
    optional={
        "status_code": statuses,
        "status": statuses,
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


@given(errors)
def test_any_error_gives_a_verdict(error: Exception) -> None:
    assert isinstance(classify(error), Verdict)


@given(st.lists(errors, min_size=1, max_size=3))
def test_any_group_gives_the_gravest_verdict(group: list[Exception]) -> None:
    verdicts = [classify(error).kind for error in group]
    assert list(VerdictKind).index(classify(ExceptionGroup("several", group)).kind) == max(
        map(list(VerdictKind).index, verdicts)
    )

"""What became of an invocation, and the errors in which the library says so."""

import asyncio
import copy
import gc
import json
import pickle
import unicodedata
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import attrs
import pytest

import agentloop.journal
from agentloop import (
    AgentLoopError,
    BatchStopped,
    BudgetSpent,
    FirstChunkTimeout,
    IdleTimeout,
    InvocationCancelled,
    InvocationResult,
    InvocationTimeout,
    Status,
    Verdict,
    VerdictKind,
    _errors,
)
from agentloop.contrib import dask
from agentloop.contrib.dask import RemoteError, WorkerLost


class Boom(Exception):
    pass


ERRORS: list[Exception] = [
    *(AgentLoopError("broken"), BatchStopped("not started"), BudgetSpent(5, 2.5, 50)),
    *(_errors.DeadlockError("a", "b"), FirstChunkTimeout(2), IdleTimeout(1.5)),
    InvocationCancelled("cancelled by itself"),
    InvocationTimeout(0.5),
    InvocationTimeout(60, total=True),
    _errors.JournalError("disk full"),
    _errors.JournalInUse("in use"),
    _errors.JournalMismatch("night.db", "1", "2"),
    _errors.JournaledError("ValueError: boom"),
    _errors.LeftOpenError("agent"),
    _errors.QueueFull(3, 1.5),
    _errors.QueueTimeout(2),
    _errors.LoopClosed("left"),
    RemoteError("openai.RateLimitError", "slow down", 429, Verdict(VerdictKind.OVERLOAD, 7)),
    WorkerLost("died 3 times", 3),
]
every_error = pytest.mark.parametrize("error", ERRORS, ids=repr)


def failed(exception: BaseException, status: Status = Status.ERROR) -> InvocationResult[Any]:
    return InvocationResult("agent", status, exception=exception)


# --- results


DEFAULTS = {
    "agent_id": "agent",
    "status": "success",
    "output": 42,
    "latency_ms": 0.0,
    "queue_ms": 0.0,
    "retries": 0,
    "index": 0,
    "chunks": 0,
    "first_chunk_ms": None,
    "replayed": False,
}


def test_result_has_the_defaults_of_a_plain_success_and_is_frozen() -> None:
    result = InvocationResult("agent", Status.SUCCESS, 42)
    assert attrs.asdict(result) == {**DEFAULTS, "exception": None, "failures": ()}
    assert result.success
    assert result.error is None
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        result.output = 1


def test_status_is_its_word_and_only_a_success_is_one() -> None:
    assert [str(status) for status in Status] == ["success", "error", "timeout", "cancelled", "skipped"]
    assert [failed(Boom("boom"), status).success for status in Status] == [True, *[False] * 4]


@pytest.mark.parametrize(
    ("status", "exception", "text"),
    [
        (Status.ERROR, ValueError("boom"), "ValueError: boom"),
        (Status.ERROR, ValueError(), "ValueError"),
        (Status.ERROR, KeyError("k"), "KeyError: 'k'"),
        (Status.ERROR, ValueError("rate: "), "ValueError: rate: "),
        (Status.ERROR, TimeoutError("the agent's own"), "TimeoutError: the agent's own"),
        (Status.ERROR, ExceptionGroup("two", [Boom()]), "ExceptionGroup: two (1 sub-exception)"),
        (Status.TIMEOUT, InvocationTimeout(0.5), "Timeout after 0.5s"),
        (Status.TIMEOUT, InvocationTimeout(60, total=True), "Timeout after 60s in total"),
        (Status.TIMEOUT, FirstChunkTimeout(2), "No first chunk after 2s"),
        (Status.TIMEOUT, IdleTimeout(1.5), "No chunk for 1.5s"),
        (Status.CANCELLED, InvocationCancelled("by itself"), "InvocationCancelled: by itself"),
        (Status.CANCELLED, asyncio.CancelledError(), "CancelledError"),
        (Status.SKIPPED, BatchStopped("not started"), "BatchStopped: the batch was stopped: not started"),
    ],
    ids=repr,
)
def test_error_says_what_went_wrong(status: Status, exception: BaseException, text: str) -> None:
    assert failed(exception, status).error == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(300.0, "300"), (0.1 + 0.2, "0.3"), (1 / 3, "0.3333333333"), (86400 * 30, "2592000"), (1e-5, "1e-05")],
)
def test_time_out_says_its_seconds_without_noise(seconds: float, text: str) -> None:
    assert str(InvocationTimeout(seconds)) == f"Timeout after {text}s"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("2 errors\ntitle\n  Field required\r\n\tyear", "2 errors title Field required year"),
        ("\n\n boom\x00\x1b \x85\u2028\u2029boom \n", "boom boom"),
        ("two  spaces stay in a line", "two  spaces stay in a line"),
        ("no\u00a0break, wide\u3000space", "no break, wide space"),
        ("half a pair \ud83d, private \ue000", "half a pair \ufffd, private \ufffd"),
        ("turned \u202earound, joined\u200d, \ufeffmarked", "turned around, joined, marked"),
        ("\u00fcber \u4f60\u597d \U0001f600", "\u00fcber \u4f60\u597d \U0001f600"),
        *((text, "") for text in ("\n", " \t\r\n", "\u200b", "\x00")),
    ],
    ids=ascii,
)
def test_error_is_one_line_of_printable_characters(text: str, line: str) -> None:
    assert failed(Boom(text)).error == (f"Boom: {line}" if line else "Boom")
    assert failed(Boom(text), Status.TIMEOUT).error == (line or "Boom")


@pytest.mark.parametrize("text", ["x" * 10**7, "x\n" * 10**7, "\n" * 10**7, "\ud83d" * 10**7], ids=range(4))
@pytest.mark.parametrize("status", [Status.ERROR, Status.TIMEOUT])
def test_error_of_any_length_is_cut_at_a_thousand_characters(
    text: str, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    category = unicodedata.category
    monkeypatch.setattr(unicodedata, "category", lambda char: looked_at.append(char) or category(char))
    error = failed(Boom(text), status).error
    assert error is not None
    assert len(error) <= 1000
    assert error.isprintable()
    assert error.endswith("...")
    assert len(looked_at) <= 4000
    # What just fits is whole.
    assert failed(Boom("x" * 994)).error == f"Boom: {'x' * 994}"
    assert failed(Boom("x" * 995)).error == f"Boom: {'x' * 991}..."


def test_error_whose_text_is_of_an_odd_class_is_described_all_the_same() -> None:
    class Text(str):
        __slots__ = ()

        def __getitem__(self, key: Any) -> str:
            raise asyncio.CancelledError

        __bool__ = __len__ = __iter__ = isprintable = __getitem__

    class Said(Exception):
        def __str__(self) -> str:
            return Text("two\nlines")

    assert failed(Said()).error == "Said: two lines"


class NamelessType(type):
    @property
    def __name__(cls) -> str:
        raise ValueError("no name")


class Nameless(Exception, metaclass=NamelessType):
    pass


@pytest.mark.parametrize(
    "raised", [ValueError(), asyncio.CancelledError(), GeneratorExit(), RecursionError()], ids=repr
)
def test_error_that_cannot_say_what_it_is_is_its_type(raised: BaseException) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise raised

    assert failed(Mute()).error == failed(Mute(), Status.TIMEOUT).error == "Mute"


def test_error_with_odd_classes_is_described_all_the_same() -> None:
    class Number(Exception):
        def __str__(self) -> Any:
            return 5

    two_lines = type("Two\nlines", (Exception,), {})
    assert failed(Number()).error == "Number"
    assert failed(Nameless("boom")).error == "Nameless: boom"
    assert failed(two_lines()).error == "Two lines"
    assert len(str(failed(type("E" * 5000, (Exception,), {})("boom")).error)) == 1000


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupt_while_an_error_says_what_it_is_propagates(interrupt: type[BaseException]) -> None:
    class Slow(Exception):
        def __str__(self) -> str:
            raise interrupt

    with pytest.raises(interrupt):
        _ = failed(Slow()).error


def test_dict_of_a_success_has_every_field_that_json_carries_and_the_error_for_the_exception() -> None:
    result = InvocationResult("agent", Status.SUCCESS, {"a": [1]}, None, 12.5, 3.0, 0, (), 7, 2, 1.5)
    given = {"output": {"a": [1]}, "latency_ms": 12.5, "queue_ms": 3.0, "index": 7, "chunks": 2}
    expected = {**DEFAULTS, **given, "first_chunk_ms": 1.5, "error": None, "failures": []}
    assert result.to_dict() == expected
    assert result.to_dict()["output"] is result.output
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_dict_of_a_failure_has_its_errors_as_lines() -> None:
    failures = (Boom("two\nlines \ud83d"), Nameless(), InvocationTimeout(0.5))
    result = InvocationResult("agent", Status.TIMEOUT, None, failures[-1], 12.5, 3.0, 2, failures)
    carried = json.loads(json.dumps(result.to_dict()))
    assert carried == result.to_dict()
    assert type(result.to_dict()["status"]) is str
    assert carried["error"] == "Timeout after 0.5s"
    lines = ["Boom: two lines \ufffd", "Nameless", "InvocationTimeout: Timeout after 0.5s"]
    assert carried["failures"] == lines
    fields = {field.name for field in attrs.fields(InvocationResult)}
    assert carried.keys() == fields - {"exception"} | {"error"}


@pytest.mark.parametrize("output", [42, None, "", ValueError("returned, not raised")])
def test_unwrapping_a_success_returns_its_output(output: object) -> None:
    result = InvocationResult("agent", Status.SUCCESS, output)
    assert result.unwrap() is result.unwrap() is output


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.SUCCESS])
@pytest.mark.parametrize(
    "exception", [Boom("boom"), asyncio.CancelledError(), InvocationTimeout(1)], ids=repr
)
def test_unwrapping_a_failure_raises_the_very_object(status: Status, exception: BaseException) -> None:
    result = failed(exception, status)
    for _ in range(3):
        with pytest.raises(type(exception)) as caught:
            result.unwrap()

        assert caught.value is exception

    assert exception.__context__ is exception.__cause__ is None


def test_unwrapping_keeps_the_traceback_of_the_agent() -> None:
    def explode() -> NoReturn:
        raise Boom

    with pytest.raises(Boom) as original:
        explode()

    with pytest.raises(Boom) as caught:
        failed(original.value).unwrap()

    assert "explode" in [entry.name for entry in caught.traceback]


def test_unwrapping_leaves_no_reference_cycle() -> None:
    def unwrap_a_new_one() -> weakref.ref[BaseException]:
        try:
            failed(Boom("boom")).unwrap()
        except Boom as exc:
            return weakref.ref(exc)

    gc.disable()
    try:
        assert unwrap_a_new_one()() is None
    finally:
        gc.enable()


def test_result_survives_pickling() -> None:
    success = InvocationResult("agent", Status.SUCCESS, {"a": [1]}, None, 12.5, 3.0, 2, (), 7)
    assert pickle.loads(pickle.dumps(success)) == success

    failures = (ValueError("boom"), InvocationTimeout(0.5))
    failure = InvocationResult("agent", Status.TIMEOUT, None, failures[1], 12.5, 3.0, 1, failures, 7)
    copied = pickle.loads(pickle.dumps(failure))
    assert copied.error == "Timeout after 0.5s"
    assert copied.exception is copied.failures[1]
    assert repr(copied) == repr(failure)


# --- errors


def test_every_error_is_in_the_tests_below() -> None:
    names = {name for name in _errors.__all__ if isinstance(getattr(_errors, name), type)}
    assert {type(error).__name__ for error in ERRORS} == names | {"RemoteError", "WorkerLost"}


@every_error
def test_every_error_is_an_agentloop_error_and_public(error: Exception) -> None:
    assert isinstance(error, AgentLoopError)
    name = type(error).__name__
    assert type(error) in [getattr(module, name, None) for module in (agentloop, agentloop.journal, dask)]


COPIES: list[Callable[[Any], Any]] = [
    *(copy.copy, copy.deepcopy),
    *(
        lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ),
]


@every_error
@pytest.mark.parametrize("make", COPIES, ids=range(len(COPIES)))
def test_error_survives_copying_and_pickling(error: Exception, make: Callable[[Any], Any]) -> None:
    error = copy.copy(error)
    error.add_note("a note")
    copied = make(error)
    assert copied is not error
    assert (type(copied), str(copied), copied.args) == (type(error), str(error), error.args)
    assert vars(copied) == vars(error)


@pytest.mark.parametrize("error_class", [InvocationTimeout, FirstChunkTimeout, IdleTimeout])
def test_time_out_is_a_timeout_error_that_carries_its_seconds(error_class: type[InvocationTimeout]) -> None:
    error = error_class(0.5)
    assert isinstance(error, TimeoutError)
    assert isinstance(error, InvocationTimeout)
    assert (error.seconds, error.total) == (0.5, False)
    assert error.errno is error.strerror is None


def test_closed_loop_is_a_runtime_error() -> None:
    assert issubclass(_errors.LoopClosed, RuntimeError)

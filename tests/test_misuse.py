"""Mistakes that are easy to make, and the errors that say what to write instead."""

import inspect
import random
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from agents import each_batch

from agentloop import AgentLoop, Backoff, Invocation, KeyedLimiter, Limiter, LoopConfig, Rate


def named(value: object) -> str:
    """Return a test id that is the same in every run."""
    return re.sub(r" at 0x\w+", "", repr(value))


# --- callbacks that are async


async def coroutine_function(*_: object) -> Any:
    pass


async def generator_function(*_: object) -> AsyncIterator[Any]:
    yield


class Methods:
    async def method(self, *_: object) -> Any:
        pass

    @classmethod
    async def of_class(cls, *_: object) -> Any:
        pass

    @staticmethod
    async def of_none(*_: object) -> Any:
        pass


class Asked:
    async def __call__(self, *_: object) -> Any:
        pass


class Generating:
    async def __call__(self, *_: object) -> AsyncIterator[Any]:
        yield


ASYNC = [
    *(coroutine_function, generator_function, Methods().method, Methods.of_class, Methods.of_none, Asked()),
    *(Generating(), partial(coroutine_function, 1)),
    partial(partial(generator_function, 1), 2),
    partial(Methods().method),
    partial(Asked()),
]


class Plain:
    def __call__(self, *_: object) -> Any:
        return 1


# To make an object of a class is not async, whatever its objects are.
PLAIN = [lambda *_: 1, Plain(), partial(Plain()), max, [].append, Asked]

TAKERS: dict[str, Callable[[Any], object]] = {
    "classify": lambda fn: LoopConfig(classify=fn),
    "cost": lambda fn: Rate(5, cost=fn),
    "settle": lambda fn: Rate(5, settle=fn),
    "by": lambda fn: KeyedLimiter(fn, lambda _: Limiter(1)),
    "make": lambda fn: KeyedLimiter(str, fn),
    "on_event": lambda fn: AgentLoop(on_event=fn),
    "agent_id": lambda fn: Invocation.map(coroutine_function, [1], fn),
}
every_taker = pytest.mark.parametrize("name", TAKERS)


@every_taker
@pytest.mark.parametrize("fn", ASYNC, ids=named)
def test_async_function_is_refused_where_a_plain_one_is_called(name: str, fn: Any) -> None:
    with pytest.raises(TypeError) as caught:
        TAKERS[name](fn)

    assert str(caught.value) == f"{name} must be a plain function, got an async one, {fn!r}"


@every_taker
@pytest.mark.parametrize("fn", PLAIN, ids=named)
def test_any_other_callable_is_a_plain_function(name: str, fn: Any) -> None:
    TAKERS[name](fn)


async def test_coroutine_that_a_plain_function_returns_is_that_functions_error() -> None:
    limiter = Limiter(1, rates=[Rate(5, cost=lambda _: coroutine_function())])
    result = await AgentLoop(limiter=limiter).run_single("a", coroutine_function)
    assert re.match("TypeError: the cost of 'a' must be a number, got <coroutine object ", result.error or "")


# --- settings that would be ignored


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"initial_seconds": 60}, "initial_seconds must be at most max_seconds=30.0, got 60"),
        ({"initial_seconds": 2, "max_seconds": 1}, "initial_seconds must be at most max_seconds=1, got 2"),
    ],
)
def test_backoff_that_begins_above_its_maximum_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        Backoff(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"initial_seconds": 30},
        {"initial_seconds": 60, "max_seconds": 60},
        {"max_seconds": 0.01},  # of the default nothing was said
        {"initial_seconds": 0, "max_seconds": 0},
    ],
    ids=named,
)
def test_backoff_that_begins_at_its_maximum_or_by_default_is_none_of_that(settings: dict[str, Any]) -> None:
    assert Backoff(**settings, jitter="none").delay(5, random) <= settings.get("max_seconds", 30)


@pytest.mark.parametrize("seconds", [5.5, 301])
def test_time_out_that_the_total_would_always_precede_is_refused(seconds: float) -> None:
    rule = f"total_timeout_seconds must be at least timeout_seconds={seconds}, got 5"
    with pytest.raises(ValueError, match=f"^{rule}: no attempt could take that long$"):
        LoopConfig(total_timeout_seconds=5, timeout_seconds=seconds)

    loop = AgentLoop(LoopConfig(timeout_seconds=seconds))
    with pytest.raises(ValueError, match=f"^{rule}"):
        loop.with_config(total_timeout_seconds=5)


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"timeout_seconds": 300.0}, {"timeout_seconds": 300}, {"timeout_seconds": 5}),
        *({"timeout_seconds": 1}, {"timeout_seconds": None}, {"timeout_seconds": float("inf")}),
        {"timeout_seconds": 5, "first_chunk_timeout_seconds": 6, "idle_timeout_seconds": 6},
    ],
    ids=named,
)
def test_total_time_out_may_be_short_where_no_longer_one_was_asked_for(settings: dict[str, Any]) -> None:
    assert LoopConfig(total_timeout_seconds=5, **settings).total_timeout_seconds == 5


def test_number_of_slots_that_a_limiter_would_override_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_concurrency must be the limiter's, 5, or left out, got 50$"):
        AgentLoop(LoopConfig(max_concurrency=50), limiter=Limiter(5))

    limiters = KeyedLimiter(str, lambda _: Limiter(50))
    with pytest.raises(ValueError, match=r"^max_concurrency must be left out .*, got 50; .* KeyedLimiter\("):
        AgentLoop(LoopConfig(max_concurrency=50), limiter=limiters)

    # That of the only key that there is, and not of all.
    assert limiters["a"].max_concurrency == limiters.max_concurrency == 50
    with pytest.raises(ValueError):
        AgentLoop(LoopConfig(max_concurrency=50), limiter=limiters)


def test_number_of_slots_may_be_the_limiters_or_the_default() -> None:
    assert AgentLoop(LoopConfig(max_concurrency=5), limiter=Limiter(5)).config.max_concurrency == 5
    for limiter in (Limiter(5), KeyedLimiter(str, lambda _: Limiter(5))):
        assert AgentLoop(LoopConfig(max_concurrency=10), limiter=limiter).limiter is limiter
        assert AgentLoop(limiter=limiter).with_config(timeout_seconds=1).limiter is limiter

    # A limiter may be resized before there is a view.
    loop = AgentLoop(LoopConfig(max_concurrency=50))
    loop.limiter.max_concurrency = 5
    assert loop.with_config(timeout_seconds=1).statistics().max_concurrency == 5


# --- names of parameters


LIKELY_NAMES = {
    LoopConfig: "timeout=timeout_seconds total_timeout=total_timeout_seconds concurrency=max_concurrency "
    "first_chunk_timeout=first_chunk_timeout_seconds idle_timeout=idle_timeout_seconds retries=max_retries "
    "overload_timeout=overload_timeout_seconds max_workers=max_concurrency limit=max_concurrency "
    "max_attempts=max_retries retry_timeout=retry_on_timeout max_concurency=max_concurrency",
    Backoff: "initial=initial_seconds max=max_seconds factor=multiplier",
    partial(Rate, 60): "per=per_seconds period=per_seconds",
    Rate: "max_rate=limit",
    partial(Limiter, 10): "rate=rates budget=retry_budget",
    Limiter: "limit=max_concurrency",
    partial(KeyedLimiter, str, Limiter): "max_limiter=max_limiters",
    AgentLoop: "callback=on_event events=on_event",
}


@pytest.mark.parametrize(
    ("make", "wrong", "right"),
    [(make, *pair.split("=")) for make, pairs in LIKELY_NAMES.items() for pair in pairs.split()],
)
def test_likely_name_of_a_parameter_is_answered_by_the_right_one(make: Any, wrong: str, right: str) -> None:
    cls = make.func if isinstance(make, partial) else make
    text = f"{cls.__name__}() got an unexpected keyword argument {wrong!r}: did you mean {right}?"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        make(**{wrong: 3})


def test_name_that_resembles_none_is_answered_by_all_of_them() -> None:
    with pytest.raises(TypeError, match=r"'x': its parameters are config, limiter, metrics, on_event$"):
        AgentLoop(x=1)


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        ({"max_concurrency": 50}, "max_concurrency=50"),
        ({"timeout_seconds": 3}, "timeout_seconds=3"),
        ({"timeout": 3, "concurrency": 5}, "timeout_seconds=3, max_concurrency=5"),
    ],
    ids=named,
)
def test_settings_of_a_loop_are_given_as_a_whole(settings: dict[str, Any], right: str) -> None:
    with pytest.raises(TypeError, match=rf": pass AgentLoop\(LoopConfig\({right}\)\)$"):
        AgentLoop(**settings)


def test_unknown_setting_of_a_view_is_answered_by_the_right_one() -> None:
    with pytest.raises(TypeError, match=r"'timeout': did you mean timeout_seconds\?$"):
        AgentLoop().with_config(timeout=3)


@pytest.mark.parametrize("cls", [LoopConfig, Backoff, Rate, Limiter, KeyedLimiter, AgentLoop])
def test_signature_is_that_of_the_constructor(cls: type) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(cls).parameters.values()}
    assert kinds
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


# --- inputs that are none


async def answer(question: str) -> str:
    return question


NO_BATCH: dict[str, Callable[[], Any]] = {
    "a function": lambda: answer,
    "a partial": lambda: partial(answer, "x"),
    "a coroutine": lambda: answer("x"),
    "one invocation": lambda: Invocation("a", answer, ("x",)),
}


@pytest.mark.parametrize("what", NO_BATCH)
@each_batch
async def test_input_that_is_no_batch_is_refused_with_a_batch_to_write(verb: str, what: str) -> None:
    value = NO_BATCH[what]()
    text = (
        "expected a sync or async iterable of invocations, such as [Invocation(agent_id, fn, args)] or "
        f"Invocation.map(fn, items), got {value!r}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        await getattr(AgentLoop(), verb)(value)


@pytest.mark.parametrize("what", [what for what in NO_BATCH if what != "one invocation"])
async def test_function_or_coroutine_among_the_inputs_is_refused_with_what_to_write(what: str) -> None:
    value = NO_BATCH[what]()
    text = (
        f"expected an Invocation or a tuple (agent_id, fn, args, kwargs) as an input, got {value!r}: "
        "write Invocation(agent_id, fn, args)"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        await AgentLoop().run_all([value])


# --- what is entered and read asynchronously


READ = {
    "as_completed": lambda loop: loop.as_completed([]),
    "stream_all": lambda loop: loop.stream_all([]),
    "run_streaming": lambda loop: loop.run_streaming("a", generator_function),
}


@pytest.mark.parametrize("verb", READ)
async def test_iterating_entering_or_awaiting_what_needs_async_with_says_so(verb: str) -> None:
    item, name = ("chunk", "stream") if verb == "run_streaming" else ("...", "results")
    text = f"write `async with loop.{verb}(...) as {name}:` around `async for {item} in {name}:`"
    reader: Any = READ[verb](AgentLoop())
    expected = partial(pytest.raises, TypeError, match=f"^{re.escape(text)}$")
    with expected():
        for _ in reader:
            pass

    with expected():
        print(*reader)

    with expected():
        with reader:
            pass

    with expected():
        await reader

    async with reader:
        with expected():
            list(reader)


async def test_stream_of_invocations_is_an_input_all_the_same() -> None:
    async def plan() -> AsyncIterator[Invocation[str]]:
        for name in "ab":
            yield Invocation(name, answer, (name,))

    loop = AgentLoop()
    async with loop.run_streaming("planner", plan) as stream:
        assert [result.output for result in await loop.run_all(stream)] == ["a", "b"]


async def test_what_is_printed_instead_of_read_says_what_to_write() -> None:
    loop = AgentLoop()
    reader: Any = loop.as_completed([])
    assert repr(reader) == (
        "<as_completed not entered: write `async with loop.as_completed(...) as results:` around "
        "`async for ... in results:`>"
    )
    async with reader:
        assert repr(reader) == "<as_completed entered>"

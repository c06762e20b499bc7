"""Mistakes that are easy to make, and the errors that say what to write instead."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest

from agentloop import AgentLoop, Invocation, Limiter, Limiters, LoopConfig, Rate


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
    coroutine_function,
    generator_function,
    Methods().method,
    Methods.of_class,
    Methods.of_none,
    Asked(),
    Generating(),
    partial(coroutine_function, 1),
    partial(partial(generator_function, 1), 2),
    partial(Methods().method),
    partial(Asked()),
]


class Plain:
    def __call__(self, *_: object) -> Any:
        return 1


PLAIN = [
    lambda *_: 1,
    Plain(),
    partial(Plain()),
    max,
    [].append,
    Asked,  # to make an object of it is not async
]

TAKERS: dict[str, Callable[[Any], object]] = {
    "classify": lambda fn: LoopConfig(classify=fn),
    "cost": lambda fn: Rate(5, cost=fn),
    "settle": lambda fn: Rate(5, settle=fn),
    "key": lambda fn: Limiters(fn, lambda _: Limiter(1)),
    "make": lambda fn: Limiters(str, fn),
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

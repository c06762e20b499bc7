"""What is to be run: how it is described, and what is refused with which hint."""

import gc
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import attrs
import pytest
from agents import raised_by

from agentloop import AgentLoop, Invocation
from agentloop._invocation import as_invocation
from agentloop.testing import Chunks, FakeAgent


async def double(x: int) -> int:
    return 2 * x


async def scaled(factor: int, x: int, *, offset: int = 0) -> int:
    return factor * x + offset


def named(value: object) -> str:
    """Return a test id that is the same in every run."""
    return re.sub(r" at 0x\w+", "", repr(value))


class Agent:
    async def __call__(self, x: int) -> int:
        return x

    async def ask(self, x: int) -> int:
        return x


def by_lambda() -> Callable[[int], Awaitable[int]]:
    return lambda x: double(x)


class Source:
    """An async generator that knows how far it was pulled and whether it was closed."""

    def __init__(self, count: int = 5) -> None:
        self.count = count
        self.pulled = 0
        self.closed = False

    async def __call__(self) -> AsyncIterator[int]:
        try:
            for item in range(self.count):
                await anyio.lowlevel.checkpoint()
                self.pulled += 1
                yield item
        finally:
            self.closed = True


# --- one invocation


def test_arguments_are_none_where_none_are_given() -> None:
    invocation = Invocation("a", double)
    fields = {"agent_id": "a", "fn": double, "args": (), "kwargs": {}, "key": None}
    assert attrs.asdict(invocation, recurse=False) == fields
    assert invocation.kwargs is not Invocation("b", double).kwargs


def test_arguments_may_be_any_sequence_and_any_mapping() -> None:
    args = [1, 2]
    invocation = Invocation("a", scaled, args, {"offset": 3})
    args.append(4)
    assert (invocation.args, invocation.kwargs) == ((1, 2), {"offset": 3})
    assert Invocation("a", double, range(1)).args == (0,)


def test_invocation_is_frozen_and_compared_by_value() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Invocation("a", double).agent_id = "b"

    assert Invocation("a", double, (1,)) == Invocation("a", double, (1,)) != Invocation("a", double, (2,))


REFUSED: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
    "agent_id must be a str": (lambda value: Invocation(value, double), [None, 5, b"a", ("a",)]),
    "fn must be an async function": (lambda value: Invocation("a", value), [None, 5, "double", (double,)]),
    "args must be a tuple of positional arguments": (
        lambda value: Invocation("a", double, value),
        ["ab", b"ab", 5, None, {1}, {"x": 1}, iter(())],
    ),
    "kwargs must be a mapping of argument names to values": (
        lambda value: Invocation("a", double, (), value),
        [None, 5, ("x", 1), {1: 2}, {"x": 1, b"y": 2}],
    ),
    "key must be a str, an int or None": (
        lambda value: Invocation("a", double, key=value),
        [1.5, True, b"a", ("a",)],
    ),
    "expected an Invocation or a tuple (agent_id, fn, args, kwargs) as an input": (
        as_invocation,
        [("a", double), ("a", double, ()), ["a", double, (), {}], "a", 5, None],
    ),
    "expected a sync or async iterable of invocations, such as [Invocation(agent_id, fn, args)] or "
    "Invocation.map(fn, items)": (
        lambda value: AgentLoop().as_completed(value),
        [None, 5, "jobs", b"jobs", {"a": double}, double],
    ),
    "agent_id must be a str, a function of an item or None": (
        lambda value: Invocation.map(double, [1], value),
        [5, b"q", ("q",)],
    ),
    "items must be a sync or async iterable": (
        lambda value: Invocation.map(double, value),
        [5, None, double],
    ),
    "key must be callable": (lambda value: Invocation.map(double, [1], key=value), ["id"]),
    "key must be a plain function, got an async one, ": (
        lambda value: Invocation.map(double, [1], key=value),
        [double],
    ),
}


@pytest.mark.parametrize(
    ("rule", "value"), [(rule, value) for rule, (_, values) in REFUSED.items() for value in values], ids=named
)
def test_what_is_none_is_refused_with_what_was_expected(rule: str, value: Any) -> None:
    text = f"{rule}{value!r}" if rule.endswith(", ") else f"{rule}, got {value!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        REFUSED[rule][0](value)


def test_invocation_of_takes_the_arguments_of_its_call() -> None:
    assert Invocation.of("a", double, 5) == Invocation("a", double, (5,))
    assert Invocation.of("a", double, agent_id=1, fn=2) == Invocation(
        "a", double, (), {"agent_id": 1, "fn": 2}
    )
    with pytest.raises(TypeError, match=r"^agent_id must be a str, got 5$"):
        Invocation.of(5, double, 1)

    swapped: Any = (double, "a")
    with pytest.raises(TypeError, match=r"double .*: a name comes first, and then the function$"):
        Invocation(*swapped)


REFUSED_COROUTINE = (
    r"^fn must be an async function, got the coroutine <coroutine object double at 0x\w+>; "
    r"pass the function and its arguments apart: not fn\(x\) but fn, x$"
)


@pytest.mark.parametrize(
    "make",
    [
        lambda coroutine: Invocation("a", coroutine),
        lambda coroutine: Invocation("a", coroutine, 1),
        lambda coroutine: Invocation("a", coroutine, (), 1),
        lambda coroutine: Invocation.of("a", coroutine),
        lambda coroutine: Invocation.map(coroutine, [1]),
        lambda coroutine: as_invocation(("a", coroutine, (), {})),
    ],
    ids=["alone", "bad args", "bad kwargs", "of", "map", "tuple"],
)
def test_coroutine_is_refused_with_a_hint_and_without_a_warning(
    make: Callable[[Any], object], recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(TypeError, match=REFUSED_COROUTINE):
        make(double(1))

    gc.collect()
    assert not recwarn.list


# --- what a batch accepts


def test_input_is_an_invocation_or_a_tuple_of_its_four_fields() -> None:
    invocation = Invocation("a", scaled, (2, 3), {"offset": 1})
    assert as_invocation(invocation) is invocation
    assert as_invocation(("a", scaled, [2, 3], {"offset": 1})) == invocation


async def test_batch_may_be_any_iterable_and_is_not_touched_before_it_is_entered() -> None:
    source = Source()
    inputs: list[Any] = [
        [],
        (),
        set(),
        iter([]),
        Invocation.map(double, []),
        Invocation.map(double, source()),
    ]
    for batch in inputs:
        AgentLoop().as_completed(batch)

    assert source.pulled == 0


# --- map


def test_map_numbers_the_items_after_the_function() -> None:
    assert list(Invocation.map(double, [])) == []
    assert list(Invocation.map(double, [7, 8])) == [
        Invocation("double-0", double, (7,)),
        Invocation("double-1", double, (8,)),
    ]


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (double, "double"),
        (partial(scaled, 2), "scaled"),
        (partial(partial(scaled, 2), offset=1), "scaled"),
        (Agent(), "Agent"),
        (partial(Agent()), "Agent"),
        (Agent().ask, "ask"),
        (by_lambda(), "<lambda>"),
    ],
    ids=["function", "partial", "partial of partial", "object", "partial of object", "method", "lambda"],
)
def test_map_finds_a_name_for_every_kind_of_function(fn: Any, name: str) -> None:
    assert [invocation.agent_id for invocation in Invocation.map(fn, "xy")] == [f"{name}-0", f"{name}-1"]


@pytest.mark.parametrize(
    ("agent_id", "names"),
    [(None, "double-0 double-1"), ("q", "q-0 q-1"), ("", "-0 -1"), ("item{}".format, "item0 item1")],
)
async def test_map_takes_a_prefix_or_a_function_that_names_each_item(agent_id: Any, names: str) -> None:
    found = [invocation.agent_id for invocation in Invocation.map(double, [0, 1], agent_id)]
    asynchronous = Invocation.map(double, Source(2)(), agent_id)
    assert found == [invocation.agent_id async for invocation in asynchronous] == names.split()


def test_map_takes_a_function_that_gives_each_item_a_key() -> None:
    assert [one.key for one in Invocation.map(double, [7, 8], key=lambda x: x * 10)] == [70, 80]


def test_map_refuses_an_item_whose_name_is_no_str() -> None:
    invocations = Invocation.map(double, [7], agent_id=lambda x: x)
    with pytest.raises(TypeError, match=r"^agent_id must be a str, got 7$"):
        next(invocations)


def test_map_refuses_a_function_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match=r"^fn must be an async function, got None$"):
        Invocation.map(None, [1])


def test_map_over_an_iterable_is_lazy() -> None:
    pulled: list[int] = []

    def source() -> Iterator[int]:
        for item in range(5):
            pulled.append(item)
            yield item

    invocations = Invocation.map(double, source())
    assert pulled == []
    next(invocations)
    next(invocations)
    assert pulled == [0, 1]


async def test_error_of_the_items_comes_through_as_it_is() -> None:
    error = LookupError("no more")

    def source() -> Iterator[int]:
        yield 1
        raise error

    invocations = Invocation.map(double, source())
    next(invocations)
    with pytest.raises(LookupError) as caught:
        next(invocations)

    assert caught.value is error
    slow = Invocation.map(double, FakeAgent(Chunks([1], then=error))())
    await anext(slow)
    assert await raised_by(anext, slow) is error


async def test_map_over_an_async_iterable_is_lazy_and_closes_it() -> None:
    source = Source()
    invocations: Any = Invocation.map(double, source())
    assert source.pulled == 0
    assert await anext(invocations) == Invocation("double-0", double, (0,))
    assert (source.pulled, source.closed) == (1, False)
    await invocations.aclose()
    assert source.closed
    with pytest.raises(StopAsyncIteration):
        await anext(invocations)


async def test_item_that_cannot_be_named_closes_the_source_of_an_async_map() -> None:
    source = Source()
    invocations = Invocation.map(double, source(), agent_id=lambda item: str(1 / item))
    with pytest.raises(ZeroDivisionError):
        await anext(invocations)

    assert source.closed


async def test_async_map_leaves_a_source_open_that_is_no_generator() -> None:
    send, receive = anyio.create_memory_object_stream[int](2)
    async with send, receive:
        await send.send(1)
        await send.send(2)
        invocations: Any = Invocation.map(double, receive)
        await anext(invocations)
        await invocations.aclose()
        assert receive.receive_nowait() == 2

"""What is to be run: how it is described, and what is refused with which hint."""

import gc
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import attrs
import pytest

from agentloop import AgentLoop, Invocation
from agentloop._invocation import as_invocation


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
    assert attrs.asdict(invocation, recurse=False) == {
        "agent_id": "a",
        "fn": double,
        "args": (),
        "kwargs": {},
        "key": None,
    }
    assert invocation.kwargs is not Invocation("b", double).kwargs


def test_arguments_may_be_any_sequence_and_any_mapping() -> None:
    args = [1, 2]
    invocation = Invocation("a", scaled, args, {"offset": 3})
    args.append(4)
    assert invocation.args == (1, 2)
    assert invocation.kwargs == {"offset": 3}
    assert Invocation("a", double, range(1)).args == (0,)


def test_invocation_is_frozen_and_compared_by_value() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Invocation("a", double).agent_id = "b"

    assert Invocation("a", double, (1,)) == Invocation("a", double, (1,)) != Invocation("a", double, (2,))


@pytest.mark.parametrize("value", [None, 5, b"a", ("a",)], ids=named)
def test_agent_id_that_is_no_str_is_refused(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Invocation(value, double)

    assert str(caught.value) == f"agent_id must be a str, got {value!r}"


@pytest.mark.parametrize("value", [None, 5, "double", (double,)], ids=named)
def test_fn_that_cannot_be_called_is_refused(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Invocation("a", value)

    assert str(caught.value) == f"fn must be an async function, got {value!r}"


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
        lambda coroutine: Invocation.map(coroutine, [1]),
        lambda coroutine: as_invocation(("a", coroutine, (), {})),
    ],
    ids=["alone", "bad args", "bad kwargs", "map", "tuple"],
)
def test_coroutine_is_refused_with_a_hint_and_without_a_warning(
    make: Callable[[Any], object], recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(TypeError, match=REFUSED_COROUTINE):
        make(double(1))

    gc.collect()
    assert not recwarn.list


@pytest.mark.parametrize("value", ["ab", b"ab", 5, None, {1}, {"x": 1}, iter(())], ids=named)
def test_args_that_are_no_sequence_are_refused(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Invocation("a", double, value)

    assert str(caught.value) == f"args must be a tuple of positional arguments, got {value!r}"


@pytest.mark.parametrize("value", [None, 5, ("x", 1), {1: 2}, {"x": 1, b"y": 2}], ids=named)
def test_kwargs_that_are_no_mapping_of_names_are_refused(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Invocation("a", double, (), value)

    assert str(caught.value) == f"kwargs must be a mapping of argument names to values, got {value!r}"


@pytest.mark.parametrize("value", [1.5, True, b"a", ("a",)], ids=named)
def test_key_that_is_neither_text_nor_a_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Invocation("a", double, key=value)

    assert str(caught.value) == f"key must be a str, an int or None, got {value!r}"


# --- what a batch accepts


def test_invocation_as_an_input_is_itself() -> None:
    invocation = Invocation("a", double, (1,))
    assert as_invocation(invocation) is invocation


def test_plain_tuple_is_an_invocation_of_its_four_fields() -> None:
    assert as_invocation(("a", scaled, [2, 3], {"offset": 1})) == Invocation(
        "a", scaled, (2, 3), {"offset": 1}
    )


@pytest.mark.parametrize(
    "value", [("a", double), ("a", double, ()), ["a", double, (), {}], "a", 5, None], ids=named
)
def test_other_input_is_refused_with_what_was_expected(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        as_invocation(value)

    assert str(caught.value) == (
        f"expected an Invocation or a tuple (agent_id, fn, args, kwargs) as an input, got {value!r}"
    )


@pytest.mark.parametrize("value", [None, 5, "jobs", b"jobs", {"a": double}, double], ids=named)
def test_batch_of_what_is_no_iterable_of_invocations_is_refused(value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        AgentLoop().as_completed(value)

    assert str(caught.value) == (
        "expected a sync or async iterable of invocations, such as [Invocation(agent_id, fn, args)] or "
        f"Invocation.map(fn, items), got {value!r}"
    )


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


def test_map_takes_a_prefix() -> None:
    assert [i.agent_id for i in Invocation.map(double, [7, 8], agent_id="q")] == ["q-0", "q-1"]
    assert [i.agent_id for i in Invocation.map(double, [7], agent_id="")] == ["-0"]


def test_map_takes_a_function_that_names_each_item() -> None:
    assert [i.agent_id for i in Invocation.map(double, [7, 8], agent_id="item {}".format)] == [
        "item 7",
        "item 8",
    ]


def test_map_takes_a_function_that_gives_each_item_a_key() -> None:
    invocations = list(Invocation.map(double, [7, 8], key=lambda x: x * 10))
    assert invocations == [
        Invocation("double-0", double, (7,), key=70),
        Invocation("double-1", double, (8,), key=80),
    ]


def test_map_refuses_a_key_that_is_no_plain_function() -> None:
    with pytest.raises(TypeError, match=r"^key must be callable, got 'id'$"):
        Invocation.map(double, [1], key="id")  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"^key must be a plain function, got an async one"):
        Invocation.map(double, [1], key=double)  # type: ignore[arg-type]


def test_map_refuses_an_item_whose_name_is_no_str() -> None:
    invocations = Invocation.map(double, [7], agent_id=lambda x: x)
    with pytest.raises(TypeError, match=r"^agent_id must be a str, got 7$"):
        next(invocations)


@pytest.mark.parametrize("agent_id", [5, b"q", ("q",)], ids=named)
def test_map_refuses_an_agent_id_that_names_nothing(agent_id: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Invocation.map(double, [1], agent_id)

    assert str(caught.value) == f"agent_id must be a str, a function of an item or None, got {agent_id!r}"


def test_map_refuses_a_function_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match=r"^fn must be an async function, got None$"):
        Invocation.map(None, [1])


@pytest.mark.parametrize("items", [5, None, double], ids=named)
def test_map_refuses_items_that_cannot_be_iterated(items: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Invocation.map(double, items)

    assert str(caught.value) == f"items must be a sync or async iterable, got {items!r}"


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


def test_map_over_nothing_is_empty() -> None:
    assert list(Invocation.map(double, [])) == []


def test_error_of_the_items_comes_through_as_it_is() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    invocations = Invocation.map(double, source())
    next(invocations)
    with pytest.raises(LookupError, match="no more"):
        next(invocations)


async def test_map_over_an_async_iterable_is_lazy() -> None:
    source = Source()
    invocations: Any = Invocation.map(double, source())
    assert source.pulled == 0
    assert await anext(invocations) == Invocation("double-0", double, (0,))
    assert source.pulled == 1
    await invocations.aclose()


async def test_map_over_an_async_iterable_names_and_numbers_as_over_any_other() -> None:
    async def ids(invocations: AsyncIterable[Invocation[int]]) -> list[str]:
        return [invocation.agent_id async for invocation in invocations]

    assert await ids(Invocation.map(double, Source(2)())) == ["double-0", "double-1"]
    assert await ids(Invocation.map(double, Source(2)(), "q")) == ["q-0", "q-1"]
    assert await ids(Invocation.map(double, Source(2)(), "item {}".format)) == ["item 0", "item 1"]


async def test_closing_an_async_map_closes_its_source() -> None:
    source = Source()
    invocations: Any = Invocation.map(double, source())
    await anext(invocations)
    assert not source.closed
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


async def test_error_of_an_async_source_comes_through_as_it_is() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        raise LookupError("no more")

    invocations = Invocation.map(double, source())
    await anext(invocations)
    with pytest.raises(LookupError, match="no more"):
        await anext(invocations)

"""Context variables: the caller's are seen, and none leak."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.to_thread
import pytest
from agents import agent_for, each_verb, make_loop, run
from anyio.lowlevel import checkpoint

from agentloop import (
    AgentLoop,
    FirstChunkEvent,
    Invocation,
    Limiter,
    LoopConfig,
    Rate,
    StartedEvent,
    classify,
    current_attempt,
)

var: contextvars.ContextVar[Any] = contextvars.ContextVar("var", default="unset")


seen: list[Any] = []


@pytest.fixture(autouse=True)
def forget() -> None:
    seen.clear()


async def sees_and_sets(x: Any) -> Any:
    before = var.get()
    seen.append(before)
    var.set(x)
    await checkpoint()
    assert var.get() == x
    return before


@each_verb
@pytest.mark.parametrize("limit", [1, 3])
async def test_invocation_sees_the_callers_variables_and_leaves_them_alone(verb: str, limit: int) -> None:
    var.set("caller")
    loop = make_loop(max_concurrency=limit)
    await run(verb, loop, Invocation.map(agent_for(verb, sees_and_sets), range(12)))
    assert seen == ["caller"] * 12
    assert var.get() == "caller"


async def test_batch_sees_the_variables_from_when_it_began() -> None:
    var.set("caller")
    async with make_loop(max_concurrency=1).as_completed(Invocation.map(sees_and_sets, range(12))) as done:
        var.set("reader")
        assert [result.success async for result in done] == [True] * 12

    assert seen == ["caller"] * 12
    assert var.get() == "reader"


async def test_variable_that_was_never_set_stays_unset() -> None:
    fresh: contextvars.ContextVar[int] = contextvars.ContextVar("fresh")

    async def agent(x: int) -> bool:
        was_set = fresh.get(None) is not None
        fresh.set(x)
        return was_set

    results = await AgentLoop(LoopConfig(max_concurrency=1)).run_all(Invocation.map(agent, range(5)))
    assert not any(result.unwrap() for result in results)
    assert fresh.get(None) is None


@each_verb
async def test_every_attempt_starts_from_the_callers_variables(verb: str) -> None:
    async def agent() -> None:
        await sees_and_sets("attempt")
        raise OSError

    var.set("caller")
    await run(verb, make_loop(max_retries=2), [Invocation("a", agent_for(verb, agent))])
    assert seen == ["caller"] * 3


async def test_token_can_be_reset_in_any_later_step() -> None:
    async def agent(x: int) -> None:
        token = var.set(x)
        try:
            for _ in range(3):
                await anyio.sleep(1)
                assert var.get() == x
        finally:
            var.reset(token)

        assert var.get() == "caller"

    var.set("caller")
    loop = AgentLoop(LoopConfig(max_retries=0, max_concurrency=4))
    for result in await loop.run_all(Invocation.map(agent, range(12))):
        result.unwrap()


async def test_token_can_be_reset_when_the_agent_is_cancelled() -> None:
    ends = []

    async def agent(x: int) -> None:
        token = var.set(x)
        try:
            await anyio.sleep_forever()
        finally:
            var.reset(token)
            ends.append(var.get())

    var.set("caller")
    loop = AgentLoop(LoopConfig(max_retries=0, timeout_seconds=1))
    await loop.run_all(Invocation.map(agent, range(3)))
    assert ends == ["caller"] * 3


async def test_tasks_and_threads_of_the_agent_see_its_variables() -> None:
    async def agent(x: int) -> list[Any]:
        var.set(x)
        seen = []

        async def child() -> None:
            seen.append(var.get())

        async with anyio.create_task_group() as group:
            group.start_soon(child)

        seen.append(await anyio.to_thread.run_sync(var.get))
        return seen

    results = await AgentLoop().run_all(Invocation.map(agent, range(5)))
    assert [result.output for result in results] == [[x, x] for x in range(5)]


async def test_nested_invocation_sees_its_parents_variables() -> None:
    loop = AgentLoop()

    async def parent(x: int) -> Any:
        var.set(x)
        single = await loop.run_single("child", sees_and_sets, -1)
        batch = await loop.run_all(Invocation.map(sees_and_sets, [-1, -2]))
        return single.success, all(result.success for result in batch), var.get()

    results = await loop.run_all(Invocation.map(parent, range(4)))
    assert [result.output for result in results] == [(True, True, x) for x in range(4)]
    assert sorted(seen) == sorted([*range(4)] * 3)


async def test_sync_part_of_a_callable_runs_in_the_same_context() -> None:
    def fn() -> Any:
        var.set("sync")

        async def rest() -> Any:
            return var.get()

        return rest()

    var.set("caller")
    assert (await AgentLoop().run_single("a", fn)).output == "sync"
    assert var.get() == "caller"


@each_verb
@pytest.mark.parametrize("function", ["on_event", "classify", "cost"])
async def test_functions_besides_agents_see_the_callers_variables_and_no_attempt(
    verb: str, function: str
) -> None:
    def look(about: Any) -> Any:
        if not isinstance(about, StartedEvent | FirstChunkEvent):
            seen.append(var.get())
            with pytest.raises(RuntimeError, match="outside of an agent"):
                current_attempt()

        return classify(about) if isinstance(about, Exception) else 1

    async def agent(x: int) -> None:
        var.set(x)
        if x % 2:
            raise OSError

    var.set("caller")
    on_event, cost = (look if function == name else None for name in ("on_event", "cost"))
    limiter = Limiter(1, rates=[Rate(100, cost=cost, settle=cost)])
    config = LoopConfig(max_retries=1, classify=look if function == "classify" else classify)
    loop = AgentLoop(config, limiter=limiter if cost else Limiter(1), on_event=on_event)
    await run(verb, loop, Invocation.map(agent_for(verb, agent), range(6)))
    assert len(seen) >= 6
    assert set(seen) == {"caller"}


@pytest.mark.parametrize("kind", [0, 1])
async def test_input_has_a_context_of_its_own(kind: int) -> None:
    def sync() -> Iterator[Any]:
        for i in range(6):
            assert var.get() == ("caller" if i == 0 else i - 1)
            var.set(i)
            yield Invocation("a", sees_and_sets, ("agent",))

    async def asynchronous() -> AsyncIterator[Any]:
        for item in sync():
            await checkpoint()
            yield item

    var.set("caller")
    inputs: Any = [sync, asynchronous][kind]()
    results = await AgentLoop(LoopConfig(max_concurrency=2)).run_all(inputs)
    assert [result.output for result in results] == ["caller"] * 6
    assert var.get() == "caller"


async def test_exception_thrown_in_is_no_context_of_what_the_agent_raises_later() -> None:
    async def agent() -> None:
        with anyio.move_on_after(1):
            try:
                await anyio.sleep(10)
            except BaseException:
                pass

        raise ValueError

    result = await AgentLoop(LoopConfig(max_retries=0)).run_single("a", agent)
    assert isinstance(result.exception, ValueError)
    assert result.exception.__context__ is None


async def test_call_that_is_closed_closes_the_agent() -> None:
    closed = []

    class Wait:
        def __await__(self) -> Iterator[None]:
            yield

    async def agent() -> None:
        try:
            await Wait()
        finally:
            closed.append(var.get())

    var.set("inside")
    call = AgentLoop().run_single("a", agent)
    call.send(None)
    var.set("outside")
    call.close()
    assert closed == ["inside"]

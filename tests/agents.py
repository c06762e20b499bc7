"""Agents that many tests run, and ways to run them. Agents that fail play a script: see ``FakeAgent``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from agentloop import AgentLoop, AgentStream, Backoff, BatchStopped, LoopConfig, ResultEvent, Status
from agentloop.testing import virtual_clock

backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
both_verbs = pytest.mark.parametrize("verb", ["run_all", "as_completed"])
each_verb = pytest.mark.parametrize(
    "verb", ["run_single", "run_all", "as_completed", "run_streaming", "stream_all"]
)
each_batch = pytest.mark.parametrize("verb", ["run_all", "as_completed", "stream_all"])
entered_or_not = pytest.mark.parametrize("entered", [False, True], ids=["outside", "entered"])

# -- agents


async def nothing(*_: object) -> None:
    pass


async def double(x: int) -> int:
    await checkpoint()
    return 2 * x


async def count(upto: int) -> AsyncGenerator[int]:
    for i in range(upto):
        await checkpoint()
        yield i


async def count_at_once(upto: int) -> AsyncGenerator[int]:
    for i in range(upto):
        yield i


async def one_a_second(upto: int) -> AsyncGenerator[int]:
    for i in range(upto):
        await anyio.sleep(1)
        yield i


def agent_for(verb: str, agent: Callable[..., Any]) -> Callable[..., Any]:
    """Return an agent that a verb can run: of a stream, what the agent returns is its only chunk."""

    async def stream(*args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        yield await agent(*args, **kwargs)

    return stream if verb in ("run_streaming", "stream_all") else agent


async def stray_cancellation() -> BaseException:
    """Return a cancellation of the backend whose scope has ended."""
    caught: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class() as exc:
            caught.append(exc)
            raise

    return caught[0]


# -- loops


def make_loop(**settings: Any) -> AgentLoop:
    """Return a loop that retries nothing, unless told to; then it waits 1, 2, 4 ... seconds."""
    plain = Backoff(initial_seconds=1, jitter="none")
    return AgentLoop(LoopConfig(**{"max_retries": 0, "backoff": plain, **settings}))


def within(loop: AgentLoop, entered: bool) -> AbstractAsyncContextManager[object]:
    """Return what enters a loop, or does nothing."""
    return loop if entered else nullcontext()


async def run(verb: str, loop: AgentLoop, inputs: Any) -> list[Any]:
    """Run invocations by any verb, and return their results in input order."""
    results: list[Any] = []
    await run_into(results, verb, loop, inputs)
    return in_order(results)


async def run_until_stopped(verb: str, loop: AgentLoop, inputs: Any) -> tuple[list[Any], Any]:
    """Run a batch, and return the results that there are in input order, and what stopped it, if anything."""
    results: list[Any] = []
    try:
        await run_into(results, verb, loop, inputs)
    except BatchStopped as exc:
        return in_order(exc.results or results), exc

    skipped = [result.exception for result in results if result.status is Status.SKIPPED]
    return in_order(results), skipped[0] if skipped else None


def in_order(results: list[Any]) -> list[Any]:
    return sorted(results, key=lambda result: result.index)


async def run_into(results: list[Any], verb: str, loop: AgentLoop, inputs: Any) -> None:
    """Run invocations by a verb, and append each result as soon as it is there."""
    match verb:
        case "run_single":
            for each in inputs:
                results.append(await loop.run_single(each.agent_id, each.fn, *each.args, **each.kwargs))
        case "run_streaming":
            for each in inputs:
                stream = loop.run_streaming(each.agent_id, each.fn, *each.args, **each.kwargs)
                with suppress(Exception):
                    async with stream:
                        [_ async for _ in stream]

                results.append(stream.result)
        case "run_all":
            results += await loop.run_all(inputs)
        case "as_completed":
            async with loop.as_completed(inputs) as completed:
                async for result in completed:
                    results.append(result)
        case "stream_all":
            async with loop.stream_all(inputs) as events:
                async for event in events:
                    if isinstance(event, ResultEvent):
                        results.append(event.result)


async def read(stream: AgentStream[Any]) -> tuple[list[Any], Any]:
    """Read a stream to its end, and return its chunks, and its error if it failed."""
    chunks = []
    try:
        async for chunk in stream:
            chunks.append(chunk)
    except Exception as exc:
        return chunks, exc

    return chunks, None


async def run_stream(
    loop: AgentLoop, agent: Callable[..., Any], *args: Any, pause: float | None = None
) -> tuple[list[Any], Any, Any]:
    """Run an agent that yields, read it after a pause, and return its chunks, its error and its result."""
    async with loop.run_streaming("a", agent, *args) as stream:
        if pause is not None:
            await anyio.sleep(pause)

        chunks, error = await read(stream)

    return chunks, error, stream.result


def run_scheduled(backend: Any, seed: int | None, main: Callable[..., Any], *args: Any) -> Any:
    """Run a function in an event loop of its own, whose schedule the seed decides, if there is one."""
    name, options = virtual_clock(backend, seed=seed)
    return anyio.run(main, *args, backend=name, backend_options=options)


# -- tasks

on_asyncio = pytest.mark.parametrize("anyio_backend", [virtual_clock("asyncio")], ids=["asyncio"])


async def into(results: list[Any], fn: Callable[..., Any], *args: Any) -> None:
    """Call a function, and append what it returns."""
    results.append(await fn(*args))


async def launch(group: TaskGroup, fn: Callable[..., Any], *args: Any) -> None:
    """Start a task, and return when it waits for something, as all other tasks do."""
    group.start_soon(fn, *args)
    await anyio.wait_all_tasks_blocked()


async def raised_by(fn: Callable[..., Any], *args: Any) -> Exception | None:
    """Call a function, and return the error that it raises, if it raises one."""
    try:
        await fn(*args)
    except Exception as exc:
        return exc

    return None

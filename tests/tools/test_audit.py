"""The audit finds what was left behind on purpose, and nothing where nothing was."""

import asyncio
import gc
import logging
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
from agents import backends, count, run_scheduled
from audit import assert_quiet, audit_limiters, leak_audit, open_generators, other_tasks

from agentloop import AgentLoop, Invocation, Limiter
from agentloop._limits.limiter import pool_of

kept: list[Any] = []


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    kept.clear()


@backends
def test_clean_run_passes(backend: Any) -> None:
    async def main() -> list[int]:
        await assert_quiet()
        send, receive = anyio.create_memory_object_stream[int](1)
        async with anyio.create_task_group() as tg, send, receive:
            tg.start_soon(send.send, 1)
            await receive.receive()

        numbers = [number async for number in count(3)]
        await anyio.to_thread.run_sync(int)
        await assert_quiet()
        return numbers

    with leak_audit():
        assert run_scheduled(backend, None, main) == [0, 1, 2]


@backends
def test_task_left_is_found(backend: Any) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.sleep_forever)
            with pytest.raises(AssertionError, match=r"tasks left: .*sleep"):
                await assert_quiet()

            await assert_quiet(other_tasks())
            tg.cancel_scope.cancel()

    run_scheduled(backend, None, main)


@backends
def test_ancestors_and_siblings_of_the_host_are_told_apart(backend: Any) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.sleep, 1)
            tg.start_soon(anyio.sleep, 1)
            await anyio.lowlevel.checkpoint()
            assert len(other_tasks()) == 2

        assert not other_tasks()

    run_scheduled(backend, None, main)


@backends
def test_open_generator_is_found(backend: Any) -> None:
    async def main() -> None:
        generator = count(3)
        await anext(generator)
        with pytest.raises(AssertionError, match=r"async generators left open: .*count"):
            await assert_quiet()

        await assert_quiet(open_generators())
        await generator.aclose()
        await assert_quiet()

    run_scheduled(backend, None, main)


def test_cancellation_that_nobody_took_back_is_found() -> None:
    async def main() -> None:
        host = asyncio.current_task()
        assert host is not None
        host.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(1)

        with pytest.raises(AssertionError, match="1 cancellations of the host"):
            await assert_quiet()

        host.uncancel()
        await assert_quiet()

    asyncio.run(main())


def assert_found(what: str, main: Callable[[], Awaitable[Any]], backend: Any = "asyncio") -> None:
    with pytest.raises(AssertionError, match=what), leak_audit():
        run_scheduled(backend, None, main)


@backends
def test_stream_that_nobody_closed_is_found(backend: Any) -> None:
    async def collected() -> None:
        anyio.create_memory_object_stream[int](1)

    async def still_there() -> None:
        kept.append(anyio.create_memory_object_stream[int](1))

    assert_found("unraisable .*Unclosed <MemoryObject", collected, backend)
    assert_found("left open: .*MemoryObjectSendStream", still_there, backend)
    for stream in kept.pop():
        stream.close()


@backends
def test_coroutine_that_nobody_awaited_is_found(backend: Any) -> None:
    async def main() -> None:
        anyio.sleep(1)

    assert_found("never awaited", main, backend)


@backends
def test_error_in_a_finalizer_is_found_even_in_a_cycle(backend: Any) -> None:
    class Broken:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            raise ValueError("in a finalizer")

    async def main() -> None:
        Broken()

    assert_found("in a finalizer", main, backend)


@backends
def test_thread_that_died_is_found(backend: Any) -> None:
    def work() -> None:
        raise ValueError("in a thread")

    async def main() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)

    assert_found("died: ValueError", main, backend)


def test_error_in_the_log_of_asyncio_is_found() -> None:
    async def main() -> None:
        logging.getLogger("asyncio").error("something is wrong")

    assert_found("asyncio logged: something is wrong", main)


def test_exception_handler_of_any_kind_is_found() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)

    assert_found("exception handler was called: .*ZeroDivisionError", main)


def test_future_whose_error_nobody_looked_at_is_found() -> None:
    async def main() -> None:
        asyncio.get_running_loop().create_future().set_exception(ValueError("unseen"))

    assert_found("unseen", main)


@backends
def test_error_of_the_run_passes_through(backend: Any) -> None:
    async def main() -> None:
        kept.append(anyio.create_memory_object_stream[int](1))
        raise LookupError("the run's own")

    with pytest.raises(LookupError, match="the run's own"), leak_audit():
        run_scheduled(backend, None, main)

    for stream in kept.pop():
        stream.close()


def test_audit_leaves_no_trace_itself() -> None:
    def traces() -> list[object]:
        handlers = list(logging.getLogger("asyncio").handlers)
        return [
            asyncio.BaseEventLoop.call_exception_handler,
            threading.excepthook,
            list(warnings.filters),
            handlers,
        ]

    before = traces()
    with leak_audit():
        trio.run(trio.sleep, 0)
        gc.collect()

    assert traces() == before


@pytest.fixture
async def opened(anyio_backend: Any) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tg:
        tg.start_soon(anyio.sleep_forever)
        yield
        tg.cancel_scope.cancel()


async def test_fixtures_of_a_plugin_test_can_be_known(opened: None) -> None:
    known = other_tasks() | open_generators()
    assert len(other_tasks()) == 1
    await assert_quiet(known)


# --- limiters


async def nothing_yet() -> AsyncIterator[Invocation[None]]:
    await anyio.sleep(1)
    yield Invocation("a", anyio.sleep, (0,))


@pytest.mark.parametrize(
    ("paused", "inputs", "message"),
    [
        (False, [Invocation("a", anyio.sleep, (1,))], "a slot was not given back"),
        (True, [Invocation("a", anyio.sleep, (1,))], "something still waits for a slot or a retry"),
        (False, nothing_yet, "a batch still listens to its limiter"),
    ],
    ids=["running", "waiting", "listening"],
)
async def test_limiter_that_is_not_idle_is_found(paused: bool, inputs: Any, message: str) -> None:
    limiter = Limiter(1)
    async with anyio.create_task_group() as tg:
        with pytest.raises(AssertionError, match=message):
            with audit_limiters():
                if paused:
                    limiter.pause()

                loop = AgentLoop(limiter=limiter)
                tg.start_soon(loop.run_all, inputs() if callable(inputs) else inputs)
                await anyio.wait_all_tasks_blocked()

        limiter.resume()


async def test_call_that_still_counts_once_it_has_ended_is_found() -> None:
    with pytest.raises(AssertionError, match="a call that has ended still counts as a user"):
        with audit_limiters():
            pool = pool_of(Limiter(1))
            pool.claim()

    pool.users -= 1

"""Signals that drain loops: what is printed, what has ended, and the exit status."""

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from agents import backends
from elsewhere import in_use_elsewhere

from agentloop import AgentLoop, Invocation, LoopConfig, Status, drain_on_signals

pytestmark = pytest.mark.skipif(os.name == "nt", reason="drain_on_signals() does nothing on Windows")

PROGRAM = """
import signal, sys
from contextlib import suppress
import anyio
from agentloop import AgentLoop, BatchStopped, Invocation, LoopConfig, ResultEvent, drain_on_signals

backend, verb, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
# Where tests run in the background of a shell it is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
loop = AgentLoop(LoopConfig(max_concurrency=3))

async def work(x):
    print("began", x, file=sys.stderr, flush=True)
    await (draining.wait() if count == 1 else anyio.sleep_forever())
    print("ended", x, file=sys.stderr, flush=True)
    return x

async def write(x):
    yield await work(x)

def tell(result):
    # Not flushed: it has to come out all the same.
    print(result.agent_id, result.status)

async def one(x):
    if verb == "run_single":
        tell(await loop.run_single(str(x), work, x))
    else:
        stream = loop.run_streaming(str(x), write, x)
        with suppress(Exception):
            async with stream:
                [_ async for _ in stream]

        tell(stream.result)

async def main():
    global draining
    async with drain_on_signals(loop, grace_seconds=None) as draining:
        jobs = Invocation.map(write if verb == "stream_all" else work, range(9), agent_id=str)
        try:
            if verb == "run_all":
                for result in await loop.run_all(jobs):
                    tell(result)
            elif verb in ("run_single", "run_streaming"):
                async with anyio.create_task_group() as group:
                    for x in range(9):
                        group.start_soon(one, x)
            else:
                async with getattr(loop, verb)(jobs) as items:
                    async for item in items:
                        if verb == "as_completed":
                            tell(item)
                        elif isinstance(item, ResultEvent):
                            tell(item.result)
        except BatchStopped as stopped:
            print("stopped:", stopped.reason)
    print("never reached")

anyio.run(main, backend=backend)
"""


@pytest.mark.long
# Which signal it is makes no difference to a verb, and which event loop it is none to the results.
@pytest.mark.parametrize(
    ("backend", "verb", "first"),
    [
        ("asyncio", "run_all", signal.SIGINT),
        ("trio", "run_all", signal.SIGINT),
        ("asyncio", "run_all", signal.SIGTERM),
        ("trio", "run_all", signal.SIGTERM),
        ("asyncio", "as_completed", signal.SIGINT),
        ("trio", "stream_all", signal.SIGINT),
        ("asyncio", "run_streaming", signal.SIGINT),
        ("trio", "run_single", signal.SIGINT),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_agents_that_are_printed_as_done_are_those_that_were(
    backend: str, verb: str, count: int, first: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, backend, verb, str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        began = {process.stderr.readline().split()[1] for _ in range(3)}
        process.send_signal(first)
        if count == 2:
            process.send_signal(signal.SIGTERM if first is signal.SIGINT else signal.SIGINT)

        output, errors = process.communicate(timeout=30)

    lines = [line.split() for line in output.splitlines()]
    told = {line[0]: line[1] for line in lines if line[0].isdecimal()}
    ended = {line.split()[1] for line in errors.splitlines() if line.startswith("ended")}
    assert {name for name, status in told.items() if status == "success"} == ended
    assert "began" not in errors
    # Two different signals that come together may change places, but one of them it is.
    either = {first} if count == 1 else {signal.SIGINT, signal.SIGTERM}
    assert -process.returncode in either, errors
    assert "never reached" not in output
    if count == 1:
        assert ended == began
    else:
        assert {told[name] for name in began} == {"cancelled"}

    if verb in ("as_completed", "stream_all"):
        assert lines[-1][0] == "stopped:"
    else:
        assert set(told) == set("012345678")
        assert {told[name] for name in set(told) - began} == {"skipped"}


@pytest.fixture(autouse=True)
def interrupt() -> Any:
    """Ctrl-C works, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@backends
def test_interrupt_drains_and_is_raised_when_the_block_is_left(backend: str) -> None:
    statuses: list[Status] = []

    async def agent(x: int) -> None:
        if x == 0:
            signal.raise_signal(signal.SIGINT)
            await anyio.sleep(0.01)

    async def main() -> None:
        loop = AgentLoop(LoopConfig(max_concurrency=1))
        async with drain_on_signals(loop) as draining:
            assert not draining.is_set()
            results = await loop.run_all(Invocation.map(agent, range(3)))
            await draining.wait()
            statuses.extend(result.status for result in results)
            assert str(results[1].exception) == "received SIGINT"

        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend)

    assert statuses == [Status.SUCCESS, Status.SKIPPED, Status.SKIPPED]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@backends
def test_grace_cancels_what_runs(backend: str) -> None:
    async def main() -> None:
        loop = AgentLoop()
        async with drain_on_signals(loop, grace_seconds=0.02):
            signal.raise_signal(signal.SIGINT)
            (result,) = await loop.run_all([Invocation("a", anyio.sleep, (60,))])
            assert result.status in (Status.CANCELLED, Status.SKIPPED)

    with pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend)


@backends
def test_interrupt_replaces_what_the_block_raises(backend: str) -> None:
    async def main() -> None:
        async with drain_on_signals(AgentLoop()):
            signal.raise_signal(signal.SIGINT)
            raise ValueError("lost")

    with pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend)


def test_interrupt_is_raised_though_the_block_left_a_cancellation_counted() -> None:
    async def main() -> None:
        async with drain_on_signals(AgentLoop()):
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(0)

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


@backends
def test_block_without_a_signal_raises_what_it_raises_and_leaves_no_handler(backend: str) -> None:
    async def main() -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with pytest.raises(ValueError, match="mine"):
            async with drain_on_signals(AgentLoop()):
                raise ValueError("mine")

        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    anyio.run(main, backend=backend)


@backends
def test_third_interrupt_interrupts(backend: str) -> None:
    async def main() -> None:
        async with drain_on_signals(AgentLoop()):
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)

            await anyio.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend)


@backends
def test_loop_in_use_elsewhere_is_logged_and_the_others_drain(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere, here = AgentLoop(), AgentLoop()

    async def main() -> None:
        async with drain_on_signals(elsewhere, here):
            signal.raise_signal(signal.SIGINT)
            await anyio.sleep(0.02)
            assert (await here.run_single("a", anyio.sleep, 0)).status is Status.SKIPPED

    with in_use_elsewhere(elsewhere, backend), pytest.raises(KeyboardInterrupt):
        anyio.run(main, backend=backend)

    assert "a loop could not be drained" in caplog.text


async def test_bad_arguments_are_refused_at_once() -> None:
    loop = AgentLoop()
    with pytest.raises(TypeError, match="needs the loops to drain"):
        drain_on_signals()

    with pytest.raises(TypeError, match="loops must be of type AgentLoop, got 5"):
        drain_on_signals(loop, 5)  # type: ignore[arg-type]  # has to be refused

    with pytest.raises(ValueError, match="grace_seconds must be at least 0"):
        drain_on_signals(loop, grace_seconds=-1)

    with pytest.raises(TypeError, match=r"signals must be several"):
        drain_on_signals(loop, signals=signal.SIGTERM)  # type: ignore[arg-type]  # has to be refused

    with pytest.raises(TypeError, match=r"signals must be of type signal.Signals, got 'SIGTERM'"):
        drain_on_signals(loop, signals=["SIGTERM"])  # type: ignore[list-item]  # has to be refused

    with pytest.raises(ValueError, match="no process can catch SIGKILL"):
        drain_on_signals(loop, signals=[signal.SIGKILL])

    draining = drain_on_signals(loop)
    async with draining:
        with pytest.raises(RuntimeError, match="can be entered once"):
            await draining.__aenter__()


def test_another_thread_gets_no_signals() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="main thread alone"):
            async with drain_on_signals(AgentLoop()):
                pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, main()).result()


async def test_windows_is_told_that_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("agentloop._signals._ON_WINDOWS", True)
    before = signal.getsignal(signal.SIGTERM)
    async with drain_on_signals(AgentLoop()):
        assert signal.getsignal(signal.SIGTERM) is before

    assert "does nothing on Windows" in caplog.text

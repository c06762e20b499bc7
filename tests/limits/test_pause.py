"""A limiter that is paused: nothing new starts, and what runs goes on."""

import math
from typing import Any

import anyio
import pytest
from agents import backends, into, launch, nothing, run_stream
from elsewhere import in_use_elsewhere
from trouble import one_chunk, overload, passed, watched

from agentloop import AgentLoop, Backoff, Invocation, Limiter, LoopConfig, Rate, Status
from agentloop.testing import Chunks, FakeAgent


async def test_pause_lets_nothing_new_start_and_what_runs_go_on() -> None:
    limiter = Limiter(2)
    loop, starts = watched(limiter)
    streams: list[Any] = []
    async with anyio.create_task_group() as group:
        await launch(group, loop.run_all, [Invocation("c", anyio.sleep, (2,))] * 4)
        limiter.pause()
        limiter.pause()
        group.start_soon(loop.run_single, "b", nothing)
        group.start_soon(into, streams, run_stream, loop, one_chunk)
        await anyio.sleep(5)
        now = limiter.statistics()
        assert (now.running, now.waiting, now.paused_until) == (0, 4, math.inf)
        assert repr(limiter) == "<Limiter 0 running, 4 waiting, limit 2, paused>"
        limiter.resume()
        limiter.resume()
        assert limiter.statistics().paused_until is None

    assert starts.by_name == {"a": [5], "b": [5], "c": [0, 0, 5, 5]}
    assert streams[0][0] == [1]


@pytest.mark.parametrize("rates", [(), (Rate(100),)])
async def test_pause_before_the_first_run_holds_unless_it_is_undone(rates: tuple[Rate, ...]) -> None:
    limiter = Limiter(2, rates=rates)
    limiter.pause()
    limiter.resume()
    assert limiter.statistics().paused_until is None
    limiter.pause()
    assert limiter.statistics().paused_until == math.inf
    assert repr(limiter) == "<Limiter 0 running, 0 waiting, limit 2, paused>"
    loop, starts = watched(limiter)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", nothing)] * 3)
        await anyio.sleep(4)
        assert limiter.statistics().waiting == 3
        limiter.resume()

    assert starts.by_name == {"a": [4, 4, 4]}


@pytest.mark.parametrize("rates", [(), (Rate(1000, per_seconds=1),)])
async def test_agent_that_runs_goes_on_running_others_while_paused(rates: tuple[Rate, ...]) -> None:
    limiter = Limiter(3, rates=rates)
    loop, starts = watched(limiter)

    async def parent() -> None:
        await anyio.sleep(1)
        await loop.run_all([Invocation("child", anyio.sleep, (1,))] * 3)

    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "parent", parent)
        limiter.pause()
        group.start_soon(loop.run_single, "other", nothing)
        await anyio.sleep(10)
        limiter.resume()

    # One at a time, in the slot of their parent, though there are others.
    assert starts.by_name == {"parent": [0], "child": [1, 2, 3], "other": [10]}


async def test_nested_agent_that_waits_for_a_rate_starts_on_time_while_paused() -> None:
    limiter = Limiter(2, rates=[Rate(2, per_seconds=4)])
    loop, starts = watched(limiter)

    async def parent() -> None:
        await loop.run_single("first", anyio.sleep, 1)
        await loop.run_single("second", nothing)

    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "parent", parent)
        # First in line, and the one that the clock is set for.
        group.start_soon(loop.run_single, "other", nothing)
        await anyio.sleep(2)
        limiter.pause()
        await anyio.sleep(18)
        limiter.resume()

    assert starts.by_name == {"parent": [0], "first": [0], "second": [4], "other": [20]}


async def test_waiters_that_are_cancelled_while_paused_leave_the_line() -> None:
    limiter = Limiter(1)
    loop, starts = watched(limiter)
    limiter.pause()
    async with anyio.create_task_group() as group:
        with anyio.move_on_after(2):
            await loop.run_single("a", nothing)

        assert limiter.statistics().waiting == 0
        with anyio.move_on_after(2):
            group.start_soon(loop.run_single, "b", nothing)
            await loop.run_all([Invocation("c", nothing)] * 3)

        assert limiter.statistics().waiting == 1
        limiter.resume()

    assert starts.by_name == {"b": [4]}


async def test_total_time_runs_out_while_a_retry_waits_for_the_end_of_a_pause() -> None:
    limiter = Limiter(1)
    config = LoopConfig(total_timeout_seconds=5, backoff=Backoff(initial_seconds=1, jitter="none"))
    loop = AgentLoop(config, limiter=limiter)

    async def agent() -> None:
        limiter.pause()
        raise OSError

    begin = anyio.current_time()
    single = await loop.run_single("a", agent)
    limiter.resume()
    (batched,) = await loop.run_all([Invocation("a", agent)])
    assert [single.status, batched.status] == [Status.TIMEOUT] * 2
    assert passed(begin) == 10
    limiter.resume()


@backends
def test_limiter_in_use_is_paused_and_resumed_only_in_its_own_thread(backend: str) -> None:
    limiter = Limiter(1)
    with in_use_elsewhere(AgentLoop(limiter=limiter), backend):
        with pytest.raises(RuntimeError, match="a limiter in use can be paused only in the thread of its ev"):
            limiter.pause()

        with pytest.raises(RuntimeError, match="a limiter in use can be resumed only in the thread of its"):
            limiter.resume()

        assert limiter.statistics().paused_until is None

    limiter.pause()
    assert limiter.statistics().paused_until == math.inf
    limiter.resume()


@pytest.mark.parametrize("rates", [(), (Rate(4, per_seconds=1000),)])
@pytest.mark.parametrize("how", ["cool-off", "pause"])
async def test_stream_that_waits_is_neither_charged_nor_held(how: str, rates: tuple[Rate, ...]) -> None:
    limiter = Limiter(1, rates=rates)
    loop, starts = watched(limiter)

    async def parent() -> int:
        async with loop.run_streaming("stream", FakeAgent(Chunks(range(100)))) as stream:
            assert await anext(stream) == 0
            # The stream waits for its reader, who has the slot back meanwhile.
            if how == "pause":
                await loop.run_single("child", nothing)
                limiter.pause()
            else:
                await loop.run_single("child", overload, 50)

            return 1 + len([chunk async for chunk in stream])

    assert (await loop.run_single("parent", parent)).unwrap() == 100
    assert passed(starts.began) == 0
    limiter.resume()
    await loop.run_single("fourth", nothing)
    assert passed(starts.began) == (0 if how == "pause" else 2.5), "as a probe, and the stream has paid once"

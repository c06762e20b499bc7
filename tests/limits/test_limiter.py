"""Limiter: one limit for everything that shares it, in one event loop after the other."""

import asyncio
import contextlib
import os
import pickle
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from agents import backends, launch, nothing, run_scheduled, run_stream
from elsewhere import in_threads, in_use_elsewhere
from trouble import watched

from agentloop import AgentLoop, Backoff, Invocation, KeyedLimiter, Limiter, LimiterStatistics, LoopConfig
from agentloop._limits.limiter import pool_of
from agentloop._limits.slots import Slot
from agentloop.testing import FakeAgent, FakeHTTPError, Reply, VirtualClockDeadlock


@pytest.mark.parametrize(
    "bound",
    [Limiter(1), KeyedLimiter(id, lambda _: Limiter(1)), AgentLoop()],
    ids=lambda one: type(one).__name__,
)
def test_limits_do_not_pickle(bound: object) -> None:
    with pytest.raises(
        TypeError, match=rf"^{type(bound).__name__} cannot be pickled, since it.* one process"
    ):
        pickle.dumps(bound)


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "3", None])
def test_limit_that_is_no_int_from_one_on_is_refused(bad: Any) -> None:
    limiter = Limiter(1)
    error, rule = (ValueError, f"at least 1, got {bad}") if type(bad) is int else (TypeError, "an int")
    with pytest.raises(error, match=f"max_concurrency must be {rule}"):
        Limiter(bad)

    with pytest.raises(error, match=f"max_concurrency must be {rule}"):
        limiter.max_concurrency = bad

    assert limiter.max_concurrency == 1


def test_limiter_can_be_made_and_looked_at_outside_an_event_loop() -> None:
    limiter = Limiter(3)
    assert limiter.statistics() == LimiterStatistics(0, 0, 3, 3)
    limiter.max_concurrency = 5
    assert repr(limiter) == "<Limiter 0 running, 0 waiting, limit 5>"
    assert repr(AgentLoop(limiter=limiter)) == "<AgentLoop 0 running, 0 waiting, limit 5>"


async def test_repr_says_what_all_wait_for() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=8, max_retries=1, backoff=Backoff(jitter="none")))
    refusals = [*[ConnectionError()] * 8, FakeHTTPError(429, retry_after=40)]
    provider = FakeAgent(*refusals, Reply(1, after_seconds=9))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", provider)] * 9)
        await anyio.sleep(1)
        assert re.search("limit [1-7] of 8, outage, held>$", repr(loop.limiter))
        await anyio.sleep(4)
        assert repr(loop.limiter).endswith(" of 8, outage, held, probing>")
        loop.limiter.pause()
        assert repr(loop.limiter).endswith(" of 8, outage, paused, probing>")
        loop.limiter.resume()

    assert re.search(r"limit \d of 8>$", repr(loop.limiter))


async def test_loops_that_share_a_limiter_share_the_limit() -> None:
    limiter, agent = Limiter(2), FakeAgent(Reply(after_seconds=1))
    async with anyio.create_task_group() as group:
        for _ in range(3):
            loop = AgentLoop(limiter=limiter)
            group.start_soon(loop.run_all, [Invocation("a", agent)] * 5)
            group.start_soon(loop.run_single, "b", agent)

    assert (agent.peak, len(agent.calls)) == (2, 18)


async def test_cancelled_waiters_leave_the_line() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "hog", anyio.sleep, 10)
        for _ in range(100):
            with anyio.move_on_after(0.01):
                await loop.run_single("impatient", anyio.sleep, 1)

        assert loop.statistics().waiting == 0
        result = await loop.run_single("patient", anyio.sleep, 1)

    assert result.queue_ms == pytest.approx(9000)


async def test_one_that_waits_in_line_comes_before_the_next_of_a_batch() -> None:
    loop, starts = watched(Limiter(1))
    async with anyio.create_task_group() as group:
        # Each is pulled when it is about to begin, so its worker could keep the slot of the one before.
        group.start_soon(loop.run_all, (Invocation(name, anyio.sleep, (1,)) for name in "abc"))
        await anyio.sleep(0.5)
        await loop.run_single("x", anyio.sleep, 1)

    assert starts.order == ["a", "x", "b", "c"]


async def test_batch_begins_nothing_while_more_run_than_a_limit_that_its_agent_has_lowered() -> None:
    limiter = Limiter(2)
    loop, starts = watched(limiter)

    async def agent() -> None:
        # It never waits, so no other worker of its batch is in line.
        limiter.max_concurrency = 1

    async with anyio.create_task_group() as group:
        await launch(group, loop.run_single, "long", anyio.sleep, 10)
        await loop.run_all(Invocation("a", agent) for _ in range(3))

    assert starts.by_name["a"] == [0, 10, 10]


async def test_slot_granted_to_a_waiter_that_is_cancelled_in_the_same_moment_is_handed_on() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    served = []

    async def serve(name: int) -> None:
        await loop.run_single("a", anyio.sleep, 0)
        served.append(name)

    for steps in range(8):
        served.clear()
        async with anyio.create_task_group() as group:
            release = anyio.Event()
            await launch(group, loop.run_single, "hog", release.wait)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as inner:
                    await launch(inner, serve, 0)
                    await launch(group, serve, 1)
                    release.set()
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()

                    scope.cancel()

        assert 1 in served
        assert loop.statistics().running == 0


@backends
def test_one_loop_serves_several_runs_on_either_backend(backend: str) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    for name in (backend, "asyncio", "trio", backend):
        results = run_scheduled(name, None, loop.run_all, [Invocation("a", anyio.sleep, (1,))] * 5)
        assert all(result.success for result in results)


@backends
def test_slots_that_a_run_was_torn_down_with_are_not_missed_in_the_next(backend: str) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    async def torn_down() -> None:
        # What is left of a task that never came to its end, because its event loop was closed before.
        pool = pool_of(loop.limiter)
        assert pool.acquire_nowait(Slot(pool, None))

    run(backend, torn_down)
    assert loop.statistics().running == 1
    assert run(backend, loop.run_single, "b", nothing).success
    assert loop.statistics().running == 0


@backends
def test_limiter_in_use_in_another_event_loop_is_refused(backend: str) -> None:
    loop = AgentLoop()
    with in_use_elsewhere(loop, backend):
        with pytest.raises(RuntimeError, match="in use in another event loop, in thread 'other'"):
            run(backend, loop.run_single, "b", nothing)

        with pytest.raises(RuntimeError, match="only in the thread of its event loop"):
            loop.limiter.max_concurrency = 3

    assert run(backend, loop.run_single, "b", nothing).success


async def test_agent_may_resize_and_nest_from_a_worker_thread() -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))

    def in_thread() -> int:
        anyio.from_thread.run_sync(setattr, loop.limiter, "max_concurrency", 2)
        return anyio.from_thread.run(loop.run_single, "child", child).unwrap()

    async def child() -> int:
        return loop.statistics().running

    assert (await loop.run_single("a", anyio.to_thread.run_sync, in_thread)).unwrap() == 1
    assert loop.limiter.max_concurrency == 2


async def test_view_shares_limiter_metrics_and_lifetime_and_checks_its_changes() -> None:
    loop = AgentLoop(LoopConfig(timeout_seconds=5))
    view = loop.with_config(timeout_seconds=1, max_retries=0)
    assert (view.config.timeout_seconds, view.config.max_retries) == (1, 0)
    assert loop.config.timeout_seconds == 5
    assert (view.limiter, view.metrics) == (loop.limiter, loop.metrics)
    assert loop.with_config(max_concurrency=10).limiter is loop.limiter
    with pytest.raises(ValueError, match="max_concurrency cannot differ in a view"):
        loop.with_config(max_concurrency=3)

    with pytest.raises(ValueError, match="timeout_seconds must be greater than 0, got 0"):
        loop.with_config(timeout_seconds=0)


@pytest.mark.parametrize("name", ["config", "limiter", "metrics"])
def test_parameters_of_a_wrong_type_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be of type"):
        AgentLoop(**{name: 3})


async def test_latency_statistics_have_the_shape_of_the_original() -> None:
    loop = AgentLoop()
    empty = {"p50_ms": 0, "p95_ms": 0, "p99_ms": 0, "mean_ms": 0, "count": 0}
    assert loop.get_latency_stats() == empty
    await loop.run_all([Invocation("a", anyio.sleep, (1,))] * 9 + [Invocation("a", anyio.sleep, (2,))])
    assert loop.get_latency_stats() == pytest.approx(
        {"p50_ms": 1000, "p95_ms": 2000, "p99_ms": 2000, "mean_ms": 1100, "count": 10}, rel=0.01
    )
    loop.reset_metrics()
    assert loop.get_latency_stats() == empty
    await loop.with_config(collect_metrics=False).run_single("a", anyio.sleep, 1)
    assert loop.get_latency_stats() == empty


@backends
def test_deadlock_of_agents_names_the_lines_of_the_agents(backend: Any) -> None:
    async def stuck() -> None:
        await anyio.Event().wait()

    loop = AgentLoop(LoopConfig(timeout_seconds=None))
    with pytest.raises(VirtualClockDeadlock, match=r"test_limiter\.py:\d+ .*stuck"):
        run_scheduled(backend, None, loop.run_all, [Invocation("a", stuck)])


# -- threads, processes and event loops that are gone


def run(backend: str, main: Any, *args: Any) -> Any:
    return anyio.run(main, *args, backend=backend)


def end(event_loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
    """Cancel what was left of an event loop that was stopped, and close it."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        event_loop.run_until_complete(task)

    event_loop.close()


@backends
def test_threads_that_race_for_a_limiter_never_use_it_at_once(backend: str) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=3))
    lock = threading.Lock()
    running = peak = 0
    outcomes: Counter[str] = Counter()

    async def agent(x: int) -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)

        await anyio.sleep(0.001)
        with lock:
            running -= 1

    def call() -> None:
        for number in range(20):
            try:
                if number % 2:
                    results = run(backend, loop.run_all, Invocation.map(agent, range(4)))
                else:
                    results = [run(backend, loop.run_single, "a", agent, 1)]

                assert all(result.success for result in results)
                outcomes["ran"] += 1
            except RuntimeError as exc:
                outcomes[str(exc).partition(", in thread")[0]] += 1

    in_threads(*[call] * 4)
    assert peak <= 3
    assert outcomes["ran"]
    assert set(outcomes) <= {"ran", "this limiter is in use in another event loop"}
    assert not run(backend, loop.run_all, Invocation.map(agent, range(4)))[0].error


@backends
@pytest.mark.parametrize("use", ["pulls", "waits", "runs", "streams", "rests"])
def test_limiter_that_is_in_use_in_another_thread_is_refused(use: str, backend: str) -> None:
    config = LoopConfig(max_concurrency=1, backoff=Backoff(initial_seconds=30, jitter="none"))
    loop = AgentLoop(config)
    begun, over = threading.Event(), threading.Event()

    async def wait() -> None:
        begun.set()
        await anyio.to_thread.run_sync(over.wait)

    async def inputs() -> AsyncIterator[Any]:
        await wait()
        return
        yield

    async def chunks() -> AsyncIterator[int]:
        yield 1
        await wait()

    async def main() -> None:
        if use == "pulls":
            await loop.run_all(inputs())
        elif use == "runs":
            await loop.run_single("a", wait)
        elif use == "streams":
            await run_stream(loop, chunks)
        else:
            async with anyio.create_task_group() as group:
                agent = FakeAgent(OSError) if use == "rests" else anyio.sleep_forever
                group.start_soon(loop.run_single, "a", agent)
                if use == "waits":
                    group.start_soon(loop.run_single, "b", anyio.sleep_forever)

                await anyio.sleep(0.01)
                await wait()
                group.cancel_scope.cancel()

    thread = threading.Thread(target=run, args=(backend, main), name="user")
    thread.start()
    begun.wait()
    for other in ("asyncio", "trio"):
        with pytest.raises(RuntimeError, match="in use in another event loop, in thread 'user'"):
            run(other, loop.run_single, "a", anyio.sleep, 0)

    with pytest.raises(RuntimeError, match="only in the thread of its event loop"):
        loop.limiter.pause()

    over.set()
    thread.join()
    assert run(backend, loop.run_single, "a", anyio.sleep, 0).success


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("same_thread", [False, True])
def test_stopped_event_loop_blocks_others_while_it_can_go_on(same_thread: bool, closed: bool) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    stopped = asyncio.new_event_loop()
    stopped.call_later(0.01, stopped.stop)
    with pytest.raises(RuntimeError, match="Event loop stopped"):
        stopped.run_until_complete(loop.run_single("long", anyio.sleep, 60))

    [task] = asyncio.all_tasks(stopped)
    if closed:
        end(stopped, task)

    outcomes: list[Any] = []

    def call() -> None:
        try:
            outcomes.append(asyncio.run(loop.run_single("a", anyio.sleep, 0)).status)
            loop.limiter.pause()
            loop.limiter.resume()
        except RuntimeError as exc:
            outcomes.append(str(exc))

    call() if same_thread else in_threads(call)
    if closed or same_thread:
        assert outcomes == ["success"]
    else:
        assert "in use in another event loop" in outcomes[0]

    if not closed:
        end(stopped, task)


@backends
def test_thread_that_has_ended_blocks_no_other(backend: str) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    event_loop = asyncio.new_event_loop()
    task = event_loop.create_task(loop.run_single("long", anyio.sleep, 60))
    event_loop.call_later(0.01, event_loop.stop)
    in_threads(event_loop.run_forever)
    assert loop.statistics().running == 1
    assert run(backend, loop.run_single, "a", anyio.sleep, 0).success
    end(event_loop, task)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork()")
@backends
def test_limiter_in_use_in_the_parent_process_can_be_used_in_a_child(backend: str) -> None:
    program = f"""
import os, threading, anyio
from agentloop import AgentLoop, LoopConfig
loop = AgentLoop(LoopConfig(max_concurrency=1))
begun, over = threading.Event(), threading.Event()
async def wait():
    begun.set()
    await anyio.to_thread.run_sync(over.wait)
thread = threading.Thread(target=lambda: anyio.run(loop.run_single, "a", wait, backend={backend!r}))
thread.start()
begun.wait()
if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    over.set()
    thread.join()
    raise SystemExit(status)
os._exit(0 if anyio.run(loop.run_single, "b", anyio.sleep, 0, backend={backend!r}).success else 3)
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    subprocess.run(command, check=True, timeout=60)

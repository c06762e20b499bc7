"""Agents in worker processes, from the first call to the last."""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import dask
import psutil
import pytest
import remote_agents as there
from conftest import NothingLeftBehind
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from agentloop import (
    AgentLoop,
    Invocation,
    InvocationCancelled,
    InvocationResult,
    LoopClosed,
    LoopConfig,
    Status,
    Verdict,
    VerdictKind,
    classify,
    in_thread,
)
from agentloop.contrib.dask import RemoteError, WorkerLost, Workers
from agentloop.contrib.opentelemetry import OpenTelemetrySink
from agentloop.journal import Journal

ONCE = LoopConfig(max_retries=0)


# What differs between two event loops of callers, the tests of the parts reach without processes.
@pytest.fixture(params=["asyncio", pytest.param("trio", marks=pytest.mark.long)])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def wait_for(path: Path, text: str) -> None:
    with anyio.fail_after(5):
        while not path.exists() or path.read_text() != text:
            await anyio.sleep(0.01)


# --- calls


async def test_batch_runs_in_all_processes_and_its_results_are_in_order(workers: Workers) -> None:
    results = await AgentLoop(LoopConfig(max_concurrency=20)).run_all(
        Invocation.map(workers.remote(there.square), range(200))
    )
    outputs = [result.unwrap() for result in results]
    assert [square for square, _ in outputs] == [x * x for x in range(200)]
    processes = {process for _, process in outputs}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert repr(workers) == f"<Workers 2 processes, 0 calls, 0 waiting, {workers.statistics().lost} lost>"


async def test_agent_can_be_called_outside_of_a_loop(workers: Workers) -> None:
    assert (await workers.remote(there.square)(3))[0] == 9


async def test_blocking_function_runs_in_a_thread_there(workers: Workers) -> None:
    assert await workers.remote(in_thread(there.process))() != os.getpid()


async def test_function_that_cannot_be_imported_travels_by_value(workers: Workers) -> None:
    factor = 3

    async def times(x: int) -> int:
        return x * factor

    assert await workers.remote(times)(2) == 6
    assert await workers.remote(partial(times, 5))() == 15


def test_what_is_no_async_function_is_refused(workers: Workers) -> None:
    async def chunks() -> Any:
        yield 1

    coroutine = there.square(1)
    for bad, hint in [
        (there.process, r"in a thread there: workers.remote\(in_thread\(fn\)\)"),
        (chunks, "chunks cannot travel"),
        (coroutine, "pass the function and its arguments apart"),
        (7, r"got 7: workers.remote\(ask\)"),
    ]:
        with pytest.raises(TypeError, match=f"fn must be an async function.*{hint}"):
            workers.remote(bad)  # type: ignore[arg-type]  # what is tested


async def test_remote_agent_has_the_name_and_the_journal_entries_of_its_function(
    workers: Workers, tmp_path: Path
) -> None:
    loop = AgentLoop()
    async with Journal(tmp_path / "night.db") as journal:
        first = await loop.run_all(Invocation.map(workers.remote(there.square), [1, 2]), journal=journal)
        assert [result.agent_id for result in first] == ["square-0", "square-1"]

    async with Journal(tmp_path / "night.db") as journal:
        again = await loop.run_all(Invocation.map(there.square, [1, 2]), journal=journal)
        assert [result.replayed for result in again] == [True, True]


async def test_agent_sees_its_attempt_with_the_failures_before_it(workers: Workers) -> None:
    events: list[Any] = []
    loop = AgentLoop(on_event=events.append)
    result = await loop.run_single("teller", workers.remote(there.tell_attempt))
    agent_id, number, failures, key = result.unwrap()
    assert (agent_id, number, failures, len(key)) == ("teller", 2, ["RemoteError"], 32)


async def test_agent_outside_of_a_loop_has_no_attempt(workers: Workers) -> None:
    with pytest.raises(RuntimeError, match="outside of an agent"):
        await workers.remote(there.tell_attempt)()


async def test_spans_there_are_children_of_the_invocation(workers: Workers) -> None:
    tracer = TracerProvider().get_tracer("test")
    spans: list[int] = []

    async def ask() -> int:
        spans.append(trace.get_current_span().get_span_context().span_id)
        return await workers.remote(there.tell_span)()

    result = await AgentLoop(on_event=OpenTelemetrySink(tracer)).run_single("a", ask)
    assert [result.unwrap()] == spans != [0]
    assert await workers.remote(there.tell_span)() == 0


@pytest.mark.skipif(find_spec("uvloop") is None, reason="needs uvloop")
def test_caller_may_use_uvloop(workers: Workers) -> None:
    options = {"use_uvloop": True}
    assert anyio.run(workers.remote(there.square), 3, backend_options=options)[0] == 9


# --- what does not travel


async def test_argument_that_does_not_pickle_is_named(workers: Workers) -> None:
    call: Any = workers.remote(there.nap)
    with pytest.raises(TypeError, match=r"argument 2 of <function nap .* cannot be sent to another process"):
        await call(0, threading.Lock())

    with pytest.raises(TypeError, match="argument lock of "):
        await call(0, lock=threading.Lock())


async def test_function_that_does_not_pickle_is_refused_at_its_first_call(workers: Workers) -> None:
    lock = threading.Lock()

    async def locked() -> None:
        lock.acquire()

    result = await AgentLoop().run_single("a", workers.remote(locked))
    assert (result.status, result.retries) == (Status.ERROR, 0)
    assert "let the agent make what it needs, such as a client" in str(result.exception)


async def test_output_that_does_not_pickle_is_an_error(workers: Workers) -> None:
    with pytest.raises(TypeError, match=r"cannot pickle .*lock"):
        await workers.remote(there.return_lock)()


def test_workers_do_not_pickle(workers: Workers) -> None:
    with pytest.raises(TypeError, match=r"^Workers cannot be pickled, since they belong to the process"):
        pickle.dumps(workers)


# --- failures


async def test_error_is_the_one_that_was_raised_with_its_traceback_as_a_note(workers: Workers) -> None:
    with pytest.raises(ValueError, match=r"^boom") as caught:
        await workers.remote(there.fail)(ValueError("boom"))

    assert "in fail\n    raise error" in caught.value.__notes__[-1]


async def test_error_that_does_not_unpickle_keeps_its_verdict(workers: Workers) -> None:
    result = await AgentLoop(ONCE).run_single("a", workers.remote(there.fail_rudely))
    error = result.exception
    assert isinstance(error, RemoteError)
    assert (error.kind, error.text) == ("remote_agents.Rude", "slow down")
    assert (error.status_code, error.retry_after) == (429, 7)
    assert classify(error) == Verdict(VerdictKind.OVERLOAD, 7)


async def test_exit_of_an_agent_propagates(workers: Workers) -> None:
    with pytest.raises(SystemExit) as caught:
        await workers.remote(there.quit_with)(3)

    assert caught.value.code == 3


async def test_cancellation_that_the_caller_did_not_ask_for_is_an_error(workers: Workers) -> None:
    with pytest.raises(InvocationCancelled, match="cancelled from within"):
        await workers.remote(there.cancel_itself)()


async def test_agent_that_leaves_a_scope_open_harms_no_other(workers: Workers) -> None:
    loop = AgentLoop(ONCE)
    remote = workers.remote
    bad = Invocation("bad", remote(there.leave_scope_open))
    results = await loop.run_all([bad, *Invocation.map(remote(there.square), range(9))])
    assert [result.status for result in results] == [Status.ERROR] + [Status.SUCCESS] * 9
    assert str(results[0].exception).startswith("'bad' has left a cancel scope or a task group open")


# --- cancellation


async def test_cancellation_reaches_the_agent(workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "held"
    async with anyio.create_task_group() as group:
        group.start_soon(workers.remote(there.hold), str(path))
        await wait_for(path, "begun")
        group.cancel_scope.cancel()

    assert path.read_text() == "cancelled"
    assert not sum(workers.statistics().calls.values())


async def test_time_out_reaches_the_agent(workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "held"
    loop = AgentLoop(LoopConfig(timeout_seconds=0.5, max_retries=0))
    result = await loop.run_single("a", workers.remote(there.hold), str(path))
    assert result.status is Status.TIMEOUT
    assert path.read_text() == "cancelled"


# --- processes that die; each is started again, which takes seconds


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_process_that_dies_loses_no_call_and_its_poison_is_found(
    workers: Workers, tmp_path: Path
) -> None:
    path, names = tmp_path / "calls", [str(n) for n in range(100)]
    before = workers.statistics().lost
    # A kill takes Dask a second or more to make good.
    loop = AgentLoop(LoopConfig(max_concurrency=20, timeout_seconds=30))
    with anyio.fail_after(60):
        results = await loop.run_all(
            Invocation(name, workers.remote(there.note_and_die), (str(path), name, "7")) for name in names
        )

    lost = [result for result in results if not result.success]
    assert [(result.agent_id, result.retries) for result in lost] == [("7", 0)]
    error = lost[0].exception
    assert isinstance(error, WorkerLost)
    assert (error.deaths, classify(error).kind) == (3, VerdictKind.PERMANENT)
    assert workers.statistics().lost - before == 3
    calls = Counter(path.read_text().splitlines())
    assert calls["7"] == 3
    # Only what was open when a process died ran again.
    assert sum(calls.values()) <= len(names) + 3 * 20


@pytest.mark.long
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_kills_at_random_moments_lose_no_call_and_repeat_few(workers: Workers, tmp_path: Path) -> None:
    path, draw, kills = tmp_path / "calls", random.Random(), 2
    names = [str(n) for n in range(200)]
    note = workers.remote(there.note_and_die)
    results: list[InvocationResult[Any]] = []

    async def kill() -> None:
        for _ in range(kills):
            # It may be one that has just been started.
            victims = {await process() for _ in range(6)}
            await anyio.sleep(draw.random() / 10)
            with suppress(ProcessLookupError):
                os.kill(draw.choice(sorted(victims)), signal.SIGKILL)

            await anyio.sleep(draw.random())

    process = workers.remote(in_thread(there.process))
    loop = AgentLoop(LoopConfig(max_concurrency=20, timeout_seconds=30, max_retries=0))
    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            group.start_soon(kill)
            jobs = (Invocation(name, note, (str(path), name, "none")) for name in names)
            async with loop.as_completed(jobs) as done:
                async for result in done:
                    results.append(result)
                    await anyio.sleep(0.005)

    assert [result.error for result in results] == [None] * len(names)
    assert sorted(result.index for result in results) == list(range(len(names)))
    calls = Counter(path.read_text().splitlines())
    assert calls.keys() == set(names)
    assert calls.total() <= len(names) + kills * 20


@pytest.mark.by_hand
async def test_processes_that_die_while_they_start_are_replaced() -> None:
    # Dask forgets a process that does not come back within this time.
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "500ms"}):
        async with Workers(2) as workers:
            ends = anyio.current_time() + 4
            while anyio.current_time() < ends:
                for child in psutil.Process().children(recursive=True):
                    with suppress(psutil.Error):
                        if "resource_tracker" not in " ".join(child.cmdline()):
                            child.kill()

                await anyio.sleep(0.05)

            with anyio.fail_after(20):
                await workers.remote(there.square)(3)
                while workers.statistics().processes < 2:
                    await anyio.sleep(0.1)


# --- lifetime


async def test_calls_outside_of_the_block_are_refused_and_open_ones_end_with_it() -> None:
    workers = Workers(1)
    nap = workers.remote(there.nap)
    ended: list[LoopClosed] = []

    async def call() -> None:
        with pytest.raises(LoopClosed, match="inside of `async with Workers") as caught:
            await nap(60)

        ended.append(caught.value)

    await call()
    with NothingLeftBehind():
        async with anyio.create_task_group() as group:
            async with workers:
                group.start_soon(call)
                await nap(0)

    assert len(ended) == 2
    result = await AgentLoop().run_single("a", nap)
    assert (type(result.exception), result.retries) == (LoopClosed, 0)
    with pytest.raises(RuntimeError, match="were started before"):
        await workers.__aenter__()


async def test_start_that_is_cancelled_leaves_no_process() -> None:
    with NothingLeftBehind():
        with anyio.move_on_after(0.2) as scope:
            async with Workers(1):
                raise AssertionError("a process does not start so fast")

    assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"processes": 0}, ValueError, "processes must be at least 1, got 0"),
        ({"processes": 1.5}, TypeError, "processes must be an int"),
        ({"processes": 1, "address": "tcp://host:1"}, ValueError, "processes and address exclude each other"),
        ({"address": 8786}, TypeError, "address must be a str"),
        ({"backend": "curio"}, ValueError, "backend must be one of 'asyncio', 'trio', got 'curio'"),
        ({"linger_seconds": -1}, ValueError, "linger_seconds must be at least 0"),
        ({"max_deaths": 0}, ValueError, "max_deaths must be at least 1"),
        ({"patience_seconds": float("nan")}, ValueError, "patience_seconds must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Workers(**given)

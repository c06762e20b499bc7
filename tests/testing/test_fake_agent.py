"""The agent for tests: it plays its script, records its calls, and leaves nothing behind."""

import copy
import itertools
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from agents import backends, into, raised_by, run_stream
from anyio.lowlevel import checkpoint

import agentloop.testing
from agentloop import (
    AgentLoop,
    BatchStopped,
    FirstChunkTimeout,
    IdleTimeout,
    Invocation,
    InvocationTimeout,
    LoopConfig,
    Status,
    VerdictKind,
    classify,
)
from agentloop.testing import Chunks, Fail, FakeAgent, FakeCall, FakeHTTPError, Reply, Stall

ROOT = Path(__file__).parents[2]
Clock = Callable[[], float]
PATIENT = LoopConfig(timeout_seconds=None, max_retries=0)


@pytest.fixture
async def clock() -> Callable[[], float]:
    """Seconds of the event loop since the test began."""
    start = anyio.current_time()
    return lambda: anyio.current_time() - start


# --- what it plays


async def test_replies_come_in_order_each_after_its_delay_and_the_last_one_again(clock: Clock) -> None:
    agent = FakeAgent(Reply("a", after_seconds=3600), Reply("b"))
    assert (await agent(), clock()) == ("a", 3600)
    assert [await agent(), await agent(), clock()] == ["b", "b", 3600]


async def test_exception_is_raised_as_the_object_that_it_is_or_made_anew_of_a_class(clock: Clock) -> None:
    boom = ValueError("boom")
    agent = FakeAgent(boom, Fail(boom, after_seconds=60), KeyError)
    with pytest.raises(ValueError, match="boom") as first:
        await agent()

    frames = len(first.traceback)
    with pytest.raises(ValueError, match="boom") as second:
        await agent()

    assert first.value is second.value is boom
    assert clock() == 60
    assert len(second.traceback) == frames, "the frames of the first time are not those of the second"
    with pytest.raises(KeyError) as third:
        await agent()

    with pytest.raises(KeyError) as fourth:
        await agent()

    assert third.value is not fourth.value


async def test_control_flow_can_be_played_too() -> None:
    loop = AgentLoop()
    with pytest.raises(KeyboardInterrupt):
        await loop.run_single("agent", FakeAgent(KeyboardInterrupt))

    with pytest.raises(SystemExit):
        await loop.run_single("agent", FakeAgent(SystemExit(3)))


async def test_stall_ends_by_cancellation_only() -> None:
    agent = FakeAgent(Stall())
    with anyio.move_on_after(10**6) as scope:
        await agent()

    assert scope.cancelled_caught
    assert agent.calls[0].cancelled


async def test_chunks_come_with_gaps(clock: Clock) -> None:
    agent = FakeAgent(Chunks(list("abc"), after_seconds=10, gap_seconds=2))
    assert [(chunk, clock()) async for chunk in agent()] == [("a", 10), ("b", 12), ("c", 14)]


async def test_chunks_may_come_to_a_bad_end(clock: Clock) -> None:
    boom = ValueError("boom")
    agent = FakeAgent(
        Chunks(["a"], then=boom), Chunks(["b"], then=Fail(boom, after_seconds=5)), Chunks(then=Stall())
    )
    for expected in (["a"], 0), (["b"], 5):
        received = []
        with pytest.raises(ValueError, match="boom") as caught:
            async for chunk in agent():
                received.append(chunk)

        assert (received, clock()) == expected
        assert caught.value is boom

    with anyio.move_on_after(60) as scope:
        assert [chunk async for chunk in agent()] == []

    assert scope.cancelled_caught


async def test_every_step_reaches_a_checkpoint() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await FakeAgent(Reply())()

    assert scope.cancelled_caught
    agent = FakeAgent(Chunks(itertools.repeat(0, 3)))
    with anyio.CancelScope() as scope:
        async with aclosing(agent()) as chunks:
            async for _ in chunks:
                scope.cancel()

    assert scope.cancelled_caught
    assert agent.calls[0].chunks == 1
    with anyio.CancelScope() as scope:
        async with aclosing(FakeAgent(Chunks([1]))()) as chunks:
            assert await anext(chunks) == 1
            scope.cancel()
            await anext(chunks)

    assert scope.cancelled_caught


# --- what a loop makes of it


async def test_loop_retries_what_the_script_lets_fail() -> None:
    agent = FakeAgent(
        FakeHTTPError(429, retry_after=200), Stall(), Fail(OSError(), after_seconds=5), Reply(42)
    )
    result = await AgentLoop(LoopConfig(timeout_seconds=10)).run_single("agent", agent, 1, two=2)
    assert (result.output, result.retries) == (42, 3)
    assert [type(failure) for failure in result.failures] == [FakeHTTPError, InvocationTimeout, OSError]
    assert [(call.args, call.kwargs) for call in agent.calls] == [((1,), {"two": 2})] * 4
    # The wait that the server asked for, and at most a quarter more.
    assert 200 <= agent.calls[1].started_at - agent.calls[0].started_at <= 250
    assert [call.cancelled for call in agent.calls] == [False, True, False, False]


async def test_batch_is_bounded_and_the_agent_says_how_many_ran_at_once(clock: Clock) -> None:
    agent = FakeAgent(Reply("done", after_seconds=60))
    loop = AgentLoop(LoopConfig(max_concurrency=7))
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run_all, list(Invocation.map(agent, range(21))))
        await anyio.sleep(70)
        assert (agent.running, agent.peak, len(agent.calls)) == (7, 7, 14)
        assert repr(agent) == "<FakeAgent 14 calls, 7 running, peak 7>"

    assert (agent.running, agent.peak, clock()) == (0, 7, 180)
    assert [call.args for call in agent.calls] == [(number,) for number in range(21)]
    assert loop.metrics.snapshot().counts[Status.SUCCESS] == 21


async def test_fatal_error_stops_a_batch() -> None:
    agent = FakeAgent(FakeHTTPError(401))
    results = await AgentLoop(LoopConfig(max_concurrency=1)).run_all(Invocation.map(agent, range(3)))
    assert [result.status for result in results] == [Status.ERROR, Status.SKIPPED, Status.SKIPPED]
    assert isinstance(results[2].exception, BatchStopped)
    assert len(agent.calls) == 1


async def test_stream_fails_stalls_and_goes_idle() -> None:
    config = LoopConfig(first_chunk_timeout_seconds=10, idle_timeout_seconds=5)
    agent = FakeAgent(
        FakeHTTPError(503),
        Stall(),
        Chunks([1], after_seconds=11),
        Chunks([1, 2, 3], gap_seconds=4, then=Stall()),
    )
    received, error, result = await run_stream(AgentLoop(config), agent, "x")
    assert (received, type(error)) == ([1, 2, 3], IdleTimeout)
    failures = [type(failure) for failure in result.failures]
    assert failures == [FakeHTTPError, FirstChunkTimeout, FirstChunkTimeout, IdleTimeout]
    assert [call.chunks for call in agent.calls] == [0, 0, 0, 3]
    assert [call.cancelled for call in agent.calls] == [False, True, True, True]


async def test_stream_that_is_left_is_closed_and_recorded_so() -> None:
    agent = FakeAgent(Chunks(range(1000), gap_seconds=1))
    async with AgentLoop().run_streaming("agent", agent) as stream:
        async for chunk in stream:
            if chunk == 3:
                break

    (call,) = agent.calls
    assert stream.result.status is Status.CANCELLED
    assert (call.cancelled, call.ended_at, agent.running) == (True, anyio.current_time(), 0)
    assert 4 <= call.chunks < 1000


async def test_stream_that_is_closed_between_two_chunks_is_recorded_so() -> None:
    agent = FakeAgent(Chunks([1, 2]))
    async with aclosing(agent()) as chunks:
        assert await anext(chunks) == 1
        assert not agent.calls[0].cancelled

    assert agent.calls[0].cancelled
    assert agent.running == 0


async def test_agent_that_returns_is_refused_as_a_stream_and_the_other_way_round() -> None:
    loop = AgentLoop()
    result = await loop.run_single("agent", FakeAgent(Chunks([1])))
    assert "run it with run_streaming()" in str(result.exception)
    with pytest.raises(TypeError, match="returned a coroutine"):
        async with loop.run_streaming("agent", FakeAgent(Reply(1))) as stream:
            await anext(stream)


# --- what it records


async def test_call_is_recorded_while_it_runs() -> None:
    agent = FakeAgent(Reply(after_seconds=60))
    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(agent, 1, self=2))
        await anyio.sleep(10)
        (call,) = agent.calls
        assert (call.args, call.kwargs) == ((1,), {"self": 2})
        assert (call.started_at, call.ended_at, agent.running) == (start, None, 1)

    assert (call.started_at, call.ended_at, call.cancelled) == (start, start + 60, False)
    assert call is agent.calls[0]


async def test_what_is_called_but_never_run_is_no_call_and_takes_nothing_of_the_script() -> None:
    agent = FakeAgent(Reply("first"), Reply("second"))
    agent().close()
    assert agent.calls == []
    assert await agent() == "first"
    # The list is the caller's own.
    agent.calls.clear()
    assert await agent() == "second"
    assert len(agent.calls) == 2


async def test_calls_that_overlap_each_play_an_outcome_of_their_own() -> None:
    agent = FakeAgent(*(Reply(number, after_seconds=10 - number) for number in range(10)))
    outputs: list[int] = []
    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(into, outputs, agent)

    assert outputs == [*reversed(range(10))]
    assert agent.peak == 10


# --- what it leaves behind: conftest's fixtures look for tasks and generators after each of these

SCRIPTS: dict[str, Callable[[], FakeAgent]] = {
    "reply": lambda: FakeAgent(Reply(after_seconds=2)),
    "fail": lambda: FakeAgent(Fail(ValueError, after_seconds=2)),
    "stall": lambda: FakeAgent(Stall()),
    "chunks": lambda: FakeAgent(
        Chunks([1, 2], after_seconds=1, gap_seconds=1, then=Fail(ValueError, after_seconds=1))
    ),
}


async def play(agent: FakeAgent) -> None:
    call = agent()
    if hasattr(call, "aclose"):
        async with aclosing(call):
            async for _ in call:
                pass
    else:
        await call


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("seconds", [0, 0.5, 1, 1.5, 2, 2.5])
async def test_nothing_is_left_wherever_it_is_cancelled(script: str, seconds: float, clock: Clock) -> None:
    agent = SCRIPTS[script]()
    with anyio.move_on_after(seconds) as scope:
        await raised_by(play, agent)

    (call,) = agent.calls
    assert agent.running == 0
    assert call.ended_at == anyio.current_time()
    assert call.cancelled == scope.cancelled_caught
    if seconds < 2:
        assert call.cancelled
        assert clock() == seconds


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("steps", range(6))
async def test_nothing_is_left_when_its_loop_is_cancelled(script: str, steps: int) -> None:
    agent = SCRIPTS[script]()
    loop = AgentLoop(PATIENT)
    async with anyio.create_task_group() as group:
        if script == "chunks":
            group.start_soon(run_stream, loop, agent)
        else:
            group.start_soon(loop.run_single, "agent", agent)

        for _ in range(steps):
            await checkpoint()

        group.cancel_scope.cancel()

    assert agent.running == 0
    assert all(call.cancelled and call.ended_at is not None for call in agent.calls)


@backends
def test_real_clocks_will_do(backend: str) -> None:
    agent = FakeAgent(OSError, Reply("real", after_seconds=0.01))

    async def main() -> Any:
        return (await AgentLoop().run_single("agent", agent)).output

    assert anyio.run(main, backend=backend) == "real"
    (failed, replied) = agent.calls
    assert replied.ended_at is not None
    assert replied.ended_at - replied.started_at >= 0.01 - 0.001  # an event loop may round a timer
    assert not failed.cancelled


# --- the error of an HTTP client


@pytest.mark.parametrize(
    ("error", "kind", "retry_after"),
    [
        (FakeHTTPError(429, retry_after=2), VerdictKind.OVERLOAD, 2),
        (FakeHTTPError(529), VerdictKind.OVERLOAD, None),
        (FakeHTTPError(503, retry_after=0.25), VerdictKind.OVERLOAD, 0.25),
        (FakeHTTPError(503), VerdictKind.TRANSIENT, None),
        (FakeHTTPError(429, retry_after="soon"), VerdictKind.OVERLOAD, None),
        (FakeHTTPError(429, retry_after=0), VerdictKind.OVERLOAD, None),
        (FakeHTTPError(401), VerdictKind.FATAL, None),
        (FakeHTTPError(404), VerdictKind.PERMANENT, None),
    ],
    ids=repr,
)
def test_http_error_is_judged_as_such(
    error: FakeHTTPError, kind: VerdictKind, retry_after: float | None
) -> None:
    verdict = classify(error)
    assert (verdict.kind, verdict.retry_after) == (kind, retry_after)
    assert error.response.status_code == error.status_code
    assert str(error) == f"HTTP {error.status_code}"


@pytest.mark.parametrize(
    ("retry_after", "headers"),
    [
        (2.0, {"retry-after": "2"}),
        ("Fri, 31 Dec 1999 23:59:59 GMT", {"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}),
        (None, {}),
    ],
)
def test_header_is_what_a_server_sends(retry_after: Any, headers: dict[str, str]) -> None:
    assert FakeHTTPError(429, retry_after).response.headers == headers


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_http_error_can_be_copied_and_pickled(duplicate: Callable[[FakeHTTPError], FakeHTTPError]) -> None:
    error = duplicate(FakeHTTPError(429, retry_after=2))
    assert repr(error) == "FakeHTTPError(status_code=429, retry_after=2)"
    error.add_note("and takes notes")


# --- what it refuses


AN_OUTCOME = "must be Reply(...), Fail(...), Stall(), Chunks(...) or an exception, got"
BOTH = "script must not have both Reply and Chunks: an agent either returns or yields"


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: FakeAgent(), ValueError, "script must have at least one outcome, such as Reply("),
        (lambda: FakeAgent(Reply("a"), "b"), TypeError, f"script[1] {AN_OUTCOME} 'b'"),
        (lambda: FakeAgent([Reply("a")]), TypeError, f"script[0] {AN_OUTCOME} [Reply("),
        (lambda: FakeAgent(Stall), TypeError, f"script[0] {AN_OUTCOME} <class"),
        (lambda: FakeAgent(Reply("a"), Chunks(["b"])), ValueError, BOTH),
        (lambda: Reply("a", after_seconds=-1), ValueError, "after_seconds must be at least 0, got -1"),
        (lambda: Reply("a", after_seconds=float("inf")), ValueError, "after_seconds must be finite, got inf"),
        (lambda: Fail(OSError, after_seconds="1"), TypeError, "after_seconds must be a number, got '1'"),
        (lambda: Fail("boom"), TypeError, "exception must be an exception or a class of one, got 'boom'"),
        (lambda: Chunks("ab"), TypeError, "an iterable of chunks, got 'ab': write Chunks([...])"),
        (lambda: Chunks(3), TypeError, "chunks must be an iterable of chunks, got 3"),
        (lambda: Chunks([], gap_seconds=True), TypeError, "gap_seconds must be a number, got True"),
        (
            lambda: Chunks([], then=Reply()),
            TypeError,
            "then must be an exception, Fail(...), Stall() or None",
        ),
        (lambda: FakeHTTPError("429"), TypeError, "status_code must be an int, got '429'"),
        (lambda: FakeHTTPError(99), ValueError, "status_code must be at least 100, got 99"),
        (lambda: FakeHTTPError(600), ValueError, "status_code must be at most 599, got 600"),
        (lambda: FakeHTTPError(429, -1), ValueError, "retry_after must be at least 0, got -1"),
    ],
)
def test_nonsense_is_refused_by_name(make: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        make()


# --- in the tests of a user


@pytest.mark.long
def test_example_of_the_documentation_passes_on_both_backends(tmp_path: Path) -> None:
    """The docstring's ``conftest.py`` and test, under a pytest of their own, as a user has them."""
    blocks = [
        textwrap.dedent(text)
        for text in re.findall(r"::\n\n((?:    .*\n|\n)+)", agentloop.testing.__doc__ or "")
    ]
    assert len(blocks) == 2
    (tmp_path / "conftest.py").write_text(blocks[0])
    (tmp_path / "test_oracle.py").write_text(blocks[1])
    options = ["-W", "error", "-p", "no:cacheprovider", "-p", "no:xdist", "-v"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b2 passed in ", done.stdout)
    assert "asyncio" in done.stdout
    assert "trio" in done.stdout


def test_tools_for_testing_need_neither_pytest_nor_trio() -> None:
    code = "import sys, agentloop.testing; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "agentloop.testing" in done.stdout.split()
    assert not {"pytest", "trio"} & set(done.stdout.split())


def test_records_compare_by_what_they_are_and_not_by_what_they_say() -> None:
    assert FakeCall((), {}, 0.0) != FakeCall((), {}, 0.0)

"""Batches with a journal: what is replayed, what runs, and when a result is delivered."""

from __future__ import annotations

import asyncio
import functools
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest
from anyio.lowlevel import checkpoint
from asking import Asker, rows, run

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    Invocation,
    KeyedLimiter,
    Limiter,
    LoopConfig,
    MetricsRecorder,
    Rate,
    ResultEvent,
    Status,
    StopRule,
    current_attempt,
)
from agentloop.journal import Journal, JournaledError, JournalStatistics

both_verbs = pytest.mark.parametrize("verb", ["run_all", "as_completed"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "night.db"


class Unauthorized(Exception):
    status_code = 401


# --- what is replayed


@both_verbs
async def test_second_run_gives_the_results_of_the_first_and_calls_nothing(verb: str, path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    async with Journal(path) as journal:
        first = await run(verb, loop, asker.inputs("abc"), journal)

    async with Journal(path) as journal:
        second = await run(verb, loop, asker.inputs("abc"), journal)

    assert asker.counts == {"a": 1, "b": 1, "c": 1}
    assert [result.output for result in second] == [{"answer": x} for x in "abc"]
    assert [(result.agent_id, result.latency_ms, result.index) for result in second] == [
        (result.agent_id, result.latency_ms, result.index) for result in first
    ]
    assert not any(result.replayed for result in first)
    assert all(result.replayed and result.success for result in second)
    assert journal.statistics() == JournalStatistics(replayed=3, written=0)
    assert loop.statistics().replayed == 3


@both_verbs
async def test_inputs_may_be_reordered_inserted_removed_and_repeated(verb: str, path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    async with Journal(path) as journal:
        await run(verb, loop, asker.inputs("abca"), journal)

    async with Journal(path) as journal:
        results = await run(verb, loop, asker.inputs("xacaaa"), journal)

    assert [result.output["answer"] for result in results] == [*"xacaaa"]
    assert [result.replayed for result in results].count(True) == 3
    assert asker.counts == {"a": 4, "b": 1, "c": 1, "x": 1}


async def test_index_is_that_of_the_current_input(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    async with Journal(path) as journal:
        await loop.run_all(asker.inputs("ab"), journal=journal)

    async with Journal(path) as journal:
        results = await loop.run_all(asker.inputs("xba"), journal=journal)

    assert [(result.index, result.replayed) for result in results] == [(0, False), (1, True), (2, True)]


async def test_equal_inputs_of_one_opening_have_an_entry_each(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    async with Journal(path) as journal:
        for _ in range(2):
            await loop.run_all(asker.inputs("ab"), journal=journal)

    assert len(rows(path)) == len(asker.calls) == 4


async def test_thousands_of_equal_inputs_take_linear_time(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    for expected in (0, 3000):
        async with Journal(path, durable=False) as journal:
            with anyio.fail_after(1000):
                results = await loop.run_all(asker.inputs("a" * 3000), journal=journal)

        assert sum(result.replayed for result in results) == expected

    assert len(rows(path)) == len(asker.calls) == 3000


async def test_many_kinds_of_equal_inputs_are_told_apart_without_remembering_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentloop.journal._claims.REMEMBERED", 2)
    asker, loop = Asker(), AgentLoop()
    for expected in (0, 40):
        async with Journal(path, durable=False) as journal:
            results = await loop.run_all(asker.inputs("abcdefgh" * 5), journal=journal)

        assert sum(result.replayed for result in results) == expected

    assert len(rows(path)) == 40


async def test_explicit_key_names_one_entry_whatever_the_arguments(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()

    def inputs(items: str) -> list[Invocation[Any]]:
        return [Invocation("a", asker.ask, (item,), key=index) for index, item in enumerate(items)]

    async with Journal(path) as journal:
        await loop.run_all(inputs("ab"), journal=journal)
        again = await loop.run_all(inputs("xy"), journal=journal)

    assert [result.output["answer"] for result in again] == ["a", "b"]
    assert len(asker.calls) == 2


async def test_key_that_is_text_differs_from_the_same_number(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    async with Journal(path) as journal:
        results = await loop.run_all(
            [Invocation("a", asker.ask, ("a",), key=key) for key in (1, "1")], journal=journal
        )

    assert [result.replayed for result in results] == [False, False]


@pytest.mark.parametrize("limit", [1, 2])
async def test_key_that_is_there_twice_in_a_batch_is_an_error_of_the_input(limit: int, path: Path) -> None:
    asker, loop = Asker(0.1), AgentLoop(LoopConfig(max_concurrency=limit))
    inputs = [Invocation("a", asker.ask, (x,), key="k") for x in "ab"]
    async with Journal(path) as journal:
        with pytest.raises(ValueError, match=r"^key 'k' is there twice: of asking\.Asker"):
            await loop.run_all(inputs, journal=journal)

        # What was written is there for the next batch.
        (result,) = await loop.run_all(inputs[:1], journal=journal)

    assert result.replayed
    assert asker.ended == ["a"]


async def test_key_that_was_there_long_before_in_a_batch_is_an_error_of_the_input(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    arrived = anyio.Event()

    async def inputs() -> AsyncIterator[Invocation[Any]]:
        yield Invocation("a", asker.ask, ("a",), key="k")
        await arrived.wait()
        yield Invocation("a", asker.ask, ("b",), key="k")

    async with Journal(path) as journal:
        async with loop.as_completed(inputs(), journal=journal) as done:
            assert not (await anext(done)).replayed
            arrived.set()
            with pytest.raises(ValueError, match="key 'k' is there twice"):
                await anext(done)


async def test_key_that_runs_in_another_batch_is_an_error_of_the_input(path: Path) -> None:
    asker, loop = Asker(1), AgentLoop()
    inputs = [Invocation("a", asker.ask, ("a",), key="k")]
    async with Journal(path) as journal, anyio.create_task_group() as group:
        group.start_soon(functools.partial(loop.run_all, inputs, journal=journal))
        await anyio.sleep(0.5)
        with pytest.raises(ValueError, match="key 'k' is there twice"):
            await loop.run_all(inputs, journal=journal)


async def test_failures_run_again_and_their_rows_are_replaced(path: Path) -> None:
    broken = {"b"}
    asker = Asker(fails=lambda x: ValueError("boom") if x in broken else None)
    loop = AgentLoop(LoopConfig(max_retries=0))
    async with Journal(path) as journal:
        await loop.run_all(asker.inputs("abb"), journal=journal)

    assert [row[0] for row in rows(path, "error")] == [None, "ValueError: boom", "ValueError: boom"]
    broken.clear()
    async with Journal(path) as journal:
        results = await loop.run_all(asker.inputs("abb"), journal=journal)

    assert [result.replayed for result in results] == [True, False, False]
    assert [row[0] for row in rows(path, "status")] == ["success"] * 3


async def test_finished_entry_is_taken_before_a_failed_one_of_the_same_input(path: Path) -> None:
    left = [ValueError("boom"), ValueError("boom")]
    asker = Asker(fails=lambda _: left.pop() if left else None)
    loop = AgentLoop(LoopConfig(max_concurrency=1, max_retries=0))
    async with Journal(path) as journal:
        await loop.run_all(asker.inputs("aaa"), journal=journal)

    assert [row[0] for row in rows(path, "status")] == ["error", "error", "success"]
    async with Journal(path) as journal:
        (result,) = await loop.run_all(asker.inputs("a"), journal=journal)

    assert result.replayed
    assert result.success


@both_verbs
async def test_kept_failure_is_replayed_as_its_line(verb: str, path: Path) -> None:
    asker = Asker(2, fails=lambda x: ValueError("boom") if x == "a" else None)
    loop = AgentLoop(LoopConfig(max_retries=0, timeout_seconds=3))
    slow = Asker(5)
    inputs = [*asker.inputs("a"), Invocation("slow", slow.ask, ("b",), key=1)]
    keep = (Status.ERROR, Status.TIMEOUT)
    async with Journal(path, keep=keep) as journal:
        first = await run(verb, loop, inputs, journal)

    async with Journal(path, keep=keep) as journal:
        second = await run(verb, loop, inputs, journal)

    assert [result.status for result in second] == [Status.ERROR, Status.TIMEOUT]
    assert [result.error for result in second] == [result.error for result in first]
    assert all(isinstance(result.exception, JournaledError) for result in second)
    with pytest.raises(JournaledError, match="boom"):
        second[0].unwrap()


async def test_what_is_not_kept_runs_again(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    for _ in range(2):
        async with Journal(path, keep=()) as journal:
            await loop.run_all(asker.inputs("a"), journal=journal)

    assert len(asker.calls) == 2
    assert len(rows(path)) == 1
    async with Journal(path, keep=["success"]) as journal:  # type: ignore[list-item]  # as good as its word
        await loop.run_all(asker.inputs("a"), journal=journal)

    assert len(asker.calls) == 2


async def test_cancelled_and_skipped_results_are_not_recorded(path: Path) -> None:
    async def ask(x: str) -> str:
        if x == "hangs":
            await anyio.sleep_forever()

        return x

    loop = AgentLoop(LoopConfig(max_concurrency=1, stop=StopRule(seconds=1, grace_seconds=0)))
    async with Journal(path) as journal:
        results = await loop.run_all(Invocation.map(ask, ["a", "hangs", "b"]), journal=journal)

    assert [result.status for result in results] == ["success", "cancelled", "skipped"]
    assert [row[0] for row in rows(path, "status")] == ["success"]
    async with Journal(path) as journal:
        results = await loop.run_all(Invocation.map(ask, ["b", "a"]), journal=journal)

    assert [result.replayed for result in results] == [False, True]


# --- what a replayed result costs


@both_verbs
async def test_replayed_result_takes_no_slot_and_no_rate_and_no_metric(verb: str, path: Path) -> None:
    asker = Asker()
    costs: list[str] = []

    def cost(invocation: Invocation[Any]) -> float:
        costs.append(invocation.args[0])
        return 1

    async with Journal(path) as journal:
        await AgentLoop().run_all(asker.inputs("abc"), journal=journal)

    events: list[Any] = []
    limiter = Limiter(1, rates=(Rate(1, cost=cost),))
    loop = AgentLoop(LoopConfig(max_concurrency=1), limiter=limiter, on_event=events.append)
    limiter.pause()
    async with Journal(path) as journal:
        results = await run(verb, loop, [*asker.inputs("abc")], journal)

    assert all(result.replayed for result in results)
    assert costs == []
    assert not any(loop.metrics.snapshot().counts.values())
    told = [event for event in events if isinstance(event, ResultEvent)]
    assert [type(event).__name__ for event in events if event not in told] == ["LimitEvent"]
    assert [event.result for event in told] == results
    assert len({event.id for event in told}) == 3


async def test_replayed_failures_do_not_count_for_a_stop_rule(path: Path) -> None:
    asker = Asker(fails=lambda x: ValueError("boom") if x < 3 else None)
    keep = (Status.SUCCESS, Status.ERROR)
    async with Journal(path, keep=keep) as journal:
        await AgentLoop(LoopConfig(max_retries=0)).run_all(asker.inputs(range(3)), journal=journal)

    loop = AgentLoop(LoopConfig(max_retries=0, stop=StopRule(failures=2)))
    async with Journal(path, keep=keep) as journal:
        results = await loop.run_all(asker.inputs(range(6)), journal=journal)

    assert [result.success for result in results] == [False] * 3 + [True] * 3


async def test_long_replay_lets_others_run(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    async with Journal(path) as journal:
        await loop.run_all(asker.inputs(range(1000)), journal=journal)

    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with Journal(path) as journal, anyio.create_task_group() as group:
        group.start_soon(other)
        await loop.run_all(asker.inputs(range(1000)), journal=journal)
        group.cancel_scope.cancel()

    assert turns >= 5


async def test_replay_works_below_a_keyed_limiter_and_an_outer_invocation(path: Path) -> None:
    asker = Asker()
    limiter = KeyedLimiter(by=lambda invocation: invocation.args[0], make=lambda _: Limiter(1))
    loop = AgentLoop(limiter=limiter)

    async def outer(x: str) -> list[bool]:
        return [result.replayed for result in await loop.run_all(asker.inputs(x), journal=journal)]

    seen = []
    for _ in range(2):
        async with Journal(path) as journal:
            result = await loop.run_single("outer", outer, "ab")
            seen.append(result.unwrap())

    assert seen == [[False, False], [True, True]]


# --- delivered means committed


@both_verbs
async def test_result_is_delivered_after_the_commit_that_holds_it(verb: str, path: Path) -> None:
    asker, loop = Asker(0.1), AgentLoop()
    async with Journal(path) as journal:
        if verb == "run_all":
            await loop.run_all(asker.inputs(range(30)), journal=journal)
            assert len(rows(path)) == 30
        else:
            async with loop.as_completed(asker.inputs(range(30)), journal=journal) as done:
                async for result in done:
                    assert (result.index,) in rows(path, "idx")


async def test_slot_is_given_back_before_the_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While results wait for the disk, as many others run as the limit."""
    monkeypatch.setattr("agentloop.journal._writer.LINGER_SECONDS", 100)
    asker, loop = Asker(1), AgentLoop(LoopConfig(max_concurrency=2))
    async with Journal(path) as journal, anyio.create_task_group() as group:
        group.start_soon(functools.partial(loop.run_all, asker.inputs(range(4)), journal=journal))
        await anyio.sleep(1.5)
        assert asker.calls == [0, 1, 2, 3]
        assert rows(path) == []

    assert len(rows(path)) == 4


async def test_reader_that_stops_stops_new_starts(path: Path) -> None:
    asker, loop = Asker(1), AgentLoop(LoopConfig(max_concurrency=3))
    async with Journal(path) as journal:
        async with loop.as_completed(asker.inputs(range(100)), journal=journal) as done:
            await anext(done)
            await anyio.sleep(50)
            assert len(asker.calls) <= 9

    assert len(rows(path)) == len(asker.ended)


async def test_short_agents_do_not_wait_for_the_linger(path: Path) -> None:
    """Once as many results as the limit wait to be written, they are written at once."""
    asker, loop = Asker(), AgentLoop(LoopConfig(max_concurrency=2))
    async with Journal(path) as journal:
        began = anyio.current_time()
        await loop.run_all(asker.inputs(range(50)), journal=journal)
        assert anyio.current_time() - began < 0.02

    assert len(rows(path)) == 50


async def test_async_input_that_waits_for_results_goes_on(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    arrived = anyio.Event()

    async def inputs() -> AsyncIterator[Invocation[Any]]:
        yield Invocation("a", asker.ask, (1,))
        await arrived.wait()
        yield Invocation("b", asker.ask, (2,))

    async with Journal(path) as journal:
        async with loop.as_completed(inputs(), journal=journal) as done:
            async for _ in done:
                arrived.set()

    assert asker.calls == [1, 2]


# --- the end of a batch


@both_verbs
async def test_what_had_ended_when_a_batch_is_cancelled_is_written_and_not_run_again(
    verb: str, path: Path
) -> None:
    asker, loop = Asker(1), AgentLoop(LoopConfig(max_concurrency=2))
    async with Journal(path) as journal:
        with anyio.move_on_after(3.01):
            await run(verb, loop, asker.inputs(range(10)), journal)

        ended = [*asker.ended]
        assert len(ended) == len(rows(path)) == 6

    async with Journal(path) as journal:
        results = await run(verb, loop, asker.inputs(range(10)), journal)

    assert [result.index for result in results if result.replayed] == sorted(ended)
    assert asker.counts[0] == 1
    assert sorted(asker.ended) == [*range(10)]
    assert len(rows(path)) == 10


async def test_results_that_a_cancelled_batch_has_not_returned_are_replayed_to_the_next_one(
    path: Path,
) -> None:
    asker, loop = Asker(1), AgentLoop(LoopConfig(max_concurrency=2))
    async with Journal(path) as journal:
        with anyio.move_on_after(1.01):
            await loop.run_all(asker.inputs(range(4)), journal=journal)

        results = await loop.run_all(asker.inputs(range(4)), journal=journal)

    assert [result.replayed for result in results] == [True, True, False, False]


async def test_equal_inputs_of_a_cancelled_batch_are_found_by_the_next_one(path: Path) -> None:
    asker, loop = Asker(1), AgentLoop(LoopConfig(max_concurrency=2))
    async with Journal(path) as journal:
        await loop.run_all(asker.inputs("aaaa"), journal=journal)
        with anyio.move_on_after(1.01):
            await loop.run_all(asker.inputs("aaaa"), journal=journal)

        results = await loop.run_all(asker.inputs("aaaa"), journal=journal)

    assert [result.replayed for result in results] == [True, True, False, False]


@pytest.mark.parametrize("verb", ["run_all", "as_completed"])
def test_native_cancellation_loses_nothing_that_had_ended(verb: str, path: Path) -> None:
    asker, loop = Asker(0.02), AgentLoop(LoopConfig(max_concurrency=2))

    async def main() -> None:
        async with Journal(path) as journal:
            task = asyncio.ensure_future(run(verb, loop, asker.inputs(range(100)), journal))
            while len(asker.ended) < 5:
                await asyncio.sleep(0.01)

            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        assert {row[0] for row in rows(path, "idx")} == set(asker.ended)

    asyncio.run(main())


async def test_results_that_were_not_read_are_replayed_to_the_next_batch(path: Path) -> None:
    asker, loop = Asker(), AgentLoop(LoopConfig(max_concurrency=4))
    async with Journal(path) as journal:
        async with loop.as_completed(asker.inputs(range(4)), journal=journal) as done:
            first = await anext(done)
            await anyio.sleep(1)

        async with loop.as_completed(asker.inputs(range(4)), journal=journal) as done:
            results = [result async for result in done]

    assert sorted(result.index for result in results if result.replayed) == sorted(
        {*range(4)} - {first.index}
    )
    assert asker.counts[first.index] == 2


async def test_results_that_an_input_error_hides_are_replayed_to_the_next_batch(path: Path) -> None:
    asker, loop = Asker(), AgentLoop(LoopConfig(max_concurrency=1))

    def inputs() -> Any:
        yield from asker.inputs("ab")
        raise OSError("gone")

    async with Journal(path) as journal:
        with pytest.raises(OSError, match="gone"):
            await loop.run_all(inputs(), journal=journal)

        results = await loop.run_all(asker.inputs("ab"), journal=journal)

    assert [result.replayed for result in results] == [True, True]


async def test_drained_loop_writes_what_has_ended_and_replays_it(path: Path) -> None:
    asker, loop = Asker(1), AgentLoop(LoopConfig(max_concurrency=2))
    async with Journal(path) as journal, anyio.create_task_group() as group:

        async def drain() -> None:
            await anyio.sleep(1.5)
            loop.drain()

        group.start_soon(drain)
        results = await loop.run_all(asker.inputs(range(6)), journal=journal)

    assert [result.status for result in results] == ["success"] * 4 + ["skipped"] * 2
    async with Journal(path) as journal:
        results = await AgentLoop().run_all(asker.inputs(range(6)), journal=journal)

    assert [result.replayed for result in results] == [True] * 4 + [False] * 2


async def test_stopped_batch_still_gives_what_the_journal_has(path: Path) -> None:
    asker = Asker()
    async with Journal(path) as journal:
        await AgentLoop().run_all(asker.inputs("ab"), journal=journal)

    loop = AgentLoop()
    loop.drain()
    async with Journal(path) as journal:
        results = await loop.run_all(asker.inputs("abc"), journal=journal)
        assert [result.status for result in results] == ["success", "success", "skipped"]
        async with loop.as_completed(asker.inputs("c"), journal=journal) as done:
            with pytest.raises(BatchStopped):
                await anext(done)


@both_verbs
async def test_fatal_failure_is_recorded_and_what_it_skipped_runs_next_time(verb: str, path: Path) -> None:
    keys = {"bad": True}
    asker = Asker(fails=lambda x: Unauthorized() if x == "b" and keys["bad"] else None)
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    async with Journal(path) as journal:
        try:
            results = await run(verb, loop, asker.inputs("abc"), journal)
        except BatchStopped:
            pass
        else:
            assert [result.status for result in results] == ["success", "error", "skipped"]

    assert [row[0] for row in rows(path, "status")] == ["success", "error"]
    keys["bad"] = False
    async with Journal(path) as journal:
        results = await run(verb, loop, asker.inputs("abc"), journal)

    assert [(result.status, result.replayed) for result in results] == [
        ("success", True),
        ("success", False),
        ("success", False),
    ]


async def test_finished_batch_is_freed(path: Path) -> None:
    class Output(dict[str, Any]):
        pass

    refs = []

    async def ask(x: int) -> dict[str, Any]:
        refs.append(weakref.ref(current_attempt.__class__))
        output = Output(x=x)
        refs[-1] = weakref.ref(output)
        return output

    loop = AgentLoop()
    async with Journal(path, encode=lambda x: str(x["x"]), decode=int) as journal:
        results: Any = await loop.run_all(Invocation.map(ask, range(5)), journal=journal)
        assert len(results) == len(refs) == 5
        del results
        gc.collect()
        assert not any(ref() for ref in refs)


# --- steps in agents


@pytest.mark.parametrize("limit", [1, 4])
async def test_steps_of_agents_are_journaled_below_any_limit(limit: int, path: Path) -> None:
    asker = Asker(1)
    loop = AgentLoop(LoopConfig(max_concurrency=limit))

    async def plan(x: int) -> int:
        for step in range(3):
            (result,) = await loop.run_all(asker.inputs([f"{x}.{step}"]), journal=journal)
            assert result.success

        return x

    async with Journal(path) as journal:
        with anyio.move_on_after(4.5):
            await loop.run_all(Invocation.map(plan, range(4)), journal=journal)

    ended = [*asker.ended]
    assert ended
    async with Journal(path) as journal:
        results = await loop.run_all(Invocation.map(plan, range(4)), journal=journal)

    assert [result.output for result in results] == [*range(4)]
    assert max(asker.counts.values()) <= 2
    assert all(asker.counts[step] == 1 for step in ended)


async def test_two_batches_at_once_share_a_journal(path: Path) -> None:
    asker, loop = Asker(0.1), AgentLoop()
    async with Journal(path) as journal, anyio.create_task_group() as group:
        for items in ("abc", "bcd"):
            group.start_soon(functools.partial(loop.run_all, asker.inputs(items), journal=journal))

    assert asker.counts == {"a": 1, "b": 2, "c": 2, "d": 1}
    assert len(rows(path)) == 6


# --- idempotency keys


async def test_idempotency_key_stays_until_a_result_is_recorded(path: Path) -> None:
    keys: list[tuple[str, str]] = []
    state = {"fails": False, "hangs": True}

    async def pay(x: str) -> str:
        keys.append((x, current_attempt().idempotency_key))
        if len(keys) % 2:
            raise ConnectionError

        if state["hangs"]:
            await anyio.sleep_forever()

        if state["fails"]:
            raise TypeError("no")

        return x

    async def once() -> list[str]:
        keys.clear()
        async with Journal(path) as journal:
            with anyio.move_on_after(10):
                await loop.run_all(Invocation.map(pay, ["order"]), journal=journal)

        assert len({key for _, key in keys}) == 1
        return [key for _, key in keys]

    loop = AgentLoop(LoopConfig(max_concurrency=1, backoff=Backoff(0.1, jitter="none")))
    interrupted, again = await once(), await once()
    assert interrupted == again
    assert len(interrupted[0]) == 32
    state.update(hangs=False, fails=True)
    assert await once() == again
    second = await once()
    state.update(fails=False)
    assert len({again[0], second[0], (await once())[0]}) == 3


async def test_idempotency_keys_of_equal_inputs_differ_and_are_those_of_the_run_before(path: Path) -> None:
    keys: list[str] = []
    passes = 1

    async def pay(x: str) -> str:
        keys.append(current_attempt().idempotency_key)
        if len(keys) > passes:
            await anyio.sleep_forever()

        return x

    loop = AgentLoop()
    async with Journal(path) as journal:
        with anyio.move_on_after(1):
            await loop.run_all(Invocation.map(pay, ["a"] * 4), journal=journal)

    first, passes = [*keys], 100
    assert len(set(first)) == 4
    keys.clear()
    async with Journal(path) as journal:
        await loop.run_all(Invocation.map(pay, ["a"] * 4), journal=journal)

    assert sorted(keys) == sorted(first[1:])


async def test_idempotency_keys_of_equal_inputs_fill_the_gaps_that_were_left(path: Path) -> None:
    keys: list[str] = []
    hangs = 2

    async def pay(x: str) -> str:
        keys.append(current_attempt().idempotency_key)
        if len(keys) <= hangs:
            await anyio.sleep_forever()

        await anyio.sleep(0.1)
        return x

    loop = AgentLoop()
    async with Journal(path) as journal:
        with anyio.move_on_after(1):
            await loop.run_all(Invocation.map(pay, ["a"] * 5), journal=journal)

    left, hangs = keys[:2], 0
    keys.clear()
    async with Journal(path) as journal:
        await loop.run_all(Invocation.map(pay, ["a"] * 6), journal=journal)

    assert keys[:2] == left
    assert len({*keys}) == len(keys) == 3


async def test_idempotency_key_differs_between_journals_versions_and_runs_without(path: Path) -> None:
    keys: list[str] = []

    async def pay(x: str) -> str:
        keys.append(await anyio.to_thread.run_sync(lambda: current_attempt().idempotency_key))
        await anyio.sleep_forever()
        return x

    loop = AgentLoop(LoopConfig(timeout_seconds=None))
    for number, (name, version) in enumerate([("a", 1), ("b", 1), ("a", 2)]):
        async with Journal(path.with_name(name), version=version, changed="keep") as journal:
            with anyio.move_on_after(1):
                await loop.run_all(Invocation.map(pay, ["a"]), journal=journal)

        assert len(keys) == number + 1

    with anyio.move_on_after(1):
        await loop.run_all(Invocation.map(pay, ["a"]))

    assert len(set(keys)) == 4


# --- threads


async def test_journal_serves_agents_that_fill_the_default_thread_limit(path: Path) -> None:
    asker, loop = Asker(), AgentLoop(LoopConfig(max_concurrency=3))
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1

    def step(x: int) -> int:
        run_all = functools.partial(loop.run_all, asker.inputs([x]), journal=journal)
        return len(anyio.from_thread.run(run_all))

    async def agent(x: int) -> int:
        return await anyio.to_thread.run_sync(step, x)

    async with Journal(path) as journal:
        with anyio.fail_after(100):
            results = await loop.run_all(Invocation.map(agent, range(3)), journal=journal)

    assert [result.output for result in results] == [1, 1, 1]


async def test_metrics_of_the_journal_are_those_of_all_runs(path: Path) -> None:
    asker = Asker(1, fails=lambda x: ValueError("boom") if x == 2 else None)
    merged = MetricsRecorder()
    for items in (range(3), range(5)):
        loop = AgentLoop(LoopConfig(max_retries=0))
        async with Journal(path, keep=(Status.SUCCESS, Status.ERROR)) as journal:
            await loop.run_all(asker.inputs(items), journal=journal)
            merged.merge(loop.metrics)
            metrics = await journal.metrics()

    assert metrics.snapshot().counts == merged.snapshot().counts
    assert metrics.snapshot().latency == merged.snapshot().latency
    assert metrics.snapshot().queue.count == merged.snapshot().queue.count == 5

"""Batches with a journal: what is replayed, what runs, and when a result is delivered."""

import asyncio
import functools
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest
from agents import both_verbs, into, launch, make_loop
from anyio.lowlevel import checkpoint
from asking import Asker, night, replayed, rows, run

from agentloop import (
    AgentLoop,
    BatchStopped,
    Invocation,
    KeyedLimiter,
    Limiter,
    MetricsRecorder,
    Rate,
    ResultEvent,
    Status,
    StopRule,
    current_attempt,
)
from agentloop.journal import Journal, JournaledError, JournalStatistics
from agentloop.testing import FakeHTTPError

# --- what is replayed


@both_verbs
async def test_second_run_gives_the_results_of_the_first_and_calls_nothing(verb: str, path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    first = await night(path, asker.inputs("abc"), loop, verb)
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
    asker = Asker()
    await night(path, asker.inputs("abca"), verb=verb)
    results = await night(path, asker.inputs("xacaaa"), verb=verb)
    assert [result.output["answer"] for result in results] == [*"xacaaa"]
    assert [result.index for result in results] == [*range(6)]
    assert len(replayed(results)) == 3
    assert asker.counts == {"a": 4, "b": 1, "c": 1, "x": 1}


async def test_equal_inputs_of_one_opening_have_an_entry_each(path: Path) -> None:
    asker, loop = Asker(), AgentLoop()
    async with Journal(path) as journal:
        for _ in range(2):
            await loop.run_all(asker.inputs("ab"), journal=journal)

    assert len(rows(path)) == len(asker.calls) == 4


@pytest.mark.long
async def test_thousands_of_equal_inputs_take_linear_time(path: Path) -> None:
    asker = Asker()
    for expected in (0, 3000):
        with anyio.fail_after(1000):
            results = await night(path, asker.inputs("a" * 3000), durable=False)

        assert len(replayed(results)) == expected

    assert len(rows(path)) == len(asker.calls) == 3000


async def test_many_kinds_of_equal_inputs_are_told_apart(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.journal._claims.REMEMBERED", 2)
    asker = Asker()
    for expected in (0, 40):
        results = await night(path, asker.inputs("abcdefgh" * 5), durable=False)
        assert len(replayed(results)) == expected

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
    inputs = [Invocation("a", Asker().ask, ("a",), key=key) for key in (1, "1")]
    assert replayed(await night(path, inputs)) == []


@pytest.mark.parametrize("limit", [1, 2])
async def test_key_that_is_there_twice_in_a_batch_is_an_error_of_the_input(limit: int, path: Path) -> None:
    asker, loop = Asker(0.1), make_loop(max_concurrency=limit)
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
        await launch(group, run, "run_all", loop, inputs, journal)
        with pytest.raises(ValueError, match="key 'k' is there twice"):
            await loop.run_all(inputs, journal=journal)


async def test_failures_run_again_and_their_rows_are_replaced(path: Path) -> None:
    broken = {"b"}
    asker = Asker(fails=lambda x: ValueError("boom") if x in broken else None)
    await night(path, asker.inputs("abb"), make_loop())
    assert rows(path, "error") == [None, "ValueError: boom", "ValueError: boom"]
    broken.clear()
    assert replayed(await night(path, asker.inputs("abb"), make_loop())) == [0]
    assert rows(path, "status") == ["success"] * 3


async def test_finished_entry_is_taken_before_a_failed_one_of_the_same_input(path: Path) -> None:
    left = [ValueError("boom"), ValueError("boom")]
    asker = Asker(fails=lambda _: left.pop() if left else None)
    await night(path, asker.inputs("aaa"), make_loop(max_concurrency=1))
    assert rows(path, "status") == ["error", "error", "success"]
    (result,) = await night(path, asker.inputs("a"))
    assert result.replayed
    assert result.success


@both_verbs
async def test_kept_failure_is_replayed_as_its_line(verb: str, path: Path) -> None:
    asker = Asker(2, fails=lambda x: ValueError("boom") if x == "a" else None)
    inputs = [*asker.inputs("a"), Invocation("slow", Asker(5).ask, ("b",), key=1)]
    keep = (Status.ERROR, Status.TIMEOUT)
    first, second = [
        await night(path, inputs, make_loop(timeout_seconds=3), verb, keep=keep) for _ in range(2)
    ]
    assert [result.status for result in second] == [Status.ERROR, Status.TIMEOUT]
    assert [result.error for result in second] == [result.error for result in first]
    assert all(isinstance(result.exception, JournaledError) for result in second)
    with pytest.raises(JournaledError, match="boom"):
        second[0].unwrap()


async def test_what_is_not_kept_runs_again(path: Path) -> None:
    asker = Asker()
    for _ in range(2):
        await night(path, asker.inputs("a"), keep=())

    assert len(asker.calls) == 2
    assert len(rows(path)) == 1
    # As good as Status.SUCCESS.
    await night(path, asker.inputs("a"), keep=["success"])
    assert len(asker.calls) == 2


async def test_cancelled_and_skipped_results_are_not_recorded(path: Path) -> None:
    async def ask(x: str) -> str:
        if x == "hangs":
            await anyio.sleep_forever()

        return x

    loop = make_loop(max_concurrency=1, stop=StopRule(seconds=1, grace_seconds=0))
    results = await night(path, Invocation.map(ask, ["a", "hangs", "b"]), loop)
    assert [result.status for result in results] == ["success", "cancelled", "skipped"]
    assert rows(path, "status") == ["success"]
    assert replayed(await night(path, Invocation.map(ask, ["b", "a"]))) == [1]


# --- what a replayed result costs


@both_verbs
async def test_replayed_result_takes_no_slot_and_no_rate_and_no_metric(verb: str, path: Path) -> None:
    asker = Asker()
    costs: list[str] = []

    def cost(invocation: Invocation[Any]) -> float:
        costs.append(invocation.args[0])
        return 1

    await night(path, asker.inputs("abc"))
    events: list[Any] = []
    loop = AgentLoop(limiter=Limiter(1, rates=(Rate(1, cost=cost),)), on_event=events.append)
    loop.limiter.pause()
    results = await night(path, asker.inputs("abc"), loop, verb)
    assert len(replayed(results)) == 3
    assert costs == []
    assert not any(loop.metrics.snapshot().counts.values())
    told = [event for event in events if isinstance(event, ResultEvent)]
    assert [type(event).__name__ for event in events if event not in told] == ["LimitEvent"]
    assert [event.result for event in told] == results
    assert len({event.id for event in told}) == 3


async def test_replayed_failures_do_not_count_for_a_stop_rule(path: Path) -> None:
    asker = Asker(fails=lambda x: ValueError("boom") if x < 3 else None)
    keep = (Status.SUCCESS, Status.ERROR)
    await night(path, asker.inputs(range(3)), make_loop(), keep=keep)
    results = await night(path, asker.inputs(range(6)), make_loop(stop=StopRule(failures=2)), keep=keep)
    assert [result.success for result in results] == [False] * 3 + [True] * 3


async def test_long_replay_lets_others_run(path: Path) -> None:
    asker, turns = Asker(), []
    await night(path, asker.inputs(range(1000)))

    async def other() -> None:
        while True:
            await checkpoint()
            turns.append(1)

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        await night(path, asker.inputs(range(1000)))
        group.cancel_scope.cancel()

    assert len(turns) >= 5


async def test_replay_works_below_a_keyed_limiter_and_an_outer_invocation(path: Path) -> None:
    asker = Asker()
    limiter = KeyedLimiter(by=lambda invocation: invocation.args[0], make=lambda _: Limiter(1))
    loop = AgentLoop(limiter=limiter)

    async def outer(x: str) -> list[int]:
        return replayed(await night(path, asker.inputs(x), loop))

    seen = [(await loop.run_single("outer", outer, "ab")).unwrap() for _ in range(2)]
    assert seen == [[], [0, 1]]


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
                    assert result.index in rows(path, "idx")


async def test_slot_is_given_back_before_the_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While results wait for the disk, as many others run as the limit."""
    monkeypatch.setattr("agentloop.journal._writer.LINGER_SECONDS", 100)
    asker = Asker(1)
    async with anyio.create_task_group() as group:
        group.start_soon(night, path, asker.inputs(range(4)), make_loop(max_concurrency=2))
        await anyio.sleep(1.5)
        assert asker.calls == [0, 1, 2, 3]
        assert rows(path) == []

    assert len(rows(path)) == 4


async def test_reader_that_stops_stops_new_starts(path: Path) -> None:
    asker, loop = Asker(1), make_loop(max_concurrency=3)
    async with Journal(path) as journal:
        async with loop.as_completed(asker.inputs(range(100)), journal=journal) as done:
            await anext(done)
            await anyio.sleep(50)
            assert len(asker.calls) <= 9

    assert len(rows(path)) == len(asker.ended)


async def test_short_agents_do_not_wait_for_the_linger(path: Path) -> None:
    """Once as many results as the limit wait to be written, they are written at once."""
    asker, loop = Asker(), make_loop(max_concurrency=2)
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
async def test_what_had_ended_when_a_batch_is_cancelled_is_not_run_again(verb: str, path: Path) -> None:
    asker, loop = Asker(1), make_loop(max_concurrency=2)
    async with Journal(path) as journal:
        with anyio.move_on_after(3.01):
            await run(verb, loop, asker.inputs(range(10)), journal)

        ended = [*asker.ended]
        assert len(ended) == len(rows(path)) == 6

    results = await night(path, asker.inputs(range(10)), loop, verb)
    assert replayed(results) == sorted(ended)
    assert (asker.counts[0], sorted(asker.ended)) == (1, [*range(10)])
    assert len(rows(path)) == 10


@pytest.mark.parametrize("items", ["abcd", "aaaa"], ids=["different", "equal"])
async def test_results_of_a_cancelled_batch_are_replayed_to_the_next_one(items: str, path: Path) -> None:
    asker, loop = Asker(1), make_loop(max_concurrency=2)
    async with Journal(path) as journal:
        if items == "aaaa":
            # Which have their entries, so that the next ones have others.
            await loop.run_all(asker.inputs(items), journal=journal)

        with anyio.move_on_after(1.01):
            await loop.run_all(asker.inputs(items), journal=journal)

        assert replayed(await loop.run_all(asker.inputs(items), journal=journal)) == [0, 1]


@both_verbs
def test_native_cancellation_loses_nothing_that_had_ended(verb: str, path: Path) -> None:
    asker, loop = Asker(0.02), make_loop(max_concurrency=2)

    async def main() -> None:
        async with Journal(path) as journal:
            task = asyncio.ensure_future(run(verb, loop, asker.inputs(range(100)), journal))
            while len(asker.ended) < 5:
                await asyncio.sleep(0.01)

            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        assert {*rows(path, "idx")} == set(asker.ended)

    asyncio.run(main())


async def test_results_that_were_not_read_are_replayed_to_the_next_batch(path: Path) -> None:
    asker, loop = Asker(), make_loop(max_concurrency=4)
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
    asker, loop = Asker(), make_loop(max_concurrency=1)

    def inputs() -> Any:
        yield from asker.inputs("ab")
        raise OSError("gone")

    async with Journal(path) as journal:
        with pytest.raises(OSError, match="gone"):
            await loop.run_all(inputs(), journal=journal)

        results = await loop.run_all(asker.inputs("ab"), journal=journal)

    assert [result.replayed for result in results] == [True, True]


async def test_drained_loop_writes_what_has_ended_and_gives_what_the_journal_has(path: Path) -> None:
    asker, loop = Asker(1), make_loop(max_concurrency=2)
    results: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(into, results, night, path, asker.inputs(range(6)), loop)
        await anyio.sleep(1.5)
        loop.drain()

    assert [result.status for result in results[0]] == ["success"] * 4 + ["skipped"] * 2
    assert [result.status for result in await night(path, asker.inputs(range(5)), loop)] == [
        *["success"] * 4,
        "skipped",
    ]
    with pytest.raises(BatchStopped):
        await night(path, asker.inputs([5]), loop, "as_completed")

    assert replayed(await night(path, asker.inputs(range(6)))) == [0, 1, 2, 3]


@both_verbs
async def test_fatal_failure_is_recorded_and_what_it_skipped_runs_next_time(verb: str, path: Path) -> None:
    bad = {"b"}
    asker = Asker(fails=lambda x: FakeHTTPError(401) if x in bad else None)
    loop = make_loop(max_concurrency=1)
    try:
        results = await night(path, asker.inputs("abc"), loop, verb)
    except BatchStopped:
        assert verb == "as_completed"
    else:
        assert [result.status for result in results] == ["success", "error", "skipped"]

    assert rows(path, "status") == ["success", "error"]
    bad.clear()
    results = await night(path, asker.inputs("abc"), loop, verb)
    assert all(result.success for result in results)
    assert replayed(results) == [0]


async def test_finished_batch_is_freed(path: Path) -> None:
    class Output(dict[str, Any]):
        pass

    refs = []

    async def ask(x: int) -> dict[str, Any]:
        output = Output(x=x)
        refs.append(weakref.ref(output))
        return output

    async with Journal(path, encode=lambda x: str(x["x"]), decode=int) as journal:
        results: Any = await AgentLoop().run_all(Invocation.map(ask, range(5)), journal=journal)
        assert len(results) == len(refs) == 5
        del results
        gc.collect()
        assert not any(ref() for ref in refs)


# --- steps in agents


@pytest.mark.parametrize("limit", [1, 4])
async def test_steps_of_agents_are_journaled_below_any_limit(limit: int, path: Path) -> None:
    asker = Asker(1)
    loop = make_loop(max_concurrency=limit)

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
            group.start_soon(run, "run_all", loop, asker.inputs(items), journal)

    assert asker.counts == {"a": 1, "b": 2, "c": 2, "d": 1}
    assert len(rows(path)) == 6


# --- idempotency keys


class Payer:
    """Makes an agent, and notes the idempotency keys of its calls; ``act`` says what becomes of each."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.act: Callable[[], Any] = checkpoint

        async def pay(x: str) -> str:
            self.keys.append(current_attempt().idempotency_key)
            await self.act()
            return x

        self.pay = pay

    async def run(self, count: int, act: Callable[[], Any], path: Path, **settings: Any) -> list[str]:
        """Run a batch of equal inputs, for ten seconds at most, and return the keys of its calls."""
        self.keys, self.act = [], act
        with anyio.move_on_after(10):
            loop = make_loop(max_retries=3, timeout_seconds=None)
            await night(path, Invocation.map(self.pay, ["order"] * count), loop, **settings)

        return self.keys


async def test_idempotency_key_stays_until_a_result_is_recorded(path: Path) -> None:
    payer = Payer()

    async def fail_once(then: Callable[[], Any]) -> None:
        if len(payer.keys) % 2:
            raise ConnectionError

        await then()

    async def bug() -> None:
        raise TypeError("no")

    found = []
    for then in (anyio.sleep_forever, anyio.sleep_forever, bug, bug, checkpoint):
        first, second = await payer.run(1, functools.partial(fail_once, then), path)
        assert (first, len(first)) == (second, 32)
        found.append(first)

    assert found[0] == found[1] == found[2]
    assert len({*found[2:]}) == 3


async def test_idempotency_keys_of_equal_inputs_differ_and_are_those_of_the_run_before(path: Path) -> None:
    payer = Payer()

    async def end_first() -> None:
        if len(payer.keys) > 1:
            await anyio.sleep_forever()

    first = await payer.run(4, end_first, path)
    assert len({*first}) == 4
    assert sorted(await payer.run(4, checkpoint, path)) == sorted(first[1:])


async def test_idempotency_keys_of_equal_inputs_fill_the_gaps_that_were_left(path: Path) -> None:
    payer = Payer()

    async def hang_two() -> None:
        await (anyio.sleep_forever() if len(payer.keys) <= 2 else anyio.sleep(0.1))

    left = (await payer.run(5, hang_two, path))[:2]
    keys = await payer.run(6, checkpoint, path)
    assert keys[:2] == left
    assert len({*keys}) == len(keys) == 3


async def test_idempotency_key_differs_between_journals_versions_and_runs_without(path: Path) -> None:
    payer, keys = Payer(), []

    async def look_from_a_thread() -> None:
        key = await anyio.to_thread.run_sync(lambda: current_attempt().idempotency_key)
        assert payer.keys == [key]
        await anyio.sleep_forever()

    for name, version in [("a", 1), ("b", 1), ("a", 2)]:
        file = path.with_name(name)
        keys += await payer.run(1, look_from_a_thread, file, version=version, changed="keep")

    payer.act = checkpoint
    await AgentLoop().run_all(Invocation.map(payer.pay, ["order"]))
    assert len(keys) == 3
    assert len({*keys, *payer.keys}) == 4


# --- threads


async def test_journal_serves_agents_that_fill_the_default_thread_limit(path: Path) -> None:
    asker, loop = Asker(), make_loop(max_concurrency=3)
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
        loop = make_loop()
        async with Journal(path, keep=(Status.SUCCESS, Status.ERROR)) as journal:
            await loop.run_all(asker.inputs(items), journal=journal)
            merged.merge(loop.metrics)
            metrics = (await journal.metrics()).snapshot()

    assert metrics.counts == merged.snapshot().counts
    assert metrics.latency == merged.snapshot().latency
    assert metrics.queue.count == merged.snapshot().queue.count == 5

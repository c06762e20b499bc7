"""The timeline of a run: what is in the file, that it stays readable, and that memory is bounded."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentloop import (
    AgentLoop,
    Backoff,
    Event,
    Invocation,
    InvocationResult,
    KeyedLimiter,
    Limiter,
    LimitEvent,
    LoopConfig,
    QueuedEvent,
    ResultEvent,
    RetryEvent,
    StartedEvent,
    Status,
    StopEvent,
    Verdict,
    VerdictKind,
)
from agentloop.contrib.timeline import Timeline
from agentloop.journal import Journal
from agentloop.testing import FakeAgent, FakeHTTPError, Reply, virtual_clock

ROOT = Path(__file__).parents[2]
STEADY = Backoff(initial_seconds=2, jitter="none")
Record = dict[str, Any]


def records(path: Path) -> list[Record]:
    """Read a file, of which nothing but the closing bracket may be missing."""
    text = path.read_text("ascii")
    return json.loads(text if text.rstrip().endswith("]") else text + "]")


def of(found: list[Record], phase: str, name: str | None = None) -> list[Record]:
    return [record for record in found if record["ph"] == phase and name in (None, record.get("name"))]


def slices(found: list[Record]) -> list[tuple[str, str, float, float, Record]]:
    """Return the lane, name, begin, end and final arguments of each attempt, in the order of their ends."""
    lanes = {record["tid"]: record["args"]["name"] for record in of(found, "M", "thread_name")}
    opened: dict[int, Record] = {}
    done = []
    for record in found:
        if record["ph"] == "B":
            assert record["tid"] not in opened, "two attempts in one lane"
            opened[record["tid"]] = record
        elif record["ph"] == "E":
            begin = opened.pop(record["tid"])
            assert record["ts"] >= begin["ts"]
            done.append((lanes[record["tid"]], begin["name"], begin["ts"], record["ts"], record["args"]))

    assert not opened, "an attempt has no end"
    return done


def waits(found: list[Record]) -> list[tuple[str, str, float, float]]:
    opened: dict[tuple[str, str], Record] = {}
    done = []
    for record in found:
        if record["ph"] == "b":
            assert (record["cat"], record["id"]) not in opened
            opened[record["cat"], record["id"]] = record
        elif record["ph"] == "e":
            begin = opened.pop((record["cat"], record["id"]))
            done.append((record["name"], begin["args"]["agent"], begin["ts"], record["ts"]))

    assert not opened
    return done


def troubles(found: list[Record]) -> list[tuple[str, float, float]]:
    """Return the kind, begin and end of each cool-off and outage, in seconds."""
    opened: dict[str, float] = {}
    done = []
    for record in found:
        if record["ph"] in "be" and record["cat"] in ("held", "outage"):
            assert (record["id"], record["name"]) == (f"{record['pid']}.{record['cat']}", record["cat"])
            if record["ph"] == "b":
                assert record["id"] not in opened
                opened[record["id"]] = record["ts"]
            else:
                done.append((record["cat"], opened.pop(record["id"]) / 1e6, record["ts"] / 1e6))

    return done


async def nap(seconds: float) -> float:
    await anyio.sleep(seconds)
    return seconds


class StatusError(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__(f"status {status_code}")
        self.code = str(status_code)


def failing(times: int, error: Exception) -> Callable[[], Any]:
    left = iter(range(times))

    async def fail() -> str:
        await anyio.sleep(1)
        if next(left, None) is not None:
            raise error

        return "done"

    return fail


# --- what is drawn


async def test_each_slot_has_a_lane_in_which_attempts_follow_each_other(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(max_concurrency=2), on_event=timeline)
        await loop.run_all(Invocation.map(nap, [3, 1, 1, 2]))

    found = records(tmp_path / "run.json")
    assert [(lane, name, begin, end) for lane, name, begin, end, _ in slices(found)] == [
        ("slot 2", "nap-1", 0, 1e6),
        ("slot 2", "nap-2", 1e6, 2e6),
        ("slot 1", "nap-0", 0, 3e6),
        ("slot 2", "nap-3", 2e6, 4e6),
    ]
    assert [record["args"] for record in of(found, "M", "process_name")] == [{"name": "agentloop"}]
    assert [record["args"]["sort_index"] for record in of(found, "M", "thread_sort_index")] == [1, 2]
    assert {record["args"]["status"] for record in of(found, "E")} == {"success"}


async def test_retries_backoffs_and_errors_are_drawn(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(backoff=STEADY), on_event=timeline)
        await loop.run_single("flaky", failing(1, StatusError(503)))

    found = records(tmp_path / "run.json")
    first, second = slices(found)
    assert first[2:4] == (0, 1e6)
    assert first[4] == {
        "status": "error",
        "verdict": "transient",
        "delay_seconds": 2,
        "reason": "StatusError 503",
        "error": "StatusError: status 503",
    }
    assert second[2:] == (3e6, 4e6, {"status": "success"})
    assert [record["cat"] for record in of(found, "B")] == ["attempt", "attempt,retry"]
    assert [record["args"]["attempt"] for record in of(found, "B")] == [1, 2]
    assert waits(found) == [("backoff", "flaky", 1e6, 3e6)]
    (mark,) = of(found, "i")
    assert (mark["name"], mark["ts"], mark["cat"], mark["cname"]) == (
        "error: StatusError 503",
        1e6,
        "error",
        "terrible",
    )
    # Inside of its attempt, whose end comes next.
    assert found[found.index(mark) + 1]["ph"] == "E"


async def test_time_outs_are_told_apart_from_errors(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        config = LoopConfig(timeout_seconds=0.5, max_retries=1, backoff=STEADY)
        await AgentLoop(config, on_event=timeline).run_single("slow", nap, 9)

    found = records(tmp_path / "run.json")
    assert [args["status"] for *_, args in slices(found)] == ["timeout", "timeout"]
    assert slices(found)[1][4]["reason"] == "InvocationTimeout"
    assert [record["cname"] for record in of(found, "i", "timeout: InvocationTimeout")] == ["bad", "bad"]


async def test_waits_for_a_slot_are_drawn_and_share_tracks(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=timeline)
        for _ in range(2):
            async with anyio.create_task_group() as group:
                for name in "abc":
                    group.start_soon(loop.run_single, name, nap, 1)

    found = records(tmp_path / "run.json")
    drawn = sorted(waits(found), key=lambda wait: wait[2:])
    assert [(kind, begin, end) for kind, _, begin, end in drawn] == [
        ("queued", 0, 1e6),
        ("queued", 0, 2e6),
        ("queued", 3e6, 4e6),
        ("queued", 3e6, 5e6),
    ]
    # One of three waits no time.
    assert len({record["id"] for record in of(found, "b")}) <= 3
    assert len({record["tid"] for record in of(found, "B")}) == 1


async def test_what_waits_for_a_slot_after_its_backoff_is_queued(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(max_concurrency=1, backoff=STEADY), on_event=timeline)
        async with anyio.create_task_group() as group:
            group.start_soon(loop.run_single, "flaky", failing(1, OSError()))
            await anyio.sleep(0.5)
            group.start_soon(loop.run_single, "long", nap, 9)

    assert waits(records(tmp_path / "run.json")) == [
        ("queued", "long", 0.5e6, 1e6),
        ("backoff", "flaky", 1e6, 3e6),
        ("queued", "flaky", 3e6, 10e6),
    ]


async def test_first_chunks_are_instants_in_their_lane(tmp_path: Path) -> None:
    async def write() -> AsyncIterator[str]:
        await anyio.sleep(1)
        yield "a"
        await anyio.sleep(1)
        yield "b"

    with Timeline(tmp_path / "run.json") as timeline:
        async with AgentLoop(on_event=timeline).run_streaming("writer", write) as stream:
            assert [chunk async for chunk in stream] == ["a", "b"]

    found = records(tmp_path / "run.json")
    (instant,) = of(found, "i", "first chunk")
    assert (instant["ts"], instant["tid"]) == (1e6, of(found, "B")[0]["tid"])
    assert slices(found)[0][4] == {"status": "success", "chunks": 2}


async def test_limit_and_how_many_do_what_are_counters(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        limiter = Limiter(1)
        loop = AgentLoop(LoopConfig(backoff=STEADY), limiter=limiter, on_event=timeline)
        async with anyio.create_task_group() as group:
            group.start_soon(loop.run_single, "flaky", failing(1, OSError()))
            group.start_soon(loop.run_single, "long", nap, 2)
            await anyio.sleep(0.5)
            limiter.max_concurrency = 2

    found = records(tmp_path / "run.json")
    assert [(record["ts"], record["args"]) for record in of(found, "C", "limit")] == [
        (0, {"slots": 1}),
        (0.5e6, {"slots": 2}),
    ]
    counted = [(record["ts"], *record["args"].values()) for record in of(found, "C", "invocations")]
    assert counted[0] == (0, 1, 1, 0)
    assert (0.5e6, 2, 0, 0) in counted
    assert any(retrying == 1 for *_, retrying in counted)
    assert counted[-1][1:] == (0, 0, 0)


async def test_counters_are_written_no_more_than_once_a_millisecond(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=timeline)
        await loop.run_all(Invocation.map(nap, [0.0001] * 100))

    counted = of(records(tmp_path / "run.json"), "C", "invocations")
    assert 5 <= len(counted) <= 12


async def test_end_of_a_batch_is_a_global_instant(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=timeline)
        fatal = failing(1, StatusError(401))
        results = await loop.run_all([Invocation("first", fatal), Invocation("second", fatal)])
        assert results[1].status is Status.SKIPPED

    found = records(tmp_path / "run.json")
    (stop,) = of(found, "i", "batch stopped")
    assert (stop["s"], stop["ts"]) == ("g", 1e6)
    assert "'first' failed with StatusError: status 401" in stop["args"]["reason"]
    assert [name for _, name, *_ in slices(found)] == ["first"]


async def test_end_without_a_slot_is_marked(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        config = LoopConfig(max_concurrency=1, total_timeout_seconds=2)
        loop = AgentLoop(config, on_event=timeline)
        async with anyio.create_task_group() as group:
            group.start_soon(loop.run_single, "waiting", failing(1, OSError("gone")))
            await anyio.sleep(0.5)
            group.start_soon(loop.run_single, "long", nap, 1.9)
            await anyio.sleep(2.5)

    found = records(tmp_path / "run.json")
    marks = [record for record in of(found, "i") if record["s"] == "p"]
    assert [(mark["name"], mark["args"]["agent"]) for mark in marks] == [("timeout", "waiting")]
    assert marks[0]["args"]["reason"] == "InvocationTimeout"


async def test_result_of_a_journal_is_not_drawn(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(on_event=timeline)
        for counts in (1, 2):
            async with Journal(tmp_path / "night.db") as journal:
                await loop.run_all(Invocation.map(nap, range(counts)), journal=journal)

        assert repr(timeline) == f"<Timeline {str(tmp_path / 'run.json')!r} 0 running>"

    assert len(slices(records(tmp_path / "run.json"))) == 2


async def test_cancelled_invocation_ends(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=timeline)
        with anyio.move_on_after(1):
            await loop.run_all(Invocation.map(nap, [9, 9]))

        assert repr(timeline) == f"<Timeline {str(tmp_path / 'run.json')!r} 0 running>"

    found = records(tmp_path / "run.json")
    assert [args["status"] for *_, args in slices(found)] == ["cancelled"]


async def test_nested_invocations_have_lanes_of_their_own(tmp_path: Path) -> None:
    async def parent() -> None:
        await loop.run_single("child", nap, 1)

    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(max_concurrency=1), on_event=timeline)
        await loop.run_single("parent", parent)

    assert [(lane, name) for lane, name, *_ in slices(records(tmp_path / "run.json"))] == [
        ("slot 2", "child"),
        ("slot 1", "parent"),
    ]


# --- a provider in trouble


async def test_cool_off_that_a_probe_ends_is_a_span_up_to_there(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(LoopConfig(max_concurrency=1, max_retries=0), on_event=timeline)
        provider = FakeAgent(Reply(1, after_seconds=1), FakeHTTPError(429, retry_after=100), Reply(2))
        await loop.run_all([Invocation("a", provider)] * 4)

    found = records(tmp_path / "run.json")
    # The first probe comes after a twentieth.
    assert troubles(found) == [("held", 1, 6)]
    assert of(found, "b", "held")[0]["args"] == {"seconds": 100}


def test_cool_off_ends_when_it_is_over_although_no_event_says_so(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        agent = Invocation("a", nap)
        timeline(QueuedEvent(agent, id=1, at=50))
        timeline(LimitEvent(4, at=51, held_until=60))
        timeline(LimitEvent(3, at=52, held_until=65))
        timeline(QueuedEvent(agent, id=2, at=64))
        assert not troubles(read_now(timeline, tmp_path))
        timeline(QueuedEvent(agent, id=3, at=66))
        assert troubles(read_now(timeline, tmp_path)) == [("held", 1, 15)]
        timeline(LimitEvent(2, at=70, held_until=80))
        timeline(LimitEvent(3, at=75))

    assert troubles(records(tmp_path / "run.json")) == [("held", 1, 15), ("held", 20, 25)]


def read_now(timeline: Timeline, path: Path) -> list[Record]:
    timeline.flush()
    return records(path / "run.json")


async def test_outage_is_a_span_from_its_first_failure_to_the_first_success(tmp_path: Path) -> None:
    async def provider() -> None:
        await anyio.sleep(0.5)
        if anyio.current_time() < up_at:
            raise ConnectionError

    up_at = anyio.current_time() + 60
    with Timeline(tmp_path / "run.json") as timeline:
        await AgentLoop(on_event=timeline).run_all([Invocation("a", provider)] * 20)

    found = records(tmp_path / "run.json")
    ((kind, began, ended),) = troubles(found)
    succeeded = [end for *_, end, args in slices(found) if args["status"] == "success"]
    assert (kind, began, ended) == ("outage", 0.5, min(succeeded) / 1e6)


@pytest.mark.parametrize("how", ["killed", "closed", "next run"])
def test_trouble_at_the_end_of_a_run_is_written_and_ends_with_it(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    clock = 0.0
    agent = Invocation("a", nap)
    timeline = Timeline(tmp_path / "run.json")
    timeline(QueuedEvent(agent, id=1, at=10))
    timeline(StartedEvent(agent, id=1, at=10))
    timeline(LimitEvent(1, at=20, held_until=90, outage_since=12))
    timeline(ResultEvent(agent, InvocationResult("a", Status.SKIPPED), id=1, at=30))
    if how == "next run":
        clock = 1000.0
        timeline(LimitEvent(1, at=40))
        timeline(QueuedEvent(agent, id=2, at=50))

    found = read_now(timeline, tmp_path)
    begun = [(record["name"], record["ts"] / 1e6) for record in of(found, "b")]
    assert begun == [("held", 10), ("outage", 2)]
    timeline.close()
    if how == "killed":
        assert not of(found, "e")
    else:
        assert troubles(records(tmp_path / "run.json")) == [("held", 10, 20), ("outage", 2, 20)]


def test_trouble_that_only_loops_without_a_timeline_meet_ends_no_sooner_than_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    clock = 10.0
    with Timeline(tmp_path / "run.json") as timeline:
        timeline(LimitEvent(2, at=10))
        timeline(QueuedEvent(Invocation("a", nap), id=1, at=20))
        timeline(ResultEvent(Invocation("a", nap), InvocationResult("a", Status.SKIPPED), id=1, at=20))
        clock = 50.0
        timeline(LimitEvent(1, at=50, held_until=100, outage_since=45))
        clock = 70.0
        timeline(LimitEvent(2, at=70))

    assert troubles(records(tmp_path / "run.json")) == [("held", 40, 40), ("outage", 35, 35)]


async def test_pause_of_all_keys_is_no_cool_off(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        limiters = KeyedLimiter(lambda invocation: invocation.agent_id, lambda _: Limiter(2))
        limiters.pause()
        loop = AgentLoop(limiter=limiters, on_event=timeline)
        async with anyio.create_task_group() as group:
            group.start_soon(loop.run_single, "a", nap, 1)
            await anyio.sleep(1)
            limiters["a"].max_concurrency = 3
            limiters.resume()

    assert not troubles(records(tmp_path / "run.json"))


def test_time_of_day_of_the_beginning_is_told(tmp_path: Path) -> None:
    before = datetime.now().astimezone().replace(microsecond=0)
    with Timeline(tmp_path / "run.json") as timeline:
        feed(timeline.named("chat"), 2)

    ((label, pid),) = (
        (record["args"]["labels"], record["pid"])
        for record in of(records(tmp_path / "run.json"), "M", "process_labels")
    )
    began = datetime.fromisoformat(label.removeprefix("began "))
    assert before <= began <= datetime.now().astimezone()
    assert pid == 2


# --- several loops and runs


async def test_loops_with_names_are_shown_apart(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        chat = AgentLoop(on_event=timeline.named("chat"))
        await chat.run_single("a", nap, 1)
        await AgentLoop(on_event=timeline.named("embed")).run_single("b", nap, 1)
        await AgentLoop(on_event=timeline.named("chat")).run_single("c", nap, 1)

    found = records(tmp_path / "run.json")
    names = {record["pid"]: record["args"]["name"] for record in of(found, "M", "process_name")}
    assert sorted(names.values()) == ["agentloop", "chat", "embed"]
    assert [(names[r["pid"]], r["name"]) for r in of(found, "B")] == [
        ("chat", "a"),
        ("embed", "b"),
        ("chat", "c"),
    ]
    assert len({record["tid"] for record in of(found, "B")}) == 2


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_runs_whose_clocks_differ_follow_each_other(backend: str, tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json") as timeline:
        loop = AgentLoop(on_event=timeline)
        for seconds in (5, 3):
            name, options = virtual_clock(backend)
            anyio.run(loop.run_single, "nap", nap, seconds, backend=name, backend_options=options)

        for _ in range(2):
            anyio.run(loop.run_single, "real", nap, 0, backend=backend)

    drawn = slices(records(tmp_path / "run.json"))
    assert [end - begin for _, name, begin, end, _ in drawn if name == "nap"] == pytest.approx([5e6, 3e6])
    begins = [begin for _, _, begin, _, _ in drawn]
    assert begins == sorted(begins)
    assert drawn[0][2] == 0
    # Trio's clocks begin at a random number of hours.
    assert drawn[-1][3] < 60e6


def test_time_never_goes_back(tmp_path: Path) -> None:
    agent = Invocation("agent", nap)
    with Timeline(tmp_path / "run.json") as timeline:
        timeline(LimitEvent(1, at=100))
        timeline(QueuedEvent(agent, id=1, at=101))
        # As of an input in a sequence, which is pulled later than its batch began, and of a run torn down.
        timeline(QueuedEvent(agent, id=2, at=99))
        timeline(LimitEvent(1, at=7))
        timeline(QueuedEvent(agent, id=3, at=8))
        for number in (1, 2, 3):
            timeline(StartedEvent(agent, id=number, at=9))
            timeline(ResultEvent(agent, InvocationResult("agent", Status.SUCCESS), id=number, at=10))

    found = records(tmp_path / "run.json")
    assert [record["ts"] for record in of(found, "C", "limit")] == [0, 1e6]
    assert [begin for _, _, begin, _, _ in slices(found)] == [3e6, 4e6, 4e6]


# --- the file


def feed(sink: Callable[[Event], object], count: int, at: float = 0.0) -> None:
    for number in range(count):
        agent = Invocation(f"agent-{number}", nap)
        sink(QueuedEvent(agent, id=number, at=at))
        sink(StartedEvent(agent, id=number, at=at))
        sink(ResultEvent(agent, InvocationResult(agent.agent_id, Status.SUCCESS), id=number, at=at))
        at += 1


def test_file_is_readable_whenever_it_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with Timeline(path) as timeline:
        timeline.flush()
        assert len(records(path)) == 1
        feed(timeline, 2)
        timeline.flush()
        assert len(of(records(path), "E")) == 2
        feed(timeline, 1)

    assert path.read_text().endswith("}\n]\n")
    assert len(of(records(path), "E")) == 3


def test_much_is_written_at_once_and_memory_does_not_grow(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json", flush_seconds=3600) as timeline:
        feed(timeline, 2000)
        assert len(of(records(tmp_path / "run.json"), "E")) > 1500
        assert len(timeline._buffer) < 1 << 16
        assert not timeline._groups["agentloop"].open

    assert len(of(records(tmp_path / "run.json"), "E")) == 2000


def test_hostile_names_and_errors_are_kept_as_they_are_or_shortened(tmp_path: Path) -> None:
    class Rude(Exception):
        def __str__(self) -> str:
            raise RuntimeError

        @property
        def response(self) -> object:
            raise RuntimeError

    names = ['"},]\n', "\ud800", "\N{SNOWMAN}", "x" * 10_000]
    errors = [Rude(), OSError('"\n]'), ValueError("y" * 10_000), KeyError()]
    with Timeline(tmp_path / "run.json") as timeline:
        for number, (name, error) in enumerate(zip(names, errors, strict=True)):
            agent = Invocation(name, nap)
            timeline(QueuedEvent(agent, id=number))
            timeline(StartedEvent(agent, id=number))
            timeline(RetryEvent(agent, 1, error, Verdict(VerdictKind.OVERLOAD), 1.0, id=number, at=1))
            result = InvocationResult[Any](name, Status.ERROR, exception=error)
            timeline(ResultEvent(agent, result, id=number, at=1.5))

        timeline(StopEvent("z" * 10_000))

    found = records(tmp_path / "run.json")
    shown = [record["name"] for record in of(found, "B")]
    assert shown[:3] == names[:3]
    assert shown[3] == "x" * 497 + "..."
    assert [len(record["args"]["error"]) for record in of(found, "E")] == [4, 12, 500, 8]
    assert [record["args"]["reason"] for record in of(found, "E")] == [
        "Rude",
        "OSError",
        "ValueError",
        "KeyError",
    ]
    assert len(of(found, "i", "batch stopped")[0]["args"]["reason"]) == 500
    # The backoff was cut short.
    assert {end - begin for kind, _, begin, end in waits(found)} == {0.5e6}


def test_errors_whose_attributes_raise_whatever_they_like_are_drawn(tmp_path: Path) -> None:
    class NamelessType(type):
        @property
        def __name__(cls) -> str:
            raise ValueError

    def refuse(*_: object) -> Any:
        raise asyncio.CancelledError

    hostile = {name: property(refuse) for name in ("response", "status_code", "__class__")}
    error = NamelessType("Hostile", (Exception,), {**hostile, "__str__": refuse})()
    with Timeline(tmp_path / "run.json") as timeline:
        agent = Invocation("a", nap)
        timeline(QueuedEvent(agent))
        timeline(StartedEvent(agent))
        timeline(RetryEvent(agent, 1, error, Verdict(VerdictKind.TRANSIENT), 1.0, at=1))
        result = InvocationResult[Any]("a", Status.ERROR, exception=error)
        timeline(ResultEvent(agent, result, at=1.5))

    assert {
        (record["args"]["reason"], record["args"]["error"])
        for record in of(records(tmp_path / "run.json"), "E")
    } == {("Hostile", "Hostile")}


def test_interrupt_while_an_attribute_is_read_leaves_the_sink(tmp_path: Path) -> None:
    class Interrupted(Exception):
        @property
        def response(self) -> Any:
            raise KeyboardInterrupt

    with Timeline(tmp_path / "run.json") as timeline:
        agent = Invocation("a", nap)
        timeline(QueuedEvent(agent))
        timeline(StartedEvent(agent))
        result = InvocationResult[Any]("a", Status.ERROR, exception=Interrupted())
        with pytest.raises(KeyboardInterrupt):
            timeline(ResultEvent(agent, result, at=1.5))


def test_event_of_a_later_version_is_ignored(tmp_path: Path) -> None:
    class LaterEvent:
        """It does not even say when it was."""

    with Timeline(tmp_path / "plain.json") as plain, Timeline(tmp_path / "later.json") as later:
        agent: Invocation[Any] = Invocation("a", nap)
        events: list[Event] = [
            LimitEvent(1),
            QueuedEvent(agent, 1),
            StartedEvent(agent, 1, 1, 1.0),
            ResultEvent(agent, InvocationResult("a", Status.SUCCESS), 1, 2.0),
        ]
        unknown: Any = LaterEvent()
        for event in events:
            plain(event)
            later(unknown)
            later(event)

    def told(name: str) -> list[Record]:
        return [record for record in records(tmp_path / name) if record.get("name") != "process_labels"]

    assert told("later.json") == told("plain.json")


def test_closing_again_does_nothing_and_events_are_then_refused(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "run.json")
    timeline.close()
    timeline.close()
    timeline.flush()
    assert repr(timeline).endswith(" closed>")
    with pytest.raises(ValueError, match="has been closed; close it when its loops have ended"):
        timeline(LimitEvent(1))

    with pytest.raises(ValueError, match="has been closed"):
        timeline.named("late")

    assert len(records(tmp_path / "run.json")) == 1


def test_path_that_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Timeline(tmp_path / "no" / "run.json")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_harms_no_run_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> list[InvocationResult[float]]:
        return await AgentLoop(on_event=timeline).run_all(Invocation.map(nap, [0] * 2000))

    timeline = Timeline("/dev/full", flush_seconds=3600)
    assert all(result.success for result in anyio.run(run))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert len(timeline._buffer) < 1 << 16
    with pytest.raises(OSError, match="No space left"):
        timeline.close()

    timeline.close()


class Disk(io.FileIO):
    """A file on a disk that has room up to there, and takes a part of what does not fit."""

    room = 1 << 30

    def write(self, data: Any) -> int:
        count = min(len(data), self.room - self.tell())
        if count <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

        return super().write(bytes(data[:count]))


def on_disk(path: Path, room: int, flush_seconds: float = 3600) -> tuple[Timeline, Disk]:
    timeline, disk = Timeline(path, flush_seconds=flush_seconds), Disk(path, "w")
    disk.room = room
    with timeline._lock:
        timeline._file.close()
        timeline._file, timeline._size = disk, 0

    return timeline, disk


@pytest.mark.parametrize("room", [1 << 30, 5000, 1000, 1, 0])
def test_disk_that_is_full_for_a_while_loses_whole_records_alone(room: int, tmp_path: Path) -> None:
    timeline, disk = on_disk(tmp_path / "run.json", room)
    for _ in range(3):
        feed(timeline, 20)
        with suppress(OSError):
            timeline.flush()

        if disk.tell():
            records(tmp_path / "run.json")

    disk.room = 1 << 30
    feed(timeline, 1)
    timeline.close()
    found = json.loads((tmp_path / "run.json").read_text())
    assert found[-1]["ph"] == "C"
    assert of(found, "E")
    assert (len(of(found, "E")) == 61) is (room == 1 << 30)


def test_bracket_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    timeline, disk = on_disk(tmp_path / "run.json", 1 << 30)
    feed(timeline, 10)
    timeline.flush()
    disk.room = disk.tell() + 1
    with pytest.raises(OSError, match="No space left"):
        timeline.close()

    assert len(of(records(tmp_path / "run.json"), "E")) == 10


def test_flushing_goes_on_when_there_is_room_again_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timeline, disk = on_disk(tmp_path / "run.json", 0, flush_seconds=0.001)
    for _ in range(2):
        feed(timeline, 1)
        wait_until(lambda: not timeline._buffer)

    wait_until(lambda: bool(caplog.records))
    disk.room = 1 << 30
    feed(timeline, 2)
    wait_until(lambda: disk.tell() > 0)
    timeline.close()
    assert of(json.loads((tmp_path / "run.json").read_text()), "E")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "cannot be written, so a part of it is lost" in caplog.records[0].message


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_several_threads_flush_at_once(tmp_path: Path) -> None:
    with Timeline(tmp_path / "run.json", flush_seconds=0.0001) as timeline:
        threads = [
            threading.Thread(target=feed, args=(timeline.named(name), 300)) for name in ("one", "other")
        ]
        for thread in threads:
            thread.start()

        for thread in threads:
            thread.join()

    assert len(of(records(tmp_path / "run.json"), "E")) == 600


HANGS = """
import sys, anyio
from agentloop import AgentLoop, Invocation
from agentloop.contrib.timeline import Timeline

async def hang():
    await anyio.sleep_forever()

async def main():
    loop = AgentLoop(on_event=Timeline(sys.argv[1], flush_seconds=0.01))
    await loop.run_all(Invocation(f"agent-{n}", hang) for n in range(3))

anyio.run(main, backend=sys.argv[2])
"""


@pytest.mark.long
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_file_of_a_killed_process_tells_what_was_running(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with subprocess.Popen([sys.executable, "-c", HANGS, path, backend], cwd=ROOT) as process:
        try:
            while process.poll() is None:
                if path.exists() and path.stat().st_size and len(of(records(path), "B")) == 3:
                    break
        finally:
            process.kill()

    found = records(path)
    assert process.returncode == -9 or sys.platform == "win32"
    assert [record["name"] for record in of(found, "B")] == ["agent-0", "agent-1", "agent-2"]
    assert not path.read_text().rstrip().endswith("]")

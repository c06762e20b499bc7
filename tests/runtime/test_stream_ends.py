"""How a stream ends: by every path, and also where it belongs to an entered loop."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import nullcontext
from typing import Any

import anyio
import pytest
from agents import (
    backends,
    count,
    entered_or_not,
    make_loop,
    one_a_second,
    read,
    run_scheduled,
    run_stream,
    stray_cancellation,
    within,
)
from anyio.lowlevel import checkpoint
from audit import assert_quiet, leak_audit, open_generators

from agentloop import AgentLoop, AgentStream, Invocation, InvocationCancelled, LoopClosed, ResultEvent, Status
from agentloop._stream.channel import BUFFER, PATIENCE_SECONDS
from agentloop._stream.stream_attempt import ADVANCES, CLOSE_SECONDS
from agentloop.testing import Chunks, FakeAgent, Stall


class Agent:
    """An agent that says what became of it."""

    def __init__(self) -> None:
        self.story: list[str] = []

    async def numbers(self) -> AsyncGenerator[int]:
        try:
            for i in range(100):
                yield i
        finally:
            await self.close()

    async def number(self) -> AsyncGenerator[int]:
        try:
            yield 0
            await anyio.sleep_forever()
        finally:
            await self.close()

    async def close(self) -> None:
        self.story.append("closed")


class ClosesSlowly(Agent):
    async def close(self) -> None:
        await anyio.sleep(2)
        await super().close()


class RefusesToClose(Agent):
    async def close(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await super().close()


class ShieldsItsClosing(Agent):
    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(2 * CLOSE_SECONDS)

        await super().close()


class FailsToClose(Agent):
    async def close(self) -> None:
        await super().close()
        raise OSError("cleanup")


class YieldsWhileItCloses(Agent):
    async def numbers(self) -> AsyncGenerator[int]:
        try:
            for i in range(100):
                yield i
        finally:
            try:
                yield -1
            finally:
                self.story.append("closed")


# -- generators that take their time, or do not want to


@entered_or_not
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["leave", "raise", "cancel"])
@pytest.mark.parametrize(
    ("kind", "yields", "seconds", "cause"),
    [
        (ClosesSlowly, "numbers", 2, None),
        (RefusesToClose, "numbers", CLOSE_SECONDS, TimeoutError),
        (YieldsWhileItCloses, "numbers", 0, RuntimeError),
        (ShieldsItsClosing, "numbers", 2 * CLOSE_SECONDS, None),
        (ShieldsItsClosing, "number", 2 * CLOSE_SECONDS, None),
        (FailsToClose, "numbers", 0, OSError),
        (FailsToClose, "number", 0, OSError),
    ],
)
async def test_block_ends_when_the_generator_is_closed(
    kind: Any, yields: str, seconds: float, cause: Any, how: str, nested: bool, entered: bool
) -> None:
    agent = kind()
    loop = make_loop(max_concurrency=1, timeout_seconds=None)
    stream = loop.run_streaming("a", getattr(agent, yields))
    took = []

    async def read() -> None:
        start = anyio.current_time()
        try:
            async with stream:
                assert await anext(stream) == 0
                await anyio.sleep(1)
                if how == "raise":
                    raise ValueError("body")

                if how == "cancel":
                    await anyio.sleep_forever()
        finally:
            took.append(anyio.current_time() - start)
            assert agent.story == ["closed"]

    async with within(loop, entered):
        with anyio.move_on_after(1 if how == "cancel" else None) as scope:
            with pytest.raises(ValueError, match="body") if how == "raise" else nullcontext():
                if nested:
                    (await loop.run_single("reader", read)).unwrap()
                else:
                    await read()

        assert scope.cancelled_caught == (how == "cancel")

    assert took == [pytest.approx(1 + seconds)]
    result = stream.result
    assert result.status is Status.CANCELLED
    assert isinstance(result.exception, InvocationCancelled)
    assert str(result.exception) == "the block that reads the stream was left" or nested
    cause_text = "the agent's generator took longer than 5s to close"
    assert type(result.exception.__cause__) is (cause or type(None))
    assert cause is not TimeoutError or str(result.exception.__cause__) == cause_text
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == (2 if nested and how == "cancel" else 1)
    assert loop.metrics.snapshot().counts[Status.ERROR] == (1 if nested and how == "raise" else 0)


async def test_generator_that_yields_for_ever_instead_of_closing_is_given_up() -> None:
    advanced = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal advanced
        try:
            for i in range(100):
                yield i
        finally:
            while advanced < 50:
                advanced += 1
                yield -1

    known = open_generators()
    async with make_loop().run_streaming("a", agent) as stream:
        await anyio.wait_all_tasks_blocked()

    assert (advanced, stream.result.status) == (1 + ADVANCES, Status.CANCELLED)
    assert stream.result.exception is not None
    assert isinstance(stream.result.exception.__cause__, RuntimeError)
    for generator in open_generators() - known:
        # What nobody can close is the test's own to exhaust.
        with pytest.raises(GeneratorExit):
            while True:
                await anext(generator)


async def test_stray_cancellation_while_a_generator_is_closed_is_no_refusal_to_close() -> None:
    stray = await stray_cancellation()

    class Chunks:
        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> int:
            raise StopAsyncIteration

        async def aclose(self) -> None:
            raise stray

    _, error, result = await run_stream(make_loop(), Chunks)
    assert isinstance(error, InvocationCancelled)
    assert "cancelled from within" in str(error)
    assert error.__cause__ is stray
    assert result.status is Status.CANCELLED


async def test_idleness_after_another_time_out_changes_nothing() -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 1
        with anyio.CancelScope(shield=True):
            await anyio.sleep(10)

        await checkpoint()

    chunks, error, result = await run_stream(make_loop(timeout_seconds=2, idle_timeout_seconds=5), agent)
    assert (chunks, str(error), result.status) == ([1], "Timeout after 2s", Status.TIMEOUT)


async def test_agent_that_catches_its_cancellation_has_ended_well() -> None:
    async def agent() -> AsyncGenerator[int]:
        yield 0
        try:
            await anyio.sleep_forever()
        except BaseException:
            pass

    async with make_loop().run_streaming("a", agent) as stream:
        await anyio.sleep(1)

    assert stream.result.status is Status.SUCCESS


async def test_agent_that_catches_its_cancellation_and_yields_on_is_closed() -> None:
    closed = False

    async def agent() -> AsyncGenerator[int]:
        nonlocal closed
        try:
            while True:
                try:
                    await anyio.sleep_forever()
                except BaseException:
                    yield 1
        finally:
            closed = True

    with anyio.fail_after(50):
        async with make_loop().run_streaming("a", agent) as stream:
            await anyio.sleep(1)

    assert closed
    assert stream.result.status is Status.CANCELLED


@entered_or_not
@pytest.mark.parametrize(("size", "status"), [(BUFFER - 1, Status.SUCCESS), (BUFFER, Status.CANCELLED)])
async def test_result_that_was_ready_is_not_thrown_away_by_leaving(
    size: int, status: Status, entered: bool
) -> None:
    loop = make_loop()
    async with within(loop, entered):
        async with loop.run_streaming("a", count, size) as stream:
            await anyio.wait_all_tasks_blocked()

        assert stream.result.status is status
        assert stream.result.chunks == size


@entered_or_not
async def test_chunks_that_were_not_read_are_dropped_with_the_block(entered: bool) -> None:
    class Chunk:
        pass

    async def agent() -> AsyncGenerator[Chunk]:
        for _ in range(5):
            yield Chunk()

    loop = make_loop()
    async with within(loop, entered):
        async with loop.run_streaming("a", agent) as stream:
            await anyio.wait_all_tasks_blocked()

        gc.collect()
        assert not any(isinstance(thing, Chunk) for thing in gc.get_objects())
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


@entered_or_not
async def test_stream_that_was_left_does_not_look_complete(entered: bool) -> None:
    loop = make_loop()
    async with within(loop, entered):
        async with loop.run_streaming("a", count, 50) as stream:
            await anext(stream)

        for _ in range(2):
            with pytest.raises(InvocationCancelled, match="the block that reads the stream was left"):
                await anext(stream)


# -- in an entered loop


async def test_stream_belongs_to_the_loop_and_not_to_the_task_that_reads() -> None:
    async with make_loop() as loop:
        stream = await loop.run_streaming("a", count, 50).__aenter__()
        chunks: list[int] = []

        async def read(number: int) -> None:
            for _ in range(number):
                chunks.append(await anext(stream))

        for number in (10, 20):
            async with anyio.create_task_group() as group:
                group.start_soon(read, number)

        async with anyio.create_task_group() as group:
            group.start_soon(stream.__aexit__, None, None, None)

        assert (chunks, stream.result.status) == (list(range(30)), Status.CANCELLED)


@pytest.mark.parametrize("order", ["first in, first out", "last in, first out", "random"])
async def test_streams_are_closed_in_any_order(order: str) -> None:
    rng = random.Random(7)
    async with make_loop(max_concurrency=20) as loop:
        streams = [await loop.run_streaming("a", count, 50).__aenter__() for _ in range(20)]
        for stream in streams:
            for i in range(rng.randrange(10)):
                assert await anext(stream) == i

        if order == "random":
            rng.shuffle(streams)
        elif order == "last in, first out":
            streams.reverse()

        for stream in streams:
            await stream.__aexit__(None, None, None)
            assert stream.result.status is Status.CANCELLED

        assert loop.statistics().running == 0


@pytest.mark.parametrize("how", ["closed", "closed by another task", "dropped", "dropped in a cycle", "kept"])
async def test_async_generator_that_reads_a_stream_can_be_abandoned(how: str) -> None:
    cleaned = 0

    async def agent() -> AsyncGenerator[int]:
        nonlocal cleaned
        try:
            for i in range(100):
                await checkpoint()
                yield i
        finally:
            cleaned += 1

    async def read(kept: Any = None) -> AsyncIterator[int]:
        async with loop.run_streaming("a", agent) as stream:
            async for chunk in stream:
                yield chunk

    loop = make_loop()
    generator: Any = None
    with anyio.fail_after(50):
        async with loop:
            cycle: list[Any] = []
            generator = read(cycle)
            cycle.append(generator if how == "dropped in a cycle" else None)
            assert [await anext(generator) for _ in range(3)] == [0, 1, 2]
            if how == "closed":
                await generator.aclose()
            elif how == "closed by another task":
                async with anyio.create_task_group() as group:
                    group.start_soon(generator.aclose)
            elif how != "kept":
                asyncio_only = anyio.get_cancelled_exc_class() is asyncio.CancelledError
                with pytest.warns(ResourceWarning) if not asyncio_only else nullcontext():
                    del generator, cycle
                    gc.collect()
                    await anyio.wait_all_tasks_blocked()

            if how != "kept":
                assert cleaned == 1
                assert loop.statistics().running == 0

    assert cleaned == 1
    if how == "kept":
        with pytest.raises(InvocationCancelled, match="the stream was not read"):
            while True:
                await anext(generator)


async def test_leaving_the_loop_waits_for_a_reader_that_goes_on() -> None:
    chunks: list[int] = []

    async def read() -> None:
        async with loop.run_streaming("a", count, 50) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                await anyio.sleep(PATIENCE_SECONDS - 1)

    loop = make_loop()
    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(read)
            await anyio.sleep(1)

    assert chunks == list(range(50))


async def test_leaving_the_loop_waits_for_an_agent_that_is_not_too_far_ahead() -> None:
    async with make_loop() as loop:
        stream = await loop.run_streaming("a", one_a_second, BUFFER - 1).__aenter__()

    assert stream.result.status is Status.SUCCESS
    assert [chunk async for chunk in stream] == list(range(BUFFER - 1))
    await stream.__aexit__(None, None, None)


async def test_leaving_the_loop_ends_what_nobody_reads() -> None:
    loop = make_loop()
    async with loop:
        stream = await loop.run_streaming("a", count, 50).__aenter__()
        await anyio.sleep(1)
        start = anyio.current_time()

    assert anyio.current_time() - start == pytest.approx(PATIENCE_SECONDS)
    assert stream.result.status is Status.CANCELLED
    assert stream.result.error is not None
    assert "the loop was left, and the stream was not read" in stream.result.error
    assert [await anext(stream) for _ in range(BUFFER)] == list(range(BUFFER))
    for _ in range(2):
        with pytest.raises(InvocationCancelled, match="the loop was left, and the stream was not read"):
            await anext(stream)

    await stream.__aexit__(None, None, None)
    assert loop.metrics.snapshot().counts[Status.CANCELLED] == 1


async def test_leaving_the_loop_ends_what_nobody_reads_any_more() -> None:
    loop = make_loop()
    async with anyio.create_task_group() as group:
        async with loop:
            stream = await loop.run_streaming("a", count, 100).__aenter__()

            async def read() -> None:
                for _ in range(20):
                    await anyio.sleep(2)
                    await anext(stream)

            group.start_soon(read)
            start = anyio.current_time()

    # Its patience is counted anew whenever something was taken, and looked at when it has passed.
    assert 40 + PATIENCE_SECONDS <= anyio.current_time() - start <= 40 + 2 * PATIENCE_SECONDS
    assert stream.result.status is Status.CANCELLED
    await stream.__aexit__(None, None, None)


async def test_patience_with_a_reader_is_not_about_what_other_streams_produce() -> None:
    async def late() -> AsyncGenerator[int]:
        # Takes the place of what was just read, at the moment before patience ends.
        await anyio.sleep(PATIENCE_SECONDS - 1)
        yield 1
        await anyio.sleep(1)

    results: list[Any] = []

    async def read() -> None:
        inputs = [Invocation("many", count, (40,)), Invocation("late", late)]
        async with loop.stream_all(inputs) as events:
            await anyio.sleep(2)
            async for event in events:
                if isinstance(event, ResultEvent):
                    results.append(event.result.status)

                await anyio.sleep(3)

    loop = make_loop()
    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(read)
            await anyio.wait_all_tasks_blocked()

    assert results == [Status.SUCCESS] * 2


async def test_stream_that_an_agent_opened_and_left_behind_keeps_no_loop_open() -> None:
    loop = make_loop()

    async def opener() -> AgentStream[int]:
        return await loop.run_streaming("b", count, 50).__aenter__()

    with anyio.fail_after(50):
        async with loop:
            stream = (await loop.run_single("a", opener)).unwrap()
            await anyio.sleep(1)

    assert stream.result.status is Status.CANCELLED
    await stream.__aexit__(None, None, None)


async def test_leaving_the_loop_is_patient_with_a_reader_that_is_an_agent() -> None:
    loop = make_loop(max_concurrency=1)
    chunks: list[int] = []

    async def agent() -> None:
        async with loop.run_streaming("child", count, 50) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                if chunk == 2:
                    await anyio.sleep(100)

    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(loop.run_single, "a", agent)
            await anyio.sleep(1)

    assert chunks == list(range(50))


async def test_leaving_the_loop_by_an_exception_cancels_its_streams() -> None:
    loop = make_loop(max_concurrency=2)
    streams = [loop.run_streaming(name, one_a_second, 100) for name in "abc"]
    errors: list[Any] = []

    async def go(stream: AgentStream[int]) -> None:
        async with stream:
            errors.append((await read(stream))[1])

    error = KeyError("body")
    async with anyio.create_task_group() as group:
        with pytest.raises(KeyError) as caught:
            async with loop:
                for stream in streams:
                    group.start_soon(go, stream)

                await anyio.sleep(1.5)
                raise error

        assert caught.value is error

    assert [type(each) for each in errors] == [InvocationCancelled] * 3
    assert all("the loop was left by KeyError" in str(each) for each in errors)
    # For one of them there was no slot.
    statuses = sorted(stream.result.status for stream in streams)
    assert statuses == [Status.CANCELLED, Status.CANCELLED, Status.SKIPPED]


async def test_cancelling_the_loop_cancels_its_streams() -> None:
    loop = make_loop()
    errors: list[Any] = []

    async def go() -> None:
        _, error, result = await run_stream(loop, one_a_second, 100)
        errors.append((type(error), "cancelled" in str(error), result.status))

    async with anyio.create_task_group() as group:
        with anyio.move_on_after(3) as scope:
            async with loop:
                group.start_soon(go)
                await anyio.sleep_forever()

        assert scope.cancelled_caught

    assert errors == [(InvocationCancelled, True, Status.CANCELLED)]


async def test_streams_are_refused_once_the_loop_was_left() -> None:
    loop = make_loop()
    async with loop:
        stream = loop.run_streaming("a", count, 5)
        events = loop.stream_all(Invocation.map(count, [5]))

    for refused in (stream, events):
        with pytest.raises(LoopClosed, match="has been left"):
            await refused.__aenter__()

    # It was not begun, so it may be entered where it is not refused.
    async with loop, stream:
        assert [chunk async for chunk in stream] == list(range(5))


async def test_agent_that_runs_while_the_loop_is_left_may_still_stream() -> None:
    loop = make_loop(max_concurrency=1)
    streams: list[Any] = []

    async def agent() -> None:
        await anyio.sleep(5)
        streams.append(await run_stream(loop, count, 50))

    async with anyio.create_task_group() as group:
        async with loop:
            group.start_soon(loop.run_single, "a", agent)
            await anyio.sleep(1)

    assert streams[0][0] == list(range(50))


async def test_idle_stream_of_an_entered_loop_is_timed_out_and_leaves_no_watch() -> None:
    agent = FakeAgent(Chunks([1], then=Stall()))
    known = open_generators()
    async with make_loop(idle_timeout_seconds=100) as loop:
        for _ in range(3):
            async with loop.run_streaming("a", agent) as stream:
                await anext(stream)

            await assert_quiet(known)

        async with loop.with_config(idle_timeout_seconds=2).run_streaming("a", agent) as stream:
            await anyio.sleep(5)

        assert stream.result.status is Status.TIMEOUT


# -- very many


async def consume(loop: AgentLoop, rng: random.Random, entered: bool) -> Status:
    """Open a stream and abandon it at a random point, in a random way."""
    length = rng.randrange(2 * BUFFER)
    fails = rng.random() < 0.2
    waits = rng.choice([None, checkpoint, checkpoint, lambda: anyio.sleep(0.01)])

    async def agent() -> AsyncGenerator[int]:
        for i in range(length):
            if waits is not None:
                await waits()

            yield i

        if fails:
            raise OSError

    stream = loop.run_streaming("a", agent)
    # Only what belongs to an entered loop can be left by another task, or by nobody.
    how = rng.choice(["break", "raise", "cancel", "close", "drop"][: 5 if entered else 3])
    reads = rng.randrange(length + 2)
    if how == "drop":
        # Nobody leaves the block; the loop closes the stream when it is left itself.
        await stream.__aenter__()
        return Status.CANCELLED

    with anyio.CancelScope() as scope:
        try:
            if how == "close":
                await stream.__aenter__()
                async with anyio.create_task_group() as group:
                    for i in range(min(reads, length)):
                        assert await anext(stream) == i

                    group.start_soon(stream.__aexit__, None, None, None)

                return stream.result.status

            async with stream:
                for i in range(reads):
                    assert await anext(stream) == i

                if how == "raise":
                    raise KeyError

                if how == "cancel":
                    scope.cancel()
                    await checkpoint()
        except (KeyError, OSError, StopAsyncIteration):
            pass

    return stream.result.status


@pytest.mark.long
@backends
@entered_or_not
def test_thousands_of_abandoned_streams_leave_nothing(backend: Any, entered: bool) -> None:
    number = 1000
    rng = random.Random(entered)
    statuses: list[Status] = []

    async def worker(loop: AgentLoop, times: int) -> None:
        for _ in range(times):
            statuses.append(await consume(loop, rng, entered))

    async def main() -> None:
        loop = make_loop(max_concurrency=1000, timeout_seconds=None)
        for _ in range(5):
            async with within(loop, entered), anyio.create_task_group() as group:
                for _ in range(10):
                    group.start_soon(worker, loop, number // 50)

            now = loop.statistics()
            assert (now.running, now.waiting) == (0, 0)
            await assert_quiet()

        assert sum(loop.metrics.snapshot().counts.values()) == number

    with leak_audit():
        run_scheduled(backend, None, main)

    assert len(statuses) == number
    assert {Status.SUCCESS, Status.ERROR, Status.CANCELLED} <= set(statuses)

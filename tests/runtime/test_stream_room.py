"""stream_all: how far many streams get ahead of their reader, and when each of them goes on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
from agents import count, count_at_once, make_loop, one_a_second
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from agentloop import BatchStopped, ChunkEvent, Invocation, ResultEvent, Status
from agentloop._stream.channel import BUFFER, LOW, PATIENCE_SECONDS, STARVED_SECONDS, TURN, Channel
from agentloop.testing import Chunks, FakeAgent, FakeHTTPError, virtual_clock

MANY = 100


class Source:
    """An agent that counts what it has produced in all its calls."""

    def __init__(self, agent: Callable[[int], AsyncIterator[int]]) -> None:
        self.agent = agent
        self.produced = 0

    async def __call__(self, upto: int) -> AsyncIterator[int]:
        async with aclosing(self.agent(upto)) as chunks:
            async for i in chunks:
                self.produced += 1
                yield i


each_count = pytest.mark.parametrize("agent", [count, count_at_once, one_a_second])
each_quick_one = pytest.mark.parametrize("agent", [count, count_at_once])


async def count_chunks(agent: Callable[[int], Any], streams: int, size: int) -> int:
    """Read to the end as fast as the agents are."""
    async with make_loop(max_concurrency=streams).stream_all(
        Invocation.map(agent, [size] * streams)
    ) as events:
        return sum([isinstance(event, ChunkEvent) async for event in events])


# -- how far ahead


@pytest.mark.parametrize("streams", [4, 10, 200])
@each_count
async def test_streams_are_less_than_two_buffers_ahead_however_many_there_are(
    agent: Any, streams: int
) -> None:
    source, taken = Source(agent), 0
    inputs = Invocation.map(source, [100 if streams < 10 else 20] * streams)
    async with make_loop(max_concurrency=streams).stream_all(inputs) as events:
        await anyio.sleep(100)
        assert BUFFER <= source.produced < 2 * BUFFER
        for _ in range(100):
            taken += isinstance(await anext(events), ChunkEvent)
            await anyio.wait_all_tasks_blocked()
            # Each may have one that it produced before it found the buffer full.
            assert source.produced - taken <= min(BUFFER + streams, 2 * BUFFER - 1)
            await anyio.sleep(2)


async def test_reader_that_is_faster_than_a_checkpoint_holds_streams_back() -> None:
    source, taken = Source(count), 0
    inputs = Invocation.map(source, [20] * 200)
    async with make_loop(max_concurrency=200).stream_all(inputs) as events:
        async for event in events:
            taken += isinstance(event, ChunkEvent)
            assert source.produced - taken < 2 * BUFFER

    assert taken == 4000


async def test_streams_that_have_no_room_have_not_begun() -> None:
    loop = make_loop(max_concurrency=200)
    async with loop.stream_all(Invocation.map(count_at_once, [20] * 200)) as events:
        await anyio.sleep(100)
        assert loop.statistics().running == 1
        assert isinstance(await anext(events), ChunkEvent)

    assert loop.metrics.snapshot().counts == {**dict.fromkeys(Status, 0), Status.CANCELLED: 1}


async def test_streams_are_two_chunks_ahead_each_when_a_starved_reader_stops() -> None:
    source, taken, streams = Source(one_a_second), 0, 50
    inputs = Invocation.map(source, [1000] * streams)
    async with make_loop(max_concurrency=streams).stream_all(inputs) as events:
        async for _ in events:
            taken += 1
            if taken == 5 * streams:
                break

        await anyio.sleep(100)
        assert streams < source.produced - taken <= 2 * streams
        # From now on the reader is the slower side.
        async for _ in events:
            taken += 1
            await anyio.sleep(1)
            if taken > 7 * streams:
                assert source.produced - taken < 2 * BUFFER

            if taken == 10 * streams:
                break


# -- wake-ups


@each_quick_one
async def test_wakeups_for_each_chunk_do_not_grow_with_the_number_of_streams(
    agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = timers = 0
    wait: Callable[[Any], Awaitable[None]] = vars(Channel)["wait_for_room"]
    move_on_after = anyio.move_on_after

    async def counted_wait(channel: Channel[Any]) -> None:
        nonlocal waits
        waits += 1
        await wait(channel)

    def counted_timer(seconds: float) -> anyio.CancelScope:
        nonlocal timers
        timers += 1
        return move_on_after(seconds)

    monkeypatch.setattr(Channel, "wait_for_room", counted_wait)
    monkeypatch.setattr(anyio, "move_on_after", counted_timer)
    for streams in (BUFFER, BUFFER + 1, 10 * BUFFER):
        waits = timers = 0
        chunks = await count_chunks(agent, streams, 24)
        assert chunks == streams * 24
        # Each waits once a turn, and again when it has found the buffer full.
        assert waits < chunks * 4 / TURN
        assert timers < chunks * 2 / TURN


# -- a starved reader


@pytest.mark.parametrize("streams", [BUFFER, BUFFER + 1, 10 * BUFFER])
async def test_reader_that_waits_lets_all_streams_wait_for_their_models_at_once(streams: int) -> None:
    start = anyio.current_time()
    assert await count_chunks(one_a_second, streams, 9) == 9 * streams
    late = 0 if streams <= BUFFER else STARVED_SECONDS
    assert anyio.current_time() - start == pytest.approx(9 + late, abs=1e-6)


async def test_reader_that_pauses_costs_streams_a_moment_and_no_more() -> None:
    start, taken = anyio.current_time(), 0
    inputs = Invocation.map(one_a_second, [20] * MANY)
    async with make_loop(max_concurrency=MANY).stream_all(inputs) as events:
        async for event in events:
            taken += isinstance(event, ChunkEvent)
            if taken in (3 * MANY, 10 * MANY):
                await anyio.sleep(100)

    # A stream may have two chunks ready when the reader comes back.
    assert anyio.current_time() - start == pytest.approx(220, abs=4.1)


async def test_stream_joins_the_line_while_the_reader_waits() -> None:
    slow, quick = (FakeAgent(Chunks([1], after_seconds=seconds)) for seconds in (100, 0))
    inputs = [*[Invocation("a", slow)] * BUFFER, Invocation("b", quick)]
    async with make_loop(max_concurrency=BUFFER + 1).stream_all(inputs) as events:
        order = [event.index async for event in events if isinstance(event, ChunkEvent)]

    assert (order[0], sorted(order)) == (BUFFER, list(range(BUFFER + 1)))


# -- fairness


@pytest.mark.long
@each_count
async def test_every_stream_gets_on(agent: Any) -> None:
    seen: Counter[int] = Counter()
    async with make_loop(max_concurrency=MANY).stream_all(Invocation.map(agent, [10**6] * MANY)) as events:
        for _ in range(20_000):
            event = await anext(events)
            assert isinstance(event, ChunkEvent)
            seen[event.index] += 1

    assert len(seen) == MANY
    assert min(seen.values()) > 50


# -- the line itself


class Line:
    """A channel, and tasks that wait in its line and then keep the room that they got."""

    def __init__(self, group: TaskGroup) -> None:
        self.channel: Channel[int] = Channel()
        self.went_on: list[int] = []
        self.group = group

    def fill(self) -> None:
        while self.channel.send(0) is False:
            pass

    async def take(self, count: int) -> None:
        for _ in range(count):
            await self.channel.receive()

    async def join(self, *numbers: int) -> None:
        for number in numbers:
            self.group.start_soon(self._wait, number, name=f"producer {number}")
            await anyio.wait_all_tasks_blocked()

    async def _wait(self, number: int) -> None:
        self.channel.enter()
        try:
            await self.channel.wait_for_room()
            self.went_on.append(number)
            await anyio.sleep_forever()
        finally:
            self.channel.leave()

    def close(self) -> None:
        self.group.cancel_scope.cancel()
        self.channel.close()
        self.channel.drop()

    def count_room(self) -> int:
        """Count the producers that may begin now, and let them begin."""
        count = 0
        while self.channel.has_room(lambda: None):
            self.channel.enter()
            count += 1

        return count


@asynccontextmanager
async def open_line(full: bool = True) -> AsyncIterator[Line]:
    async with anyio.create_task_group() as group:
        line = Line(group)
        if full:
            line.fill()

        yield line
        line.close()


async def test_first_in_line_go_on_once_the_buffer_is_low() -> None:
    async with open_line() as line:
        await line.join(*range(20))
        await line.take(BUFFER - LOW - 1)
        await anyio.wait_all_tasks_blocked()
        assert line.went_on == []
        await line.take(1)
        await anyio.wait_all_tasks_blocked()
        assert sorted(line.went_on) == list(range(BUFFER - LOW))
        await line.take(LOW)
        await anyio.wait_all_tasks_blocked()
        assert sorted(line.went_on) == list(range(BUFFER))


async def test_all_in_line_go_on_when_the_reader_has_waited_for_those_that_advance() -> None:
    async with open_line() as line:
        await line.take(BUFFER)
        # They have room, and yield nothing.
        assert line.count_room() == BUFFER
        start = anyio.current_time()
        with anyio.move_on_after(9):
            line.group.start_soon(line.join, *range(20))
            await line.channel.receive()

        assert sorted(line.went_on) == list(range(20))
        assert anyio.current_time() - start == pytest.approx(9)
        # From then on none waits, until there is an item for each.
        assert not any(line.channel.send(0, TURN) for _ in range(BUFFER + 20 - 1))
        assert line.channel.send(0)


async def test_one_that_is_to_begin_goes_second() -> None:
    async with open_line() as line:
        await line.join(*range(20))
        told: list[int] = []
        for _ in range(2):
            assert not line.channel.has_room(lambda: told.append(len(line.went_on)))

        await line.take(BUFFER - LOW)
        assert len(told) == 1
        await anyio.wait_all_tasks_blocked()
        assert len(line.went_on) == BUFFER - LOW - 1
        assert line.count_room() == 1


async def cancel_by_scope(number: int, scope: anyio.CancelScope) -> None:
    del number
    scope.cancel()


async def cancel_natively(number: int, scope: anyio.CancelScope) -> None:
    del scope
    (task,) = (task for task in asyncio.all_tasks() if task.get_name() == f"producer {number}")
    task.cancel()


async def check_cancellation(goes_on: bool, cancel: Callable[[int, anyio.CancelScope], Any]) -> None:
    async with open_line(full=False) as line:
        group = line.group
        for number in range(2 * BUFFER):
            line.fill()
            async with anyio.create_task_group() as inner:
                line.group = inner
                await line.join(number)
                if goes_on:
                    # It is woken, and has not run.
                    await line.take(BUFFER)

                await cancel(number, inner.cancel_scope)

            await line.take(0 if goes_on else BUFFER)

        assert line.count_room() == BUFFER
        line.group = group


@pytest.mark.parametrize("goes_on", [False, True])
async def test_producer_that_is_cancelled_in_line_keeps_no_room(goes_on: bool) -> None:
    await check_cancellation(goes_on, cancel_by_scope)


@pytest.mark.parametrize("anyio_backend", [virtual_clock("asyncio")])
@pytest.mark.parametrize("goes_on", [False, True])
async def test_producer_that_is_cancelled_natively_in_line_keeps_no_room(goes_on: bool) -> None:
    await check_cancellation(goes_on, cancel_natively)


async def test_room_of_a_producer_that_ends_is_for_the_first_in_line() -> None:
    async with open_line(full=False) as line:
        for _ in range(BUFFER):
            line.channel.enter()

        await line.join(*range(3))
        for expected in ([0], [0, 1]):
            line.channel.leave()
            await anyio.wait_all_tasks_blocked()
            assert line.went_on == expected


async def test_abandoned_channel_lets_all_go_on() -> None:
    async with open_line() as line:
        await line.join(*range(40))
        assert not line.channel.has_room(lambda: None)
        line.channel.abandon()
        await line.join(40)
        assert sorted(line.went_on) == list(range(41))
        assert line.channel.has_room(lambda: None)


async def test_hurried_producers_keep_their_places() -> None:
    stalls: list[float] = []
    async with open_line() as line:
        await line.join(*range(20))
        start = anyio.current_time()
        line.channel.limit_patience(lambda: stalls.append(anyio.current_time() - start))
        await anyio.sleep(PATIENCE_SECONDS - 1)
        # It makes no room, and shows that there is a reader.
        await line.take(1)
        await anyio.sleep(PATIENCE_SECONDS)
        await line.take(BUFFER - LOW - 1)
        await anyio.wait_all_tasks_blocked()
        assert (sorted(line.went_on), stalls) == (list(range(BUFFER - LOW)), [])
        await anyio.sleep(2 * PATIENCE_SECONDS)
        # Those that still wait.
        assert len(stalls) == 20 - (BUFFER - LOW)
        assert stalls == [pytest.approx(3 * PATIENCE_SECONDS)] * len(stalls)


# -- ends


@each_quick_one
async def test_total_time_of_streams_in_line_passes(agent: Any) -> None:
    loop = make_loop(max_concurrency=MANY, total_timeout_seconds=20)
    async with loop.stream_all(Invocation.map(agent, [50] * MANY)) as events:
        await anyio.sleep(50)
        statuses = [event.result.status async for event in events if isinstance(event, ResultEvent)]

    # Some had begun when the reader paused. The others began when it went on.
    assert len(statuses) == MANY
    assert 0 < statuses.count(Status.TIMEOUT) < BUFFER
    assert statuses.count(Status.SUCCESS) == MANY - statuses.count(Status.TIMEOUT)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["leave", "cancel", "fatal", "loop"])
async def test_streams_that_wait_for_room_can_be_ended(how: str, asynchronous: bool) -> None:
    opened = closed = 0
    seen: list[Any] = []

    async def agent(x: int) -> AsyncGenerator[int]:
        nonlocal opened, closed
        opened += 1
        try:
            for i in range(50):
                await checkpoint()
                yield i

            if how == "fatal":
                raise FakeHTTPError(401)
        finally:
            closed += 1

    async def read(scope: anyio.CancelScope) -> None:
        inputs = Invocation.map(agent, numbers() if asynchronous else range(1000))
        with scope, suppress(BatchStopped):
            async with loop.stream_all(inputs) as events:
                await anyio.sleep(3)
                if how == "cancel":
                    scope.cancel()
                elif how in ("fatal", "loop"):
                    async for event in events:
                        seen.append(event)

    async def numbers() -> AsyncGenerator[int]:
        for number in range(1000):
            yield number

    loop = make_loop(max_concurrency=MANY)
    with anyio.fail_after(50):
        async with anyio.create_task_group() as group:
            async with loop:
                group.start_soon(read, anyio.CancelScope())
                await anyio.sleep(5 if how != "loop" else 1)

    assert 0 < opened == closed < MANY
    results = sum(isinstance(event, ResultEvent) for event in seen)
    assert opened <= results <= opened + 1 if how in ("fatal", "loop") else not results
    assert len(seen) == 50 * opened + results if how == "fatal" else True

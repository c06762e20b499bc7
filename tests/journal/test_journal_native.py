"""A journal on asyncio whose tasks are cancelled natively, by ``Task.cancel()``, while the disk is slow."""

import asyncio
import gc
import sqlite3
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from agents import both_verbs, make_loop
from asking import Asker, night, rows, run

from agentloop import AgentLoop, Invocation, InvocationCancelled
from agentloop.journal import Journal


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def path(path: Path) -> Path:
    await night(path, [])
    return path


@asynccontextmanager
async def slow_disk(path: Path) -> AsyncIterator[None]:
    """Let nobody write a file in the block."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def writers() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "agentloop journal"]


async def let_run() -> None:
    await asyncio.sleep(0.1)


async def cancel_twice(task: asyncio.Task[object]) -> None:
    for _ in range(2):
        await let_run()
        await let_run()
        task.cancel()


async def test_opening_that_is_cancelled_waits_and_closes_the_file(path: Path) -> None:
    async with slow_disk(path):
        task = asyncio.create_task(night(path, []))
        await cancel_twice(task)
        await let_run()
        assert not task.done()

    with pytest.raises(asyncio.CancelledError):
        await task

    await night(path, [])


async def test_commit_goes_on_when_all_tasks_are_cancelled(path: Path) -> None:
    """An agent may cancel all tasks that it does not know; the writer is one of them, and goes on."""
    async with Journal(path) as journal:
        async with slow_disk(path):
            task = asyncio.create_task(AgentLoop().run_all(Asker().inputs("ab"), journal=journal))
            await let_run()
            for writer in writers():
                writer.cancel()

            await let_run()
            assert not task.done()

        assert [result.output for result in await task] == [{"answer": "a"}, {"answer": "b"}]

    assert len(rows(path)) == 2


@both_verbs
async def test_slow_disk_stops_new_starts(verb: str, path: Path) -> None:
    """As many results as the limit wait for the disk and do not count as live, and then as many that do."""
    asker = Asker()
    async with Journal(path) as journal:
        async with slow_disk(path):
            inputs, loop = asker.inputs(range(50)), make_loop(max_concurrency=2)
            task = asyncio.create_task(run(verb, loop, inputs, journal))
            while len(asker.calls) < 4:
                await let_run()

            await let_run()
            assert len(asker.calls) == 4

        assert len(await task) == 50


@pytest.mark.parametrize("count", [2, 2500], ids=["few", "more than fit into a commit"])
async def test_batch_cancelled_twice_leaves_its_results_to_the_journal(count: int, path: Path) -> None:
    asker, loop = Asker(), make_loop(max_concurrency=3000)
    async with Journal(path) as journal:
        async with slow_disk(path):
            task = asyncio.create_task(loop.run_all(asker.inputs(range(count)), journal=journal))
            while len(asker.ended) < count:
                await let_run()

            await cancel_twice(task)
            with pytest.raises(asyncio.CancelledError):
                await task

            assert rows(path) == []

    assert len(rows(path)) == count


async def test_cancelled_end_of_the_block_delivers_its_results(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task has ended before it could write."""
    monkeypatch.setattr("agentloop.journal._writer.LINGER_SECONDS", 100)
    asker, loop = Asker(), AgentLoop()
    opened = asyncio.Event()
    journal = Journal(path)

    async def hold() -> None:
        async with journal:
            opened.set()
            while not asker.ended:
                await let_run()

    async def read() -> object:
        inputs = [Invocation("a", asker.ask, ("a",)), Invocation("never", asyncio.Event().wait, key=1)]
        async with loop.as_completed(inputs, journal=journal) as done:
            return (await anext(done)).output

    task = asyncio.create_task(hold())
    await opened.wait()
    async with slow_disk(path):
        reader = asyncio.create_task(read())
        while not asker.ended:
            await let_run()

        await cancel_twice(task)
        await let_run()
        assert not task.done()

    with pytest.raises(asyncio.CancelledError):
        await task

    assert await asyncio.wait_for(reader, 10) == {"answer": "a"}
    assert len(rows(path)) == 1


async def test_writer_that_is_cancelled_before_it_begins_ends_the_block(path: Path) -> None:
    with pytest.raises(InvocationCancelled, match="one of its own tasks was cancelled from outside"):
        async with Journal(path):
            for task in writers():
                task.cancel()

            await asyncio.sleep(10)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its coroutine was never awaited
        gc.collect()

    await night(path, [])

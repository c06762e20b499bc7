"""A scheduler and workers that were started by hand, with Dask's own commands, and processes that stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import remote_agents as there

from agentloop import AgentLoop, Backoff, Invocation, LoopConfig, VerdictKind, classify
from agentloop._signs import is_sign_of_outage
from agentloop.contrib.dask import WorkerLost, Workers, _engine

DASK = Path(sys.executable).with_name("dask")
HERE = Path(__file__).parent


@pytest.fixture
def anyio_backend() -> str:
    """One event loop is enough: Dask, which finds and loses processes, runs in a thread of its own."""
    return "trio"


@contextmanager
def dask(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    path = os.pathsep.join([str(HERE), *sys.path])
    # To measure what others test takes these as long again.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    with subprocess.Popen(
        [DASK, *command],
        env={**kept, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Cluster:
    """A scheduler without workers."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._stack = stack
        self.scheduler = stack.enter_context(
            dask("scheduler", "--no-dashboard", "--host=127.0.0.1", "--port=0", f"--scheduler-file={path}")
        )
        began = time.monotonic()
        while not path.exists() or not path.read_text():
            assert time.monotonic() < began + 20
            time.sleep(0.02)

        self.address: str = json.loads(path.read_text())["address"]

    def add(self) -> subprocess.Popen[bytes]:
        """Start a worker, which no nanny starts again."""
        options = ("--no-nanny", "--no-dashboard", "--nthreads=1", "--host=127.0.0.1")
        return self._stack.enter_context(dask("worker", self.address, *options))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(tmp_path_factory.mktemp("dask") / "scheduler.json", stack)


async def wait_until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.sleep(0.02)


async def test_workers_of_a_cluster_join_and_leave(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WorkerLost, match=r"there has been no worker process for 0\.5 s"):
        async with Workers(address=cluster.address, patience_seconds=0.5):
            raise AssertionError("there is no worker")

    first = cluster.add()
    async with Workers(address=cluster.address) as workers:
        call = workers.remote(there.square)
        assert (await call(2))[1] == first.pid

        # Another version, as far as this process knows.
        with monkeypatch.context() as patch:
            patch.setattr(_engine, "versions", lambda: {"Python": "2.7"})
            with pytest.raises(RuntimeError, match=rf"Python 3\.{sys.version_info[1]} there and 2\.7 here"):
                async with Workers(address=cluster.address):
                    raise AssertionError("the worker is refused")

            patch.setattr(_engine, "AgentActor", there.BrokenActor)
            with pytest.raises(RuntimeError, match="cannot be used: No such backend: curio"):
                async with Workers(address=cluster.address):
                    raise AssertionError("the worker is refused")

            caplog.clear()
            second = cluster.add()
            await wait_until(lambda: "cannot be used" in caplog.text)

        third = cluster.add()
        await wait_until(lambda: workers.statistics().processes == 2)
        results = await AgentLoop().run_all(Invocation.map(call, range(20)))
        assert {result.unwrap()[1] for result in results} == {first.pid, third.pid}

    for process in (first, second, third):
        process.kill()


async def test_calls_wait_for_a_process_and_not_for_ever(cluster: Cluster) -> None:
    process = cluster.add()
    async with (
        # The process takes as long as it takes to come.
        Workers(address=cluster.address),
        Workers(address=cluster.address, patience_seconds=1) as workers,
    ):
        call = workers.remote(there.square)
        await call(1)
        process.kill()
        await wait_until(lambda: not workers.statistics().processes)
        assert workers.statistics().lost == 1
        with pytest.raises(WorkerLost, match="there has been no worker process for 1 s") as caught:
            await call(2)

        # It is an outage, which a batch waits for.
        assert classify(caught.value).kind is VerdictKind.TRANSIENT
        assert is_sign_of_outage(caught.value)

        result: list[Any] = []

        async def go_on() -> None:
            loop = AgentLoop(LoopConfig(max_retries=50, backoff=Backoff(initial_seconds=0.1)))
            result.append(await loop.run_single("a", call, 3))

        async with anyio.create_task_group() as group:
            group.start_soon(go_on)
            process = cluster.add()

        assert result[0].unwrap() == [9, process.pid]

    process.kill()


async def test_scheduler_that_is_not_there_is_an_error() -> None:
    with pytest.raises(OSError, match="1"):
        async with Workers(address="tcp://127.0.0.1:1", patience_seconds=0.2):
            raise AssertionError("there is no scheduler")


async def test_stopped_process_costs_time_outs_and_no_results(workers: Workers) -> None:
    config = LoopConfig(max_concurrency=10, timeout_seconds=0.5, max_retries=9, backoff=Backoff(0.01))
    remote = workers.remote(there.square)
    pids = {result.unwrap()[1] for result in await AgentLoop().run_all(Invocation.map(remote, range(10)))}
    assert len(pids) == 2
    os.kill(min(pids), signal.SIGSTOP)
    try:
        with anyio.fail_after(30):
            results = await AgentLoop(config).run_all(Invocation.map(remote, range(50)))
    finally:
        os.kill(min(pids), signal.SIGCONT)

    assert [result.unwrap() for result in results] == [[x * x, max(pids)] for x in range(50)]
    assert any(result.retries for result in results)
    # It has heard by now that they were cancelled.
    await wait_until(lambda: not sum(workers.statistics().calls.values()))


async def test_process_that_the_scheduler_does_not_know_any_more_is_given_up(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, client = workers.statistics().lost, workers._engine._client

    async def nobody() -> dict[str, int]:
        return {}

    async def fail() -> dict[str, int]:
        raise OSError("the scheduler does not answer")

    path = tmp_path / "held"
    async with anyio.create_task_group() as group:
        group.start_soon(workers.remote(there.hold), str(path))
        await wait_until(path.exists)
        monkeypatch.setattr(client, "nthreads", fail)
        await anyio.sleep(0.5)
        assert workers.statistics().lost == before
        monkeypatch.setattr(client, "nthreads", nobody)
        await wait_until(lambda: workers.statistics().lost == before + 2)
        # Its actor was closed, although the process is alive, so that nothing runs twice there.
        await wait_until(lambda: path.read_text() == "cancelled")
        monkeypatch.undo()
        await wait_until(lambda: path.read_text() == "begun")
        group.cancel_scope.cancel()

    await wait_until(lambda: workers.statistics().processes == 2)

"""The virtual clock: it jumps when nothing can run, waits for what is real, and reports deadlocks."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import trio.testing
from agents import backends, launch, raised_by, run_scheduled

from agentloop._errors import AgentLoopError
from agentloop.testing import VirtualClockDeadlock, virtual_clock


def run(main: Callable[[], Awaitable[Any]], backend: Any, seed: int | None = None) -> Any:
    return run_scheduled(backend, seed, main)


@backends
def test_each_call_gives_fresh_options_for_a_known_backend(backend: Any) -> None:
    assert virtual_clock(backend)[0] == backend
    assert virtual_clock(backend)[1] is not virtual_clock(backend)[1]
    with pytest.raises(ValueError, match='backend must be "asyncio" or "trio", got \'curio\''):
        virtual_clock("curio")


# --- time


@backends
def test_clock_starts_at_1000_and_hours_take_no_time(backend: Any) -> None:
    async def main() -> list[float]:
        times = [anyio.current_time()]
        for hours in (1, 10, 1000):
            await anyio.sleep(hours * 3600)
            times.append(anyio.current_time())

        return times

    started = time.monotonic()
    assert run(main, backend) == [1000, 1000 + 3600, 1000 + 11 * 3600, 1000 + 1011 * 3600]
    assert time.monotonic() - started < 5


@pytest.fixture
async def start() -> float:
    return anyio.current_time()


async def test_clock_stands_still_while_tasks_are_running(start: float) -> None:
    for _ in range(100):
        await anyio.lowlevel.checkpoint()
        time.sleep(0.0001)

    assert anyio.current_time() == start


async def test_timers_fire_in_the_order_of_their_times_and_in_a_far_future_too(start: float) -> None:
    woken = []

    async def sleeper(seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append((seconds, anyio.current_time() - start))

    async with anyio.create_task_group() as tg:
        for seconds in (5, 0.5, 4000, 3, 0.25, 86400 * 3):
            tg.start_soon(sleeper, seconds)

    assert woken == [(s, s) for s in (0.25, 0.5, 3, 5, 4000, 86400 * 3)]
    start = anyio.current_time()
    for _ in range(3):
        await anyio.sleep(1e8)
        await anyio.sleep(0.001)

    assert anyio.current_time() == pytest.approx(start + 3e8 + 0.003, abs=1e-6)


async def test_deadlines_follow_the_virtual_clock(start: float) -> None:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(600):
            await anyio.sleep_forever()

    with anyio.move_on_after(60) as scope:
        await anyio.sleep(59)

    assert not scope.cancelled_caught
    assert anyio.current_time() == start + 659


async def test_waiting_until_all_tasks_are_blocked_takes_no_time_and_can_be_given_up(start: float) -> None:
    seen = []

    async def sleeper() -> None:
        await anyio.sleep(0.01)
        seen.append("sleeper")

    async def busy() -> None:
        for _ in range(20):
            await anyio.lowlevel.checkpoint()

        seen.append("busy")

    async with anyio.create_task_group() as tg:
        tg.start_soon(sleeper)
        await launch(tg, busy)
        seen.append(f"blocked at {anyio.current_time() - start:g}")

    assert seen == ["busy", "blocked at 0", "sleeper"]
    async with anyio.create_task_group() as tg:
        tg.start_soon(busy)
        tg.start_soon(anyio.wait_all_tasks_blocked)
        for _ in range(2):
            await anyio.lowlevel.checkpoint()

        tg.cancel_scope.cancel()

    await anyio.sleep(1)


# --- what is real


async def test_clock_waits_for_a_worker_thread_and_not_for_an_idle_one(start: float) -> None:
    with anyio.fail_after(1):
        assert await anyio.to_thread.run_sync(lambda: time.sleep(0.1) or "done") == "done"

    assert anyio.current_time() == start
    await anyio.sleep(5)
    await anyio.to_thread.run_sync(int)
    assert anyio.current_time() == start + 5


async def test_clock_goes_on_for_a_worker_thread_that_waits_for_a_task(start: float) -> None:
    def work() -> float:
        anyio.from_thread.run(anyio.sleep, 5)
        return anyio.from_thread.run_sync(anyio.current_time)

    with anyio.fail_after(6):
        seen = await anyio.to_thread.run_sync(work)

    assert (seen, anyio.current_time()) == (start + 5, start + 5)


def test_clock_waits_for_the_executors_of_asyncio() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(1):
            await asyncio.to_thread(time.sleep, 0.05)
            with ThreadPoolExecutor(1) as pool:
                await loop.run_in_executor(pool, time.sleep, 0.05)

        # left running: closing the loop joins it, since Python 3.12 under a time limit of 300 seconds
        started = threading.Event()
        left = loop.run_in_executor(None, lambda: started.set() or time.sleep(0.1))
        while not started.is_set():
            await asyncio.sleep(0)

        left.cancel()
        return loop.time()

    assert run(main, "asyncio") == 1000


async def test_what_can_be_read_at_once_comes_before_a_timer() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.send(b"x")
        with anyio.fail_after(1):
            await anyio.wait_readable(left)


# --- no false alarm


async def test_waiting_for_a_worker_thread_is_no_deadlock() -> None:
    assert await anyio.to_thread.run_sync(lambda: time.sleep(0.1) or "done") == "done"


async def test_waiting_for_the_slot_of_an_abandoned_thread_is_no_deadlock() -> None:
    limiter = anyio.CapacityLimiter(1)
    started = threading.Event()

    def work() -> None:
        started.set()
        time.sleep(0.1)

    async with anyio.create_task_group() as tg:
        tg.start_soon(lambda: anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter))
        await anyio.to_thread.run_sync(started.wait)
        tg.cancel_scope.cancel()

    await anyio.to_thread.run_sync(int, limiter=limiter)


async def test_waiting_for_a_plain_thread_is_no_deadlock() -> None:
    event = anyio.Event()
    token = anyio.lowlevel.current_token()
    timer = threading.Timer(0.1, anyio.from_thread.run_sync, [event.set], {"token": token})
    timer.start()
    await event.wait()
    timer.join()


@backends
@pytest.mark.parametrize("of_anyio", [False, True])
def test_thread_that_ends_without_waking_anyone_leaves_a_deadlock(backend: Any, of_anyio: bool) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tg:
            if of_anyio:
                # It cannot be interrupted, and delays what is reported.
                tg.start_soon(anyio.to_thread.run_sync, time.sleep, 0.1)
            else:
                threading.Thread(target=time.sleep, args=[0.1]).start()

            await wait_for_what_never_comes()

    started = time.monotonic()
    with pytest.raises(VirtualClockDeadlock):
        run(main, backend)

    assert time.monotonic() - started >= 0.1


@backends
def test_waiting_for_a_socket_is_no_deadlock(backend: Any) -> None:
    left, right = socket.socketpair()
    timer = threading.Timer(0.1, right.send, [b"x"])
    # Started before the run, so only the socket speaks against a deadlock.
    timer.start()
    with left, right:
        run(lambda: anyio.wait_readable(left), backend)

    timer.join()


async def test_waiting_for_a_process_is_no_deadlock() -> None:
    command = ["sleep", "0.1"]
    await anyio.run_process(command)
    async with await anyio.open_process(command, stdout=None, stderr=None) as process:
        assert await process.wait() == 0


@backends
def test_waiting_for_a_signal_is_no_deadlock(backend: Any) -> None:
    timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGUSR1])

    async def main() -> int:
        with anyio.open_signal_receiver(signal.SIGUSR1) as signals:
            async for number in signals:
                return number

        raise AssertionError

    timer.start()
    assert run(main, backend) == signal.SIGUSR1
    timer.join()


@backends
def test_loop_in_a_thread_of_its_own_waits_for_the_thread_that_started_it(backend: Any) -> None:
    name, options = virtual_clock(backend)
    with anyio.from_thread.start_blocking_portal(name, options) as portal:
        time.sleep(0.05)
        assert portal.call(anyio.current_time) == 1000
        portal.call(anyio.sleep, 3600)
        assert portal.call(anyio.current_time) == 4600


# --- deadlock


async def wait_for_what_never_comes() -> None:
    await anyio.Event().wait()


@backends
def test_blocked_main_task_is_a_deadlock(backend: Any) -> None:
    steps = []

    async def main() -> None:
        await anyio.sleep(1)
        try:
            await wait_for_what_never_comes()
        finally:
            steps.append("finally")

    with pytest.raises(VirtualClockDeadlock) as caught:
        run(main, backend)

    assert isinstance(caught.value, AgentLoopError)
    assert isinstance(caught.value, RuntimeError)
    assert VirtualClockDeadlock.__module__ == "agentloop.testing"
    line = wait_for_what_never_comes.__code__.co_firstlineno + 1
    assert f"{__file__}:{line} wait_for_what_never_comes" in str(caught.value)
    assert "main waits at" in str(caught.value)
    assert steps == ["finally"]


@backends
def test_sleeping_forever_is_a_deadlock(backend: Any) -> None:
    with pytest.raises(VirtualClockDeadlock, match=r"sleep_forever waits at .*(sleep|_real_async_yield)$"):
        run(anyio.sleep_forever, backend)


@backends
def test_blocked_children_are_a_deadlock_that_names_ten_of_them(backend: Any) -> None:
    finished = []

    async def child(number: int) -> None:
        try:
            await wait_for_what_never_comes()
        finally:
            finished.append(number)

    async def main() -> None:
        await anyio.to_thread.run_sync(int)
        async with anyio.create_task_group() as tg:
            for number in range(12):
                tg.start_soon(child, number, name=f"child {number // 2}")

    with pytest.raises(VirtualClockDeadlock) as caught:
        run(main, backend)

    assert str(caught.value).count(" waits at ") == 10
    assert "child 3 waits at" in str(caught.value)
    assert "and 3 more" in str(caught.value)
    assert sorted(finished) == list(range(12))


@backends
def test_main_task_that_swallows_the_deadlock_does_not_hide_it(backend: Any) -> None:
    async def main() -> str:
        # Nor does the default executor, which is idle.
        if backend == "asyncio":
            await asyncio.to_thread(int)

        await anyio.to_thread.run_sync(int)
        await raised_by(wait_for_what_never_comes)
        return "all is well"

    with pytest.raises(VirtualClockDeadlock):
        run(main, backend)


@backends
def test_shielded_wait_in_the_cleanup_does_not_hang(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def child() -> None:
        with anyio.CancelScope(shield=True):
            await wait_for_what_never_comes()

    async def main() -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(child)

    with pytest.raises(VirtualClockDeadlock) as caught:
        run(main, backend)

    if backend == "trio":
        # trio unwinds by the error itself, asyncio by cancelling all the tasks of the closing loop
        assert isinstance(caught.value.__context__, ExceptionGroup)


# --- order


def trace(backend: Any, seed: int | None) -> tuple[str, ...]:
    """Run four tasks that meet at checkpoints, a lock, a cancellation and a timer."""
    steps: list[str] = []

    async def worker(name: str, lock: anyio.Lock) -> None:
        for step in range(3):
            await anyio.lowlevel.checkpoint()
            async with lock:
                steps.append(f"{name}{step}")

        await anyio.sleep(1)
        steps.append(f"{name}+")

    async def sleeper(name: str) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            steps.append(f"{name}!")

    async def main() -> None:
        lock = anyio.Lock()
        async with anyio.create_task_group() as tg:
            for name in "abcd":
                tg.start_soon(worker, name, lock)

        async with anyio.create_task_group() as tg:
            for name in "efgh":
                tg.start_soon(sleeper, name)

            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()

    run_scheduled(backend, seed, main)
    return tuple(steps)


TRACES = [(backend, seed) for backend in ("asyncio", "trio") for seed in range(10)]


@backends
def test_same_seed_gives_the_same_run(backend: Any) -> None:
    for seed in range(30):
        assert trace(backend, seed) == trace(backend, seed)


@pytest.mark.long
def test_same_seed_gives_the_same_run_in_another_process() -> None:
    hypothesis_is_there = trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING
    code = f"""
import sys, trio._core._run
sys.path[:] = {sys.path!r}
trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = {hypothesis_is_there}
from test_virtual_clock import TRACES, trace
print([trace(*each) for each in TRACES])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert output == f"{[trace(*each) for each in TRACES]}\n"


@pytest.mark.long
@backends
@pytest.mark.parametrize("shuffled_by_trio", [False, True])
def test_seeds_give_different_runs(
    backend: Any, shuffled_by_trio: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", shuffled_by_trio)
    assert len({trace(backend, seed) for seed in range(200)}) > 190


@pytest.mark.long
@backends
def test_cancellation_order_depends_on_the_seed(backend: Any) -> None:
    assert len({trace(backend, seed)[-4:] for seed in range(200)}) == 24


def test_without_a_seed_asyncio_keeps_its_order() -> None:
    assert len({trace("asyncio", None)[:-4] for _ in range(5)}) == 1
    assert trace("asyncio", None)[:4] == ("a0", "b0", "c0", "d0")


def test_shuffling_leaves_other_callbacks_of_asyncio_in_place() -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        seen: list[Any] = []

        async def task(number: int) -> None:
            seen.append("task")

        victim = loop.create_future()
        waiting = asyncio.ensure_future(asyncio.wait_for(victim, None))
        await asyncio.sleep(0)
        tasks = []
        for number in range(10):
            loop.call_soon(seen.append, number)
            tasks.append(loop.create_task(task(number)))

        loop.call_soon(waiting.cancel)
        await asyncio.wait([*tasks, waiting])
        return seen

    for seed in range(10):
        assert run(main, "asyncio", seed) == [x for n in range(10) for x in (n, "task")]


def test_trio_tosses_its_own_coin_again_after_a_seeded_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # which the pytest plugins of others may have replaced by a shuffle
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", False)

    def order() -> tuple[int, ...]:
        seen = []

        async def child(number: int) -> None:
            seen.append(number)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(child, number)

        trace("trio", 1)
        trio.run(main)
        return tuple(seen)

    assert {order() for _ in range(60)} == {(0, 1, 2), (2, 1, 0)}


@pytest.mark.parametrize(
    ("backend", "owner", "name"),
    [
        ("asyncio", "asyncio.events.Handle", "_callback"),
        ("trio", "trio._core._run", "_r"),
        ("trio", "trio._core._run.Runner", "runq"),
    ],
)
def test_scheduler_that_cannot_be_shuffled_is_refused_only_with_a_seed(
    backend: Any, owner: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(f"{owner}.{name}")
    virtual_clock(backend)
    with pytest.raises(RuntimeError, match=f"to have '{name}', which this version lacks"):
        virtual_clock(backend, seed=1)


# --- AnyIO's pytest plugin

PLUGIN_TESTS = """
    import time
    import anyio, pytest
    from agentloop.testing import virtual_clock

    @pytest.fixture(params=["asyncio", "trio"], scope="{scope}")
    def anyio_backend(request):
        return virtual_clock(request.param, seed={seed})

    @pytest.fixture
    async def opened(anyio_backend):
        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.sleep_forever)
            await anyio.sleep(10)
            yield "opened"
            await anyio.sleep(10)
            tg.cancel_scope.cancel()

    @pytest.fixture(scope="{scope}")
    async def shared(anyio_backend):
        yield await anyio.to_thread.run_sync(lambda: "shared")

    async def test_before(opened, shared):
        time.sleep(0.01)
        await anyio.sleep(3600)
        await anyio.to_thread.run_sync(time.sleep, 0.01)

    async def test_deadlock():
        try:
            await anyio.Event().wait()
        finally:
            print("unwound main")

    async def test_deadlock_in_a_child():
        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.sleep_forever)

    async def test_after(opened, shared):
        await anyio.sleep(3600)
        assert opened == "opened"
"""


@pytest.mark.long
def test_deadlocked_test_of_the_pytest_plugin_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    for scope, seed in (("function", 3), ("module", None)):
        text = textwrap.dedent(PLUGIN_TESTS.format(scope=scope, seed=seed))
        (tmp_path / f"test_{scope}.py").write_text(text)

    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "anyio_mode=auto"]
    result = subprocess.run(
        [*command, "-rA", "--tb=short", "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "300"},
    )
    outcomes = re.findall(
        r"^(PASSED|FAILED|ERROR) (?:\S*/)?(test_\S+)(?: - ([\w.]+).*)?$", result.stdout, re.MULTILINE
    )
    said = {name: (outcome, why) for outcome, name, why in outcomes}
    # On asyncio the deadlocked test still occupies the task in which the fixture of the module lives on.
    spoiled = {"test_module.py::test_after[asyncio]", "test_module.py::test_before[trio]"}
    for scope in ("function", "module"):
        for name in (f"test_{scope}.py::test_{{}}[{backend}]".format for backend in ("asyncio", "trio")):
            assert said[name("deadlock")] == ("FAILED", "agentloop.testing.VirtualClockDeadlock")
            assert said[name("deadlock_in_a_child")][1].endswith("VirtualClockDeadlock")
            for test in {name("before"), name("after")} - spoiled:
                assert said[test] == ("PASSED", "")

    assert result.stdout.count("unwound main\n") == 4

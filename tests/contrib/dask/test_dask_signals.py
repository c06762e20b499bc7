"""Signals to a process that has workers, and its death."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

# Processes of their own take long to start, and reach nothing that the other tests do not.
pytestmark = pytest.mark.long

DRIVER = Path(__file__).with_name("driver.py")
backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@contextmanager
def driver(path: Path, backend: str, count: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a batch in a process group of its own; give its process and those of its workers."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", DRIVER, path, backend, str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        try:
            yield process, pids
        finally:
            process.kill()


def wait_until_gone(pids: list[int]) -> None:
    began = time.monotonic()
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < began + 5, "a worker process is left behind"
        time.sleep(0.02)


def read(path: Path, suffix: str) -> list[int]:
    found = Path(f"{path}.{suffix}")
    return [int(line) for line in found.read_text().split()] if found.exists() else []


def recorded(path: Path) -> set[int]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT output FROM results WHERE status = 'success'")
        return {int(output.strip("[]").split(",")[0]) for (output,) in rows}


@backends
def test_ctrl_c_in_the_terminal_drains_the_batch_and_leaves_no_process(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "night.db"
    with driver(path, backend, 100_000) as (process, pids):
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=20)

    assert (process.returncode, out) == (-signal.SIGINT, "")
    wait_until_gone(pids)
    # What had begun has finished, and all of it is written.
    assert recorded(path) == {*read(path, "calls")}
    assert {*read(path, "delivered")} == {number for number in recorded(path) if number >= 0}


@pytest.mark.by_hand
def test_killed_driver_leaves_no_process_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path, count = tmp_path / "night.db", 300
    with driver(path, "asyncio", count) as (process, pids):
        time.sleep(0.3)
        process.kill()
        wait_until_gone(pids)

    with driver(path, "trio", count) as (process, pids):
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (0, "done\n", "")
    assert {*read(path, "delivered")} == {*range(count)}
    calls = Counter(read(path, "calls"))
    assert {*calls} == {*range(-20, count)}
    # What ran, and what had ended and was not written yet.
    assert sum(calls.values()) <= count + 20 + 100

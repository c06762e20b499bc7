"""The example of a batch in many processes, run as a user runs it."""

from __future__ import annotations

import os
import re
import signal
import time

import psutil
import pytest
from examples_run import every_backend, start

pytestmark = [pytest.mark.long, pytest.mark.by_hand]


@every_backend
def test_process_is_killed_and_nothing_is_lost(backend: str) -> None:
    with start("many_processes", "--count", "300", "--backend", backend, start_new_session=True) as process:
        out, err = process.communicate(timeout=60)

    assert process.returncode == 0, err
    rows = dict(re.findall(r"^  (\S.{13}) 300 of 300 right in ([\d.]+) s", out, re.MULTILINE))
    assert [name.strip() for name in rows] == ["this process", "2 processes", "with a kill"]
    assert "1 process lost" in out
    assert re.fullmatch(
        r"the worker process tcp://\S+ is lost, with \d+ calls, which are sent elsewhere\n", err
    )


# While the processes start, and while they work. Without -u, output stays in a buffer until a process starts.
@pytest.mark.parametrize(("backend", "lines", "seconds"), [("asyncio", 2, 0.3), ("trio", 4, 0.02)])
def test_ctrl_c_ends_all_processes_without_a_traceback(backend: str, lines: int, seconds: float) -> None:
    options = ("--count", "300", "--backend", backend)
    with start("many_processes", *options, flags=("-u", "-W", "error"), start_new_session=True) as process:
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()

        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)

    assert (process.returncode, err) == (130, "")
    # One of multiprocessing's own ends a moment after its parent.
    began = time.monotonic()
    while any(is_alive(one, process.pid) for one in psutil.process_iter()):
        assert time.monotonic() < began + 5, "a process is left behind"
        time.sleep(0.02)


def is_alive(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False

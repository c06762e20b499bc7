"""The virtual clock on trio: trio's mock clock, with a hook for when every task is blocked."""

import math
import threading
from collections import deque
from collections.abc import Iterator
from importlib import import_module
from random import Random
from typing import Any, NoReturn

import attrs
import outcome
import trio.testing

from agentloop.testing._deadlock import (
    POLL_SECONDS,
    START_SECONDS,
    Outside,
    VirtualClockDeadlock,
    deadlock,
    require,
    threads_served,
)

# trio has no public way to control its scheduler; a version that lacks these attributes is refused below.
_run: Any = import_module("trio._core._run")
_thread_cache: Any = import_module("trio._core._thread_cache")


def backend_options(seed: int | None) -> dict[str, Any]:
    require(trio.testing.MockClock, "_autojump")
    require(trio.lowlevel.Task, "_abort_func", "_attempt_abort", "_counter")
    require(_run.Runner, "main_task", "main_task_outcome", "tasks")
    if seed is not None:
        require(_run, "_r")
        require(_run.Runner, "runq")

    director = _Director(seed)
    return {"clock": director.clock, "instruments": [director]}


class _Director(trio.abc.Instrument):
    """Controls one run: shuffles its tasks, advances its clock, ends its deadlock."""

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else Random(seed)
        self._deadlock: VirtualClockDeadlock | None = None
        self.clock = trio.testing.MockClock(autojump_threshold=0)
        self.clock.jump(START_SECONDS)
        # The class is final, but trio looks its method up on the object. It calls the method when no task is
        # ready, there is no input, and no task is in wait_all_tasks_blocked().
        vars(self.clock)["_autojump"] = self._pass_idle_time

    def before_run(self) -> None:
        self._runner = _run.GLOBAL_RUN_CONTEXT.runner
        self._outside = Outside(_idle_threads)
        self._deadlock = None
        if self._random is not None:
            self._runner.runq = _ShuffledQueue(self._random)

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002  # trio's signature
        if self.clock.autojump_threshold:
            self.clock.autojump_threshold = 0

    def after_run(self) -> None:
        result = self._runner.main_task_outcome
        if self._random is not None:
            _run._r.seed()

        if self._deadlock is not None and getattr(result, "error", None) is not self._deadlock:
            # The error was wrapped in a group, replaced by an error of the cleanup, or swallowed.
            error = VirtualClockDeadlock(*self._deadlock.args)
            error.__context__ = getattr(result, "error", None)
            self._runner.main_task_outcome = outcome.Error(error)

        del self._runner

    def _pass_idle_time(self) -> None:
        statistics = trio.lowlevel.current_statistics()
        if self._threads_are_busy():
            self._wait()
        elif statistics.seconds_to_next_deadline < math.inf:
            self.clock.jump(statistics.seconds_to_next_deadline)
        elif _waits_for_io(statistics.io_statistics) or self._outside.can_wake():
            self._wait()
        else:
            self._end_deadlock()

    def _wait(self) -> None:
        """Sleep until a real event, for ``POLL_SECONDS`` at most, instead of polling at once."""
        self.clock.autojump_threshold = POLL_SECONDS

    def _tasks(self) -> list[Any]:
        tasks = sorted(self._runner.tasks, key=lambda task: task._counter)
        return [task for task in tasks if not task.name.startswith("<")]

    def _threads_are_busy(self) -> bool:
        busy = trio.testing.active_thread_count()
        return busy > 0 and busy > threads_served(task.coro for task in self._tasks())

    def _end_deadlock(self) -> None:
        """
        Unwind the run by an error in the main task, in the way of trio's ``KeyboardInterrupt``.

        If that task already has the error and waits for shielded tasks, these get it too.
        """
        tasks = self._tasks()
        error = deadlock((task.name, task.coro) for task in tasks)
        self._deadlock = self._deadlock or error

        def raise_error() -> NoReturn:
            raise error

        blocked = [task for task in tasks if task._abort_func is not None]
        for task in [self._runner.main_task] if self._runner.main_task in blocked else blocked:
            task._attempt_abort(raise_error)


def _waits_for_io(statistics: Any) -> bool:
    counts = [value for value in attrs.asdict(statistics).values() if isinstance(value, int)]
    # One wait is the run's own, by which threads and signals wake it.
    return sum(counts) > 1


def _idle_threads() -> Iterator[threading.Thread]:
    yield from (worker._thread for worker in list(_thread_cache.THREAD_CACHE._idle_workers))


class _ShuffledQueue(deque[Any]):
    """The tasks that are ready. trio runs them in the order in which they come out of an iteration."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random

    def __iter__(self) -> Iterator[Any]:
        # Cancellation is delivered in the order of a set, which differs from run to run.
        tasks = sorted(super().__iter__(), key=lambda task: task._counter)
        self._random.shuffle(tasks)
        if len(tasks) > 1:
            # After this, trio reverses the batch at random, or shuffles it again if Hypothesis is installed.
            _run._r.seed(self._random.getrandbits(64))

        return iter(tasks)

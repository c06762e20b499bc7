"""The virtual clock on asyncio: an event loop whose selector advances the time instead of sleeping."""

import asyncio
import math
import selectors
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextvars import Context
from functools import partial
from itertools import count, groupby
from random import Random
from typing import Any, TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary

from agentloop.testing._deadlock import (
    POLL_SECONDS,
    START_SECONDS,
    Outside,
    deadlock,
    require,
    threads_served,
)

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")


def backend_options(seed: int | None) -> dict[str, Any]:
    if seed is not None:
        require(asyncio.Handle, "_callback")

    return {"loop_factory": partial(_VirtualEventLoop, seed)}


class _VirtualSelector(selectors.DefaultSelector):
    """Lets the event loop advance its time whenever it would have to sleep."""

    loop: "_VirtualEventLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.loop.shuffle()
        events = super().select(0)
        if events or timeout == 0 or self.loop.pass_idle_time(timeout):
            return events

        return super().select(POLL_SECONDS)


class _VirtualEventLoop(asyncio.SelectorEventLoop):
    def __init__(self, seed: int | None) -> None:
        self._virtual_time = START_SECONDS
        self._outside: Outside | None = None
        self._executor_jobs = set[object]()
        self._waiting_until_blocked: list[tuple[asyncio.TimerHandle, Callable[[], object]]] = []
        self._random = None if seed is None else Random(seed)
        self._numbers = WeakKeyDictionary[asyncio.Task[Any], int]()
        self._next_number = count().__next__
        self._virtual_selector = _VirtualSelector()
        self._virtual_selector.loop = self
        super().__init__(self._virtual_selector)
        if seed is not None:
            require(self, "_ready")

    def time(self) -> float:
        return self._virtual_time

    def run_forever(self) -> None:
        self._outside = self._outside or Outside(self._idle_threads)
        super().run_forever()

    def call_at(
        self, when: float, callback: Callable[[*_Args], object], *args: *_Args, context: Context | None = None
    ) -> asyncio.TimerHandle:
        if when == math.inf:
            # A timer at infinity, as anyio.sleep_forever() sets, never fires: it ends no deadlock.
            return asyncio.TimerHandle(when, callback, args, self, context)

        return super().call_at(when, callback, *args, context=context)

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Args], object],
        *args: *_Args,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        sleeper = sys._getframe(1).f_back  # pyright: ignore[reportPrivateUsage]  # of asyncio.sleep()
        if sleeper is not None and sleeper.f_code.co_qualname == "AsyncIOBackend.wait_all_tasks_blocked":
            # AnyIO polls here by sleeping; it is woken instead, so that no virtual time passes.
            handle = asyncio.TimerHandle(self.time(), callback, args, self, context)
            self._waiting_until_blocked.append((handle, partial(callback, *args)))
            return handle

        return super().call_later(delay, callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Args], _T], *args: *_Args
    ) -> asyncio.Future[_T]:
        future = super().run_in_executor(executor, func, *args)
        self._executor_jobs.add(future)
        future.add_done_callback(self._executor_jobs.discard)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        # A thread joins those of the executor, with a time limit that a jump must not exceed.
        self._executor_jobs.add(self)
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._executor_jobs.discard(self)

    def pass_idle_time(self, timeout: float | None) -> bool:
        """
        Advance the time to the next timer.

        :param timeout: the seconds until then; ``None`` if there is no timer
        :return: ``False`` if the loop must wait for a real event
        :raises VirtualClockDeadlock: if no event can come
        """
        if self._waiting_until_blocked:
            waiting, self._waiting_until_blocked = self._waiting_until_blocked, []
            for handle, wake in waiting:
                if not handle.cancelled():
                    self.call_soon(wake)

            return True

        if self._threads_are_busy():
            return False

        if timeout is not None:
            self._virtual_time += timeout
            # asyncio also runs the timers of the next nanosecond, which is less than a float step here.
            if self._virtual_time + 1e-9 == self._virtual_time:
                self._virtual_time = math.nextafter(self._virtual_time, math.inf)

            return True

        # One file is the loop's own, by which threads and signals wake it.
        if len(self._virtual_selector.get_map()) > 1 or (self._outside and self._outside.can_wake()):
            return False

        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        raise deadlock((task.get_name(), task.get_coro()) for task in tasks)

    def _workers(self, idle: bool) -> Iterator[threading.Thread]:
        """Yield the idle worker threads of AnyIO on this loop, or the busy ones."""
        for thread in threading.enumerate():
            # This is exact: AnyIO's list of idle threads, on each of them, changes only within the loop.
            is_idle = thread in getattr(thread, "idle_workers", ())
            is_ours = getattr(thread, "loop", None) is self and not getattr(thread, "stopping", False)
            if is_ours and is_idle is idle:
                yield thread

    def _threads_are_busy(self) -> bool:
        busy = len(list(self._workers(idle=False)))
        if busy:
            busy -= threads_served(task.get_coro() for task in asyncio.all_tasks(self))

        return busy > 0 or bool(self._executor_jobs)

    def _idle_threads(self) -> Iterator[threading.Thread]:
        yield from self._workers(idle=True)
        # Threads of the default executor, whose work is tracked.
        yield from (thread for thread in threading.enumerate() if thread.name.startswith("asyncio_"))

    def shuffle(self) -> None:
        """
        Shuffle tasks that are about to run one after the other.

        No task passes another callback, which may be the delivery of a cancellation.
        """
        if self._random is None:
            return

        # Taken from the left and put back there, since other threads may append on the right meanwhile.
        ready: deque[Any] = vars(self)["_ready"]
        order: list[Any] = []
        for is_step, group in groupby([ready.popleft() for _ in range(len(ready))], _is_step):
            handles = list(group)
            if is_step:
                # Cancellation is delivered in the order of a set, which differs from run to run.
                handles.sort(key=self._number)
                self._random.shuffle(handles)

            order += handles

        ready.extendleft(reversed(order))

    def _number(self, handle: Any) -> int:
        return self._numbers.setdefault(handle._callback.__self__, self._next_number())


def _is_step(handle: Any) -> bool:
    """Whether this callback runs a step of a task."""
    owner: Any = getattr(handle._callback, "__self__", None)
    is_task = issubclass(type(owner), asyncio.Task)
    return is_task and getattr(handle._callback, "__name__", None) != "cancel"

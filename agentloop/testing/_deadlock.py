"""Detection of deadlocks, for both virtual clocks."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from agentloop._errors import AgentLoopError
from agentloop._runtime.run import Runnable

# The virtual time at which every run starts. Not zero: that would hide confusions of time and duration.
START_SECONDS = 1000.0

# How often to poll while waiting for a real event, such as a thread that ends without a signal.
POLL_SECONDS = 0.02

_LIBRARIES = {"anyio", "asyncio", "outcome", "trio"}
_MOST_TASKS = 10

# The coroutines that serve a worker thread's ``anyio.from_thread.run()``: by module and qualified name.
_SERVING_A_THREAD = {
    ("anyio._backends._asyncio", "AsyncIOBackend.run_async_from_thread.<locals>.task_wrapper"),
    ("trio._threads", "Run.run"),
}


class VirtualClockDeadlock(AgentLoopError, RuntimeError):
    """Every task waits, no timer is set, and nothing outside the event loop can wake any of them."""


def require(owner: object, *names: str) -> None:
    """
    Raise an error if private attributes that the clock needs are missing.

    :raises RuntimeError: if one is missing, as may happen in a future version
    """
    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(
                f"virtual_clock needs {owner!r} to have {name!r}, which this version lacks; "
                "use an earlier version of Python or trio, or no seed"
            )


def deadlock(tasks: Iterable[tuple[str, Any]]) -> VirtualClockDeadlock:
    """
    Describe a deadlock.

    :param tasks: the name and the coroutine of each blocked task
    """
    lines = [f"  {name} waits at {_place(coro)}" for name, coro in tasks]
    if len(lines) > _MOST_TASKS:
        lines[_MOST_TASKS:] = [f"  and {len(lines) - _MOST_TASKS} more"]

    return VirtualClockDeadlock(
        "no task can ever go on: none is ready, no timer is set, and no thread, socket or signal can wake "
        "one. Wake the task, or put a timeout around its wait:\n" + "\n".join(lines)
    )


def threads_served(coros: Iterable[Any]) -> int:
    """Count the worker threads that wait for one of these coroutines: such a thread is not busy itself."""
    return sum(
        any((_module(frame), frame.f_code.co_qualname) in _SERVING_A_THREAD for frame in _frames(coro))
        for coro in coros
    )


def _frames(coro: Any) -> Iterator[FrameType]:
    """Yield the frames of a suspended coroutine, outermost first."""
    while coro is not None:
        frame = getattr(coro, "cr_frame", None) or getattr(coro, "gi_frame", None)
        if frame is not None:
            yield frame

        inner = getattr(coro, "cr_await", None) or getattr(coro, "gi_yieldfrom", None)
        if inner is None and frame is not None and frame.f_code is vars(Runnable)["run_isolated"].__code__:
            # It drives the agent's coroutine by hand, so the interpreter does not link the two.
            inner = frame.f_locals.get("coroutine")

        coro = inner


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _place(coro: Any) -> str:
    """Return the innermost line outside of the event loop's own code, if there is one."""
    frames = list(_frames(coro))
    own = [frame for frame in frames if _module(frame).partition(".")[0] not in _LIBRARIES]
    return "".join(
        f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"
        for frame in own[-1:] or frames[-1:]
    )


class Outside:
    """
    The threads and signal handlers that could wake an event loop from outside.

    :param idle_threads: returns the idle threads of pools
    """

    def __init__(self, idle_threads: Callable[[], Iterable[threading.Thread]]) -> None:
        self._idle_threads = idle_threads
        self._threads = set(threading.enumerate()) - set(idle_threads())
        self._handlers = _signal_handlers()

    def can_wake(self) -> bool:
        """Return whether a thread or a signal handler from the time of the run may wake a task."""
        if threading.current_thread() is not threading.main_thread():
            # The thread that started this loop in another one may call into it.
            return True

        threads = set(threading.enumerate()) - self._threads - set(self._idle_threads())
        return bool(threads) or bool(_signal_handlers() - self._handlers)


def _signal_handlers() -> set[tuple[int, Any]]:
    handlers = {(number, signal.getsignal(number)) for number in signal.valid_signals()}
    return {(n, h) for n, h in handlers if callable(h) and h is not signal.default_int_handler}

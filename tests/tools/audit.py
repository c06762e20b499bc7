"""
Nothing is left behind: what every test, and every run of the fuzzer, has to hold.

Within the event loop ``await assert_quiet()``; around a whole run ``with leak_audit():`` and
``with audit_limiters():``.
"""

import asyncio
import gc
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import AsyncGeneratorType
from typing import Any
from unittest.mock import patch

import anyio
import anyio.lowlevel
import trio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from agentloop import Limiter

# The tasks of AnyIO's pytest plugin, by the code they run.
_RUNNER = {"TestRunner._call_in_runner_task", "TestRunner._run_tests_and_fixtures"}


def other_tasks() -> set[Any]:
    """Give the tasks that are alive, except this one, those it descends from, and the test runner's."""
    if anyio.get_current_task().__class__.__name__ == "TrioTaskInfo":
        host: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        root = trio.lowlevel.current_root_task()
        tasks = set(_descendants(root))
        while host is not None:
            tasks.discard(host)
            host = host.parent_nursery.parent_task if host.parent_nursery else None

        return {task for task in tasks if not task.name.startswith("<")}

    current = asyncio.current_task()
    return {
        task
        for task in asyncio.all_tasks()
        if task is not current and task.get_coro().__qualname__ not in _RUNNER
    }


def _descendants(task: Any) -> Iterator[Any]:
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from _descendants(child)


def open_generators() -> set[AsyncGeneratorType[Any, Any]]:
    """Give the async generators that were started and have not ended."""
    if anyio.get_current_task().__class__.__name__ == "TrioTaskInfo":
        started: Any = trio._core._run.GLOBAL_RUN_CONTEXT.runner.asyncgens.alive
    else:
        started = asyncio.get_running_loop()._asyncgens

    return {generator for generator in started if generator.ag_frame is not None and not generator.ag_running}


async def assert_quiet(known: Iterable[object] = ()) -> None:
    """
    Assert that no other task is alive, no async generator is open, and nobody still cancels this task.

    :param known: tasks and generators that may be there, such as those of fixtures
    """
    with anyio.CancelScope(shield=True):
        for _ in range(3):
            # what was just closed may need a step to end
            await anyio.lowlevel.checkpoint()

    known = set(known)
    assert not (tasks := other_tasks() - known), f"tasks left: {tasks}"
    assert not (generators := open_generators() - known), f"async generators left open: {generators}"
    if anyio.get_current_task().__class__.__name__ != "TrioTaskInfo":
        host = asyncio.current_task()
        assert host is not None
        assert host.cancelling() == 0, f"{host.cancelling()} cancellations of the host were not taken back"


@contextmanager
def audit_limiters() -> Iterator[None]:
    """
    Assert that each limiter which is used within the block is idle at its end.

    An error that is raised inside passes through, with no audit.
    """
    used: list[tuple[Limiter, Any]] = []
    make_pool = Limiter._make_pool

    def follow(limiter: Limiter) -> Any:
        pool = make_pool(limiter)
        used.append((limiter, pool))
        return pool

    with patch.object(Limiter, "_make_pool", follow):
        yield

    for limiter, pool in used:
        assert_idle(limiter, pool)


def assert_idle(limiter: Limiter, pool: Any) -> None:
    """
    Assert that no slot of a limiter is taken, that nothing waits for one, and that no call uses it.

    :param pool: its state in one event loop, looked at for what the limiter's statistics do not say
    """
    now = limiter.statistics()
    assert now.running == 0, "a slot was not given back"
    assert now.waiting == 0, "something still waits for a slot or a retry"
    assert not pool.on_resize, "a batch still listens to its limiter"
    assert pool.users == 0, "a call that has ended still counts as a user"


@contextmanager
def leak_audit() -> Iterator[None]:
    """
    Assert that a whole run leaves no trace behind.

    That is: no unraisable exception, ``ResourceWarning`` or coroutine never awaited, no dead thread, no
    error in asyncio's log, no call of its exception handler, no memory object stream left open. An error
    that is raised inside passes through, with no audit.
    """
    problems: list[str] = []
    streams: weakref.WeakSet[Any] = weakref.WeakSet()
    log = _Log(problems)

    def unraisable(args: Any) -> None:
        problems.append(f"unraisable in {args.object!r}: {args.exc_value!r}")

    def thread_died(args: Any) -> None:
        problems.append(f"thread {args.thread} died: {args.exc_value!r}")

    def handle(loop: Any, context: dict[str, Any]) -> None:
        problems.append(f"asyncio's exception handler was called: {context}")
        call_exception_handler(loop, context)

    call_exception_handler = asyncio.BaseEventLoop.call_exception_handler
    with ExitStack() as stack:
        # garbage of what ran before is not ours
        gc.collect()
        stack.enter_context(patch.object(sys, "unraisablehook", unraisable))
        stack.enter_context(patch.object(threading, "excepthook", thread_died))
        stack.enter_context(patch.object(asyncio.BaseEventLoop, "call_exception_handler", handle))
        for kind in (MemoryObjectSendStream, MemoryObjectReceiveStream):
            stack.enter_context(
                patch.object(kind, "__post_init__", _remembering(kind.__post_init__, streams))
            )

        # raised in a finalizer, these two become unraisable exceptions
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", ResourceWarning)
        warnings.filterwarnings("error", "coroutine .* was never awaited", RuntimeWarning)
        logging.getLogger("asyncio").addHandler(log)
        stack.callback(logging.getLogger("asyncio").removeHandler, log)
        yield
        for _ in range(3):
            gc.collect()

        problems += [f"left open: {stream!r}" for stream in streams if not stream._closed]

    assert not problems, "the run left something behind:\n" + "\n".join(problems)


def _remembering(init: Callable[[Any], None], streams: weakref.WeakSet[Any]) -> Callable[[Any], None]:
    def post_init(stream: Any) -> None:
        init(stream)
        streams.add(stream)

    return post_init


class _Log(logging.Handler):
    def __init__(self, problems: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._problems = problems

    def emit(self, record: logging.LogRecord) -> None:
        self._problems.append(f"asyncio logged: {record.getMessage()}")

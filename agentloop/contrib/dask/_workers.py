"""The public class: starts or joins worker processes, and wraps functions for them."""

from __future__ import annotations

__all__ = ["Workers", "WorkersStatistics"]

import functools
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, Self, TypeVar

import anyio
import anyio.to_thread
import attrs
from anyio.from_thread import BlockingPortal, start_blocking_portal

from agentloop import current_attempt

from ._dispatcher import Call
from ._engine import Engine, Settings
from ._errors import pack_error, unpack_error
from ._functions import Function, check_async
from ._mailbox import mailbox_here
from ._pickles import loads
from ._tracing import trace_here

P = ParamSpec("P")
T = TypeVar("T")

# How long a cancelled call waits for its agent to end. Without this limit, a process that hangs would block
# the caller for ever.
_FAREWELL_SECONDS = 1.0
_BACKENDS = ("asyncio", "trio")


@attrs.frozen
class WorkersStatistics:
    """
    Worker processes at this moment.

    :param processes: how many processes can be called
    :param calls: how many calls are open in each, by the address of the process
    :param waiting: how many calls wait for a process
    :param lost: how many processes have died or left so far
    """

    processes: int
    calls: Mapping[str, int]
    waiting: int
    lost: int


class Workers:
    """
    Worker processes that call agents, for a loop in this process::

        async with Workers(8) as workers:
            results = await loop.run_all(Invocation.map(workers.remote(ask), prompts))

    A call goes to the process with the fewest open calls. When a process dies, its open calls, and only
    these, are sent to others, so an agent may be called more than once. Leaving the block cancels open calls,
    and ends the processes that this object has started.

    A script that starts processes needs ``if __name__ == "__main__":``, as with ``multiprocessing``.

    :param processes: how many processes to start on this machine; one per processor if absent
    :param address: the address of a Dask scheduler, ``"tcp://host:8786"``, to use its workers instead
    :param security: a ``distributed.Security``, for TLS; ``True`` for temporary certificates of processes on
        this machine
    :param backend: the backend of the event loops in the processes, ``"asyncio"`` or ``"trio"``
    :param linger_seconds: how long a call, and its reply, wait for others to share a message
    :param max_deaths: after so many deaths of its process, a call fails with a :exc:`WorkerLost`; at the last
        resend, and from the second on, it runs alone in its process
    :param patience_seconds: how long calls wait for a process when there is none, before they fail with a
        :exc:`WorkerLost`
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if a value is out of its range, or both ``processes`` and ``address`` are given
    """

    def __init__(
        self,
        processes: int | None = None,
        *,
        address: str | None = None,
        security: Any = None,
        backend: str = "asyncio",
        linger_seconds: float = 0.01,
        max_deaths: int = 3,
        patience_seconds: float = 60,
    ) -> None:
        if processes is not None and address is not None:
            raise ValueError(
                "processes and address exclude each other: a cluster has the workers that it has"
            )

        if address is not None and not isinstance(address, str):
            raise TypeError(f'address must be a str such as "tcp://host:8786", got {address!r}')

        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")

        if address is None and processes is None:
            processes = os.cpu_count() or 1

        _check("processes", 1 if processes is None else processes, int, 1)
        _check("max_deaths", max_deaths, int, 1)
        _check("linger_seconds", linger_seconds, (int, float), 0)
        _check("patience_seconds", patience_seconds, (int, float), 0)
        settings = Settings(
            processes, address, security, backend, linger_seconds, max_deaths, patience_seconds
        )
        self._engine = Engine(settings)
        self._portal: AbstractContextManager[BlockingPortal] | None = None

    def __repr__(self) -> str:
        now = self.statistics()
        calls = sum(now.calls.values())
        return f"<Workers {now.processes} processes, {calls} calls, {now.waiting} waiting, {now.lost} lost>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Workers cannot be pickled, since they belong to the process that calls them")

    def statistics(self) -> WorkersStatistics:
        """Return the state at this moment."""
        now = self._engine.dispatcher
        workers = [*now.workers]
        calls = {worker.address: len(worker.open) for worker in workers}
        return WorkersStatistics(len(workers), calls, len(now.waiting) + len(now.suspects), now.lost)

    def remote(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """
        Return an agent that calls ``fn`` in one of the processes.

        The function, its arguments and its return value must pickle. Functions and classes of modules travel
        by name, so the processes must be able to import them. Those of ``__main__`` and of function bodies
        travel by value.

        :param fn: an async function; ``in_thread(fn)`` for a blocking one
        :return: an async function of the same name and parameters
        :raises TypeError: if ``fn`` is not an async function
        """
        check_async(fn)
        function, engine = Function(fn), self._engine

        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            function.define()
            call = Call(
                function, (function.pack(args, kwargs), _attempt_here(), trace_here()), mailbox_here()
            )
            engine.submit(call)
            try:
                await call.ended.wait()
            except BaseException:
                engine.cancel(call)
                with anyio.move_on_after(_FAREWELL_SECONDS, shield=True):
                    await call.ended.wait()

                raise

            if call.is_error:
                raise unpack_error(call.data)

            value: T = loads(call.data)
            return value

        return functools.update_wrapper(call, fn)

    async def __aenter__(self) -> Self:
        if self._portal is not None:
            raise RuntimeError("these Workers were started before: make others")

        started = anyio.Event()
        here = mailbox_here()
        self._portal = start_blocking_portal(backend="asyncio")
        portal = self._portal.__enter__()
        running = portal.start_task_soon(self._engine.run, partial(here.send, started.set))
        running.add_done_callback(lambda _: here.send(started.set))
        try:
            await started.wait()
            if running.done():
                running.result()

        except BaseException:
            running.cancel()
            await self._close()
            raise

        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine.stop()
        await self._close()

    async def _close(self) -> None:
        assert self._portal is not None
        # Blocks until the engine has ended.
        close = partial(self._portal.__exit__, None, None, None)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(close, limiter=anyio.CapacityLimiter(1))


def _check(name: str, value: Any, kind: Any, minimum: int) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, got {value!r}")

    # NaN fails this comparison too.
    if not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


def _attempt_here() -> tuple[Any, ...]:
    """Return the arguments of ``Attempt`` for the worker process; an empty tuple outside of an agent."""
    try:
        now = current_attempt()
    except RuntimeError:
        return ()

    failures = [pack_error(failure, "an earlier attempt") for failure in now.failures]
    return now.agent_id, now.number, failures, now.idempotency_key

"""The processes, as users hold them."""

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

from ._courier import courier_here
from ._dispatcher import Call
from ._engine import Engine, Settings
from ._errors import pack_error, unpack_error
from ._functions import Function, check_async
from ._pickles import loads
from ._tracing import trace_here

P = ParamSpec("P")
T = TypeVar("T")

# How long a cancelled call waits for its agent to end. A process that hangs would have it wait for ever.
_FAREWELL_SECONDS = 1.0
_BACKENDS = ("asyncio", "trio")


@attrs.frozen
class WorkersStatistics:
    """
    Worker processes at this moment.

    :param processes: how many there are
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
    Processes that call agents for a loop in this one::

        async with Workers(8) as workers:
            results = await loop.run_all(Invocation.map(workers.remote(ask), prompts))

    A call goes to the process with the fewest open calls. When a process dies, its open calls, and only
    these, are sent to others, so that an agent may be called more than once. Leaving the block cancels calls
    that are open, and ends the processes if they are this object's own.

    A script that starts processes needs ``if __name__ == "__main__":``, as with ``multiprocessing``.

    :param processes: how many processes to start on this machine; as many as there are processors if absent
    :param address: of a Dask scheduler, ``"tcp://host:8786"``, to use its workers instead
    :param security: a ``distributed.Security``, for TLS; ``True`` for temporary certificates of processes on
        this machine
    :param backend: of the event loops in the processes, ``"asyncio"`` or ``"trio"``
    :param linger_seconds: how long a call, and its reply, wait for others to share a message with
    :param max_deaths: how many processes may die while they run a call, before it fails with a
        :exc:`WorkerLost`; all but the first two run no other call meanwhile
    :param patience_seconds: how long calls wait when there is no process, before they fail with a
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
        links = [*now.links]
        calls = {link.address: len(link.open) for link in links}
        return WorkersStatistics(len(links), calls, len(now.waiting) + len(now.suspects), now.lost)

    def remote(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        """
        Return an agent that calls ``fn`` in one of the processes.

        The function, its arguments and what it returns must pickle. What the processes can import travels by
        name, and all else by value.

        :param fn: an async function; ``in_thread(fn)`` for a blocking one
        :return: an async function of the same name and parameters
        :raises TypeError: if ``fn`` is not an async function
        """
        check_async(fn)
        function, engine = Function(fn), self._engine

        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            function.define()
            call = Call(
                function, (function.pack(args, kwargs), _attempt_here(), trace_here()), courier_here()
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
        here = courier_here()
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
        # Waits until all that the portal runs has ended.
        close = partial(self._portal.__exit__, None, None, None)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(close, limiter=anyio.CapacityLimiter(1))


def _check(name: str, value: Any, kind: Any, minimum: int) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, got {value!r}")

    # NaN is not, either.
    if not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


def _attempt_here() -> tuple[Any, ...]:
    """Return what ``current_attempt()`` is to return there; nothing outside of an agent."""
    try:
        now = current_attempt()
    except RuntimeError:
        return ()

    failures = [pack_error(failure, "an earlier attempt") for failure in now.failures]
    return now.agent_id, now.number, failures, now.idempotency_key

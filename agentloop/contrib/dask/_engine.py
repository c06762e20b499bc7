"""Dask's client, and the cluster if it is ours, in an asyncio event loop in a thread of its own."""

from __future__ import annotations

__all__ = ["Engine"]

import logging
import signal
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import anyio
import attrs
import distributed

from agentloop import LoopClosed

from ._courier import Courier, courier_here
from ._dispatcher import Call, Dispatcher, Link
from ._errors import WorkerLost
from ._functions import versions
from ._pickles import loads
from ._seat import Seat

_distributed: Any = distributed  # most of it has no types
_logger = logging.getLogger("agentloop")
# How often the scheduler is asked which processes there are, and how long an end may take.
_LOOK_SECONDS, _CLOSE_SECONDS = 0.3, 2.0
# Ctrl-C in a terminal reaches all processes of its group: the batch decides what is to end, not the workers.
# They inherit from this thread that the signal is blocked, and ignore it before they unblock it.
_PRELOAD = """
import contextlib, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
with contextlib.suppress(AttributeError):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
"""


@attrs.frozen
class Settings:
    """What ``Workers`` was made with."""

    processes: int | None
    address: str | None
    security: Any
    backend: str
    linger_seconds: float
    max_deaths: int
    patience_seconds: float


class Engine:
    """
    Brings calls to worker processes and their replies back.

    All methods but :meth:`run` may be called in any thread.

    :param settings: what ``Workers`` was made with
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.dispatcher = Dispatcher(settings.max_deaths)
        self._courier: Courier | None = None
        self._scopes: dict[str, anyio.CancelScope] = {}
        """For each process that is served, by address."""
        self._refused: dict[str, str] = {}
        self._without_since: float | None = None

    # -- from any thread

    def submit(self, call: Call) -> None:
        """
        Send a call.

        :raises LoopClosed: if there is nobody to send it any more
        """
        self._send(self.dispatcher.submit, call)

    def cancel(self, call: Call) -> None:
        """Cancel a call."""
        self._send(self.dispatcher.cancel, call)

    def stop(self) -> None:
        """End :meth:`run`."""
        self._send(self._stopped.set)

    def _send(self, fn: Callable[..., object], *args: Any) -> None:
        courier = self._courier
        if courier is None:
            raise _closed()

        try:
            courier.send(fn, *args)
        except RuntimeError:
            raise _closed() from None

    # -- in the thread with Dask's client

    async def run(self, on_started: Callable[[], object]) -> None:
        """Start, and serve until :meth:`stop` is called."""
        self._stopped = anyio.Event()
        stack = AsyncExitStack()
        failure: Exception | None = None
        try:
            # A start that was interrupted would leave processes behind, and so would an end.
            with anyio.CancelScope(shield=True):
                await self._connect(stack)

            async with anyio.create_task_group() as group:
                self._group = group
                failure = await self._start()
                if failure is None:
                    self._courier = courier_here()
                    on_started()
                    group.start_soon(self._watch)
                    await self._stopped.wait()

                group.cancel_scope.cancel("the block was left")

            if failure is not None:
                raise failure

        finally:
            self._courier = None
            self.dispatcher.close(_closed())
            with anyio.CancelScope(shield=True):
                await stack.aclose()

    async def _connect(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        where: Any = settings.address
        if where is None:
            # There is none of this on Windows.
            with suppress(ImportError, AttributeError):
                from multiprocessing import resource_tracker

                # Its first process would unblock the signal in this thread.
                resource_tracker.ensure_running()
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

            where = await stack.enter_async_context(_make_cluster(settings))

        security = settings.security if settings.address is not None else where.security
        client = _distributed.Client(
            where,
            security=security,
            timeout=settings.patience_seconds,
            asynchronous=True,
            # Else all calls would go through the scheduler.
            direct_to_workers=True,
        )
        self._client = await stack.enter_async_context(client)

    async def _start(self) -> Exception | None:
        """Wait until each process that there is can be called, or one at least; return what is wrong."""
        patience = self._settings.patience_seconds
        with anyio.move_on_after(patience):
            while len(self.dispatcher.links) < (len(self._scopes) or 1):
                await self._look()
                await anyio.sleep(_LOOK_SECONDS / 10)
                if self._refused:
                    return RuntimeError(next(iter(self._refused.values())))

        return None if self.dispatcher.links else _without(patience)

    async def _watch(self) -> None:
        """See who joins and who leaves, and give up calls that have had no process for too long."""
        patience = self._settings.patience_seconds
        while True:
            await anyio.sleep(_LOOK_SECONDS)
            try:
                # Of a scheduler that does not answer there is nothing to be learned.
                with anyio.move_on_after(patience):
                    await self._look()

            except Exception as exc:
                _logger.debug("the scheduler cannot be asked: %r", exc)

            now = anyio.current_time()
            if self.dispatcher.links:
                self._without_since = None
            elif self._without_since is None:
                self._without_since = now
            elif now - self._without_since >= patience:
                self.dispatcher.fail(_without(patience))

    async def _look(self) -> None:
        addresses = {*await self._client.nthreads()}
        for address in addresses - self._scopes.keys() - self._refused.keys():
            scope = self._scopes[address] = anyio.CancelScope()
            self._group.start_soon(self._serve, address, scope, name=f"calls to {address}")

        for address in self._scopes.keys() - addresses:
            self._scopes[address].cancel("the scheduler has lost the process")

    async def _serve(self, address: str, scope: anyio.CancelScope) -> None:
        """Serve one process for as long as it lives."""
        seat: Any = None
        link: Link | None = None
        bell = _Bell()
        try:
            with scope:
                seat = await self._client.submit(
                    Seat,
                    self._settings.backend,
                    self._settings.linger_seconds,
                    actor=True,
                    key=f"agentloop-seat-{uuid.uuid4().hex}",
                    workers=[address],
                    allow_other_workers=False,
                )
                _check(await seat.versions())
                link = Link(address, bell.ring)
                self.dispatcher.add(link)
                async with anyio.create_task_group() as group:
                    group.start_soon(self._give, seat, link, bell)
                    group.start_soon(self._take, seat, link)

        except* Exception as group_of_one:
            error = group_of_one.exceptions[0]
            if link is None and not isinstance(error, OSError):
                self._refused[address] = f"the worker process {address} cannot be used: {error}"
                _logger.error("%s", self._refused[address])
            else:
                _logger.debug("the worker process %s cannot be reached: %r", address, error)
        finally:
            del self._scopes[address]
            if link is not None:
                self._lose(link)

            if seat is not None:
                await _close(seat)

    def _lose(self, link: Link) -> None:
        if self._stopped.is_set():
            return

        calls = len(self.dispatcher.lose(link))
        _logger.warning(
            "the worker process %s is lost, with %d calls, which are sent elsewhere", link.address, calls
        )

    async def _give(self, seat: Any, link: Link, bell: _Bell) -> None:
        while True:
            await bell.wait()
            # Calls that come within this time share a message, which take() may have sent by then.
            await anyio.sleep(self._settings.linger_seconds)
            message = link.pack()
            if message:
                await seat.give(message)

    async def _take(self, seat: Any, link: Link) -> None:
        while True:
            for number, is_error, data in loads(await seat.take(link.pack())):
                self.dispatcher.ended(link, number, is_error, data)

            # A message costs a hundred times as much as a call. New calls often follow on replies.
            await anyio.sleep(self._settings.linger_seconds)


class _Bell:
    """An event that can happen again."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def ring(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = anyio.Event()


async def _close(seat: Any) -> None:
    with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
        try:
            await seat.close()
        except Exception as exc:
            # Its process is gone. If it is not, it ends by itself, since nothing is asked of it any more.
            _logger.debug("a seat cannot be closed: %r", exc)


def _make_cluster(settings: Settings) -> Any:
    return _distributed.LocalCluster(
        n_workers=settings.processes,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        security=settings.security,
        asynchronous=True,
        silence_logs=logging.CRITICAL,
        # No dashboard, and for its HTTP routes a port that is free, of this machine only.
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
        # Dask would stop a process that has used its share of the memory.
        memory_limit=0,
        preload=[_PRELOAD],
    )


def _check(theirs: dict[str, str]) -> None:
    differences = [
        f"{name} {theirs.get(name)} there and {version} here"
        for name, version in versions().items()
        if theirs.get(name) != version
    ]
    if differences:
        raise RuntimeError(", ".join(differences))


def _without(patience: float) -> WorkerLost:
    return WorkerLost(f"there has been no worker process for {patience:g} s")


def _closed() -> LoopClosed:
    return LoopClosed("remote agents can be called inside of `async with Workers(...)` only")

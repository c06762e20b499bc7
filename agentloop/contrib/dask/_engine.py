"""Dask's client, and the cluster that ``Workers`` starts, in an asyncio event loop in a thread of its own."""

from __future__ import annotations

__all__ = ["Engine", "replace_failed"]

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

from ._actor import AgentActor
from ._dispatcher import Call, Dispatcher, Worker
from ._errors import WorkerLost
from ._functions import versions
from ._mailbox import Mailbox, mailbox_here
from ._pickles import loads

_distributed: Any = distributed  # most of it has no types
_logger = logging.getLogger("agentloop")
# The interval at which the engine asks the scheduler for its processes, and the time to close an actor.
_LOOK_SECONDS, _CLOSE_SECONDS = 0.3, 2.0
# Ctrl-C in a terminal reaches all processes of its group, but only the caller's process decides which calls
# end. Worker processes inherit the blocked signal from this thread, and ignore it before they unblock it.
_PRELOAD = """
import contextlib, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
with contextlib.suppress(AttributeError):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
"""


@attrs.frozen
class Settings:
    """The arguments of ``Workers``."""

    processes: int | None
    address: str | None
    security: Any
    backend: str
    linger_seconds: float
    max_deaths: int
    patience_seconds: float


class Engine:
    """
    Sends calls to worker processes, and replies back to the callers.

    :meth:`run` runs in the thread with Dask's client; the other public methods may be called in any thread.

    :param settings: the arguments of ``Workers``
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.dispatcher = Dispatcher(settings.max_deaths)
        self._mailbox: Mailbox | None = None
        self._scopes: dict[str, anyio.CancelScope] = {}
        """The cancel scope of :meth:`_serve` for each process, by address."""
        self._refused: dict[str, str] = {}
        self._without_since: float | None = None
        self._cluster: Any = None
        """The cluster on this machine, if ``processes`` are given and no address."""

    # -- from any thread

    def submit(self, call: Call) -> None:
        """
        Send a call.

        :raises LoopClosed: outside of the block of ``Workers``
        """
        self._call_soon(self.dispatcher.submit, call)

    def cancel(self, call: Call) -> None:
        """Cancel a call."""
        self._call_soon(self.dispatcher.cancel, call)

    def stop(self) -> None:
        """End :meth:`run`."""
        self._call_soon(self._stopped.set)

    def _call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        mailbox = self._mailbox
        if mailbox is None:
            raise _closed()

        try:
            mailbox.send(fn, *args)
        except RuntimeError:
            raise _closed() from None

    # -- in the thread with Dask's client

    async def run(self, on_started: Callable[[], object]) -> None:
        """Start, call ``on_started``, and serve until :meth:`stop` is called."""
        self._stopped = anyio.Event()
        stack = AsyncExitStack()
        failure: Exception | None = None
        try:
            # Shielded: an interrupted start would leave processes behind, and so would an interrupted end.
            with anyio.CancelScope(shield=True):
                await self._connect(stack)

            async with anyio.create_task_group() as group:
                self._group = group
                failure = await self._start()
                if failure is None:
                    self._mailbox = mailbox_here()
                    on_started()
                    group.start_soon(self._watch)
                    await self._stopped.wait()

                group.cancel_scope.cancel("the block was left")

            if failure is not None:
                raise failure

        finally:
            self._mailbox = None
            self.dispatcher.close(_closed())
            with anyio.CancelScope(shield=True):
                await stack.aclose()

    async def _connect(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        where: Any = settings.address
        if where is None:
            # Windows has neither.
            with suppress(ImportError, AttributeError):
                from multiprocessing import resource_tracker

                # Start it now: started later, it would unblock the signal in this thread.
                resource_tracker.ensure_running()
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

            where = self._cluster = await stack.enter_async_context(_make_cluster(settings))

        security = settings.security if settings.address is not None else where.security
        client = _distributed.Client(
            where,
            security=security,
            timeout=settings.patience_seconds,
            asynchronous=True,
            # Otherwise all calls would go through the scheduler.
            direct_to_workers=True,
        )
        self._client = await stack.enter_async_context(client)

    async def _start(self) -> Exception | None:
        """
        Wait until every process of the cluster can be called, and at least one.

        :return: the error if no process can be called, or one is refused
        """
        patience = self._settings.patience_seconds
        with anyio.move_on_after(patience):
            while len(self.dispatcher.workers) < (len(self._scopes) or 1):
                await self._look()
                await anyio.sleep(_LOOK_SECONDS / 10)
                if self._refused:
                    return RuntimeError(next(iter(self._refused.values())))

        return None if self.dispatcher.workers else _without(patience)

    async def _watch(self) -> None:
        """Watch processes join and leave, and give up calls after ``patience_seconds`` without a process."""
        patience, processes = self._settings.patience_seconds, self._settings.processes
        while True:
            await anyio.sleep(_LOOK_SECONDS)
            try:
                # If the scheduler does not answer, the known processes stay.
                with anyio.move_on_after(patience):
                    await self._look()

                if processes is not None and len(self._scopes) < processes:
                    replace_failed(self._cluster, processes)

            except Exception as exc:
                _logger.debug("the scheduler cannot be asked: %r", exc)

            now = anyio.current_time()
            if self.dispatcher.workers:
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
        """Start an actor in one process, and exchange messages with it until it dies."""
        actor: Any = None
        worker: Worker | None = None
        unsent = _RepeatedEvent()
        try:
            with scope:
                actor = await self._client.submit(
                    AgentActor,
                    self._settings.backend,
                    self._settings.linger_seconds,
                    actor=True,
                    key=f"agentloop-actor-{uuid.uuid4().hex}",
                    workers=[address],
                    allow_other_workers=False,
                )
                _check(await actor.versions())
                worker = Worker(address, unsent.set)
                self.dispatcher.add(worker)
                async with anyio.create_task_group() as group:
                    pause = _Pause()
                    group.start_soon(self._send_calls, actor, worker, unsent, pause)
                    group.start_soon(self._receive_replies, actor, worker, pause)

        except* Exception as group_of_one:
            error = group_of_one.exceptions[0]
            if worker is None and not isinstance(error, OSError):
                self._refused[address] = f"the worker process {address} cannot be used: {error}"
                _logger.error("%s", self._refused[address])
            else:
                _logger.debug("the worker process %s cannot be reached: %r", address, error)
        finally:
            del self._scopes[address]
            if worker is not None:
                self._lose(worker)

            if actor is not None:
                await _close(actor)

    def _lose(self, worker: Worker) -> None:
        if self._stopped.is_set():
            return

        calls = len(self.dispatcher.lose(worker))
        _logger.warning(
            "the worker process %s is lost, with %d calls, which are sent elsewhere", worker.address, calls
        )

    async def _send_calls(self, actor: Any, worker: Worker, unsent: _RepeatedEvent, pause: _Pause) -> None:
        while True:
            await unsent.wait()
            # Calls that come within this time share a message.
            await anyio.sleep(self._settings.linger_seconds)
            if pause.is_on:
                # The next request for replies takes them along.
                pause.end()
            else:
                message = worker.pack()
                if message:
                    await actor.send(message)

    async def _receive_replies(self, actor: Any, worker: Worker, pause: _Pause) -> None:
        while True:
            for number, is_error, data in loads(await actor.receive(worker.pack())):
                self.dispatcher.ended(worker, number, is_error, data)

            # A message costs a hundred times as much as a call. New calls often follow on replies.
            await pause.wait(self._settings.linger_seconds)


class _RepeatedEvent:
    """An event that can happen again."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = anyio.Event()


class _Pause:
    """A wait that can be ended early."""

    def __init__(self) -> None:
        self._scope: anyio.CancelScope | None = None

    @property
    def is_on(self) -> bool:
        return self._scope is not None

    async def wait(self, seconds: float) -> None:
        with anyio.move_on_after(seconds) as self._scope:
            await anyio.sleep_forever()

        self._scope = None

    def end(self) -> None:
        assert self._scope is not None
        self._scope.cancel("calls wait to be sent")


async def _close(actor: Any) -> None:
    with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
        try:
            await actor.close()
        except Exception as exc:
            # The process has died, or the actor ends by itself after LEASE_SECONDS without a request.
            _logger.debug("an actor cannot be closed: %r", exc)


def _make_cluster(settings: Settings) -> Any:
    return _distributed.LocalCluster(
        n_workers=settings.processes,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        security=settings.security,
        asynchronous=True,
        silence_logs=logging.CRITICAL,
        # No dashboard. Its HTTP routes get a free port, on this machine only.
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
        # Otherwise Dask would pause or kill a process that has used its share of the memory.
        memory_limit=0,
        preload=[_PRELOAD],
    )


def replace_failed(cluster: Any, processes: int) -> None:
    """Start another process for each that Dask has given up: it restarts none that dies while it starts."""
    failed = [name for name, nanny in cluster.workers.items() if nanny.status.name in ("closed", "failed")]
    for name in failed:
        cluster.worker_spec.pop(name, None)

    cluster.scale(processes)


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

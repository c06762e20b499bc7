"""Runs in a worker process: a Dask actor with an event loop for agents in a thread of its own."""

from __future__ import annotations

__all__ = ["LEASE_SECONDS", "AgentActor"]

import os
import platform
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, cast

import anyio

from agentloop import Attempt, InvocationCancelled
from agentloop._errors import LeftOpenError
from agentloop._runtime.current import attempt_elsewhere

from ._errors import pack_error, unpack_error
from ._functions import load_function, versions
from ._mailbox import Mailbox, mailbox_here
from ._pickles import dumps, loads
from ._tracing import enter_trace

# How long receive() waits for a reply, and how long calls go on while the caller does not call receive().
POLL_SECONDS, LEASE_SECONDS = 3.0, 20.0


class AgentActor:
    """
    Calls agents in an event loop of its own, so that no agent delays Dask's heartbeats.

    The public methods run in Dask's event loop.

    :param backend: the backend of the agents' event loop
    :param linger_seconds: how long replies wait for others to share a message
    """

    def __init__(self, backend: str, linger_seconds: float) -> None:
        self._linger = linger_seconds
        self._functions: dict[int, Callable[..., Awaitable[Any]] | bytes] = {}
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._replies: deque[tuple[int, bool, bytes]] = deque()
        self._reader: tuple[Mailbox, anyio.Event] | None = None
        started: Future[Mailbox] = Future()
        threading.Thread(
            target=self._run, args=(backend, started), name="agentloop actor", daemon=True
        ).start()
        self._mailbox = started.result()

    async def versions(self) -> dict[str, str]:
        """Return versions that must be equal to those in the caller's process."""
        return versions()

    async def send(self, message: bytes) -> None:
        """
        Start calls, and cancel others.

        :param message: definitions of functions by number, calls, and numbers of calls to cancel
        """
        self._call_soon(self._accept, message)

    async def receive(self, message: bytes) -> bytes:
        """
        Return replies: once there are any, or none after ``POLL_SECONDS``.

        :param message: a message for :meth:`send`; it may be empty
        """
        self._call_soon(self._renew)
        if message:
            self._call_soon(self._accept, message)

        event = anyio.Event()
        self._reader = mailbox_here(), event
        # Check after setting the reader: a later reply sets the event.
        if not self._replies:
            with anyio.move_on_after(POLL_SECONDS):
                await event.wait()
                await anyio.sleep(self._linger)

        self._reader = None
        replies: list[tuple[int, bool, bytes]] = []
        while self._replies:
            replies.append(self._replies.popleft())

        return dumps(replies)

    async def close(self) -> None:
        """Cancel all calls, and end the event loop."""
        self._call_soon(self._end)

    def _call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        # In a context of the agents' event loop: each agent's task gets a copy of it.
        self._mailbox.send(self._context.run, fn, *args)

    # -- in the agents' event loop

    def _run(self, backend: str, started: Future[Mailbox]) -> None:
        try:
            anyio.run(self._main, started, backend=backend)
        except BaseException as exc:
            # If the event loop crashes later, it replies no more, and the caller notices.
            if not started.done():
                started.set_exception(exc)

    async def _main(self, started: Future[Mailbox]) -> None:
        async with anyio.create_task_group() as self._group:
            self._asked = anyio.Event()
            self._context = copy_context()
            started.set_result(mailbox_here())
            while not self._group.cancel_scope.cancel_called:
                with anyio.move_on_after(LEASE_SECONDS) as scope:
                    await self._asked.wait()

                if scope.cancelled_caught:
                    self._end()  # the caller has died, or was stopped for so long that it has given this up

                self._asked = anyio.Event()

    def _renew(self) -> None:
        self._asked.set()

    def _end(self) -> None:
        self._group.cancel_scope.cancel("the caller has left")

    def _accept(self, message: bytes) -> None:
        definitions, calls, cancelled = loads(message)
        self._functions.update(definitions)
        for number, *call in calls:
            scope = self._scopes[number] = anyio.CancelScope()
            self._group.start_soon(self._call, number, scope, *call, name=f"remote call {number}")

        for number in cancelled:
            if number in self._scopes:
                self._scopes[number].cancel("the caller has cancelled the call")

    async def _call(self, number: int, scope: anyio.CancelScope, *call: Any) -> None:
        reply: list[tuple[bool, bytes]] = []
        try:
            with scope:
                # An agent that leaves a scope open breaks the group of its task: this one, and no other.
                async with anyio.create_task_group() as group:
                    answer = partial(self._answer, reply, *call)
                    group.start_soon(answer, name="remote agent")

        except Exception:
            *_, attempt, _ = call
            error = LeftOpenError(attempt[0] if attempt else "the agent")
            reply = [(True, pack_error(error, _where()))]

        del self._scopes[number]
        self._replies.append((number, *(reply or [(False, b"")])[0]))
        if self._reader is not None:
            mailbox, event = self._reader
            mailbox.send(event.set)

    async def _answer(self, reply: list[tuple[bool, bytes]], *call: Any) -> None:
        try:
            reply.append((False, dumps(await self._await(*call))))
        except anyio.get_cancelled_exc_class():
            if anyio.get_current_task().has_pending_cancellation():
                raise

            error = InvocationCancelled("the agent was cancelled from within")
            reply.append((True, pack_error(error, _where())))
        except BaseException as exc:
            reply.append((True, pack_error(exc, _where())))

    async def _await(
        self, function: int, data: bytes, attempt: tuple[Any, ...], trace: dict[str, str]
    ) -> Any:
        fn = self._functions[function]
        if isinstance(fn, bytes):
            fn = self._functions[function] = load_function(fn)

        if attempt:
            agent_id, count, failures, key = attempt
            errors = tuple(cast("Exception", unpack_error(failure)) for failure in failures)
            attempt_elsewhere.set(Attempt(agent_id, count, errors, key))

        enter_trace(trace)
        args, kwargs = loads(data)
        return await fn(*args, **kwargs)


def _where() -> str:
    return f"process {os.getpid()} on {platform.node()}"

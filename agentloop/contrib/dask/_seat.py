"""The part that runs in a worker process: a Dask actor with an event loop in a thread of its own."""

from __future__ import annotations

__all__ = ["LEASE_SECONDS", "Seat"]

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

from ._courier import Courier, courier_here
from ._errors import pack_error, unpack_error
from ._functions import load_function, versions
from ._pickles import dumps, loads
from ._tracing import enter_trace

# How long take() waits for a reply, and how long calls go on when the caller asks for none.
POLL_SECONDS, LEASE_SECONDS = 3.0, 20.0


class Seat:
    """
    Calls agents in an event loop of its own, so that Dask's heartbeats need not wait for agents.

    All methods but the private ones run in Dask's event loop.

    :param backend: of the event loop of the agents
    :param linger_seconds: how long replies wait for others to share a message
    """

    def __init__(self, backend: str, linger_seconds: float) -> None:
        self._linger = linger_seconds
        self._functions: dict[int, Callable[..., Awaitable[Any]] | bytes] = {}
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._replies: deque[tuple[int, bool, bytes]] = deque()
        self._reader: tuple[Courier, anyio.Event] | None = None
        started: Future[Courier] = Future()
        threading.Thread(
            target=self._run, args=(backend, started), name="agentloop seat", daemon=True
        ).start()
        self._courier = started.result()

    async def versions(self) -> dict[str, str]:
        """Return what has to be the same as in the caller's process."""
        return versions()

    async def give(self, message: bytes) -> None:
        """
        Take calls and cancellations.

        :param message: the definitions of functions by number, the calls, the numbers of calls to cancel
        """
        self._send(self._accept, message)

    async def take(self, message: bytes) -> bytes:
        """
        Return replies, once there are any or a while has passed.

        :param message: as :meth:`give` takes it; it may be empty
        """
        self._send(self._renew)
        if message:
            self._send(self._accept, message)

        event = anyio.Event()
        self._reader = courier_here(), event
        # Looked at only now: a reply that comes later sets the event.
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
        """Cancel what runs, and end."""
        self._send(self._end)

    def _send(self, fn: Callable[..., object], *args: Any) -> None:
        # In a context of that event loop, which agents get a copy of.
        self._courier.send(self._context.run, fn, *args)

    # -- in the event loop of the agents

    def _run(self, backend: str, started: Future[Courier]) -> None:
        try:
            anyio.run(self._main, started, backend=backend)
        except BaseException as exc:
            # Later, the caller notices that the seat does not answer.
            if not started.done():
                started.set_exception(exc)

    async def _main(self, started: Future[Courier]) -> None:
        async with anyio.create_task_group() as self._group:
            self._asked = anyio.Event()
            self._context = copy_context()
            started.set_result(courier_here())
            while not self._group.cancel_scope.cancel_called:
                with anyio.move_on_after(LEASE_SECONDS) as scope:
                    await self._asked.wait()

                if scope.cancelled_caught:
                    self._end()  # the caller is gone, or was stopped for so long that it has given this up

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
                # An agent that leaves a scope open in its task breaks the group of this task, and no other.
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
            courier, event = self._reader
            courier.send(event.set)

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

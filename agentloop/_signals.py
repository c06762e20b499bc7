"""Draining loops on signals."""

from __future__ import annotations

__all__ = ["drain_on_signals"]

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import anyio
from anyio.lowlevel import checkpoint, current_token

from . import _validators as must
from ._eventloop.loop import kind_of_loop
from ._loop import AgentLoop

_logger = logging.getLogger("agentloop")

_ON_WINDOWS = os.name == "nt"
_NOT_CAUGHT = {"SIGKILL", "SIGSTOP"}


def drain_on_signals(
    *loops: AgentLoop,
    grace_seconds: float | None = 25,
    signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
) -> AbstractAsyncContextManager[anyio.Event]:
    """
    Drain loops on signals such as SIGTERM, during the block, which should be the outermost one::

        async with drain_on_signals(loop), httpx.AsyncClient() as client:
            results = await loop.run_all(Invocation.map(partial(ask, client), prompts))
            save(results)

    The first signal drains the loops (:meth:`AgentLoop.drain`) and sets the ``anyio.Event`` that the block is
    given, for other parts of the program that must stop, such as a server. A second one cancels running
    invocations, which then have a result, and the block goes on. A third one has its effect from before the
    block.

    When the block is left after a signal, in any way, standard output and error are flushed and the first
    signal is raised again, with the earlier handlers: SIGTERM ends the process there, SIGINT raises
    ``KeyboardInterrupt``. So a shell, systemd or Kubernetes get the right exit status, and final work belongs
    into the block.

    On Windows this does nothing and logs a warning: Ctrl-C still raises ``KeyboardInterrupt``.

    :param loops: the loops to drain
    :param grace_seconds: how many seconds after the first signal running invocations are cancelled; ``None``
        for never. Kubernetes kills 30 seconds after SIGTERM, by default
    :param signals: the signals to wait for
    :raises TypeError: if there is no loop, or a value is of the wrong type
    :raises ValueError: if ``grace_seconds`` is negative or not finite, or a signal cannot be caught
    :raises RuntimeError: on entering, outside of the main thread or for the second time
    """
    if not loops:
        raise TypeError("drain_on_signals() needs the loops to drain, as in drain_on_signals(loop)")

    for loop in loops:
        if not isinstance(loop, AgentLoop):
            raise TypeError(f"loops must be of type AgentLoop, got {loop!r}")

    must.check_number("grace_seconds", grace_seconds, minimum=0, optional=True, finite=True)
    return _Draining(loops, grace_seconds, _checked(signals))


def _checked(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    if not isinstance(signals, Iterable):
        raise TypeError(f"signals must be several, as in (signal.SIGTERM,), got {signals!r}")

    numbers = list(signals)
    for number in numbers:
        if not isinstance(number, int) or number not in signal.Signals.__members__.values():
            raise TypeError(f"signals must be of type signal.Signals, got {number!r}")

        if signal.Signals(number).name in _NOT_CAUGHT:
            raise ValueError(f"no process can catch {signal.Signals(number).name}: leave it out of signals")

    return [signal.Signals(number) for number in numbers]


class _Draining(AbstractAsyncContextManager[anyio.Event]):
    """
    The block in which signals drain loops.

    The handlers are Python's own, so they run in the main thread at any point, also while an agent blocks the
    event loop. They schedule the drain in the event loop.
    """

    def __init__(
        self, loops: tuple[AgentLoop, ...], grace_seconds: float | None, signals: list[signal.Signals]
    ) -> None:
        self._loops = loops
        self._grace_seconds = grace_seconds
        self._signals = signals
        self._received: list[int] = []
        self._before: dict[signal.Signals, Any] | None = None

    async def __aenter__(self) -> anyio.Event:
        if self._before is not None:
            raise RuntimeError("drain_on_signals() can be entered once: call it again for another block")

        self._before = {}
        self._draining = anyio.Event()
        if _ON_WINDOWS:
            _logger.warning("drain_on_signals() does nothing on Windows; Ctrl-C interrupts as ever")
            return self._draining

        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "signals arrive in the main thread alone: enter drain_on_signals() there, or call drain()"
            )

        self._call_soon = partial(kind_of_loop().call_from_thread, current_token().native_token)
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)

        return self._draining

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if not self._received:
            return

        for stream in (sys.stdout, sys.stderr):
            # There may be no stream, it may be closed, or its reader may be gone.
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()

        # Before CPython 3.13 a failing asyncio.TaskGroup, such as Hypercorn's, leaves the task's count of
        # cancellations raised. With such a count asyncio's runner raises no KeyboardInterrupt.
        with anyio.CancelScope(shield=True):
            await kind_of_loop().forget_cancellations()

        signal.raise_signal(self._received[0])
        # On SIGINT asyncio's runner cancels the main task. The checkpoint lets the cancellation arrive here:
        # without a later await it would be lost.
        await checkpoint()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._received.append(number)
        is_first = len(self._received) == 1
        if not is_first:
            self._restore()

        reason = f"received {signal.Signals(number).name}"
        self._call_soon(partial(self._drain, reason, self._grace_seconds if is_first else 0))

    def _drain(self, reason: str, grace_seconds: float | None) -> None:
        for loop in self._loops:
            try:
                loop.drain(reason, grace_seconds=grace_seconds)
            except RuntimeError:
                _logger.exception("a loop could not be drained")

        self._draining.set()

    def _restore(self) -> None:
        before, self._before = self._before or {}, {}
        for number, handler in before.items():
            # None stands for a handler that Python did not install.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

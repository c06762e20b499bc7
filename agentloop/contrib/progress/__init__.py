"""
A display of the progress of a loop. Needs the extra ``progress``::

    async with progress(loop, total=len(jobs)):
        results = await loop.run_all(jobs)
"""

from __future__ import annotations

__all__ = ["progress"]

import math
from collections.abc import AsyncGenerator, Sized
from contextlib import asynccontextmanager

import anyio
from rich.console import Console

from agentloop import AgentLoop

from ._display import make_display
from ._meter import Meter


@asynccontextmanager
async def progress(
    loop: AgentLoop,
    total: int | Sized | None = None,
    *,
    interval_seconds: float | None = None,
    console: Console | None = None,
) -> AsyncGenerator[None]:
    """
    Show the progress of a loop while the block runs: results, running and waiting invocations, retries,
    failures, the rate, the estimated time to the end, and percentiles of the latency. It also shows an
    outage, a cool-off (with the seconds that are left, and whether a probe runs) and a pause.

    The display reads ``loop.metrics`` and ``loop.statistics()`` a few times a second, so it costs an
    invocation nothing. It counts the results and failures of the invocations that the block starts, replayed
    ones too. Invocations that these run on the same loop are counted apart, as "nested". Retries include
    those of nested invocations. Percentiles are those since the recorder was made or reset.

    A terminal shows the display in place, below all that is printed and logged meanwhile, also to standard
    output. Several displays stand below each other. A notebook updates it in place. Any other file gets a
    line every few seconds, and one at the end. After the block the last state stays visible. An exception of
    the block is raised unchanged. If the display cannot be written, because the disk is full or the reader of
    a pipe has closed it, an error is logged once (logger ``agentloop``), and the run goes on without it.

    :param loop: the loop to show
    :param total: how many results there will be, or a collection of that length, such as the list of inputs
    :param interval_seconds: the time between two updates, at least 0.1; if absent, 0.2 on a terminal, 1 in a
        notebook, else 5
    :param console: the console to write to; standard error if absent
    :raises TypeError: if ``total`` is neither a number nor has a length
    :raises ValueError: if ``total`` is negative, ``interval_seconds`` is too short, or the loop has
        ``collect_metrics=False``
    """
    count = _length(total)
    if interval_seconds is not None and not 0.1 <= interval_seconds < math.inf:
        raise ValueError(f"interval_seconds must be finite and at least 0.1, got {interval_seconds!r}")

    if not loop.config.collect_metrics:
        raise ValueError("progress needs a loop that collects metrics, got one with collect_metrics=False")

    display = make_display(console, Meter(loop, count))
    seconds = display.interval_seconds if interval_seconds is None else interval_seconds
    raised: BaseException | None = None

    async def poll() -> None:
        nonlocal raised
        try:
            while True:
                await anyio.sleep(seconds)
                display.draw()
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            # On trio, Ctrl-C is raised in the task that runs: perhaps this one.
            raised = exc
            group.cancel_scope.cancel("the display was interrupted")

    display.open()
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(poll, name="agentloop progress")
            try:
                yield
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as exc:
                if raised is None:
                    raised = exc

            # Shielded while the display's task ends: otherwise a cancellation could replace the error.
            group.cancel_scope.shield = True
            group.cancel_scope.cancel("the block was left")
    finally:
        display.close()

    if raised is not None:
        try:
            raise raised
        finally:
            # The traceback of the error refers to this frame, and this frame to the error.
            del raised


def _length(total: int | Sized | None) -> int | None:
    if isinstance(total, Sized):
        return len(total)

    if total is not None and (not isinstance(total, int) or isinstance(total, bool)):
        raise TypeError(f"total must be a whole number, something with a length, or None, got {total!r}")

    if total is not None and total < 0:
        raise ValueError(f"total must be at least 0, got {total!r}")

    return total

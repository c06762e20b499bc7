"""
How far a loop is, shown while it runs. Needs the extra ``progress``::

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
    Show how far a loop is while the block runs: results, what runs and waits, retries, failures, the rate,
    the time to go, and percentiles of the latency. In an outage, while a server has asked to wait (with the
    seconds that are left, and whether a probe is under way) and in a pause, it says so.

    The figures are those of ``loop.metrics`` and ``loop.statistics()``, which are looked at a few times a
    second, so showing them costs an invocation nothing. Results and failures are those of the invocations
    that the block starts, with those of a journal. Invocations that these run on the same loop are counted
    apart, as "nested". Retries are those of all, and percentiles those since the recorder was made or reset.

    On a terminal it is drawn in place, below all that is printed and logged meanwhile, to standard output
    too; several displays stand below each other. A notebook updates it in place. Elsewhere it is a line every
    few seconds, and one at the end. However the block is left, the last state stays to be read, and what the
    block raises is raised unchanged. When the display cannot be written any more, because the disk is full or
    the reader of a pipe has left, it says so once in the log (logger ``agentloop``), and the run goes on.

    :param loop: the loop to look at
    :param total: how many results there will be, or something as long as that, such as the list of inputs
    :param interval_seconds: the time between two looks, at least 0.1; if absent, 0.2 on a terminal, 1 in a
        notebook, else 5
    :param console: where to show it; if absent, on standard error
    :raises TypeError: if ``total`` is neither a number nor has a length
    :raises ValueError: if ``total`` is negative, ``interval_seconds`` is too short, or the loop has
        ``collect_metrics=False``
    """
    count = _length(total)
    if interval_seconds is not None and not 0.1 <= interval_seconds < math.inf:
        raise ValueError(f"interval_seconds must be finite and at least 0.1, got {interval_seconds!r}")

    if not loop.config.collect_metrics:
        raise ValueError("there is nothing to show of a loop with collect_metrics=False")

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
            # Ctrl-C interrupts whatever runs, on trio.
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

            # Shielded for the moment that it takes: a cancellation that comes now would replace the error.
            group.cancel_scope.shield = True
            group.cancel_scope.cancel("the block was left")
    finally:
        display.close()

    if raised is not None:
        try:
            raise raised
        finally:
            # Its traceback refers to this frame.
            del raised


def _length(total: int | Sized | None) -> int | None:
    if isinstance(total, Sized):
        return len(total)

    if total is not None and (not isinstance(total, int) or isinstance(total, bool)):
        raise TypeError(f"total must be a whole number, something with a length, or None, got {total!r}")

    if total is not None and total < 0:
        raise ValueError(f"total must be at least 0, got {total!r}")

    return total

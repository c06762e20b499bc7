"""
How far a loop is, shown while it runs. Needs the extra ``progress``::

    async with progress(loop, total=len(jobs)):
        results = await loop.run_all(jobs)
"""

from __future__ import annotations

__all__ = ["progress"]

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence, Sized
from contextlib import asynccontextmanager

import anyio
import attrs
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agentloop import AgentLoop, MetricsSnapshot, Status

_logger = logging.getLogger("agentloop")

# How often it is drawn, in seconds: on a terminal, and as lines in a log.
_FRAME, _LINE = 0.2, 5.0
# The rate is that of the last half minute, or of the last results if that is longer.
_RATE_SECONDS, _RATE_RESULTS = 30.0, 20


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

    The figures are those of ``loop.metrics`` and ``loop.statistics()``, which are looked at now and then, so
    showing them costs an invocation nothing. Results, those of a journal too, retries and failures count from
    the beginning of the block, percentiles since the recorder was made or reset. On a terminal it is drawn in
    place; elsewhere it is a line now and then, and one at the end. However the block is left, the last state
    stays to be read, and what the block raises is raised as it is.

    :param loop: the loop to look at
    :param total: how many results there will be, or something as long as that, such as the list of inputs
    :param interval_seconds: the time between two looks, at least 0.1; if absent, 0.2 on a terminal and else 5
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

    # That colours are forced, as some CI services do, makes no terminal of a file.
    console = console or Console(stderr=True, force_interactive=_on_terminal(Console(stderr=True)))
    display = (_Frames if console.is_interactive else _Lines)(console, _Meter(loop, count))
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


def _on_terminal(console: Console) -> bool:
    return console.is_interactive and console.file.isatty()


@attrs.frozen
class _State:
    """How far a loop is."""

    elapsed: float
    done: int
    replayed: int
    total: int | None
    drained: bool
    running: int
    waiting: int
    retries: int
    failures: int
    cancelled: int
    skipped: int
    rate: float
    p50_ms: float
    p95_ms: float
    held_seconds: float | None
    """For how long nothing new will start but probes; infinite if the limiter is paused."""
    outage_seconds: float | None
    """For how long the provider has been out."""
    probing: bool

    @property
    def eta(self) -> float | None:
        """How many seconds there are to go, if that can be known."""
        if self.drained or self.total is None or (self.held_seconds, self.outage_seconds) != (None, None):
            return None

        left = self.total - self.done - self.cancelled - self.skipped
        return left / self.rate if left > 0 and self.rate else None

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield what all wait for and the figures, each with its style."""
        if self.outage_seconds is not None:
            yield f"outage for {_span(math.floor(self.outage_seconds))}", "bold red"

        # It is of no interest where nothing waits, as at the end.
        if self.held_seconds is not None and self.waiting:
            if self.held_seconds == math.inf:
                yield "paused", "yellow"
            else:
                yield f"held for {_span(max(1, math.ceil(self.held_seconds)))} more", "yellow"

        if self.probing:
            yield "probing", "yellow"

        if self.drained:
            yield f"draining, {self.running} running" if self.running else "drained", "yellow"
        else:
            yield f"{self.running} running", "cyan" if self.running else "dim"

        yield f"{self.waiting} waiting", "cyan" if self.waiting else "dim"
        if self.replayed:
            yield f"{self.replayed} replayed", "green"

        yield _counted(self.retries, "retry", "retries"), "yellow" if self.retries else "dim"
        yield _counted(self.failures, "failure", "failures"), "bold red" if self.failures else "dim"
        if self.cancelled:
            yield f"{self.cancelled} cancelled", "yellow"

        if self.skipped:
            yield f"{self.skipped} skipped", "yellow"

        if self.rate:
            yield f"{self.rate:.1f}/s" if self.rate >= 1 else f"{self.rate * 60:.1f}/min", ""

        if self.done > self.replayed:
            yield f"p50 {_duration(self.p50_ms)}", ""
            yield f"p95 {_duration(self.p95_ms)}", ""

    def times(self) -> str:
        """Return how long it took and will take."""
        elapsed = _clock(int(self.elapsed))
        return elapsed if self.eta is None else f"{elapsed}, ETA {_clock(math.ceil(self.eta))}"

    def counts(self) -> str:
        """Return how many are done."""
        if self.total is None:
            return f"{self.done} done"

        share = f" ({self.done * 100 // self.total}%)" if self.total else ""
        return f"{self.done}/{self.total}{share}"


class _Meter:
    """Reads how far a loop is."""

    def __init__(self, loop: AgentLoop, total: int | None) -> None:
        self._loop = loop
        self._total = total
        self._before = loop.metrics.snapshot()
        self._replayed_before = loop.statistics().replayed
        self._began = anyio.current_time()
        # When there were how many results; no more than a few hundred.
        self._seen = deque([(self._began, 0)])

    def read(self) -> _State:
        now, so_far, before = anyio.current_time(), self._loop.metrics.snapshot(), self._before
        loop, done = self._loop.statistics(), max(0, _done(so_far) - _done(before))
        replayed = loop.replayed - self._replayed_before
        limiter = self._loop.limiter.statistics()
        return _State(
            now - self._began,
            done + replayed,
            replayed,
            self._total,
            loop.drained,
            loop.running,
            loop.waiting,
            max(0, so_far.retries - before.retries),
            max(0, so_far.failures - before.failures),
            max(0, so_far.counts[Status.CANCELLED] - before.counts[Status.CANCELLED]),
            max(0, so_far.counts[Status.SKIPPED] - before.counts[Status.SKIPPED]),
            self._rate(now, done),
            so_far.latency.p50_ms,
            so_far.latency.p95_ms,
            None if limiter.paused_until is None else limiter.paused_until - now,
            None if limiter.outage_since is None else max(0.0, now - limiter.outage_since),
            limiter.probing,
        )

    def _rate(self, now: float, done: int) -> float:
        seen = self._seen
        if done != seen[-1][1]:
            seen.append((now, done))

        while len(seen) > 1 and now - seen[1][0] >= _RATE_SECONDS and done - seen[1][1] >= _RATE_RESULTS:
            seen.popleft()

        since, count = seen[0]
        return max(0, done - count) / (now - since) if now > since else 0.0


class _Display(ABC):
    """Shows how far a loop is. What goes wrong with that harms no run; the first error is logged."""

    interval_seconds: float

    def __init__(self, console: Console, meter: _Meter) -> None:
        self._console = console
        self._meter = meter
        self._has_failed = False
        self._state = meter.read()

    @abstractmethod
    def open(self) -> None:
        """Begin."""

    def draw(self) -> None:
        """Show the state."""
        if not self._has_failed:
            try:
                self._state = self._meter.read()
                self._show()
            except Exception:
                self._has_failed = True
                _logger.exception("progress cannot be shown any more")

    def close(self) -> None:
        """Show the last state, and end."""
        self.draw()

    @abstractmethod
    def _show(self) -> None:
        """Write the state."""


class _Lines(_Display):
    """A line now and then."""

    interval_seconds = _LINE

    def open(self) -> None:
        """There is nothing to begin with: the first line comes when there is something to say."""

    def _show(self) -> None:
        state = self._state
        figures = ", ".join([state.counts(), *(text for text, _ in state.items()), state.times()])
        self._console.print(figures, soft_wrap=True, markup=False, highlight=False)


class _Frames(_Display):
    """A few lines that are drawn over and over."""

    interval_seconds = _FRAME

    def __init__(self, console: Console, meter: _Meter) -> None:
        super().__init__(console, meter)
        self._live = Live(self, console=console, auto_refresh=False)

    def open(self) -> None:
        self._live.start(refresh=True)

    def close(self) -> None:
        try:
            super().close()
        finally:
            # In any case: it gives the cursor back.
            self._live.stop()

    def _show(self) -> None:
        self._live.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state, width = self._state, options.max_width
        heading = Text(f"{state.counts()}  {state.times()}", "bold", no_wrap=True, overflow="ellipsis")
        room = width - heading.cell_len - 2
        grid = Table.grid(padding=(0, 2))
        if state.total and room >= 10:
            grid.add_row(ProgressBar(state.total, state.done, width=min(room, 40)), heading)
        else:
            if state.total:
                grid.add_row(ProgressBar(state.total, state.done, width=min(width, 40)))

            grid.add_row(heading)

        yield grid
        yield from _packed([Text(text, style) for text, style in state.items()], width)


def _packed(items: Sequence[Text], width: int) -> Iterator[Text]:
    """Put items into as few lines as there have to be, without breaking any."""
    line = Text()
    for item in items:
        if line and line.cell_len + 2 + item.cell_len > width:
            yield line
            line = Text()

        line = Text("  ").join([line, item]) if line else item

    yield line


def _done(snapshot: MetricsSnapshot) -> int:
    # What was cancelled or skipped is not done, so that an interrupted run does not look complete.
    return snapshot.counts[Status.SUCCESS] + snapshot.failures


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _duration(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"


def _span(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    parts = (hours, "h"), (minutes, "min"), (0 if hours else rest, "s")
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def _clock(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

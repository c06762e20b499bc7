"""The progress of a loop, as figures and as texts."""

from __future__ import annotations

__all__ = ["Meter", "State"]

import math
from collections import deque
from collections.abc import Iterator

import anyio
import attrs

from agentloop import AgentLoop, Status, current_attempt

# The rate is that of the last half minute, or of the last 20 results if they took longer.
_RATE_SECONDS, _RATE_RESULTS = 30.0, 20


@attrs.frozen
class State:
    """The progress of a loop at one moment."""

    elapsed: float
    done: int
    replayed: int
    nested: int
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
    """How long only probes will start; infinite if the limiter is paused."""
    outage_seconds: float | None
    """How long the provider has been out."""
    probing: bool

    @property
    def eta(self) -> float | None:
        """The estimated seconds to the end; ``None`` if it cannot be estimated."""
        if self.drained or self.total is None or (self.held_seconds, self.outage_seconds) != (None, None):
            return None

        left = self.total - self.done - self.cancelled - self.skipped
        return left / self.rate if left > 0 and self.rate else None

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield the troubles of the provider and the figures, each as a text and its style."""
        if self.outage_seconds is not None:
            yield f"outage for {_span(math.floor(self.outage_seconds))}", "bold red"

        # A cool-off holds nothing back if no invocation waits, at the end for example.
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

        if self.nested:
            yield f"{self.nested} nested", "dim"

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
        """Return the elapsed time, and the estimated time to the end if there is one."""
        elapsed = _clock(int(self.elapsed))
        return elapsed if self.eta is None else f"{elapsed}, ETA {_clock(math.ceil(self.eta))}"

    def counts(self) -> str:
        """Return the number of results, of the total if it is known."""
        if self.total is None:
            return f"{self.done} done"

        share = f" ({self.done * 100 // self.total}%)" if self.total else ""
        return f"{self.done}/{self.total}{share}"


class Meter:
    """Reads the progress of a loop."""

    def __init__(self, loop: AgentLoop, total: int | None) -> None:
        self._loop = loop
        self._total = total
        # In an agent, every invocation that the block starts is nested, so nested ones are its own.
        self._counts_nested = _in_agent()
        self._before, self._retries_before = self._count(), loop.metrics.snapshot().retries
        self._began = anyio.current_time()
        # Times and the number of results at each; at most a few hundred entries.
        self._history = deque([(self._began, 0)])

    def read(self) -> State:
        now, so_far = anyio.current_time(), self._loop.metrics.snapshot()
        # The recorder may have been reset.
        counts = {name: max(0, count - self._before[name]) for name, count in self._count().items()}
        loop, limiter = self._loop.statistics(), self._loop.limiter.statistics()
        failures = counts[Status.ERROR] + counts[Status.TIMEOUT]
        # Cancelled and skipped invocations are not done, so an interrupted run does not look complete.
        done = counts[Status.SUCCESS] + failures
        return State(
            now - self._began,
            done + counts["replayed"],
            counts["replayed"],
            counts["nested"],
            self._total,
            loop.drained,
            loop.running,
            loop.waiting,
            max(0, so_far.retries - self._retries_before),
            failures,
            counts[Status.CANCELLED],
            counts[Status.SKIPPED],
            self._rate(now, done),
            so_far.latency.p50_ms,
            so_far.latency.p95_ms,
            None if limiter.paused_until is None else limiter.paused_until - now,
            None if limiter.outage_since is None else max(0.0, now - limiter.outage_since),
            limiter.probing,
        )

    def _count(self) -> dict[str, int]:
        """Return the numbers of results so far: by status, replayed, and nested."""
        loop = self._loop.statistics()
        nested: dict[Status, int] = {} if self._counts_nested else loop.nested
        counts = self._loop.metrics.snapshot().counts
        own: dict[str, int] = {status: counts[status] - nested.get(status, 0) for status in Status}
        return {**own, "replayed": loop.replayed, "nested": sum(nested.values())}

    def _rate(self, now: float, done: int) -> float:
        past = self._history
        if done != past[-1][1]:
            past.append((now, done))

        while len(past) > 1 and now - past[1][0] >= _RATE_SECONDS and done - past[1][1] >= _RATE_RESULTS:
            past.popleft()

        since, count = past[0]
        return max(0, done - count) / (now - since) if now > since else 0.0


def _in_agent() -> bool:
    try:
        current_attempt()
    except RuntimeError:
        return False

    return True


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

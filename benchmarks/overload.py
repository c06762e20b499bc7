"""
How a limiter copes with a provider whose capacity falls, is gone, or comes back slowly: a simulation in
virtual time, with the real library between the simulated provider and its invocations.

    python benchmarks/overload.py
    python benchmarks/overload.py --backend trio --scenarios outage --picture overload.svg

A call takes two seconds in the mean (log-normal, sigma 0.5). What the provider does not take it rejects
after 50 ms with HTTP 429, and a Retry-After of one second where the scenario says so. The *share of ideal* is
the time that a client would need who knew the capacity at every moment, divided by the time that was needed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import anyio
import attrs

import agentloop._limits.limiter
from agentloop import AgentLoop, Event, Invocation, InvocationResult, Limiter, LimitEvent, LoopConfig
from agentloop._limits.overload import AdaptiveLimit
from agentloop.testing import virtual_clock

MEAN_SECONDS, SIGMA = 2.0, 0.5
REJECTION_SECONDS = 0.05
CAPACITY = 50

Capacity: TypeAlias = Callable[[float], float]


class Overloaded(Exception):
    """HTTP 429."""

    status_code = 429

    def __init__(self, retry_after: float | None) -> None:
        super().__init__(retry_after)
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}


class Provider:
    """
    Takes as many calls at once, or in a second, as its capacity is at that time.

    :param capacity: how many calls at once; the rate is that divided by the mean duration
    :param by_rate: whether to bound the rate instead
    """

    def __init__(self, capacity: Capacity, by_rate: bool, retry_after: float | None) -> None:
        self.capacity = capacity
        self.by_rate = by_rate
        self.retry_after = retry_after
        self.random = random.Random(1)
        self.running = 0
        self.started: list[float] = []
        self.finished: list[float] = []
        self.rejected: list[float] = []
        self._tokens = 1.0
        self._filled_at = 0.0

    async def call(self, _: int) -> None:
        now = anyio.current_time()
        self.started.append(now)
        seconds = self.random.lognormvariate(math.log(MEAN_SECONDS) - SIGMA**2 / 2, SIGMA)
        if not self._takes(now):
            await anyio.sleep(REJECTION_SECONDS)
            self.rejected.append(anyio.current_time())
            raise Overloaded(self.retry_after)

        self.running += 1
        try:
            await anyio.sleep(seconds)
        finally:
            self.running -= 1

        self.finished.append(anyio.current_time())

    def _takes(self, now: float) -> bool:
        capacity = self.capacity(now)
        if not self.by_rate:
            return self.running + 1 <= capacity

        # Half a second's worth may come at once.
        rate = capacity / MEAN_SECONDS
        self._tokens = min(max(1.0, rate / 2), self._tokens + (now - self._filled_at) * rate)
        self._filled_at = now
        if capacity < 1 or self._tokens < 1:
            return False

        self._tokens -= 1
        return True


# -- policies


class WithoutCoolOff(AdaptiveLimit):
    """Ours, but nobody waits for what a server has told somebody else."""

    def hold(self, now: float, seconds: float) -> None:
        pass


class Timed(AdaptiveLimit):
    """Additive increase by one each second, halved by an overload at most once in 15 seconds."""

    def __init__(self, ceiling: int) -> None:
        super().__init__(ceiling)
        self._cut_at = -math.inf
        self._grown_at = 0.0

    @property
    def recovers(self) -> bool:
        return self.limit < self.ceiling

    def complete(self, _: int) -> None:
        now = anyio.current_time()
        if now - max(self._grown_at, self._cut_at) >= 1:
            self._grown_at = now
            self.limit += 1

    def reject(self, _: int, now: float) -> None:
        if now - self._cut_at >= 15:
            self._cut_at = now
            self.cuts += 1
            self.limit = max(1, self.limit // 2)

    def hold(self, now: float, seconds: float) -> None:
        pass


POLICIES: dict[str, tuple[int, type[AdaptiveLimit] | None]] = {
    "fixed 64": (64, None),
    "AIMD by a timer": (64, Timed),
    "ours, no cool-off": (64, WithoutCoolOff),
    "ours": (64, AdaptiveLimit),
    "ours, over-set to 200": (200, AdaptiveLimit),
}

# -- scenarios


@attrs.frozen
class Scenario:
    """
    :param text: what happens
    :param calls: how many invocations there are, for each of the loops
    :param capacity: of the provider, at a time
    :param loops: how many loops there are, each with a limiter of its own
    """

    text: str
    calls: int
    capacity: Capacity
    by_rate: bool = False
    retry_after: float | None = None
    patience: float = 600.0
    loops: int = 1
    until: float = 600.0


def steps(*changes: tuple[float, float]) -> Capacity:
    """Return a capacity that changes to a share of the full one at each time."""
    times = [at for at, _ in changes]
    return lambda now: CAPACITY * changes[bisect_right(times, now) - 1][1]


def ramp(now: float) -> float:
    return CAPACITY * min(1.0, 0.1 + 0.9 * now / 300)


brown_out = steps((-1, 1), (60, 0.3), (180, 1))
outage = steps((-1, 1), (60, 0), (660, 1))
SCENARIOS = {
    "brown-out": Scenario("30 % of the capacity for 120 s, calls at once", 8000, brown_out),
    "brown-out-rate": Scenario("30 % of the capacity for 120 s, calls in a second", 8000, brown_out, True),
    "brown-out-told": Scenario("the same, with Retry-After", 8000, brown_out, True, 1.0),
    "outage": Scenario("nothing at all for 600 s", 8000, outage, patience=1200, until=1000),
    "ramp": Scenario("from 10 % to 100 % in 300 s", 6000, ramp),
    "two-loops": Scenario(
        "two loops, each with a limiter of its own, at full capacity", 4000, steps((-1, 1)), loops=2
    ),
}


@attrs.frozen
class Outcome:
    provider: Provider
    results: list[InvocationResult[None]]
    limits: list[tuple[float, int]]
    seconds: float
    ideal_seconds: float

    @property
    def row(self) -> str:
        done = sum(result.success for result in self.results)
        rejections = 100 * len(self.provider.rejected) / done
        share = self.ideal_seconds / self.seconds
        return f"{share:>14.0%} {rejections:>14.1f} {len(self.results) - done:>6}"


def ideal(scenario: Scenario) -> float:
    """Return in how many seconds a client could be ready that always uses the capacity to the full."""
    done, now, step = 0.0, 0.0, 0.1
    while done < scenario.calls * scenario.loops:
        done += scenario.capacity(now) / MEAN_SECONDS * step
        now += step

    # The last calls have only begun then.
    return now


def simulate(scenario: Scenario, ceiling: int, governor: type[AdaptiveLimit] | None, backend: str) -> Outcome:
    async def main() -> Outcome:
        start = anyio.current_time()
        provider = Provider(
            lambda now: scenario.capacity(now - start), scenario.by_rate, scenario.retry_after
        )
        results: list[InvocationResult[None]] = []
        limits: list[tuple[float, int]] = []

        def note(event: Event) -> None:
            if isinstance(event, LimitEvent):
                limits.append((event.at - start, event.limit))

        async def use() -> None:
            limiter = Limiter(ceiling, adaptive=governor is not None)
            config = LoopConfig(timeout_seconds=None, overload_timeout_seconds=scenario.patience)
            loop = AgentLoop(config, limiter=limiter, on_event=note)
            results.extend(await loop.run_all(Invocation.map(provider.call, range(scenario.calls))))

        async with anyio.create_task_group() as group:
            for _ in range(scenario.loops):
                group.start_soon(use)

        for times in (provider.started, provider.finished, provider.rejected):
            times[:] = [at - start for at in times]

        return Outcome(provider, results, limits, anyio.current_time() - start, ideal(scenario))

    if governor is not None:
        agentloop._limits.limiter.AdaptiveLimit = governor  # the one private place that this needs

    random.seed(1)
    name, options = virtual_clock(backend, seed=1)
    return anyio.run(main, backend=name, backend_options=options)


def recovery(outcome: Outcome, at: float) -> int:
    """Return after how many seconds from ``at`` on 90 % of the capacity were in use, for ten seconds."""
    finished = sorted(outcome.provider.finished)
    enough = 0.9 * CAPACITY / MEAN_SECONDS * 10
    for seconds in itertools.count():
        first, last = bisect_left(finished, at + seconds), bisect_left(finished, at + seconds + 10)
        if last - first >= enough:
            return seconds

    raise AssertionError


# -- the picture

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 860, 200, 44, 34, 26
COLOURS = {"ours": "#0b6e99", "AIMD by a timer": "#d98a1f"}


def draw(panels: dict[str, dict[str, Outcome]]) -> str:
    """Return an SVG of the working limits over time, above the capacity that there was."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(panels)}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT * len(panels)}" fill="white"/>',
    ]
    for number, (name, outcomes) in enumerate(panels.items()):
        scenario = SCENARIOS[name]
        end = min(scenario.until, max(outcome.seconds for outcome in outcomes.values()))
        top = number * HEIGHT + TOP
        width, height = WIDTH - LEFT - 12, HEIGHT - TOP - BOTTOM

        def x(at: float, end: float = end, width: int = width) -> float:
            return round(LEFT + min(at, end) / end * width, 1)

        def y(value: float, top: int = top, height: int = height) -> float:
            return round(top + height - value / 70 * height, 1)

        times = [end * step / 800 for step in range(801)]
        area = " ".join(f"{x(at)},{y(scenario.capacity(at))}" for at in times)
        parts.append(f'<text x="{LEFT}" y="{top - 14}" font-weight="bold">{name}: {scenario.text}</text>')
        parts.append(f'<polygon points="{x(0)},{y(0)} {area} {x(end)},{y(0)}" fill="#dfe7ec"/>')
        for value in (0, 32, 64):
            parts.append(f'<line x1="{LEFT}" x2="{x(end)}" y1="{y(value)}" y2="{y(value)}" stroke="#ccc"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{value}</text>')

        parts.extend(
            f'<text x="{x(at)}" y="{y(0) + 17}" text-anchor="middle">{at} s</text>'
            for at in range(0, int(end) + 1, 60)
        )

        for label, outcome in outcomes.items():
            (_, first), *rest = outcome.limits
            path = f"M{x(0)},{y(first)}" + "".join(f"H{x(at)}V{y(limit)}" for at, limit in rest if at <= end)
            parts.append(
                f'<path d="{path}H{x(end)}" fill="none" stroke="{COLOURS[label]}" stroke-width="1.6"/>'
            )

    legend = {"capacity": "#dfe7ec", **COLOURS}
    for place, (label, colour) in enumerate(legend.items()):
        at = WIDTH - 360 + place * 110
        parts.append(f'<rect x="{at}" y="10" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{at + 17}" y="20">{label}</text>')

    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--picture", type=Path, help="where to draw the working limits, as an SVG")
    options = parser.parse_args()
    panels: dict[str, dict[str, Outcome]] = {}
    for name in options.scenarios:
        scenario = SCENARIOS[name]
        print(f"\n{name}: {scenario.text}\n{'':24} {'share of ideal':>14} {'rejected / 100':>14} {'lost':>6}")
        for policy in options.policies:
            outcome = simulate(scenario, *POLICIES[policy], options.backend)
            extra = ""
            if name == "outage":
                tried = sum(70 < x < 660 for x in outcome.provider.started)
                extra = f"   {tried} calls in the outage, recovered {recovery(outcome, 660)} s after it"

            print(f"{policy:24} {outcome.row}{extra}", flush=True)
            if policy in COLOURS:
                panels.setdefault(name, {})[policy] = outcome

    if options.picture:
        options.picture.write_text(draw(panels))

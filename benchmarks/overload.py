"""
How a limiter copes with a provider in trouble: one whose capacity falls, that is gone, or that names too long
a time in its Retry-After. A simulation in virtual time, with the real library between the providers of
``providers.py`` and its invocations.

    python benchmarks/overload.py
    python benchmarks/overload.py --backend trio --scenarios outage --picture overload.svg

A call takes two seconds in the mean (log-normal, sigma 0.5), unless the scenario says otherwise, and times
out after 30. A call that the provider does not take fails after 50 ms. The *share of ideal* is the time that
a client would need who knew the capacity at every moment, divided by the time that was needed; there is none
if invocations were lost.
"""

from __future__ import annotations

import argparse
import math
import random
from bisect import bisect_left
from pathlib import Path
from typing import Literal
from unittest import mock

import anyio
import attrs
from providers import CAPACITY, SCENARIOS, InAWindow, Provider, Scenario

import agentloop._limits.limiter
import agentloop._provider.provider
from agentloop import AgentLoop, Event, Invocation, InvocationResult, Limiter, LimitEvent, LoopConfig
from agentloop._provider.cool_off import CoolOff
from agentloop._provider.outage import Outage
from agentloop._provider.overload import AdaptiveLimit
from agentloop.testing import virtual_clock

# -- policies


class Timed(AdaptiveLimit):
    """Additive increase by one each second, halved by an overload at most once in 15 seconds."""

    def __init__(self, ceiling: int) -> None:
        super().__init__(ceiling)
        self._cut_at = -math.inf
        self._grown_at = 0.0

    @property
    def recovers(self) -> bool:
        return self.limit < self.ceiling

    def complete(self, epoch: int, in_use: int) -> None:  # noqa: ARG002  # as the base class has it
        now = anyio.current_time()
        if now - max(self._grown_at, self._cut_at) >= 1:
            self._grown_at = now
            self.limit += 1

    def reject(self, epoch: int, in_use: int, now: float) -> None:  # noqa: ARG002  # the same
        if now - self._cut_at >= 15:
            self._cut_at = now
            self.cuts += 1
            self.limit = max(1, self.limit // 2)


class NoCoolOff(CoolOff):
    """Nobody waits for what a server has told somebody else."""

    def hold(self, now: float, seconds: float, limit: int) -> bool:  # noqa: ARG002  # the same
        return False


class NoProbes(CoolOff):
    """Everybody waits for the whole time."""

    def ready_at(self, now: float) -> float:
        return self.until if now < self.until else super().ready_at(now)


class NoOutage(Outage):
    """A failure that is a sign of an outage is like any other."""

    def fail(self, limit: int, now: float) -> bool:  # noqa: ARG002  # the same
        return False


@attrs.frozen
class Policy:
    """
    :param ceiling: the limit that the user has set, if it is not the scenario's
    :param adaptive: whether the limiter is adaptive
    :param limit: how it finds the limit
    :param cool_off: what a Retry-After means to others
    :param outage: how it finds out that the provider is gone
    """

    ceiling: int | None = None
    adaptive: bool = True
    limit: type[AdaptiveLimit] = AdaptiveLimit
    cool_off: type[CoolOff] = CoolOff
    outage: type[Outage] = Outage

    def learn(self, limit: AdaptiveLimit) -> agentloop._provider.provider.Provider:
        """Return what a limiter learns with, made of the parts of this policy."""
        provider = agentloop._provider.provider.Provider(self.limit(limit.ceiling))
        provider.cool_off = self.cool_off()
        provider.outage = self.outage()
        return provider


POLICIES = {
    "a fixed limit": Policy(adaptive=False),
    "AIMD by a timer": Policy(limit=Timed, cool_off=NoCoolOff, outage=NoOutage),
    "ours, no probes": Policy(cool_off=NoProbes),
    "ours, no outages": Policy(outage=NoOutage),
    "ours": Policy(),
    "ours, over-set to 200": Policy(ceiling=200),
}


# -- the simulation


@attrs.frozen
class Outcome:
    provider: Provider
    results: list[InvocationResult[None]]
    limits: list[tuple[float, int]]
    seconds: float

    @property
    def lost(self) -> int:
        return sum(not result.success for result in self.results)

    @property
    def share(self) -> float:
        """The share of ideal."""
        scenario = self.provider.scenario
        return scenario.provider.ideal_seconds(scenario) / self.seconds

    @property
    def failed_per_100(self) -> float:
        return 100 * len(self.provider.failed) / max(1, len(self.results) - self.lost)

    @property
    def row(self) -> str:
        scenario = self.provider.scenario
        share = "-" if self.lost else f"{self.share:.0%}"
        row = f"{share:>14} {self.failed_per_100:>12.1f} {self.lost:>6}"
        if scenario.outage is not None:
            start, end = scenario.outage
            too_many = sum(start <= at < end for at in self.provider.failed)
            first = next((f"{at - end:.0f}" for at in self.provider.taken if at >= end), "-")
            again = self.recovery(end)
            row += f" {too_many:>14} {first:>14} {'-' if again is None else again:>14}"
        elif scenario.provider is InAWindow:
            row += f" {len(self.provider.failed) / InAWindow.windows(scenario):>14.1f}"

        return row

    def recovery(self, at: float) -> int | None:
        """Return after how many seconds from ``at`` on 90 % of the capacity were in use, for ten seconds."""
        finished = self.provider.finished
        enough = 0.9 * CAPACITY / self.provider.scenario.mean_seconds * 10
        for seconds in range(max(0, int(self.seconds - at))):
            first, last = bisect_left(finished, at + seconds), bisect_left(finished, at + seconds + 10)
            if last - first >= enough:
                return seconds

        return None


def header(scenario: Scenario) -> str:
    words = f"{'':24} {'share of ideal':>14} {'failed / 100':>12} {'lost':>6}"
    if scenario.outage is not None:
        words += f" {'calls too many':>14} {'first taken, s':>14} {'90 % again, s':>14}"
    elif scenario.provider is InAWindow:
        words += f" {'... / window':>14}"

    return words


def simulate(scenario: Scenario, policy: Policy, backend: Literal["asyncio", "trio"]) -> Outcome:
    async def main() -> Outcome:
        provider = scenario.provider(scenario)
        results: list[InvocationResult[None]] = []
        limits: list[tuple[float, int]] = []

        def note(event: Event) -> None:
            if isinstance(event, LimitEvent):
                limits.append((event.at - provider.start, event.limit))

        async def use() -> None:
            limiter = Limiter(policy.ceiling or scenario.ceiling, adaptive=policy.adaptive)
            config = LoopConfig(timeout_seconds=30, overload_timeout_seconds=scenario.patience)
            loop = AgentLoop(config, limiter=limiter, on_event=note)
            results.extend(await loop.run_all(Invocation.map(provider.call, range(scenario.calls))))

        async with anyio.create_task_group() as group:
            for _ in range(scenario.loops):
                group.start_soon(use)

        return Outcome(provider, results, limits, anyio.current_time() - provider.start)

    random.seed(1)
    name, options = virtual_clock(backend, seed=1)
    # A limiter lets nobody choose what it learns with.
    with mock.patch.object(agentloop._limits.limiter, "Provider", policy.learn):
        return anyio.run(main, backend=name, backend_options=options)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--picture", type=Path, help="where to draw the working limits, as an SVG")
    options = parser.parse_args()
    panels: dict[str, dict[str, Outcome]] = {}
    for name in options.scenarios:
        scenario = SCENARIOS[name]
        print(f"\n{name}: {scenario.text}\n{header(scenario)}")
        for policy in options.policies:
            outcome = simulate(scenario, POLICIES[policy], options.backend)
            print(f"{policy:24} {outcome.row}", flush=True)
            if policy in COLOURS:
                panels.setdefault(name, {})[policy] = outcome

    if options.picture:
        options.picture.write_text(draw(panels))


if __name__ == "__main__":
    main()

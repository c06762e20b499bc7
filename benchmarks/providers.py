"""Simulated providers in trouble, and what happens to each of them: what ``overload.py`` runs against."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable
from typing import TypeAlias

import anyio
import attrs

from agentloop.testing import FakeHTTPError

MEAN_SECONDS, SIGMA = 2.0, 0.5
FAILURE_SECONDS = 0.05
CAPACITY = 50
WINDOW_SECONDS = 60.0

Capacity: TypeAlias = Callable[[float], float]


@attrs.frozen
class Scenario:
    """
    :param text: what happens
    :param calls: how many invocations there are, for each of the loops
    :param capacity: of the provider, at a time
    :param provider: what the capacity bounds: calls at once, in a second or in a window
    :param retry_after: how many seconds a rejection names, at a time; none if ``None``
    :param outage: from when to when the capacity is 0, if it is
    :param gone: how calls fail then: ``"rejected"``, ``"refused"``, ``"500"`` or ``"hang"``
    :param mean_seconds: how long a call takes in the mean
    :param ceiling: the limit that a user has set
    :param patience: ``overload_timeout_seconds``
    :param loops: how many loops there are, each with a limiter of its own
    :param until: where a picture ends
    """

    text: str
    calls: int
    capacity: Capacity
    provider: type[Provider]
    retry_after: Callable[[float], float] | None = None
    outage: tuple[float, float] | None = None
    gone: str = "rejected"
    mean_seconds: float = MEAN_SECONDS
    ceiling: int = 64
    patience: float = 600.0
    loops: int = 1
    until: float = 600.0


class Provider:
    """Counts its calls; a subclass says which of them it takes."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = random.Random(1)
        self.start = anyio.current_time()
        self.running = 0
        self.taken: list[float] = []
        self.failed: list[float] = []
        """When each call began that was taken, and each that was not."""
        self.finished: list[float] = []

    async def call(self, _: int) -> None:
        now = anyio.current_time() - self.start
        mean = math.log(self.scenario.mean_seconds) - SIGMA**2 / 2
        seconds = self.random.lognormvariate(mean, SIGMA)
        if not self.takes(now):
            self.failed.append(now)
            await self._fail(now)

        self.taken.append(now)
        self.running += 1
        try:
            await anyio.sleep(seconds)
        finally:
            self.running -= 1

        self.finished.append(anyio.current_time() - self.start)

    async def _fail(self, now: float) -> None:
        is_gone = self.scenario.capacity(now) == 0
        if is_gone and self.scenario.gone == "hang":
            await anyio.sleep_forever()

        await anyio.sleep(FAILURE_SECONDS)
        if is_gone and self.scenario.gone == "refused":
            raise ConnectionRefusedError(111, "Connection refused")

        if is_gone and self.scenario.gone == "500":
            raise FakeHTTPError(500)

        retry_after = self.scenario.retry_after
        raise FakeHTTPError(429, None if retry_after is None else retry_after(now))

    def takes(self, now: float) -> bool:
        """Return whether a call that begins now is taken, and count it."""
        raise NotImplementedError

    @staticmethod
    def ideal_seconds(scenario: Scenario) -> float:
        """Return after how many seconds a client has begun its last call that always uses all capacity."""
        done, now, step = 0.0, 0.0, 0.1
        while done < scenario.calls * scenario.loops:
            done += scenario.capacity(now) / scenario.mean_seconds * step
            now += step

        return now


class AtOnce(Provider):
    """Takes as many calls at once as its capacity is."""

    def takes(self, now: float) -> bool:
        return self.running + 1 <= self.scenario.capacity(now)


class InASecond(Provider):
    """Takes as many calls in a second as its capacity divided by their mean duration."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self._tokens = 1.0
        self._filled_at = -math.inf

    def takes(self, now: float) -> bool:
        # Half a second's worth may come at once.
        capacity = self.scenario.capacity(now)
        rate = capacity / self.scenario.mean_seconds
        self._tokens = min(max(1.0, rate / 2), self._tokens + (now - self._filled_at) * rate)
        self._filled_at = now
        if capacity < 1 or self._tokens < 1:
            return False

        self._tokens -= 1
        return True


class InAWindow(Provider):
    """Takes as many calls in each window of a minute as its capacity is, at any time in it."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self._window = 0.0
        self._taken = 0

    def takes(self, now: float) -> bool:
        window = now // WINDOW_SECONDS
        if window != self._window:
            self._window, self._taken = window, 0

        if self._taken >= self.scenario.capacity(now):
            return False

        self._taken += 1
        return True

    @staticmethod
    def windows(scenario: Scenario) -> int:
        """Return how many windows the calls need."""
        return math.ceil(scenario.calls / scenario.capacity(0))

    @staticmethod
    def ideal_seconds(scenario: Scenario) -> float:
        return (InAWindow.windows(scenario) - 1) * WINDOW_SECONDS


# -- what happens


def steps(*changes: tuple[float, float]) -> Capacity:
    """Return a capacity that changes to a share of the full one at each time."""
    times = [at for at, _ in changes]
    return lambda now: CAPACITY * changes[bisect_right(times, now) - 1][1]


def gone_for(start: float, end: float) -> Capacity:
    return steps((-1, 1), (start, 0), (end, 1))


def steady(capacity: float) -> Capacity:
    return lambda _: capacity


def ramp(now: float) -> float:
    return CAPACITY * min(1.0, 0.1 + 0.9 * now / 300)


def rest_of_window(now: float) -> float:
    """Return what a server says with a window in mind: whole seconds, rounded up."""
    return math.ceil(WINDOW_SECONDS - now % WINDOW_SECONDS)


def outage(text: str, gone: str, seconds: float, patience: float = 600) -> Scenario:
    """Return a scenario in which the provider is gone for a time, and the limit is right otherwise."""
    times = 60, 60 + seconds
    return Scenario(
        text, 4000, gone_for(*times), AtOnce, None, times, gone, ceiling=CAPACITY, patience=patience
    )


def over_strict(retry_after: float) -> Scenario:
    text = f"10 calls at once, Retry-After {retry_after:.0f} on every 429"
    return Scenario(text, 3000, steady(10), AtOnce, steady(retry_after), ceiling=20)


def window(seconds: float, told: bool) -> Scenario:
    text = f"60 calls of {seconds:g} s in each minute, {'with' if told else 'without'} Retry-After"
    retry_after = rest_of_window if told else None
    return Scenario(text, 600, steady(60), InAWindow, retry_after, mean_seconds=seconds, ceiling=20)


HOUR = 3600
brown_out = steps((-1, 1), (60, 0.3), (180, 1))
SCENARIOS = {
    "brown-out": Scenario("30 % of the capacity for 120 s, calls at once", 8000, brown_out, AtOnce),
    "brown-out-rate": Scenario(
        "30 % of the capacity for 120 s, calls in a second", 8000, brown_out, InASecond
    ),
    "brown-out-told": Scenario("the same, with Retry-After", 8000, brown_out, InASecond, steady(1.0)),
    "outage": Scenario(
        "nothing at all for 600 s",
        8000,
        gone_for(60, 660),
        AtOnce,
        outage=(60, 660),
        patience=1200,
        until=1000,
    ),
    "ramp": Scenario("from 10 % to 100 % in 300 s", 6000, ramp, AtOnce),
    "two-loops": Scenario(
        "two loops, each with a limiter of its own, at full capacity", 4000, steady(CAPACITY), AtOnce, loops=2
    ),
    "refused-60": outage("connections refused for 60 s", "refused", 60),
    "refused-300": outage("connections refused for 300 s", "refused", 300),
    "refused-4h": outage("connections refused for 4 h", "refused", 4 * HOUR, patience=8 * HOUR),
    "500-60": outage("HTTP 500 for 60 s", "500", 60),
    "500-300": outage("HTTP 500 for 300 s", "500", 300),
    "hang-60": outage("no answer for 60 s", "hang", 60),
    "hang-300": outage("no answer for 300 s", "hang", 300),
    "told-5": over_strict(5),
    "told-20": over_strict(20),
    "told-60": over_strict(60),
    "told-89": over_strict(89),
    "window-short-told": window(0.05, True),
    "window-long-told": window(2.0, True),
    "window-short": window(0.05, False),
    "window-long": window(2.0, False),
}

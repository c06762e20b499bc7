"""Whole batches on simulated providers in trouble: what they lose, how long they take, what they cost."""

import math
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import attrs
import pytest
from trouble import overload, passed, refuse, same_chance

from agentloop import AgentLoop, Invocation, InvocationResult, Limiter, LoopConfig, Status
from agentloop.testing import FakeHTTPError, virtual_clock

pytestmark = pytest.mark.long

REJECTION_SECONDS = 0.05
CALLS = 1500
HOUR = 3600.0


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One event loop is enough: what counts here is the time and the chance, the same in both."""
    return virtual_clock("asyncio")


@pytest.fixture(autouse=True)
def _chance() -> Iterator[None]:
    with same_chance():
        yield


@attrs.define
class Provider:
    """Counts the calls that are made to it; what becomes of each, a subclass says."""

    began: float = attrs.field(factory=anyio.current_time)
    started: list[float] = attrs.field(factory=list)
    rejected: int = 0
    running: int = 0

    @property
    def now(self) -> float:
        return anyio.current_time() - self.began

    async def call(self, _: int = 0) -> None:
        self.started.append(self.now)
        await self.answer()

    async def answer(self) -> None:
        raise NotImplementedError

    async def reject(self, retry_after: float | None = None) -> None:
        self.rejected += 1
        await anyio.sleep(REJECTION_SECONDS)
        raise FakeHTTPError(429, retry_after)

    async def serve(self, seconds: float) -> None:
        self.running += 1
        try:
            await anyio.sleep(seconds)
        finally:
            self.running -= 1


def lognormal(mean: float) -> float:
    return random.lognormvariate(math.log(mean) - 0.125, 0.5)


async def run(
    provider: Provider, calls: int, limit: int, **settings: Any
) -> tuple[float, list[InvocationResult[None]]]:
    """Return how long a batch of calls has taken, and its results."""
    begin = anyio.current_time()
    loop = AgentLoop(LoopConfig(max_concurrency=limit, **settings))
    results = await loop.run_all(Invocation.map(provider.call, range(calls)))
    return passed(begin), results


# -- outages


async def look_up_fails() -> None:
    raise socket.gaierror(-3, "Temporary failure in name resolution")


async def bad_gateway() -> None:
    await anyio.sleep(REJECTION_SECONDS)
    raise FakeHTTPError(502)


@attrs.define
class Gone(Provider):
    """Fails from the 20th second on, for some time; else a call takes two seconds."""

    fail: Callable[[], Awaitable[None]] = attrs.field(kw_only=True)
    seconds: float = attrs.field(kw_only=True)

    async def answer(self) -> None:
        if 20 <= self.now < 20 + self.seconds:
            await self.fail()

        await anyio.sleep(2)


@pytest.mark.parametrize(
    ("seconds", "patience", "most"),
    [(60, 600, 450), (300, 600, 450), (4 * HOUR, 8 * HOUR, 3500)],
    ids=["a minute", "five minutes", "a night"],
)
@pytest.mark.parametrize("fail", [refuse, look_up_fails, bad_gateway, anyio.sleep_forever])
async def test_outage_loses_nothing_and_little_time(
    fail: Callable[[], Awaitable[None]], seconds: float, patience: float, most: int
) -> None:
    provider = Gone(fail=fail, seconds=seconds)
    took, results = await run(provider, CALLS, 50, timeout_seconds=30, overload_timeout_seconds=patience)
    assert all(result.success for result in results)
    assert took <= CALLS / 50 * 2 + seconds + 75 + (30 if fail is anyio.sleep_forever else 0)
    assert len(provider.started) - CALLS <= most


@pytest.mark.parametrize("kind", ["flaky", "bad input"])
async def test_other_failures_cost_what_they_cost_without_adaptation(kind: str) -> None:
    async def calls(adaptive: bool) -> tuple[int, Counter[int]]:
        tried: Counter[int] = Counter()

        async def call(number: int) -> None:
            tried[number] += 1
            await anyio.sleep(0.1)
            if kind == "bad input":
                raise ValueError

            # Each attempt fails or not whatever the order is.
            if random.Random(f"{number} {tried[number]}").random() < 0.1:
                await refuse()

        loop = AgentLoop(limiter=Limiter(50, adaptive=adaptive))
        results = await loop.run_all(Invocation.map(call, range(200)))
        return tried.total(), Counter(result.retries for result in results)

    assert await calls(True) == await calls(False)


# -- a provider that does not come back


@pytest.mark.parametrize(
    "fail",
    [
        lambda: overload(),
        lambda: overload(200),
        lambda: overload(86_400),
        lambda: overload(0),
        refuse,
        bad_gateway,
        anyio.sleep_forever,
    ],
    ids=["429", "429 for 200 s", "429 for a day", "429 for 0 s", "refused", "502", "hangs"],
)
@pytest.mark.parametrize("patience", [60, 600])
async def test_dead_provider_costs_at_most_twice_the_patience(
    fail: Callable[[], Awaitable[None]], patience: float
) -> None:
    provider = Gone(fail=fail, seconds=math.inf)
    await anyio.sleep(20)
    took, results = await run(provider, 200, 10, timeout_seconds=30, overload_timeout_seconds=patience)
    assert {result.status for result in results} <= {Status.ERROR, Status.TIMEOUT, Status.SKIPPED}
    assert results[-1].status is Status.SKIPPED
    assert took <= 2 * patience + (30 if fail is anyio.sleep_forever else 0)
    assert len(provider.started) <= 80


# -- too many calls at once


@attrs.define
class Busy(Provider):
    """Takes some calls at once, of two seconds in the mean, and rejects others."""

    capacity: Callable[[float], int] = attrs.field(kw_only=True)
    retry_after: float | None = None

    async def answer(self) -> None:
        if self.running >= self.capacity(self.now):
            await self.reject(self.retry_after)

        await self.serve(lognormal(2))


@pytest.mark.parametrize(
    ("retry_after", "limit", "share"),
    [(5, 20, 0.60), (20, 50, 0.58), (60, 20, 0.52), (60, 50, 0.52), (89, 50, 0.44)],
)
async def test_server_that_names_too_long_a_time_is_used(
    retry_after: float, limit: int, share: float
) -> None:
    provider = Busy(capacity=lambda _: 10, retry_after=retry_after)
    took, results = await run(provider, 1500, limit, timeout_seconds=None)
    assert all(result.success for result in results)
    assert 1500 / 10 * 2 / took >= share


@pytest.mark.parametrize(
    ("limit", "calls", "ideal", "rejections"), [(64, 3500, 182, 0.05), (200, 4500, 222, 0.12)]
)
async def test_brown_out_loses_little_time(limit: int, calls: int, ideal: float, rejections: float) -> None:
    provider = Busy(capacity=lambda now: 15 if 60 <= now < 120 else 50)
    took, results = await run(provider, calls, limit, timeout_seconds=None)
    assert all(result.success for result in results)
    assert ideal / took >= 0.85
    assert provider.rejected / calls <= rejections


async def test_provider_that_takes_nothing_is_tried_ever_less_often_and_used_at_once_when_it_is_back() -> (
    None
):
    provider = Busy(capacity=lambda now: 0 if 10 <= now < 310 else 50)
    took, results = await run(provider, 2000, 64, timeout_seconds=None)
    assert all(result.success for result in results)
    assert 380 / took >= 0.85
    assert sum(20 < at < 310 for at in provider.started) <= 30


# -- too many calls in a minute


@attrs.define
class Window(Provider):
    """Takes sixty calls in each minute."""

    says_when: bool = attrs.field(kw_only=True)
    seconds: float = attrs.field(kw_only=True)
    taken: Counter[int] = attrs.field(factory=Counter)

    async def answer(self) -> None:
        minute = int(self.now // 60)
        if self.taken[minute] >= 60:
            await self.reject((minute + 1) * 60 - self.now if self.says_when else None)

        self.taken[minute] += 1
        await self.serve(self.seconds)


@pytest.mark.parametrize("seconds", [0.05, 2])
@pytest.mark.parametrize(("says_when", "most"), [(True, 35), (False, 60)])
async def test_used_up_window_costs_few_rejections(says_when: bool, most: float, seconds: float) -> None:
    provider = Window(says_when=says_when, seconds=seconds)
    took, results = await run(provider, 600, 20, timeout_seconds=None)
    assert all(result.success for result in results)
    assert (9 * 60 + 3 * seconds) / took >= 0.82
    assert provider.rejected / 10 <= most

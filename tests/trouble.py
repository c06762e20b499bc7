"""Providers in trouble: how their calls fail, and what a limiter makes of that."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from agentloop import (
    AgentLoop,
    Event,
    Invocation,
    InvocationResult,
    Limiter,
    LimitEvent,
    LoopConfig,
    StartedEvent,
)
from agentloop.testing import FakeHTTPError

ONCE = LoopConfig(max_retries=0)


async def overload(retry_after: float | None = None) -> None:
    raise FakeHTTPError(429, retry_after)


async def refuse(*_: object) -> None:
    raise ConnectionRefusedError(111, "Connection refused")


async def fail(*_: object) -> None:
    """Say nothing of the provider."""
    raise LookupError


async def one_chunk(*_: object) -> AsyncIterator[int]:
    yield 1


def passed(since: float) -> float:
    return round(anyio.current_time() - since, 6)


class Starts:
    """
    When each attempt began, in seconds from now on, and what the limiter allowed meanwhile.

    Of ``"a/7"`` the name is ``"a"``.
    """

    def __init__(self) -> None:
        self.began = anyio.current_time()
        self.by_name: dict[str, list[float]] = {}
        self.order: list[str] = []
        self.told: list[LimitEvent] = []

    @property
    def limits(self) -> list[int]:
        return [event.limit for event in self.told]

    def __call__(self, event: Event) -> None:
        if isinstance(event, StartedEvent):
            at = round(event.at - self.began, 6)
            name = event.invocation.agent_id.partition("/")[0]
            self.by_name.setdefault(name, []).append(at)
            self.order.append(name)
        elif isinstance(event, LimitEvent):
            self.told.append(event)


def watched(limiter: Limiter, config: LoopConfig = ONCE) -> tuple[AgentLoop, Starts]:
    starts = Starts()
    return AgentLoop(config, limiter=limiter, on_event=starts), starts


one_or_batch = pytest.mark.parametrize("verb", ["single", "batch"])


async def run_one(
    verb: str, loop: AgentLoop, agent_id: str, fn: Callable[..., Any], *args: Any
) -> InvocationResult[Any]:
    """Run an invocation by itself, or as a batch."""
    if verb == "single":
        return await loop.run_single(agent_id, fn, *args)

    (result,) = await loop.run_all([Invocation(agent_id, fn, args)])
    return result


@contextmanager
def same_chance() -> Iterator[None]:
    """Make what is left to chance the same in each run."""
    before = random.getstate()
    random.seed(1)
    try:
        yield
    finally:
        random.setstate(before)

"""Both backends on virtual clocks, and nothing left behind after any test."""

from __future__ import annotations

import gc
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import hypothesis
import pytest
from audit import assert_quiet

from agentloop._limits.slots import SlotPool
from agentloop.testing import virtual_clock


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return virtual_clock(request.param)


# The machine that runs the tests may be slow, and a run is to be repeatable.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    if collector.istestfunction(obj, name) and inspect.iscoroutinefunction(obj):
        pytest.mark.usefixtures("quiet")(obj)


def pytest_collection_finish() -> None:
    """Let a test that looks for garbage not look through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
async def quiet() -> AsyncIterator[None]:
    """Nothing is left in the event loop of an async test: no task, no open generator, no cancellation."""
    yield
    await assert_quiet()


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SlotPool]]:
    """Every pool of slots that the test made, each of which has to be idle when it ends."""
    made: list[SlotPool] = []
    init = SlotPool.__init__

    def remember(pool: SlotPool, *args: Any, **kwargs: Any) -> None:
        init(pool, *args, **kwargs)
        made.append(pool)

    monkeypatch.setattr(SlotPool, "__init__", remember)
    yield made
    for pool in made:
        assert pool.running == 0, "a slot was not given back"
        assert pool.waiting == 0, "somebody still waits for a slot or a retry"
        assert pool.users == 0, "a call that has ended still counts as a user"
        assert not pool.on_raise, "a batch still listens to its limiter"

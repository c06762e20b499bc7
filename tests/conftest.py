"""Both backends on virtual clocks, and nothing left behind after any test."""

import gc
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import hypothesis
import pytest
from audit import assert_quiet, audit_limiters

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """
    Give pytest-xdist one test function at a time, and all tests that start Dask to one of its processes.

    Dask starts as many processes as there are processors. The groups of pytest-xdist have no effect under
    pytest 9.2, see https://github.com/pytest-dev/pytest-xdist/issues/1386.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "dask" if "/dask/" in nodeid else nodeid.partition("[")[0]

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Let a test that looks for garbage not look through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def imported() -> Iterator[None]:
    """Freeze the imports of each module after its tests too: some modules import large clients."""
    yield
    pytest_collection_finish()


@pytest.fixture
async def quiet() -> AsyncIterator[None]:
    """Nothing is left in the event loop of an async test: no task, no open generator, no cancellation."""
    yield
    await assert_quiet()


@pytest.fixture(autouse=True)
def idle() -> Iterator[None]:
    """Each limiter that a test used is idle when the test ends."""
    with audit_limiters():
        yield

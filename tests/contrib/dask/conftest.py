"""Worker processes for all tests of a module, which any event loop may call."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from anyio.from_thread import start_blocking_portal

from agentloop.contrib.dask import Workers


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The clock is the real one: no virtual clock waits for other processes."""
    return str(request.param)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with NothingLeftBehind(), start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(Workers(2)) as found:
            yield found


class NothingLeftBehind:
    """Asserts that all processes which were started in the block have ended."""

    def __enter__(self) -> None:
        self._before = {*psutil.Process().children(recursive=True)}

    def __exit__(self, *exc: object) -> None:
        started = {*psutil.Process().children(recursive=True)} - self._before
        # multiprocessing keeps this one for as long as the process lives.
        left = [one for one in started if not any("resource_tracker" in word for word in one.cmdline())]
        assert not left

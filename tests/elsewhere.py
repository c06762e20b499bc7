"""A limiter that is in use in the event loop of another thread."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import anyio

from agentloop import AgentLoop


@contextmanager
def in_use_elsewhere(loop: AgentLoop, backend: str) -> Generator[None]:
    """Run an invocation of a loop in a thread named ``other``, for as long as the block lasts."""
    started, release = threading.Event(), threading.Event()

    async def agent() -> None:
        started.set()
        while not release.is_set():
            await anyio.sleep(0.01)

    async def main() -> None:
        await loop.run_single("busy", agent)

    thread = threading.Thread(target=anyio.run, args=(main,), kwargs={"backend": backend}, name="other")
    thread.start()
    try:
        assert started.wait(5)
        yield
    finally:
        release.set()
        thread.join(5)


def in_threads(*functions: Callable[[], object]) -> None:
    """Call functions at once, each in a thread of its own, and wait until they have ended."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()

    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()

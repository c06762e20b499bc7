"""An object serves one event loop after the other, and never two at once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, Self

import anyio
import pytest
import trio
from agents import backends

from agentloop import AgentLoop, ContextStore
from agentloop._eventloop.handover import Handover, LoopState

REFUSED = "this thing is in use in another event loop, in thread 'other'; wait"


class State(LoopState):
    """One that does something before, or after, another event loop looks whether it is in use."""

    before: Callable[[], object] = staticmethod(lambda: None)
    after: Callable[[], object] = staticmethod(lambda: None)

    def is_in_use(self) -> bool:
        self.before()
        in_use = super().is_in_use()
        self.after()
        return in_use


class Elsewhere:
    """The event loop of another thread, which has the object."""

    def __init__(self, things: Handover[State], backend: str) -> None:
        self._things = things
        self._backend = backend
        self._calls: list[Callable[[], object]] = []
        self._call, self._done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=anyio.run, args=(self._main,), name="other")

    async def _main(self) -> None:
        self.state = State(self._things)
        self._things.take(self.state)
        self._done.set()
        while True:
            self._call.wait()
            self._call.clear()
            if not self._calls:
                return

            try:
                self._calls.pop()()
                self.error: BaseException | None = None
            except RuntimeError as exc:
                self.error = exc

            self._done.set()

    def begin(self, call: Callable[[], object] | None = None) -> None:
        """Let the thread make a call."""
        self._done.clear()
        if call is not None:
            self._calls.append(call)

        self._call.set()

    def wait(self) -> None:
        assert self._done.wait(5)

    def begin_claim(self) -> None:
        """Let the thread find the mark, and wait for the lock."""
        self.begin(self.claim)
        while not self.state.users:
            pass

    def claim(self) -> None:
        self.state.claim()

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self.begin()
        self._thread.join(5)


@pytest.fixture
def things() -> Handover[State]:
    return Handover("thing", "; wait")


@pytest.fixture
def other(things: Handover[State], backend: str) -> Any:
    with Elsewhere(things, backend) as other:
        yield other


def in_event_loop(things: Handover[State], backend: str, fn: Callable[[State], object]) -> None:
    async def main() -> None:
        fn(State(things))

    anyio.run(main, backend=backend)


@backends
def test_idle_object_is_handed_over(things: Handover[State], other: Elsewhere, backend: str) -> None:
    def use(state: State) -> None:
        assert things.current() is None
        things.take(state)
        assert things.current() is state
        state.claim()

    in_event_loop(things, backend, use)


async def test_each_side_leaves_its_own_sign_before_it_looks_for_the_others(things: Handover[State]) -> None:
    looked: list[str] = []

    class Watched(State):
        @property
        def retired(self) -> bool:
            if things.state is self:
                looked.append("for the mark")
                self.before = self.look_for_users
                with pytest.raises(RuntimeError, match="this thing is in use"):
                    things.take(State(things))

            return self._retired

        @retired.setter
        def retired(self, value: bool) -> None:
            self._retired = value

        def look_for_users(self) -> None:
            looked.append("for users")
            assert self._retired

    state = Watched(things)
    things.take(state)
    state.claim()
    assert (looked, things.state, state.users) == (["for the mark", "for users"], state, 1)


@backends
def test_claim_before_another_event_loop_looks_wins(
    things: Handover[State], other: Elsewhere, backend: str
) -> None:
    def use(state: State) -> None:
        other.state.before = other.begin_claim
        with pytest.raises(RuntimeError, match=REFUSED):
            things.take(state)

        other.wait()
        assert other.error is None
        assert (things.state, other.state.users, other.state.retired) == (other.state, 1, False)

    in_event_loop(things, backend, use)


@backends
@pytest.mark.parametrize("first", ["the new one", "the old one"])
def test_claim_after_another_event_loop_has_looked_decides_again(
    things: Handover[State], other: Elsewhere, backend: str, first: str
) -> None:
    def use(state: State) -> None:
        if first == "the old one":
            # Nobody uses it yet when the lock is free again.
            other.state.after = other.begin_claim
            things.take(state)
            other.wait()
            assert other.error is None
            other.state.after = lambda: None
            # Later claims do without the lock.
            assert not other.state.retired
            with pytest.raises(RuntimeError, match=REFUSED):
                state.claim()

            assert (state.users, other.state.users, things.state) == (0, 1, other.state)
        else:
            things.take(state)
            state.claim()
            other.begin(other.claim)
            other.wait()
            assert "in use in another event loop, in thread 'MainThread'" in str(other.error)
            assert (state.users, other.state.users, things.state) == (1, 0, state)

    in_event_loop(things, backend, use)


def test_event_loop_that_another_thread_goes_on_with_is_that_threads() -> None:
    loop = AgentLoop()
    event_loop = asyncio.new_event_loop()
    event_loop.run_until_complete(loop.run_single("set up", anyio.sleep, 0))
    begun, over = threading.Event(), threading.Event()

    async def agent() -> None:
        loop.limiter.pause()
        loop.limiter.resume()
        begun.set()
        await anyio.to_thread.run_sync(over.wait)

    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(event_loop.run_until_complete(loop.run_single("a", agent))),
        name="second",
    )
    thread.start()
    assert begun.wait(5)
    with pytest.raises(RuntimeError, match="only in the thread of its event loop"):
        loop.limiter.pause()

    with pytest.raises(RuntimeError, match="in thread 'second'"):
        anyio.run(loop.run_single, "b", anyio.sleep, 0)

    over.set()
    thread.join(5)
    assert results[0].success
    event_loop.close()


async def in_guest_run(fn: Callable[[], Any]) -> Any:
    """Call an async function in a trio run that is the guest of this event loop."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    trio.lowlevel.start_guest_run(
        fn,
        run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
        done_callback=done.set_result,
        host_uses_signal_set_wakeup_fd=True,
    )
    return (await done).unwrap()


def test_guest_and_host_take_turns_in_one_thread_but_never_at_once() -> None:
    loop = AgentLoop()
    store = ContextStore()

    async def single() -> None:
        assert (await loop.run_single("a", anyio.sleep, 0)).success

    async def nested() -> None:
        with pytest.raises(RuntimeError, match="this limiter is in use in another event loop"):
            await in_guest_run(single)

    async def main() -> None:
        for _ in range(2):
            await single()
            await in_guest_run(single)

        (await loop.run_single("a", nested)).unwrap()
        await store.set("a", 1)
        with pytest.raises(RuntimeError, match="this store is in use in another event loop"):
            await in_guest_run(lambda: store.get("a"))

    asyncio.run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork()")
@backends
def test_store_in_use_in_the_parent_process_can_be_used_in_a_child(backend: str) -> None:
    program = f"""
import os, threading, anyio
from agentloop import ContextStore
store = ContextStore()
begun, over = threading.Event(), threading.Event()
async def main():
    await store.set("a", 1)
    begun.set()
    await anyio.to_thread.run_sync(over.wait)
thread = threading.Thread(target=lambda: anyio.run(main, backend={backend!r}))
thread.start()
begun.wait()
if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    over.set()
    thread.join()
    raise SystemExit(status)
os._exit(0 if anyio.run(store.get, "a", backend={backend!r}) == 1 else 3)
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    assert subprocess.run(command, timeout=60).returncode == 0

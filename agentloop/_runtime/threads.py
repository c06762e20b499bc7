"""
Blocking functions as agents, in worker threads.

**A thread cannot be interrupted.** When an attempt is cancelled or timed out, its thread is *abandoned*: the
thread goes on to its end, and its return value is dropped. A function that hangs could fill the process with
threads, retry by retry. So each limiter has as many *places* for threads as it has slots, in each event loop.
A thread keeps its place until it ends, abandoned or not. AnyIO's own limiter does not bound abandoned
threads: on asyncio their tokens are given back at once.

**A call has a slot, so it waits for a place only if abandoned threads have taken it**, or if the agent makes
several calls at once. The attempt is not timed out during that wait: its deadline moves by the time of the
wait.

**A thread that runs agents waits for them** (``anyio.from_thread.run(loop.run_single, ...)``). So the threads
of these agents take no places of their own. Otherwise they could wait for the place of the thread that waits
for them.

**The thread gives its place back**, by a callback in the event loop that comes before AnyIO's with the
result. When a call is cancelled before its thread has begun, the function is called only if the thread
claims the place first.
"""

from __future__ import annotations

__all__ = ["in_thread"]

import functools
import math
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import anyio
import anyio.to_thread

from .. import _validators as must
from .._errors import not_async
from .._foreign import name_of
from .._limits.slots import Pool, current_slot
from .current import AttemptSlot, Timing

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(fn: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """
    Make an agent of a blocking function. The function is called in a worker thread::

        await loop.run_all(Invocation.map(in_thread(parse), documents))

    The function sees the agent's context variables. When the agent is cancelled or timed out, its thread is
    abandoned: the thread goes on in the background, and its return value or exception is dropped. A function
    that runs for long can call ``anyio.from_thread.check_cancelled()``, which then raises.

    There are at most as many such threads at once as ``max_concurrency`` of the limiter that the agent runs
    under, also when that number is changed. An abandoned thread counts until it ends. While a call waits for
    that, its attempt is not timed out: the deadline of the attempt moves by the time of the wait. The total
    time-out does not move, nor do the time-outs of a stream. Outside of an agent, AnyIO's default limiter
    applies instead.

    :param fn: a plain function; neither an async nor a generator function
    :return: an async function of the same name and parameters
    :raises TypeError: if ``fn`` is not a plain function
    """
    must.check_plain_function("fn", fn)
    if must.is_generator(fn):
        raise TypeError(
            f"fn must be a plain function, got a generator function, {fn!r}: "
            "a blocking function cannot be streamed; return a list, or write an async generator function "
            "that awaits in_thread(...) for each item"
        )

    @functools.wraps(fn)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # The wrapper pickles by its name, so all other code is in functions of this module.
        return await _run(partial(_call, partial(fn, *args, **kwargs)))

    call.__name__ = name_of(fn)
    return call


async def _run(bound: Callable[[], T]) -> T:
    slot = current_slot.get()
    # An agent's thread may run another event loop, in which this pool must not be used.
    if isinstance(slot, AttemptSlot) and slot.pool.is_current():
        return await _places_of(slot.pool).run(slot, bound)

    return await anyio.to_thread.run_sync(bound, abandon_on_cancel=True)


def _call(fn: partial[T]) -> T:
    try:
        returned = fn()
    except StopIteration as exc:
        # A coroutine cannot raise StopIteration; the interpreter's own RuntimeError would name no function.
        raise RuntimeError(f"{fn.func!r} raised StopIteration, which an agent cannot raise") from exc

    if must.close_coroutine(returned):
        raise not_async(f"{fn.func!r} returned a coroutine: pass an async function itself, not in_thread(fn)")

    return returned


class _Place:
    """
    The right to run one thread.

    :param places: the places of the limiter
    :param pool: the pool of the limiter, in the same event loop
    :param borrower: the token's borrower; ``None`` if the place of the thread around is used
    """

    def __init__(self, places: _Places, pool: Pool, borrower: object) -> None:
        self.places = places
        self.is_held = True
        """Whether the place is taken: until its thread ends, or it is cancelled before."""
        self._loop = pool.loop
        self._borrower = borrower
        self._claimed = threading.Lock()

    def run(self, fn: Callable[[], T]) -> T | None:
        """Call a function in the thread and give the place back; do neither after :meth:`cancel`."""
        if not self._claimed.acquire(blocking=False):
            return None

        # Set in the context of the thread, which agents that it starts inherit.
        _current_place.set(self)
        try:
            return fn()
        finally:
            self.is_held = False
            try:
                self._loop.call_from_thread(self._loop.token.native_token, self.free)
            except RuntimeError:
                pass  # the event loop has ended, so no task waits there

    def cancel(self) -> bool:
        """Return whether the thread has not begun. Then it never will, and the caller must free the place."""
        return self._claimed.acquire(blocking=False)

    def free(self) -> None:
        """Give the place back."""
        if self._borrower is not None:
            self.places.give_back(self._borrower)


_current_place: ContextVar[_Place | None] = ContextVar("agentloop.current_place", default=None)
"""The place of the thread in which the current code runs, or from which it was called."""


class _Wait:
    """
    A wait for a place, during which an attempt is not timed out.

    :param timing: the deadline of the attempt
    :param now: when the wait began
    """

    def __init__(self, timing: Timing, now: float) -> None:
        scope = timing.scope.scope
        self._timing = timing
        self._began = now
        self._deadline = math.inf if scope is None else scope.deadline
        self.calls = 0
        """How many calls of the attempt wait."""
        timing.scope.move(timing.deadline, timing.total)

    def end(self, now: float) -> None:
        """Move the deadline of the attempt by the time of the wait."""
        scope, last, total = self._timing
        deadline = self._deadline + now - self._began
        scope.move(min(deadline, last), total if last <= deadline else None)


class _Places:
    """
    The places for threads of a limiter in one event loop.

    It does not refer to the limiter's pool, since it is a value of a dictionary with weak keys, the pools.
    """

    def __init__(self) -> None:
        self._taken = anyio.CapacityLimiter(1)
        # Given to AnyIO instead of its default limiter, since places bound the threads.
        self._unbounded = anyio.CapacityLimiter(math.inf)
        self._waits: dict[AttemptSlot, _Wait] = {}

    async def run(self, slot: AttemptSlot, fn: Callable[[], T]) -> T:
        """Call a function in a thread, for the attempt that holds a slot."""
        place = await self._take(slot)
        try:
            returned = await anyio.to_thread.run_sync(
                place.run, fn, abandon_on_cancel=True, limiter=self._unbounded
            )
            # After a cancellation, _Place.run() returns None instead of a result, but to no caller.
            return cast("T", returned)
        finally:
            if place.cancel():
                place.free()

    async def _take(self, slot: AttemptSlot) -> _Place:
        pool = slot.pool
        around = _current_place.get()
        if around is not None and around.places is self and around.is_held:
            return _Place(self, pool, None)

        # A new object each time, since AnyIO refuses equal borrowers.
        borrower = object()
        self._resize(pool)
        try:
            self._taken.acquire_on_behalf_of_nowait(borrower)
        except anyio.WouldBlock:
            with self._following(pool), self._untimed(slot):
                await self._taken.acquire_on_behalf_of(borrower)

        return _Place(self, pool, borrower)

    def give_back(self, borrower: object) -> None:
        """Return the token that a place has borrowed."""
        self._taken.release_on_behalf_of(borrower)

    def _resize(self, pool: Pool) -> None:
        self._taken.total_tokens = pool.max_concurrency

    @contextmanager
    def _following(self, pool: Pool) -> Generator[None]:
        """Change the number of places when the limit changes, during the block."""
        follow = partial(self._resize, pool)
        pool.on_resize.add(follow)
        try:
            yield
        finally:
            pool.on_resize.discard(follow)

    @contextmanager
    def _untimed(self, slot: AttemptSlot) -> Generator[None]:
        """Move the deadline of an attempt by the time during which any of its calls is in the block."""
        timing, now = slot.timing(), slot.pool.loop.now
        # A stream moves its deadlines itself.
        if timing is None or timing.scope.closing is not None or slot.is_released:
            yield
            return

        wait = self._waits.get(slot) or self._waits.setdefault(slot, _Wait(timing, now()))
        wait.calls += 1
        try:
            yield
        finally:
            wait.calls -= 1
            if not wait.calls:
                del self._waits[slot]
                if not slot.is_released:
                    wait.end(now())


_places: weakref.WeakKeyDictionary[Pool, _Places] = weakref.WeakKeyDictionary()


def _places_of(pool: Pool) -> _Places:
    places = _places.get(pool)
    if places is None:
        places = _places[pool] = _Places()

    return places

"""
Blocking functions as agents, in worker threads.

**A thread cannot be interrupted.** When an attempt is cancelled or timed out, its thread is *abandoned*: the
thread goes on to its end, and what it returns is dropped. A function that hangs could fill the process with
threads, retry by retry. So each limiter has as many *places* for threads as it has slots, in each event
loop. A thread keeps its place until it ends, abandoned or not. AnyIO's own limiter does not bound abandoned
threads: on asyncio their tokens are given back at once.

**A call has a slot, so it waits for a place only if abandoned threads have taken it**, or if the agent makes
several calls at once. The attempt is not timed out meanwhile: when the call has its place, the deadline of
the attempt has moved by the time of the wait.

**A thread that runs agents waits for them** (``anyio.from_thread.run(loop.run_single, ...)``). So their
threads take no places of their own: else they could wait for the place of the thread that waits for them.

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
from .._invocation import name_of
from .._limits.slots import Pool, current_slot
from .current import AttemptSlot, Timing

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(fn: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """
    Make an agent of a blocking function, which is called in a worker thread::

        await loop.run_all(Invocation.map(in_thread(parse), documents))

    The function sees the agent's context variables. When the agent is cancelled or timed out, its thread is
    abandoned: the thread goes on in the background, and what the function returns or raises is dropped. A
    function that runs for long can call ``anyio.from_thread.check_cancelled()``, which raises then.

    There are at most ``max_concurrency`` such threads at once, of the limiter that the agent runs under, also
    when that number is changed. An abandoned thread counts until it ends. A call that waits for one to end is
    not timed out for that: the deadline of its attempt moves by the time of the wait, but the total time-out
    does not, nor do those of a stream that calls it. Outside of an agent, AnyIO's default limiter applies
    instead.

    :param fn: a plain function; neither an async nor a generator function
    :return: an async function of the same name and parameters
    :raises TypeError: if ``fn`` is not a plain function
    """
    must.check_plain_function("fn", fn)
    if must.is_generator(fn):
        raise TypeError(
            f"fn must be a plain function, got a generator function, {fn!r}: what blocks cannot be streamed; "
            "return a list, or write an async generator function that awaits in_thread(...) for each item"
        )

    @functools.wraps(fn)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # All else is a function of this module, by whose name it pickles.
        return await _run(partial(_call, partial(fn, *args, **kwargs)))

    call.__name__ = name_of(fn)
    return call


async def _run(bound: Callable[[], T]) -> T:
    slot = current_slot.get()
    # A thread of an agent may run an event loop of its own.
    if isinstance(slot, AttemptSlot) and slot.pool.is_current():
        return await _places_of(slot.pool).run(slot, bound)

    return await anyio.to_thread.run_sync(bound, abandon_on_cancel=True)


def _call(fn: partial[T]) -> T:
    try:
        returned = fn()
    except StopIteration as exc:
        # A coroutine cannot raise it; the interpreter would make a RuntimeError of it that names no function.
        raise RuntimeError(f"{fn.func!r} raised StopIteration, which an agent cannot raise") from exc

    if must.close_coroutine(returned):
        raise not_async(
            f"{fn.func!r} returned a coroutine: pass an async function as it is, not in_thread(fn)"
        )

    return returned


class _Place:
    """
    The right to run one thread.

    :param places: where it comes from
    :param pool: the limiter's, in the same event loop
    :param borrower: on whose behalf it was taken; ``None`` if the thread around counts for this one too
    """

    def __init__(self, places: _Places, pool: Pool, borrower: object) -> None:
        self.places = places
        self.is_held = True
        """Whether its thread has not ended."""
        self._loop = pool.loop
        self._borrower = borrower
        self._claimed = threading.Lock()

    def run(self, fn: Callable[[], T]) -> T | None:
        """Call a function in its thread and give the place back; do neither if that was cancelled before."""
        if not self._claimed.acquire(blocking=False):
            return None

        # In the context of the thread, and so of all that it starts.
        _current_place.set(self)
        try:
            return fn()
        finally:
            self.is_held = False
            try:
                self._loop.call_from_thread(self._loop.token.native_token, self.free)
            except RuntimeError:
                pass  # the event loop has ended, and nobody waits there

    def cancel(self) -> bool:
        """Return whether the thread has not begun. Then it never will, and the place has to be freed."""
        return self._claimed.acquire(blocking=False)

    def free(self) -> None:
        """Give the place back."""
        if self._borrower is not None:
            self.places.give_back(self._borrower)


_current_place: ContextVar[_Place | None] = ContextVar("agentloop.current_place", default=None)
"""The place of the thread that the current code runs in, or was called from."""


class _Wait:
    """
    A time in which an attempt is not timed out, since it waits for a place.

    :param timing: the attempt's
    :param now: when it began
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
        """Let the attempt be timed out, by so much later."""
        scope, last, total = self._timing
        deadline = self._deadline + now - self._began
        scope.move(min(deadline, last), total if last <= deadline else None)


class _Places:
    """
    The places for threads of a limiter in one event loop.

    It does not refer to the limiter's pool, which it is found by.
    """

    def __init__(self) -> None:
        self._taken = anyio.CapacityLimiter(1)
        # What AnyIO is given instead of its default: places are all that bounds the threads.
        self._unbounded = anyio.CapacityLimiter(math.inf)
        self._waits: dict[AttemptSlot, _Wait] = {}

    async def run(self, slot: AttemptSlot, fn: Callable[[], T]) -> T:
        """Call a function in a thread, for the attempt that has a slot."""
        place = await self._take(slot)
        try:
            returned = await anyio.to_thread.run_sync(
                place.run, fn, abandon_on_cancel=True, limiter=self._unbounded
            )
            # None of the place's own is returned only where nobody gets it.
            return cast("T", returned)
        finally:
            if place.cancel():
                place.free()

    async def _take(self, slot: AttemptSlot) -> _Place:
        pool = slot.pool
        around = _current_place.get()
        if around is not None and around.places is self and around.is_held:
            return _Place(self, pool, None)

        # Borrowers that are equal collide.
        borrower = object()
        self._resize(pool)
        try:
            self._taken.acquire_on_behalf_of_nowait(borrower)
        except anyio.WouldBlock:
            with self._following(pool), self._untimed(slot):
                await self._taken.acquire_on_behalf_of(borrower)

        return _Place(self, pool, borrower)

    def give_back(self, borrower: object) -> None:
        """Take back what a place has borrowed."""
        self._taken.release_on_behalf_of(borrower)

    def _resize(self, pool: Pool) -> None:
        self._taken.total_tokens = pool.max_concurrency

    @contextmanager
    def _following(self, pool: Pool) -> Generator[None]:
        """Let there be more or fewer places when the limit is changed."""
        follow = partial(self._resize, pool)
        pool.on_raise.add(follow)
        try:
            yield
        finally:
            pool.on_raise.discard(follow)

    @contextmanager
    def _untimed(self, slot: AttemptSlot) -> Generator[None]:
        """Time an attempt out later, by as long as one of its calls or more are in the block."""
        timing, now = slot.timing(), slot.pool.loop.now
        if timing is None or slot.is_released:
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

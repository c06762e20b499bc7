"""How many attempts may run at once."""

from __future__ import annotations

__all__ = ["Limiter", "LimiterStatistics", "pool_of"]

import weakref
from collections.abc import Callable

import attrs
from anyio.lowlevel import current_token

from . import _validators as must
from ._events import Event, LimitEvent
from ._pool import Pool


@attrs.frozen
class LimiterStatistics:
    """
    A limiter at this moment.

    :param running: how many slots are in use
    :param waiting: how many invocations wait for a slot or for their next retry, as in
        :class:`LoopStatistics`
    :param max_concurrency: how many slots there are
    """

    running: int
    waiting: int
    max_concurrency: int


class Limiter:
    """
    One limit for everything that shares it: loops, views of loops, batches and single invocations.

    It can be made anywhere, inside an event loop or not, and serve several runs in turn, but not two
    event loops at once. Slots are granted first come, first served.

    :param max_concurrency: how many invocations may run at once
    :raises TypeError: if ``max_concurrency`` is no ``int``
    :raises ValueError: if it is less than 1
    """

    def __init__(self, max_concurrency: int) -> None:
        must.check_whole("max_concurrency", max_concurrency, 1)
        self._max_concurrency = max_concurrency
        self._pool: Pool | None = None
        self._sinks: weakref.WeakSet[Callable[[Event], None]] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<Limiter {_state(self.statistics())}>"

    @property
    def max_concurrency(self) -> int:
        """
        How many invocations may run at once.

        It can be set at any time. Raised, it lets those who wait start at once; lowered, it interrupts
        nothing, and nothing new starts until enough has ended.
        """
        return self._max_concurrency

    @max_concurrency.setter
    def max_concurrency(self, value: int) -> None:
        must.check_whole("max_concurrency", value, 1)
        pool = self._pool
        if pool is not None and pool.busy and pool.in_another_thread:
            raise RuntimeError(
                "max_concurrency of a limiter in use can be set only in the thread of its event loop; "
                "go there by anyio.from_thread.run_sync()"
            )

        self._max_concurrency = value
        if pool is not None:
            pool.resize(value)
            self._tell_limit(pool)

    def tell(self, sink: Callable[[Event], None]) -> None:
        """
        Give a sink an event when a run begins to use the limiter, and whenever the limit changes meanwhile.

        :param sink: must not raise; it is told as long as somebody else keeps it alive
        """
        self._sinks.add(sink)

    def statistics(self) -> LimiterStatistics:
        """Return the state at this moment."""
        pool = self._pool
        running, waiting = (pool.running, pool.waiting) if pool is not None else (0, 0)
        return LimiterStatistics(running, waiting, self._max_concurrency)

    def _enter_run(self) -> Pool:
        pool, token = self._pool, current_token()
        if pool is not None and pool.token == token:
            return pool

        # A run that was torn down before its tasks ended leaves slots behind that nobody will give back;
        # a run that goes on in another thread is a mistake.
        if pool is not None and pool.busy and pool.in_another_thread and pool.thread.is_alive():
            raise RuntimeError(
                f"this limiter is in use in another event loop, in thread {pool.thread.name!r}; "
                "use one per event loop"
            )

        self._pool = pool = Pool(token, self._max_concurrency)
        self._tell_limit(pool)
        return pool

    def _tell_limit(self, pool: Pool) -> None:
        for sink in tuple(self._sinks):
            sink(LimitEvent(self._max_concurrency, pool.now()))


def pool_of(limiter: Limiter) -> Pool:
    """
    Return the state of a limiter in the current event loop.

    :raises RuntimeError: if it is in use in another event loop
    """
    return limiter._enter_run()  # pyright: ignore[reportPrivateUsage]  # not for users


def _state(statistics: LimiterStatistics) -> str:
    return f"{statistics.running} running, {statistics.waiting} waiting, limit {statistics.max_concurrency}"

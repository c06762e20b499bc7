"""A limiter for each provider or model."""

from __future__ import annotations

__all__ = ["KeyedLimiter", "check_concurrency"]

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from .. import _validators as must
from .._config import LoopConfig
from .._events import Event, LimitEvent
from .._invocation import Invocation
from .._misuse import name_parameters
from .keys import Keys
from .limiter import Limiter, LimiterStatistics, pool_of
from .pool import SlotPool

_MAX_CONCURRENCY = LoopConfig().max_concurrency


@name_parameters()
class KeyedLimiter(Limiter):
    """
    A limiter for each provider or model, made for the first invocation of each::

        limiters = KeyedLimiter(lambda invocation: invocation.kwargs["model"], lambda model: Limiter(20))
        loop = AgentLoop(limiter=limiters)

    Loops take it like a single limiter. Keys do not hold each other up, whether one is slow, paused, held
    back or in an outage: inputs of a batch that wait for their own key do not block others, at most 8 for
    each slot of their key (of a sequence that is given to :meth:`AgentLoop.run_all`, any number). A stop
    because of a provider or a budget, such as a fatal verdict, stops the invocations of that key alone.

    An invocation lends its slot only to nested ones under its own key. So agents of two keys can come
    to wait for each other's slots for ever: the last of them gets an error that names both keys.

    :param by: returns the key of an invocation; its exception is the invocation's error
    :param make: makes the limiter for a key; its exception is the invocation's error
    :param max_concurrency: how many attempts may run at once over all keys; absent, as many as the limiters
        of all keys allow. A free place goes to the waiting key with the fewest attempts running
    :param max_limiters: how many limiters there may be. When there are more, the least recently used one is
        forgotten, with its learned limit, unless it is in use, or still bound by a rate, a cool-off or a
        pause after an overload
    :raises TypeError: if a parameter is of the wrong type
    :raises ValueError: if ``max_concurrency`` or ``max_limiters`` is less than 1
    """

    def __init__(
        self,
        by: Callable[[Invocation[Any]], Hashable],
        make: Callable[[Any], Limiter],
        *,
        max_concurrency: int | None = None,
        max_limiters: int = 1000,
    ) -> None:
        for name, value in (("by", by), ("make", make)):
            must.check_plain_function(name, value)

        if max_concurrency is not None:
            must.check_whole("max_concurrency", max_concurrency, 1)

        must.check_whole("max_limiters", max_limiters, 1)
        super().__init__(1)
        self._total = max_concurrency
        self._by = by
        self._make = make
        self._max_limiters = max_limiters
        self._limiters: OrderedDict[Hashable, Limiter] = OrderedDict()
        # Attributes keep these alive, since the limiters refer to them weakly.
        self._on_resize = self._recount
        self._on_event = self._pass_on

    def __getitem__(self, key: Hashable) -> Limiter:
        """
        Return the limiter for a key, and make it if there is none.

        :raises RuntimeError: if there are ``max_limiters`` already, and all of them are in use
        """
        limiter = self._limiters.get(key)
        if limiter is not None:
            self._limiters.move_to_end(key)
            return limiter

        limiter = self._make(key)
        if not isinstance(limiter, Limiter) or isinstance(limiter, KeyedLimiter):
            raise TypeError(f"make must return a Limiter, got {limiter!r} for the key {key!r}")

        self._forget_some()
        self._limiters[key] = limiter
        limiter.tell(self._on_event)
        limiter._on_change.add(self._on_resize)
        if self._paused:
            limiter.pause()

        self._recount()
        return limiter

    def __len__(self) -> int:
        """Return how many limiters there are."""
        return len(self._limiters)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Hashable]:
        """Iterate over the keys for which there is a limiter, the one used least recently first."""
        return iter(tuple(self._limiters))

    @property
    def max_concurrency(self) -> int:
        """
        How many attempts may run at once over all keys: the number that was given, or the sum over all
        limiters.

        It can be set at any time if it was given.
        """
        return self._total or max(1, self._max_concurrency)

    @max_concurrency.setter
    def max_concurrency(self, value: int) -> None:
        if self._total is None:
            raise AttributeError(
                f"set max_concurrency on one limiter: limiters[key].max_concurrency = {value!r}, or give "
                "KeyedLimiter(max_concurrency=...) at first"
            )

        must.check_whole("max_concurrency", value, 1)
        pool = self._own_pool("max_concurrency of a limiter in use can be set")
        self._total = value
        if pool is not None and pool.keys is not None:
            pool.keys.resize(value)

        self._recount()

    @property
    def batch_size(self) -> int:
        """One more than can run, to look ahead for other keys while all known keys are busy."""
        return min(self.max_concurrency, self._max_concurrency) + 1

    def pause(self) -> None:
        """
        Pause all limiters, also those of later keys.

        :raises RuntimeError: if one of them is in use in the event loop of another thread
        """
        self._check_thread("limiters in use can be paused")
        self._paused = True
        for limiter in self._limiters.values():
            limiter.pause()

    def resume(self) -> None:
        """
        Resume all limiters.

        :raises RuntimeError: if one of them is in use in the event loop of another thread
        """
        self._check_thread("limiters in use can be resumed")
        self._paused = False
        for limiter in self._limiters.values():
            limiter.resume()

    def statistics(self) -> LimiterStatistics:
        """
        Return the sums over all limiters; ``paused_until`` is the time when the first of them goes on, and
        ``outage_since`` the first outage.
        """
        each = [limiter.statistics() for limiter in self._limiters.values()]
        untils = [now.paused_until for now in each]
        paused_until = min((until for until in untils if until is not None), default=None)
        if not each and self._paused:
            paused_until = math.inf
        elif None in untils:
            paused_until = None

        pool = self._pools.state
        limit = max(1, sum(now.limit for now in each))
        return LimiterStatistics(
            sum(now.running for now in each),
            sum(now.waiting for now in each) + (0 if pool is None else pool.waiting),
            self.max_concurrency,
            limit if self._total is None else min(self._total, limit),
            sum(now.cuts for now in each),
            paused_until,
            min((now.outage_since for now in each if now.outage_since is not None), default=None),
            any(now.probing for now in each),
        )

    def _check_thread(self, what: str) -> None:
        """Check all limiters before any is changed, so that a change is made to all or to none."""
        for limiter in (self, *self._limiters.values()):
            limiter._own_pool(what)

    def _forget_some(self) -> None:
        """Forget unused limiters until there is room for one more."""
        in_use = 0
        for key, limiter in tuple(self._limiters.items()):
            if len(self._limiters) < self._max_limiters:
                return

            now = limiter.statistics()
            if now.running or now.waiting or limiter._paused:
                in_use += 1
            elif not limiter._binds():
                self._forget(key, limiter)

        if in_use >= self._max_limiters:
            raise RuntimeError(
                f"there are max_limiters={self._max_limiters} limiters, all of them in use: "
                "raise max_limiters, or give fewer different keys"
            )

    def _forget(self, key: Hashable, limiter: Limiter) -> None:
        del self._limiters[key]
        limiter._sinks.discard(self._on_event)
        limiter._on_change.discard(self._on_resize)
        pool = limiter._pools.state
        if pool is not None and pool.keys is not None:
            pool.keys.leave(pool)

        self._recount()

    def _enter_run(self) -> SlotPool:
        pool = super()._enter_run()
        pool.route = self._route
        pool.must_resolve = True
        pool.keys = Keys(pool, math.inf if self._total is None else self._total)
        return pool

    def _route(self, invocation: Invocation[Any]) -> SlotPool:
        key = self._by(invocation)
        pool = pool_of(self[key])
        pool.claim()
        home = self._pools.state
        assert home is not None
        assert home.keys is not None
        home.keys.join(pool, key)
        return pool

    def _recount(self) -> None:
        self._max_concurrency = sum(limiter.max_concurrency for limiter in self._limiters.values())
        if self._pools.state is not None:
            for callback in tuple(self._pools.state.on_resize):
                callback()

    def _pass_on(self, event: Event) -> None:
        # The events of single keys are replaced by one about the sum, since running counts are sums too.
        if isinstance(event, LimitEvent) and self._pools.state is not None:
            self._report_limit(self._pools.state)

    def _report_limit(self, pool: SlotPool) -> None:
        now = self.statistics()
        for sink in tuple(self._sinks):
            sink(LimitEvent(now.limit, pool.loop.now(), now.paused_until, now.outage_since))


def check_concurrency(value: int, limiter: Limiter) -> None:
    """
    Refuse a number of slots that a limiter would override.

    :param value: ``LoopConfig.max_concurrency`` of a loop that is given the limiter
    """
    if value == _MAX_CONCURRENCY:
        return  # the default is no request

    if isinstance(limiter, KeyedLimiter) and limiter._total is None:  # pyright: ignore[reportPrivateUsage]
        raise ValueError(
            f"max_concurrency must be left out where each key has a limiter of its own, got {value}; all of "
            "them together are bounded by KeyedLimiter(max_concurrency=...)"
        )

    if value != limiter.max_concurrency:
        raise ValueError(
            f"max_concurrency must be the limiter's, {limiter.max_concurrency}, or left out, got {value}"
        )

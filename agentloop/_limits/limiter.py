"""Limits: how many attempts run at once, how many start in a time, and how overload changes that."""

from __future__ import annotations

__all__ = ["Limiter", "LimiterStatistics", "LoopStatistics", "own_pool", "pool_of"]

import math
import weakref
from collections.abc import Callable, Iterable

import attrs

from .. import _validators as must
from .._eventloop.handover import Handover
from .._events import Event, LimitEvent
from .._misuse import OfOneProcess, name_parameters
from .._provider.overload import AdaptiveLimit
from .._provider.provider import Provider
from .._result import Status
from .admission import Admission, QueueBound
from .budget import Budget, Purse
from .pool import SlotPool
from .rates import Rate, make_meter
from .retry_budget import RetryBudget, RetryLedger


@attrs.frozen
class LimiterStatistics:
    """
    A limiter at this moment.

    :param running: how many slots are in use
    :param waiting: how many invocations wait for a slot or for their next retry, as in
        :class:`LoopStatistics`
    :param max_concurrency: how many slots there are at most
    :param limit: how many slots there are now, after cuts by overload
    :param cuts: how often overload has lowered the limit
    :param paused_until: until when only probes start, because of a Retry-After, in seconds of the event
        loop's clock; infinite after :meth:`Limiter.pause`; ``None`` without either
    :param outage_since: since when all attempts have failed with signs of an outage (time-outs, HTTP 5xx,
        network errors), in seconds of the event loop's clock; ``None`` if there is no outage
    :param probing: whether a probe is under way: the one attempt that tests whether the server takes requests
        before the time that it has named
    :param remaining: the remainder of each budget (a :class:`Rate` with ``per_seconds=None``), in the order
        of :attr:`Limiter.rates`, less the reservations of running attempts. Negative if a budget was
        overdrawn. Empty for a :class:`KeyedLimiter`
    """

    running: int
    waiting: int
    max_concurrency: int
    limit: int
    cuts: int = 0
    paused_until: float | None = None
    outage_since: float | None = None
    probing: bool = False
    remaining: tuple[float, ...] = ()


@attrs.frozen
class LoopStatistics:
    """
    A loop at this moment. Loops that share a limiter share the figures.

    :param running: how many slots are in use; an invocation that waits for nested ones on the same loop has
        lent them its slot, and all of them count once
    :param waiting: how many invocations wait for a slot or for their next retry, with the inputs that are
        left of a sequence given to :meth:`AgentLoop.run_all`; other input does not count until it is pulled
    :param max_concurrency: how many slots there are
    :param drained: whether the loop was drained: nothing new is started, and running invocations finish
    :param replayed: how many results came out of a journal so far; the loop's metrics do not count these
    :param nested: how many nested invocations on the same limiter have ended so far, by status; the loop's
        metrics count them too
    """

    running: int
    waiting: int
    max_concurrency: int
    drained: bool = False
    replayed: int = 0
    nested: dict[Status, int] = attrs.field(factory=dict[Status, int], repr=False)


@name_parameters()
class Limiter(OfOneProcess, since="it limits one process, and a copy would allow as much again"):
    """
    One limit for everything that shares it: loops, views of loops, batches and single invocations.

    An attempt starts when there is a slot for it and every rate lets it, first come, first served: a cheap
    attempt never overtakes an expensive one. It starts at that very time, and takes nothing before.

    With ``adaptive`` the limit follows the provider. ``max_concurrency`` is its ceiling; an overload (such as
    HTTP 429 or 529, see :func:`classify`) cuts it to four fifths, once for all attempts that were under way
    at the last cut, to a half and then to 1 while the provider takes nothing, and clean completions raise it
    again. Running attempts are never interrupted, and cancelled ones never count.

    After a Retry-After of a server, new attempts are held back for that time, except *probes*: one at a time,
    the first after a twentieth of the time and at least a second, each next one after twice the gap before
    it. A probe that succeeds, or whose stream yields a chunk, ends the cool-off; otherwise attempts start one
    after the other within a quarter of the time once it is over. A time above
    ``Backoff.max_retry_after_seconds`` holds nothing back, since its invocation does not wait for it.

    A failure is a sign of an outage if it is a time-out of the attempt, has a status 408 or 5xx, or has an
    ``OSError`` that is not about files among its causes. When as many attempts in a row as the limit, and at
    least 8, have failed so with a transient verdict, and no attempt that began meanwhile has succeeded, there
    is an *outage*: such failures are overload until the first success. When nothing has succeeded for
    ``LoopConfig.overload_timeout_seconds`` since the first overload, and all attempts of that time have
    ended, batches stop, and single invocations have one attempt, until one succeeds. After a minute in which
    nothing ran or waited, that time begins anew.

    With ``max_waiting`` it refuses invocations that come too fast. A :exc:`QueueFull` estimates in how many
    seconds the refused invocation would have begun: the mean duration of the attempts that have ended lately,
    times one more than the number of those in line, divided by the working limit; at least until a cool-off
    ends, and until its rates let it start. There is no estimate while the limiter is paused or before an
    attempt has ended.

    A limiter can be made anywhere, inside an event loop or not, and serve several runs in turn, but not two
    event loops at once. In each run its rates, its working limit and its retry budget begin anew; payments to
    a :class:`Rate` with ``per_seconds=None`` remain.

    :param max_concurrency: how many attempts may run at once
    :param rates: the rates and budgets that bound starts
    :param adaptive: whether to slow down when the provider has too much to do; if not, the limit is
        ``max_concurrency``, and a Retry-After concerns only the invocation that got it
    :param retry_budget: how many retries there may be for each success; absent, there is no such bound
    :param max_waiting: how many single invocations and streams may wait for their first slot; a stream stands
        in line as soon as its block is entered. One more is refused at once: it is ``SKIPPED``, with a
        :exc:`QueueFull`. Retries, batches, and nested invocations that can borrow a slot are neither counted
        nor refused
    :raises TypeError: if a parameter is of the wrong type
    :raises ValueError: if ``max_concurrency`` is less than 1, or ``max_waiting`` less than 0
    """

    def __init__(
        self,
        max_concurrency: int,
        *,
        rates: Iterable[Rate] = (),
        adaptive: bool = True,
        retry_budget: RetryBudget | None = None,
        max_waiting: int | None = None,
    ) -> None:
        must.check_whole("max_concurrency", max_concurrency, 1)
        if max_waiting is not None:
            must.check_whole("max_waiting", max_waiting, 0)

        if isinstance(rates, Rate) or not isinstance(rates, Iterable):
            raise TypeError(f"rates must be an iterable of Rate, such as [Rate(60)], got {rates!r}")

        rates = tuple(rates)
        for rate in rates:
            if not isinstance(rate, Rate):
                raise TypeError(f"rates must be of type Rate, got {rate!r}")

        if not isinstance(adaptive, bool):
            raise TypeError(f"adaptive must be of type bool, got {adaptive!r}")

        if retry_budget is not None and not isinstance(retry_budget, RetryBudget):
            raise TypeError(f"retry_budget must be of type RetryBudget, got {retry_budget!r}")

        self._max_concurrency = max_concurrency
        self._rates = rates
        self._purses = [Purse(rate.limit) if rate.per_seconds is None else None for rate in rates]
        self._adaptive = adaptive
        self._retry_budget = retry_budget
        self._max_waiting = max_waiting
        self._paused = False
        self._pools = Handover[SlotPool]("limiter", "; use one per event loop")
        self._sinks: weakref.WeakSet[Callable[[Event], None]] = weakref.WeakSet()
        self._on_change: weakref.WeakSet[Callable[[], None]] = weakref.WeakSet()

    def __repr__(self) -> str:
        now = self.statistics()
        limit = f"{now.limit}" + (f" of {now.max_concurrency}" if now.limit < now.max_concurrency else "")
        states = {
            "outage": now.outage_since is not None,
            "paused": now.paused_until == math.inf,
            "held": now.paused_until not in (None, math.inf),
            "probing": now.probing,
        }
        shown = "".join(f", {state}" for state, holds in states.items() if holds)
        return f"<{type(self).__name__} {now.running} running, {now.waiting} waiting, limit {limit}{shown}>"

    @property
    def max_concurrency(self) -> int:
        """
        How many attempts may run at once.

        It can be set at any time. Raised, it lets waiting invocations start at once (but a limit that
        overload has cut goes on growing from its current value). Lowered, it interrupts nothing, and nothing
        new starts until enough attempts have ended.
        """
        return self._max_concurrency

    @max_concurrency.setter
    def max_concurrency(self, value: int) -> None:
        must.check_whole("max_concurrency", value, 1)
        pool = self._own_pool("max_concurrency of a limiter in use can be set")
        self._max_concurrency = value
        if pool is not None:
            pool.resize(value)

        for callback in tuple(self._on_change):
            callback()

    @property
    def rates(self) -> tuple[Rate, ...]:
        """The rates and budgets that bound starts."""
        return self._rates

    def pause(self) -> None:
        """
        Let nothing new start until :meth:`resume`. Running invocations go on, and may lend their slots.

        :raises RuntimeError: if the limiter is in use in the event loop of another thread
        """
        pool = self._own_pool("a limiter in use can be paused")
        self._paused = True
        if pool is not None:
            pool.pause()

    def resume(self) -> None:
        """
        Let waiting invocations start again. Without a :meth:`pause` before, this does nothing.

        :raises RuntimeError: if the limiter is in use in the event loop of another thread
        """
        pool = self._own_pool("a limiter in use can be resumed")
        self._paused = False
        if pool is not None:
            pool.resume()

    def tell(self, sink: Callable[[Event], None]) -> None:
        """
        Send an event to a sink when a run begins to use the limiter, and at each change of the limit.

        :param sink: must not raise; it is referred to weakly
        """
        self._sinks.add(sink)

    def statistics(self) -> LimiterStatistics:
        """Return the state at this moment."""
        pool = self._pools.state
        if pool is None:
            until = math.inf if self._paused else None
            remaining = tuple(purse.left() for purse in self._purses if purse is not None)
            most = self._max_concurrency
            return LimiterStatistics(0, 0, most, most, 0, until, remaining=remaining)

        provider = pool.admission.provider
        return LimiterStatistics(
            pool.running,
            pool.waiting,
            self._max_concurrency,
            pool.limit,
            0 if provider is None else provider.limit.cuts,
            math.inf if self._paused else pool.held_until,
            pool.outage_since,
            provider is not None and provider.cool_off.probe is not None,
            tuple(budget.remaining for budget in pool.admission.budgets),
        )

    @property
    def batch_size(self) -> int:
        """How many invocations of a batch may be live."""
        return self.max_concurrency

    def _binds(self) -> bool:
        """Return whether a rate, a cool-off or a cut still holds attempts back."""
        if any(purse is not None and purse.left() < purse.limit for purse in self._purses):
            return True

        pool = self._pools.state
        return pool is not None and pool.is_current() and pool.admission.binds(pool.loop.now())

    def _own_pool(self, what: str) -> SlotPool | None:
        """Return the state in the event loop of this thread, if there is one."""
        pool = self._pools.state
        if pool is not None and pool.is_in_use() and pool.in_another_thread:
            raise RuntimeError(
                f"{what} only in the thread of its event loop; go there by anyio.from_thread.run_sync()"
            )

        return pool

    def _enter_run(self) -> SlotPool:
        pool = self._make_pool()
        self._pools.take(pool)
        if self._paused:
            pool.pause()

        self._report_limit(pool)
        return pool

    def _make_pool(self) -> SlotPool:
        return SlotPool(
            self._pools,
            self._max_concurrency,
            Admission(
                [
                    make_meter(rate) if purse is None else Budget(rate, purse)
                    for rate, purse in zip(self._rates, self._purses, strict=True)
                ],
                Provider(AdaptiveLimit(self._max_concurrency)) if self._adaptive else None,
                None if self._retry_budget is None else RetryLedger(self._retry_budget),
                None if self._max_waiting is None else QueueBound(self._max_waiting),
            ),
            self._report_limit,
        )

    def _report_limit(self, pool: SlotPool) -> None:
        for sink in tuple(self._sinks):
            sink(LimitEvent(pool.limit, pool.loop.now(), pool.held_until, pool.outage_since))


def pool_of(limiter: Limiter) -> SlotPool:
    """
    Return the state of a limiter in the current event loop.

    :raises RuntimeError: if it is in use in another event loop
    """
    # As Handover.current() does; inlined for speed.
    pool = limiter._pools.state  # pyright: ignore[reportPrivateUsage]  # not for users
    if pool is not None and pool.is_current():
        return pool

    return limiter._enter_run()  # pyright: ignore[reportPrivateUsage]  # nor this


def own_pool(limiter: Limiter, what: str) -> SlotPool | None:
    """
    Return the state of a limiter in the event loop of this thread, if there is one.

    :param what: the operation, for the message of the error
    :raises RuntimeError: if it is in use in the event loop of another thread
    """
    return limiter._own_pool(what)  # pyright: ignore[reportPrivateUsage]  # not for users

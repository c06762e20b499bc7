"""The counts and the learned state of a limiter in one event loop."""

from __future__ import annotations

__all__ = ["PoolState"]

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from .._eventloop.handover import Handover, LoopState
from .._result import InvocationResult
from .._verdict import Verdict, VerdictKind
from .admission import Admission, Bill
from .guard import Guard
from .keys import Keys
from .lines import Lines
from .slots import Slot
from .work import Work


class PoolState(LoopState):
    """
    The counts of a pool of slots, and the state that it learns from attempts. Subclasses grant the slots.

    :param pools: hands the limiter over from one event loop to the next
    :param max_concurrency: how many slots there are
    :param admission: the other conditions for an attempt
    :param report_limit: called when the limit, a cool-off or an outage has changed
    """

    keys: Keys | None = None
    """The pools of all keys, if this is the pool of a key."""

    def __init__(
        self,
        pools: Handover[Any],
        max_concurrency: int,
        admission: Admission,
        report_limit: Callable[[Any], None],
    ) -> None:
        super().__init__(pools)
        self.loop = self.kind(self.token)
        self.admission = admission
        self.pending = 0
        """How many invocations wait to be retried, and how many inputs of batches wait to be pulled."""
        self.on_resize: set[Callable[[], None]] = set()
        """Called when the limit or the number of agents that are away has changed: it sizes batches."""
        self.must_resolve = bool(admission.meters)
        """Whether ``Job.resolve()`` must find the key or the cost of an invocation before it gets a slot."""
        self.limit = max_concurrency
        self.running = 0
        self._report_limit = report_limit
        self.guard = Guard(max_concurrency)
        self.in_line = 0
        """How many attempts wait for a slot, and have none on loan."""
        self.lines = Lines()
        self.work = Work()

    @property
    def max_concurrency(self) -> int:
        """How many slots there are if overload has not lowered the limit."""
        provider = self.admission.provider
        return self.limit if provider is None else provider.limit.ceiling

    @property
    def waiting(self) -> int:
        """How many invocations wait: for a slot, for their next retry, or for a change of a store."""
        return len(self.lines) + self.pending + self.away

    @property
    def away(self) -> int:
        """How many agents have stepped aside and do not come back yet."""
        absent = self.loop.absent
        return sum(slot.pool is self and slot not in absent.returning for slot in absent.away)

    @property
    def held_until(self) -> float | None:
        """When the cool-off ends, if there is one."""
        provider = self.admission.provider
        return None if provider is None else provider.held_until(self.loop.now())

    @property
    def outage_since(self) -> float | None:
        """When the outage began, if there is one."""
        provider = self.admission.provider
        return None if provider is None else provider.outage.since

    def resize(self, max_concurrency: int) -> None:
        """Change the limit, or the ceiling of an adaptive one."""
        provider = self.admission.provider
        if provider is None:
            self._set_limit(max_concurrency)
        else:
            provider.limit.resize(max_concurrency)
            self._follow()

        for callback in tuple(self.on_resize):
            callback()

    def pause(self) -> None:
        """Start only attempts on a borrowed slot."""
        self.admission.pause(True)
        # Another waiter may be the head of the line now.
        self.serve()

    def resume(self) -> None:
        """Start again."""
        self.admission.pause(False)
        self.serve()

    # -- payments and learning

    def pay(self, bill: Bill) -> None:
        """Pay the reserved bill of an attempt."""
        self.admission.pay(bill, self.loop.now())
        # The head of the line may have waited to know the time of this payment.
        self.serve()

    def refund(self, bill: Bill) -> None:
        """Give back the reservation of an attempt that will not begin."""
        self.admission.refund(bill)
        self.serve()

    def conclude(self, bill: Bill) -> None:
        """Note that an attempt has ended and will be retried."""
        if self.admission.conclude(bill):
            self.serve()

    def settle(self, bill: Bill, result: InvocationResult[Any]) -> None:
        """Correct the payment of an invocation's last attempt, now that the invocation has ended."""
        if bill.is_paid:
            self.admission.settle(bill, result, self.loop.now())
            self.serve()

    def revise(self, verdict: Verdict, error: Exception, timed_out: bool) -> Verdict:
        """
        Return the verdict to act on: in an outage, an overload.

        :param timed_out: whether the attempt ran into a time-out of its own
        """
        provider = self.admission.provider
        # The slot is released in the same step, and the pool follows the provider then.
        return verdict if provider is None else provider.revise(verdict, error, timed_out, self.loop.now())

    def learn(self, slot: Slot, verdict: Verdict | None, longest_cool_off: float) -> None:
        """
        Learn from the end of an attempt.

        :param verdict: why it failed; ``None`` if it succeeded
        """
        now, bound = self.loop.now(), self.admission.bound
        if bound is not None and slot.lender is None and slot.began_at is not None:
            bound.ended(now - slot.began_at)

        if verdict is None:
            self.admission.succeeded(slot.epoch, self.running, now)
        else:
            self.admission.failed(verdict, slot.epoch, self.running, longest_cool_off, now)

        self._follow()
        bill = slot.bill if self.admission.budgets else None
        if bill is not None and verdict is not None and verdict.kind is VerdictKind.OVERLOAD:
            # The waiters are served within this step, when the invocation is retried or settled.
            self.admission.forgive(bill)

    def answered(self, slot: Slot) -> None:
        """Learn that a stream has yielded its first chunk."""
        if self.admission.listens and self.admission.provider is not None:
            self.admission.provider.answered(slot.epoch, self.loop.now())
            self._follow()

    def _follow(self) -> None:
        """Take over the limit of the provider, and report the change."""
        provider, now = self.admission.provider, self.loop.now()
        if provider is not None:
            self.used()
            self.admission.follow(now)
            if provider.has_changed():
                self._set_limit(provider.limit.limit)

    def _set_limit(self, limit: int) -> None:
        self.limit = limit
        self.guard.resize(limit)
        self._report_limit(self)
        self.serve()

    # -- patience

    def begin_call(self, call: object, outer: Slot | None) -> None:
        """
        Note that a call begins.

        :param outer: the slot of the invocation that makes it; ``None`` outside of an agent
        """
        # An attempt whose agent calls another limiter is at work there, and may still succeed.
        if outer is not None:
            pool: Any = outer.pool
            own = pool is self or (pool.keys is not None and pool.keys.home is self)
            pool.work.begin_call(call, outer, own)
            if pool.admission.budgets and pool.is_current():
                # A waiter may have counted on a budget that the outer invocation was to give back.
                pool.serve()

        self._note_break()

    def end_call(self, call: object, outer: Slot | None) -> None:
        """Note that a call has ended."""
        if outer is not None:
            outer.pool.work.end_call(call)

        self.used()

    def begin_stall(self, slot: Slot) -> None:
        """Note that a stream begins to wait for its reader."""
        if self.admission.budgets:
            self.work.begin_stall(slot, self.loop.now())
            self.serve()

    def end_stall(self, slot: Slot) -> None:
        """Note that a stream goes on, unless another task of its agent waits too."""
        if slot not in self.loop.absent.waits and slot not in self.loop.absent.unread:
            self.work.end_stall(slot)

    def used(self) -> None:
        """Note that an attempt has run or waited until now."""
        provider = self.admission.provider
        if provider is not None and provider.outage.fruitless_since is not None:
            provider.outage.use(self.loop.now())

    def _note_break(self) -> None:
        """Note that the limiter is used again, if nothing ran or waited until now."""
        provider = self.admission.provider
        if provider is None or provider.outage.fruitless_since is None:
            return

        if not self.running and not self.waiting:
            provider.outage.begin(self.loop.now())

    def is_hopeless(self, patience: float | None) -> bool:
        """Return whether nothing has succeeded for so many seconds, and no attempt at work still may."""
        provider = self.admission.provider
        if provider is None or not provider.outage.lasts(patience, self.loop.now()):
            return False

        live = self.running + self.away + len(self.lines.returning)
        return self.work.count(live, len(self.lines.borrowing)) <= 0

    # -- agents that have stepped aside

    def report_away(self) -> None:
        """Report to batches that the number of agents that have stepped aside has changed."""
        for callback in tuple(self.on_resize) + (
            () if self.keys is None else tuple(self.keys.home.on_resize)
        ):
            callback()

    @property
    def all_away(self) -> int:
        """How many agents have stepped aside in this pool and those of its keys, coming back or not."""
        pools = {self} if self.keys is None else {self, *self.keys.pools}
        return sum(slot.pool in pools for slot in self.loop.absent.away)

    def waits_for_calls(self, slot: Slot) -> bool:
        """Return whether a task of the agent of an attempt waits for a call that the agent has made."""
        calls: list[Any] = self.work.calls_of(slot)
        return any(call.caller_waits or call in self.loop.absent.reads for call in calls)

    @abstractmethod
    def serve(self) -> None:
        """Serve all waiters that can be served now."""

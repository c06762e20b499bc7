"""
Random programs on a virtual clock with a shuffled scheduler: one seed is one run, to the last step.

Run some of them by hand with ``python tests/tools/fuzz.py --backend trio --seeds 0:5000``.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import random
import re
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import anyio
from anyio.lowlevel import checkpoint
from audit import assert_idle

from agentloop import (
    AgentLoop,
    AgentLoopError,
    Backoff,
    BatchStopped,
    ChunkEvent,
    Event,
    FirstChunkEvent,
    FirstChunkTimeout,
    IdleTimeout,
    Invocation,
    InvocationCancelled,
    InvocationResult,
    InvocationTimeout,
    LeftOpenError,
    Limiter,
    LimitEvent,
    LoopConfig,
    MetricsRecorder,
    QueuedEvent,
    Rate,
    ResultEvent,
    RetryBudget,
    RetryEvent,
    StartedEvent,
    Status,
    StopEvent,
    Verdict,
    VerdictKind,
    classify,
)
from agentloop._eventloop.tasks import LOST
from agentloop._limits.limiter import pool_of
from agentloop._limits.slots import current_slot
from agentloop.testing import FakeHTTPError, virtual_clock

var: ContextVar[str] = ContextVar("var", default="unset")
# A variable that agents alone set.
late_var: ContextVar[str] = ContextVar("late_var", default="unset")
# The call that a piece of code belongs to, seen through tasks and contexts.
call_var: ContextVar[Call | None] = ContextVar("call", default=None)


class InputError(Exception):
    pass


@contextmanager
def as_caller() -> Iterator[None]:
    """See the variable as those see it who are no agents."""
    before = var.get()
    var.set("caller")
    try:
        yield
    finally:
        var.set(before)


async def cancellation() -> BaseException:
    """Return a cancellation, to be raised where nothing can be cancelled."""
    stored: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class() as exc:
            stored.append(exc)
            raise

    return stored[0]


class Recorder(MetricsRecorder):
    """Remembers each result that was recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, list[InvocationResult[Any]]] = {}

    def record(self, result: InvocationResult[Any]) -> None:
        super().record(result)
        self.results.setdefault(result.agent_id, []).append(result)


class Payment:
    """What one attempt has paid to one rate, as far as that is known by now."""

    def __init__(self, at: float, cost: float) -> None:
        self.at = at
        self.cost = cost
        self.raised_at = -math.inf
        self.before = cost

    def known(self, at: float | None) -> float:
        """Return how much it was, without what came to it at the very time ``at``."""
        return self.before if self.raised_at == at else self.cost


class Account:
    """What was paid to one rate; what follows from that is found out anew each time."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.payments: list[Payment] = []

    def ready_at(self, cost: float, now: float, without: float | None = None) -> float:
        """Return when a cost can be paid, disregarding what was added at the time ``without``."""
        rate = self.rate
        paid = sorted((payment.at, payment.known(without)) for payment in self.payments)
        if rate.burst is None:
            paid = [(at, cost) for at, cost in paid if at + rate.per_seconds > now]
            too_much, at = sum(cost for _, cost in paid) + cost - rate.limit, now
            while too_much > 1e-9:
                then, least = paid.pop(0)
                too_much -= least
                at = then + rate.per_seconds

            return at

        each, full_at = rate.per_seconds / rate.limit, -math.inf
        for at, cost_then in paid:
            full_at = max(full_at, at) + cost_then * each

        return max(now, full_at + (cost - rate.burst) * each)

    def pay(self, cost: float, now: float) -> Payment:
        self.payments.append(Payment(now, cost))
        return self.payments[-1]

    def correct(self, payment: Payment, cost: float, now: float) -> None:
        if self.rate.burst is None and payment.at + self.rate.per_seconds <= now:
            return

        more = cost - payment.cost
        if more <= 0:
            payment.cost = cost
        elif self.rate.burst is None and payment.cost:
            payment.before, payment.cost, payment.raised_at = payment.cost, cost, now
        else:
            added = self.pay(more, now)
            added.before, added.raised_at = 0, now


class Call:
    """One use of a verb: how it is made, and what it gave."""

    def __init__(self, parent: Call | None, depth: int) -> None:
        self.parent = parent
        self.depth = depth
        # By a scope around it; and as asyncio does it, which reaches it a moment later.
        self.cancelled = False
        self.natively_cancelled = False
        self.runs_natively = False
        # Whether its agents run in tasks of the library's own.
        self.in_own_tasks = True
        self.made: list[str] = []
        self.results: list[InvocationResult[Any]] = []
        self.whole = False
        self.fatal = False
        self.input_failed = False
        self.left = False
        # How many inputs there are, and how many of them were pulled.
        self.inputs = 0
        self.pulled = 0
        # How many of its agents left a scope open, how many of them have ended, and what they left running.
        self.opened = 0
        self.open_ends = 0
        self.strays = 0


class Times:
    """When a stream's agent was at work, and when it waited for its reader."""

    def __init__(self, now: float) -> None:
        self.began = self.attempt_began = self.resumed = now
        self.away = 0.0
        self.at_yield = False

    def retry(self, now: float) -> None:
        self.attempt_began = self.resumed = now
        self.away = 0.0

    def leave(self, now: float) -> None:
        self.at_yield = True
        self.resumed = now

    def come_back(self, now: float) -> None:
        self.at_yield = False
        self.away += now - self.resumed
        self.resumed = now


class CoolOffAccount:
    """Knows when an attempt may begin in a cool-off: one at a time, and ever more rarely."""

    def __init__(self) -> None:
        self.until = self.probe_at = self.held_at = -math.inf
        self.gap = 0.0
        self.epoch = 0
        self.begun: set[int] = set()

    def hold(self, now: float, seconds: float, epoch: int) -> None:
        if now >= self.until:
            self.held_at, self.epoch = now, epoch
            self.gap = max(1.0, seconds / 20)
            self.probe_at = now + self.gap
            self.begun.clear()

        self.until = max(self.until, now + seconds)

    def start(self, number: int, now: float, epoch: int) -> bool:
        if now == self.held_at and epoch < self.epoch:
            return True  # it was granted its slot before, and its task runs only now

        may_start = now > self.until - 1e-6 or (now > self.probe_at - 1e-6 and not self.begun)
        if now < self.until:
            self.gap *= 2
            self.probe_at = now + self.gap

        self.begun.add(number)
        return may_start

    def end(self, number: int, succeeded: bool) -> None:
        if succeeded and number in self.begun:
            self.until = -math.inf

        self.begun.discard(number)


class Program:
    def __init__(self, seed: int, backend: str) -> None:
        self.random = random.Random(seed)
        self.backend = backend
        self.streams = seed % 2 == 1
        self.produced: dict[str, list[int]] = {}
        self.times: dict[str, Times] = {}
        self.gated = seed % 5 in (1, 3)
        self.accounts: list[Account] = []
        self.costs: dict[str, list[tuple[float, float]]] = {}
        self.paid: dict[str, list[Payment]] = {}
        self.call_of: dict[str, Call] = {}
        # Since when each cool-off was, and until when; since when it is paused.
        self.cool_off = CoolOffAccount()
        self.paused_at = math.inf
        # The limit, and whether it was just cut; the order of starts and cuts.
        self.limit = 0
        self.cut = False
        self.order = 0
        self.started_as: dict[int, int] = {}
        self.attempt_at: dict[int, float] = {}
        self.cut_as = 0
        self.failed: Counter[int] = Counter()
        self.budget: RetryBudget | None = None
        self.successes: Counter[int] = Counter()
        self.retries: Counter[int] = Counter()
        size = self.random.choice([1, 1, 2, 3]) if self.streams else self.random.randint(1, 4)
        self.limiter = self.make_gated_limiter(size) if self.gated else Limiter(size)
        self.ceiling = self.ceiling_now = self.floor = self.limiter.max_concurrency
        self.metrics = Recorder()
        self.names = 0
        self.working = 0
        self.attempting = 0
        self.calls = 0
        self.checked = 0
        self.uses = 0
        # Most programs have none of these; what they are is decided apart, so that the others stay the same.
        trait = random.Random(f"traits of {seed}").random
        self.leaves_open = trait() < 0.2
        self.callbacks_raise = trait() < 0.15
        self.native = trait() < 0.25 and backend == "asyncio"
        self.sabotaged = trait() < 0.15 and backend == "asyncio"
        # Whether agents that succeed leave the variables as they were.
        self.restores = trait() < 0.7
        # Whether scopes that were left stay in the queue of deadlines, as on a real clock.
        self.keeps_scopes = trait() < 0.5 and backend == "asyncio"
        self.task_numbers: weakref.WeakKeyDictionary[asyncio.Task[Any], int] = weakref.WeakKeyDictionary()
        # Which agents left a scope open; what some of them left, so that it stays.
        self.opened: set[str] = set()
        self.kept: list[Any] = []
        # A cancellation of long ago; what a cost raised; the errors that could not be judged.
        self.stray_cancellation: BaseException | None = None
        self.refused: dict[str, BaseException] = {}
        self.unjudged: list[Exception] = []
        self.natively_cancelled = 0
        # What each agent did last, and whether it returned.
        self.last: dict[str, tuple[str, bool]] = {}
        self.starts: Counter[str] = Counter()
        self.tasks = 0
        choose = self.random.choice
        self.config = LoopConfig(
            timeout_seconds=choose([None, 0.5, 2.0, 2.5]),
            total_timeout_seconds=choose([None, None, 3.0, 8.0]),
            retry_on_timeout=choose([True, False]),
            max_retries=choose([0, 1, 2]),
            backoff=Backoff(initial_seconds=choose([0.05, 0.2, 1.0]), jitter=choose(["equal", "none"])),
            classify=self.classify,
            overload_timeout_seconds=choose([2.0, 5.0]),
            first_chunk_timeout_seconds=choose([None, 0.9]) if self.streams else None,
            idle_timeout_seconds=choose([None, 0.4, 1.1]) if self.streams else None,
        )
        self.entered = False
        self.violations: list[str] = []
        self.stories: dict[int, list[str]] = {}
        # Without hooks, workers run agents directly; accounts of rates need the events.
        self.quiet = trait() < 0.6 and not self.gated
        self.sets_late_var = trait() < 0.5
        self.loop = AgentLoop(
            self.config,
            limiter=self.limiter,
            metrics=MetricsRecorder() if self.quiet else self.metrics,
            on_event=None if self.quiet else self.on_event,
        )

    def make_gated_limiter(self, size: int) -> Limiter:
        choose = self.random.choice
        for number in range(choose([0, 1, 1, 2])):
            limit = self.random.randint(2, 6)
            burst = choose([None, None, 1, 2, limit])
            heavy = choose([True, False])
            rate = Rate(
                limit,
                choose([0.5, 1.0, 3.0]),
                burst,
                (lambda invocation, number=number: self.cost(invocation.agent_id, number)) if heavy else None,
                (lambda result, number=number: self.real_cost(result, number)) if heavy else None,
            )
            self.accounts.append(Account(rate))

        if choose([True, False, False]):
            self.budget = RetryBudget(ratio=0.5, min_per_second=choose([0, 0.2]), window_seconds=10)

        rates = [account.rate for account in self.accounts]
        return Limiter(size, rates=rates, adaptive=choose([True, True, False]), retry_budget=self.budget)

    def cost(self, name: str, number: int) -> float:
        """Make up what an invocation costs, and what it will turn out to have cost."""
        try:
            self.raise_sometimes("cost")
        except BaseException as exc:
            self.refused[name] = exc
            raise

        rate = self.accounts[number].rate
        most = int(rate.limit if rate.burst is None else rate.burst)
        cost = self.random.choice([0, 1, 1, self.random.randint(1, most), most])
        if self.random.random() < 0.02:
            cost = most + 1

        costs = self.costs.setdefault(name, [(1.0, 1.0)] * len(self.accounts))
        costs[number] = (cost, self.random.choice([0, cost, cost + 1, cost / 2]))
        return cost

    def real_cost(self, result: InvocationResult[Any], number: int) -> float:
        assert self.starts[result.agent_id]
        self.raise_sometimes("settle")
        if self.random.random() < 0.1:
            raise KeyError("settle")

        real = self.costs[result.agent_id][number][1]
        self.accounts[number].correct(self.paid[result.agent_id][number], real, anyio.current_time())
        return real

    def classify(self, exc: Exception) -> Verdict:
        try:
            self.raise_sometimes("classify")
        except BaseException:
            self.unjudged.append(exc)
            raise

        verdict = classify(exc)
        if verdict.kind is VerdictKind.FATAL:
            vars(exc)["call"].fatal = True

        return verdict

    def is_unjudged(self, exc: object) -> bool:
        return any(exc is error for error in self.unjudged)

    def raise_sometimes(self, where: str) -> None:
        """Be a callback that fails, in a program that has such."""
        if self.callbacks_raise and self.random.random() < 0.1:
            raise self.random.choice([IndexError(where), self.cancellation()])

    def cancellation(self) -> BaseException:
        assert self.stray_cancellation is not None
        return self.stray_cancellation

    def check_may_start(self, name: str, call: Call) -> None:
        wrong = "after a fatal verdict" if call.fatal else None
        if call.open_ends >= self.ceiling:
            wrong = "although as many agents as the limit had left a scope open"

        if name in self.opened:
            wrong = "although it had left a scope open"

        if call.natively_cancelled and not call.in_own_tasks:
            wrong = "although its caller's task had been cancelled"

        caller: Call | None = call
        # In an entered loop what is read belongs to the loop: there a cancelled reader has to leave first.
        while caller is not None and not self.entered:
            if caller.cancelled:
                wrong = "although its caller had been cancelled"

            # In a task of its own it hears of that a moment later.
            caller = None if caller.runs_natively else caller.parent

        if wrong:
            # The result may be one that nobody looks at.
            self.violations.append(f"an agent was started {wrong}")

        assert not self.violations

    def on_event(self, event: Event) -> None:
        # What is raised here would only be logged.
        if isinstance(event, LimitEvent):
            self.cut = event.limit < min(self.limit, self.ceiling_now)
            self.limit = event.limit
        elif not isinstance(event, StopEvent):
            self.stories.setdefault(event.id, []).append(type(event).__name__[0])
            if isinstance(event, QueuedEvent):
                self.call_of[event.invocation.agent_id].pulled += 1
            elif isinstance(event, StartedEvent):
                self.note_start(event)
            elif isinstance(event, RetryEvent | ResultEvent):
                self.note_end(event)
            elif isinstance(event, FirstChunkEvent):
                self.cool_off.end(event.id, True)

        self.raise_sometimes("on_event")

    def note_start(self, event: StartedEvent) -> None:
        name, now = event.invocation.agent_id, event.at
        self.order += 1
        self.started_as[event.id] = self.order
        self.attempt_at[event.id] = now
        costs = self.costs.get(name, [(1.0, 1.0)] * len(self.accounts))
        for account, (cost, _) in zip(self.accounts, costs, strict=True):
            if account.ready_at(cost, now, without=now) > now + 1e-6:
                self.violations.append(f"{name} starts at {now}, which is too much for {account.rate}")

        self.paid[name] = [
            account.pay(cost, now) for account, (cost, _) in zip(self.accounts, costs, strict=True)
        ]
        slot = current_slot.get()
        assert slot is not None
        if not self.cool_off.start(event.id, now, slot.epoch):
            self.violations.append(f"{name} starts at {now}, during a cool-off, and is no probe")

        # Who runs may run others; who is not run by another waits.
        if now > self.paused_at and not self.call_of[name].depth:
            self.violations.append(f"{name} starts at {now}, during a pause")

    def note_end(self, event: RetryEvent | ResultEvent) -> None:
        """Look at how an attempt ended, unless it was looked at before."""
        cut, self.cut = self.cut, False
        if isinstance(event, RetryEvent):
            failures, error = event.attempt, event.error
            if event.verdict.kind is not VerdictKind.OVERLOAD:
                self.check_budget(event.at)

            if self.is_unjudged(error):
                self.violations.append(f"{error!r} was retried although nothing could judge it")
        else:
            failures, error = len(event.result.failures), event.result.exception
            self.call_of[event.result.agent_id].open_ends += isinstance(error, LeftOpenError)

        self.cool_off.end(event.id, isinstance(event, ResultEvent) and event.result.success)
        overloaded = False
        if failures > self.failed[event.id]:
            self.failed[event.id] = failures
            if isinstance(error, InvocationTimeout) and not error.total:
                took = event.at - self.attempt_at[event.id]
                if took < error.seconds * 0.999:
                    self.violations.append(f"timed out after {took} s, and not after {error.seconds}")

            # In an outage, signs of one are overloads as well.
            overloaded = isinstance(error, FakeHTTPError | OSError | ExceptionGroup)
            overloaded = overloaded and not self.is_unjudged(error)
            retry_after = getattr(error, "retry_after", None)
            if overloaded and retry_after is not None and self.limiter._adaptive:
                self.cool_off.hold(event.at, retry_after, pool_of(self.limiter).admission.epoch)

        if cut:
            if not overloaded:
                self.violations.append(f"the limit was cut by {error!r}")
            elif self.started_as[event.id] < self.cut_as:
                self.violations.append("one burst cut the limit twice")

            self.cut_as = self.order

    def check_budget(self, now: float) -> None:
        if self.budget is not None:
            self.retries[int(now)] += 1
            recent = range(int(now) - 9, int(now) + 1)
            allowed = self.budget.ratio * sum(self.successes[second] for second in recent)
            if sum(self.retries[second] for second in recent) > allowed + self.budget.min_per_second * 10:
                self.violations.append("there were more retries than the budget allows")

    # -- what agents do

    async def work(self, seconds: float) -> None:
        """Do something of the agent's own; the sum of this is what the limit is about."""
        self.working += 1
        try:
            assert self.working <= self.ceiling, f"{self.working} run, and the limit is {self.ceiling}"
            if seconds:
                await anyio.sleep(seconds)
            else:
                await checkpoint()
        finally:
            self.working -= 1

    def agent(self, call: Call, name: str, depth: int) -> Any:
        """Make an agent whose attempts each do something else, fixed by the seed."""
        actions = [self.random.choice(self.actions(call, depth)) for _ in range(3)]

        async def run() -> str:
            assert var.get() == "caller", f"an agent sees a variable that is not its caller's: {var.get()}"
            assert late_var.get() == "unset", "an agent sees a variable that its caller has not set"
            token = var.set(name)
            self.check_may_start(name, call)
            action = actions[min(self.starts[name], 2)]
            self.starts[name] += 1
            self.attempting += 1
            self.last[name] = (action, False)
            try:
                await getattr(self, action)(name, call, depth)
            finally:
                self.attempting -= 1

            assert var.get() == name
            self.return_from(name, action)
            if self.restores:
                var.reset(token)
            elif self.sets_late_var:
                late_var.set(name)

            return name

        return run

    def return_from(self, name: str, action: str) -> None:
        self.last[name] = (action, True)
        self.successes[int(anyio.current_time())] += 1

    def actions(self, call: Call, depth: int) -> list[str]:
        actions = ["succeed"] * 6 + [
            "never_wait",
            "fail",
            "fail",
            "fail_at_once",
            "overload",
            "hang",
            "swallow",
        ]
        actions += ["convert", "group", "reject", "own_timeout", "stray", "slow_cleanup"]
        if self.random.random() < 0.1:
            actions += ["unauthorized"]

        if depth < 2:
            actions += ["nest", "nest_at_once", "nest_in_background"]
            if self.streams:
                actions += ["nest"] * 4

        if self.backend == "asyncio":
            actions += ["cancel_self", "leak_count"]

        # In the caller's own task it would be the caller that pays.
        if self.leaves_open and call.in_own_tasks:
            actions += ["leave_open"] * 4

        return actions

    async def succeed(self, *_: Any) -> None:
        await self.work(self.random.choice([0, 0, 0.3, 1.0]))

    async def never_wait(self, *_: Any) -> None:
        pass

    async def fail(self, *_: Any) -> None:
        await self.work(self.random.choice([0, 0.4]))
        raise self.random.choice([LookupError, ConnectionError])("transient")

    async def fail_at_once(self, *_: Any) -> None:
        raise LookupError("transient")

    async def overload(self, *_: Any) -> None:
        await self.work(0)
        raise FakeHTTPError(429, self.random.choice([None, 0.3, 2.0, 9.0]) if self.gated else None)

    async def reject(self, *_: Any) -> None:
        raise FakeHTTPError(400)

    async def unauthorized(self, name: str, call: Call, depth: int) -> None:
        await self.work(0)
        error = FakeHTTPError(401)
        vars(error)["call"] = call
        raise error

    async def hang(self, *_: Any) -> None:
        await self.work(20.0)
        assert self.config.timeout_seconds is None, "a time-out did not come"

    async def swallow(self, *_: Any) -> None:
        try:
            await self.work(20.0)
        except BaseException:
            pass

    async def convert(self, *_: Any) -> None:
        try:
            await self.work(3.0)
        except BaseException as exc:
            raise ConnectionError("converted") from exc

    async def slow_cleanup(self, *_: Any) -> None:
        try:
            await self.work(3.0)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)

    async def group(self, *_: Any) -> None:
        async def child() -> None:
            await anyio.sleep(0.1)
            raise ValueError("child")

        async with anyio.create_task_group() as group:
            group.start_soon(child)
            await self.work(1.0)

    async def own_timeout(self, *_: Any) -> None:
        with anyio.fail_after(0.3):
            await self.work(1.0)

    async def stray(self, *_: Any) -> None:
        raise await cancellation()

    async def cancel_self(self, name: str, call: Call, depth: int) -> None:
        # In the task of whoever called run_single() this is that caller's own cancellation.
        self.natively_cancelled += 1
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if self.random.random() < 0.5:
            await asyncio.sleep(1)

    async def leak_count(self, *_: Any) -> None:
        """Let a task group of asyncio's fail, which before CPython 3.13 may leave the task's count raised."""

        async def fail() -> None:
            raise OSError

        choose = self.random.choice
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                if choose([True, False]):
                    await asyncio.sleep(1)
        except* OSError:
            pass

        ending = choose([self.succeed, self.succeed, self.fail, self.hang])
        await ending()

    async def leave_open(self, name: str, call: Call, depth: int) -> None:
        """Enter a scope or a task group, and end without leaving it."""
        await self.enter_for_good(name, call)
        await self.end_somehow()

    async def end_somehow(self) -> None:
        endings = [self.never_wait, self.succeed, self.succeed, self.fail, self.hang, self.swallow]
        await self.random.choice(endings)()

    async def enter_for_good(self, name: str, call: Call) -> None:
        self.opened.add(name)
        call.opened += 1
        choose = self.random.choice
        if choose([True, False]):
            group = anyio.create_task_group()
            await group.__aenter__()
            scope = group.cancel_scope
            for _ in range(choose([0, 1, 2])):
                group.start_soon(self.be_left, call, choose([0.0, 0.1, 0.7, 20.0]), choose([True, False]))

            if choose([True, False]):
                self.kept.append(group)
        else:
            deadline = anyio.current_time() + choose([math.inf, 0.1, 0.6])
            scope = anyio.CancelScope(deadline=deadline, shield=choose([True, False, False]))
            scope.__enter__()

        if choose([True, False, False]):
            scope.cancel()

    async def be_left(self, call: Call, seconds: float, fails: bool) -> None:
        call.strays += 1
        try:
            await anyio.sleep(seconds)
            if fails:
                raise ValueError("a task that was left")
        finally:
            try:
                await self.clean_up("shielded" if self.random.random() < 0.3 else "nothing")
            finally:
                call.strays -= 1

    async def nest(self, name: str, call: Call, depth: int) -> None:
        with as_caller():
            await self.make_call(call, depth + 1)

    async def nest_at_once(self, name: str, call: Call, depth: int) -> None:
        with as_caller():
            async with anyio.create_task_group() as group:
                for _ in range(self.random.randint(2, 3)):
                    group.start_soon(self.make_call, call, depth + 1)

    async def nest_in_background(self, name: str, call: Call, depth: int) -> None:
        self.calls += 1
        with as_caller():
            self.background.start_soon(self.make_call, None, depth + 1)

        for _ in range(self.random.randint(1, 9)):
            await checkpoint()

    def stream_agent(self, call: Call, name: str, depth: int) -> Any:
        """Make an agent that yields, and in each attempt ends in another way."""
        choose = self.random.choice
        scripts = [
            (
                choose([0, 1, 3, 20, 20, 40]),
                choose([0, 0, 0.05, 0.3]),
                choose(["end", "end", "end", *self.actions(call, depth)]),
                choose(["nothing", "nothing", "shielded", "unshielded", "yield", "raise"]),
            )
            for _ in range(3)
        ]

        async def run() -> AsyncIterator[tuple[str, int]]:
            assert var.get() == "caller", f"a stream sees a variable that is not its caller's: {var.get()}"
            var.set(name)
            self.check_may_start(name, call)
            count, gap, ending, cleanup = scripts[min(self.starts[name], 2)]
            produced = self.produced.setdefault(name, [])
            assert not produced, "a stream was retried after a chunk"
            self.starts[name] += 1
            self.attempting += 1
            self.last[name] = (ending, False)
            now = anyio.current_time
            times = self.times.setdefault(name, Times(now()))
            times.retry(now())
            try:
                opens_early = ending == "leave_open" and self.random.random() < 0.5
                if opens_early:
                    await self.enter_for_good(name, call)

                for index in range(count):
                    if gap or index % 7 == 3:
                        await self.work(gap)

                    assert var.get() == name
                    produced.append(index)
                    times.leave(now())
                    yield name, index
                    times.come_back(now())

                if opens_early:
                    await self.end_somehow()
                elif ending != "end":
                    await getattr(self, ending)(name, call, depth)

                self.return_from(name, ending)
            finally:
                try:
                    if not self.last[name][1]:
                        await self.clean_up(cleanup)
                        # A generator that answers its closing so can be closed by nobody.
                        if cleanup == "yield" and not isinstance(sys.exception(), GeneratorExit):
                            yield name, -1
                finally:
                    self.attempting -= 1

        return run

    async def clean_up(self, how: str) -> None:
        if how == "shielded":
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)
        elif how == "unshielded":
            await anyio.sleep(0.2)
        elif how == "raise":
            raise OSError("cleanup")

    # -- calls

    def name(self, call: Call) -> str:
        self.names += 1
        call.made.append(f"j{self.names}")
        self.call_of[call.made[-1]] = call
        return call.made[-1]

    def invocation(self, call: Call, depth: int) -> Invocation[str]:
        name = self.name(call)
        return Invocation(name, self.agent(call, name, depth))

    def stream_invocation(self, call: Call, depth: int) -> Invocation[Any]:
        name = self.name(call)
        return Invocation(name, self.stream_agent(call, name, depth))

    def inputs(self, call: Call, depth: int, streams: bool = False) -> Any:
        make = self.stream_invocation if streams else self.invocation
        count = self.random.choice([0, 1, 3, 6] if depth == 0 else [1, 2, 3])
        fails = self.random.random() < 0.08
        call.inputs = count

        def fail() -> None:
            call.input_failed = True
            raise self.cancellation() if self.callbacks_raise and self.random.random() < 0.5 else InputError

        def sync() -> Iterator[Any]:
            for _ in range(count):
                yield make(call, depth)

            if fails:
                fail()

        async def asynchronous() -> AsyncIterator[Any]:
            for _ in range(count):
                await anyio.sleep(self.random.choice([0, 0, 0.2]))
                yield make(call, depth)

            if fails:
                fail()

        made: list[Invocation[Any]] = []

        def name(number: int) -> str:
            if number == count:
                fail()

            made.append(make(call, depth))
            return made[number].agent_id

        kind = self.random.random()
        if kind < 0.3:
            return asynchronous()

        if kind < 0.5:
            return Invocation.map(lambda number: made[number].fn(), range(count + fails), agent_id=name)

        return sync() if kind < 0.8 or fails else list(sync())

    async def make_call(self, parent: Call | None, depth: int) -> None:
        call = Call(parent, depth)
        verbs = [self.single, self.gather, self.gather, self.read, self.read_some]
        if self.streams:
            verbs += [self.stream, self.stream, self.stream_some, self.fan, self.fan_some]

        verb = self.random.choice(verbs)
        if self.native and self.random.random() < 0.6:
            await self.call_natively(verb, call, depth)
            self.check(call)
            return

        cancel_after = self.random.choice([None, None, None, 0.0, 0.25, 1.0, 2.1])
        if cancel_after is None:
            await self.guarded(verb, call, depth)
        else:
            scope = anyio.CancelScope()
            ended = anyio.Event()

            async def cancel() -> None:
                assert cancel_after is not None
                with anyio.move_on_after(cancel_after):
                    await ended.wait()

                if not ended.is_set():
                    for _ in range(self.random.randint(0, 5)):
                        await checkpoint()

                    if not ended.is_set():
                        call.cancelled = True
                        scope.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(cancel)
                with scope:
                    try:
                        await self.guarded(verb, call, depth)
                    finally:
                        ended.set()

        self.check(call)

    async def call_natively(self, verb: Any, call: Call, depth: int) -> None:
        """Use a verb in a task of its own, which is cancelled as asyncio does it, and not by a scope."""
        choose, seconds = self.random.choice, [0.0, 0.25, 1.0, 2.1]
        # Before CPython 3.12, wait_for() leaves its task alone when it is cancelled once too often.
        how = choose(["plain", "plain", "timeout", *(["wait_for"] if not self.sabotaged else [])])
        call.runs_natively = True

        async def work() -> None:
            try:
                if how == "timeout":
                    async with asyncio.timeout(choose(seconds)):
                        await self.guarded(verb, call, depth)
                elif how == "wait_for":
                    await asyncio.wait_for(self.guarded(verb, call, depth), choose(seconds))
                else:
                    await self.guarded(verb, call, depth)
            except TimeoutError:
                call.natively_cancelled = True

        def cancel() -> None:
            if how != "wait_for" and task.cancel():
                call.natively_cancelled = True

        task = asyncio.ensure_future(work())
        loop = asyncio.get_running_loop()
        handles = [loop.call_later(choose(seconds), cancel) for _ in range(choose([0, 1, 1, 2]))]
        interrupted: BaseException | None = None
        while not task.done():
            try:
                with anyio.CancelScope(shield=interrupted is not None):
                    await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                if interrupted is None:
                    cancel()

                interrupted = exc

        for handle in handles:
            handle.cancel()

        if not task.cancelled():
            task.result()

        if interrupted is not None:
            raise interrupted

        if task.cancelled():
            wanted = call.natively_cancelled or self.natively_cancelled
            assert wanted, "a cancellation that nobody asked for"
        elif how == "plain" and verb in (self.gather, self.read, self.read_some):
            assert not call.natively_cancelled, "a native cancellation was lost"

    async def guarded(self, verb: Any, call: Call, depth: int) -> None:
        try:
            with self.may_be_cut_short(call):
                await verb(call, depth)
                call.whole = True
        finally:
            if call.strays and not self.entered:
                self.violations.append("a verb has ended, and tasks that its agents left have not")

    @contextmanager
    def may_be_cut_short(self, call: Call) -> Iterator[None]:
        """Let a batch say that there are fewer results than inputs, if it has a reason."""
        try:
            yield
        except InputError:
            assert call.input_failed
        except InvocationCancelled as exc:
            assert call.input_failed or self.sabotaged
            # Then the reader was cancelled, and has not read on.
            call.left = call.left or str(exc) == LOST
        except BatchStopped as exc:
            self.check_stop(call, exc)

    def check_stop(self, call: Call, stopped: BatchStopped) -> None:
        patience = self.config.overload_timeout_seconds
        assert patience is not None
        fruitless = anyio.current_time() >= max(self.successes, default=0) + patience
        is_out_of_patience = fruitless and stopped.reason.startswith("nothing has succeeded")
        may_stop = call.fatal or self.sabotaged or call.opened >= self.floor or is_out_of_patience
        assert may_stop, "a batch was stopped without a reason"

    async def single(self, call: Call, depth: int) -> None:
        call.in_own_tasks = False
        invocation = self.invocation(call, depth)
        task = asyncio.current_task() if self.backend == "asyncio" else None
        marks = 0 if task is None else task.cancelling()
        try:
            result = await self.loop.run_single(invocation.agent_id, invocation.fn)
        finally:
            # The marks that an agent left on its caller's task would mislead the scopes in there.
            if call.parent is None or call.runs_natively:
                while task is not None and task.cancelling() > marks:
                    task.uncancel()

        call.results.append(result)
        assert not call.cancelled or result.success or not result.latency_ms, "a cancellation was lost"
        assert not call.natively_cancelled or result.success, "a native cancellation was lost"

    async def gather(self, call: Call, depth: int) -> None:
        inputs = self.inputs(call, depth)
        try:
            results = await self.loop.run_all(inputs)
        except BatchStopped as stopped:
            self.check_stop(call, stopped)
            assert not isinstance(inputs, Iterator), "a sync input was not read to its end"
            results = stopped.results
        else:
            assert len(results) == call.inputs, "a list that is too short looks complete"

        assert [result.index for result in results] == list(range(len(call.made)))
        call.results.extend(results)

    async def read(self, call: Call, depth: int) -> None:
        with self.may_be_cut_short(call):
            async with self.loop.as_completed(self.inputs(call, depth)) as results:
                async for result in results:
                    call.results.append(result)
                    await anyio.sleep(self.random.choice([0, 0, 0.5]))

            self.check_complete(call)

        assert self.quiet or len(call.results) == call.pulled, "a result was lost"

    def check_complete(self, call: Call) -> None:
        assert len(call.results) == call.inputs, "a batch that was cut short looks complete"
        assert all(result.status is not Status.SKIPPED for result in call.results)

    async def read_some(self, call: Call, depth: int) -> None:
        count = self.random.randint(0, 3)
        async with self.loop.as_completed(self.inputs(call, depth)) as results:
            async for result in results:
                call.results.append(result)
                count -= 1
                if count <= 0:
                    break

    async def stream(self, call: Call, depth: int, leave_after: int | None = None) -> None:
        invocation = self.stream_invocation(call, depth)
        name, got = invocation.agent_id, []
        error: Exception | None = None
        stream = self.loop.run_streaming(name, invocation.fn)
        try:
            async with stream:
                while (chunk := await self.next_of(stream)) is not None:
                    who, index = chunk
                    assert who == name
                    got.append(index)
                    if len(got) == leave_after:
                        call.left = True
                        if self.random.random() < 0.5:
                            raise KeyError(name)

                        break

                    await self.use_chunk(call, depth)
        except KeyError:
            assert call.left
        except Exception as exc:
            error = exc
            if isinstance(exc, AssertionError):
                raise
        else:
            assert call.left or stream.result.success, "a truncated stream looks complete"

        if error is not None:
            assert not call.left
            call.left = self.sabotaged and str(error) == LOST
            assert call.left or error is stream.result.exception, "an error is not the object that it was"

        call.results.append(stream.result)
        self.check_chunks(call, stream.result, got)

    async def stream_some(self, call: Call, depth: int) -> None:
        await self.stream(call, depth, self.random.choice([1, 2, 17]))

    async def fan(self, call: Call, depth: int, leave_after: int | None = None) -> None:
        with self.may_be_cut_short(call):
            if await self.read_streams(call, depth, leave_after):
                self.check_complete(call)

        if leave_after is None and not call.left:
            assert self.quiet or len(call.results) == call.pulled, "a result was lost"

    async def read_streams(self, call: Call, depth: int, leave_after: int | None) -> bool:
        """Read many streams, and return whether that was to their end."""
        got: dict[int, list[int]] = {}
        results: list[InvocationResult[Any]] = []
        inputs = self.inputs(call, depth, streams=True)
        async with self.loop.stream_all(inputs) as events:
            while (event := await self.next_of(events, native=True)) is not None:
                if isinstance(event, ChunkEvent):
                    who, index = event.chunk
                    assert who == event.invocation.agent_id == call.made[event.index]
                    assert all(result.index != event.index for result in results), "a chunk after the end"
                    got.setdefault(event.index, []).append(index)
                else:
                    results.append(event.result)
                    call.results.append(event.result)
                    assert event.invocation.agent_id == event.result.agent_id
                    self.check_chunks(call, event.result, got.get(event.result.index, []))

                await self.use_chunk(call, depth)
                if leave_after is not None:
                    leave_after -= 1
                    if not leave_after:
                        return False

        return True

    async def fan_some(self, call: Call, depth: int) -> None:
        await self.fan(call, depth, self.random.choice([1, 5, 30]))

    async def next_of(self, items: Any, native: bool = False) -> Any:
        """Wait for an item, and where that is cancelled, wait again; ``None`` at the end."""
        while True:
            how = self.random.choice(["wait", "wait", "time out", "cancel", "native"])
            seconds = self.random.choice([0.0, 0.05, 0.3])
            if how == "native" and native and self.backend == "asyncio":
                try:
                    return await asyncio.wait_for(anext(items, None), seconds or 0.01)
                except TimeoutError:
                    continue

            ended = anyio.Event()
            with anyio.CancelScope() as scope:
                if how == "time out":
                    scope.deadline = anyio.current_time() + seconds
                elif how == "cancel":
                    self.background.start_soon(self.cancel_later, scope, seconds, ended)

                try:
                    return await anext(items, None)
                finally:
                    ended.set()

    async def cancel_later(self, scope: anyio.CancelScope, seconds: float, ended: anyio.Event) -> None:
        with anyio.move_on_after(seconds):
            await ended.wait()

        for _ in range(self.random.randint(0, 5)):
            await checkpoint()

        if not ended.is_set():
            scope.cancel()

    async def use_chunk(self, call: Call, depth: int) -> None:
        action = self.random.random()
        if action < 0.1:
            await anyio.sleep(self.random.choice([0, 0.2, 1.5]))
        elif action < 0.3 and depth < 2 and call.parent is not None and self.uses < 40:
            self.uses += 1
            # A reader that is itself an agent may run others meanwhile: it is lent back its slot.
            await self.make_call(call, depth + 1)

    # -- what must hold

    def check_chunks(self, call: Call, result: InvocationResult[Any], got: list[int]) -> None:
        produced = self.produced.get(result.agent_id, [])
        extra = [index for index in got if index < 0]
        assert got == [*range(len(got) - len(extra)), *extra], f"out of order: {got}"
        assert len(extra) <= 1
        if not call.left:
            assert len(got) - len(extra) == len(produced), "a chunk was lost"

        assert result.chunks >= len(got)
        assert (result.first_chunk_ms is None) == (not result.chunks)

    def check(self, call: Call) -> None:
        names = [result.agent_id for result in call.results]
        assert len(set(names)) == len(names), "an input has two results"
        assert set(names) <= set(call.made)
        self.checked += call.parent is None
        for result in call.results:
            self.check_result(call, result)

    def check_result(self, call: Call, result: InvocationResult[Any]) -> None:
        starts = self.starts[result.agent_id]
        action, returned = self.last.get(result.agent_id, ("", False))
        status, error = result.status, result.exception
        assert call.made[result.index] == result.agent_id, "a result does not belong to its input"
        assert result.retries == max(0, starts - 1), (result, starts)
        # In an outage, signs of one are overloads as well.
        overloads = sum(
            getattr(error, "status_code", 0) == 429
            or (self.limiter._adaptive and isinstance(error, (OSError, ExceptionGroup)))
            for error in result.failures
        )
        assert result.retries <= self.config.max_retries + overloads, "there were more retries than allowed"
        assert result.latency_ms >= 0
        assert result.queue_ms >= 0
        cancelled = call.left or call.cancelled or call.natively_cancelled or self.sabotaged
        if result.agent_id in self.opened:
            if status is Status.CANCELLED:
                assert cancelled, "an agent that left a scope open was cancelled"
            else:
                assert status is Status.ERROR, f"an agent that left a scope open ended with {status}"
                assert isinstance(error, LeftOpenError)
                assert error.agent_id == result.agent_id

            return

        assert returned == (status is Status.SUCCESS), "what the agent returned was thrown away"
        if status is Status.SUCCESS:
            assert result.output == (None if result.agent_id in self.produced else result.agent_id)
            assert error is None
            assert len(result.failures) == result.retries
        elif status is Status.SKIPPED:
            assert isinstance(error, (BatchStopped, AgentLoopError))
            assert starts == 0
        elif status is Status.TIMEOUT:
            assert isinstance(error, InvocationTimeout)
            limit = self.config.total_timeout_seconds if error.total else self.config.timeout_seconds
            if isinstance(error, FirstChunkTimeout):
                limit = self.config.first_chunk_timeout_seconds
                # Only an agent that yields although its time is up has a chunk then.
                assert not self.produced.get(result.agent_id)
            elif isinstance(error, IdleTimeout):
                limit = self.config.idle_timeout_seconds
                assert result.chunks

            assert error.seconds == limit
            if result.agent_id in self.times and not error.total:
                self.check_times(self.times[result.agent_id], result, error)

            # Cleanup that is shielded may take another moment: two of a stream, and those of agents within.
            # One within may also wait in a shielded scope that it has left open, for as long as it likes.
            moments = 6 if action.startswith("nest") else 1 + (result.agent_id in self.produced)
            if error.total and not any(self.is_within(name, call) for name in self.opened):
                assert result.latency_ms <= (error.seconds + moments * 0.201) * 1000

            assert result.latency_ms >= error.seconds * 999.9
        elif status is Status.CANCELLED:
            assert isinstance(error, InvocationCancelled)
            assert cancelled or action in ("stray", "cancel_self", "nest", "nest_at_once"), (
                f"{action} was cancelled"
            )
        else:
            assert error is not None
            if isinstance(error, AssertionError):
                raise error

            refusal = self.refused.get(result.agent_id)
            if refusal is not None:
                assert not starts
                assert error is refusal or error.__cause__ is refusal
                return

            if isinstance(error, ValueError) and not starts:
                assert any(
                    cost > (account.rate.limit if account.rate.burst is None else account.rate.burst)
                    for (cost, _), account in zip(self.costs[result.agent_id], self.accounts, strict=True)
                )
                return

            assert error is result.failures[-1]
            assert not isinstance(error, InvocationTimeout)
            assert isinstance(error, (LookupError, OSError, FakeHTTPError, ExceptionGroup)), repr(error)

    def is_within(self, name: str, call: Call) -> bool:
        """Return whether an agent is run by an agent of a call, at any depth."""
        parent = self.call_of[name].parent
        while parent is not None and parent is not call:
            parent = parent.parent

        return parent is not None

    def check_times(self, times: Times, result: InvocationResult[Any], error: InvocationTimeout) -> None:
        """The time that a reader takes is nobody's fault but its own."""
        assert not times.at_yield, "a stream was timed out while it waited for its reader"
        ended = times.began + result.latency_ms / 1000
        since = times.resumed
        if not isinstance(error, IdleTimeout):
            since = times.attempt_began + times.away

        assert ended - since >= error.seconds * 0.999, "a stream was timed out too early"

    async def watch(self) -> None:
        """Look at the state whenever nothing is about to happen."""
        start = anyio.current_time()
        while True:
            await anyio.wait_all_tasks_blocked()
            now = self.limiter.statistics()
            pool = pool_of(self.limiter)
            if self.sabotaged and now.running > self.attempting:
                # AnyIO does not wait for the callback of a task that was cancelled before it began.
                for _ in range(3):
                    await checkpoint()

                await anyio.wait_all_tasks_blocked()
                now = self.limiter.statistics()

            # One that waits for a time may have inherited the slot that it was going to be lent.
            assert now.running <= self.attempting + len(pool.lines.borrowing), (
                "a slot is held by nobody who runs"
            )
            assert now.limit <= now.max_concurrency
            assert not pool.lines or now.running >= now.limit or self.waits_for_a_time(pool), (
                "a slot is free, and somebody waits for it"
            )
            # Most programs are over soon; the few that go on are looked at less often.
            await anyio.sleep(0.13 if anyio.current_time() < start + 60 else 5.3)

    def waits_for_a_time(self, pool: Any) -> bool:
        """Whether nobody may start now who could have a slot, and the first of them is going to be woken."""
        if self.limiter.statistics().paused_until == math.inf and not pool.lines.borrowing:
            return not pool.lines.returning

        first, now = pool._first(), anyio.current_time()
        if first is None or pool.lines.alarmed is not first:
            return False

        ready_at = now if pool.admission.provider is None else pool.admission.provider.ready_at(now)
        costs = () if first.slot.bill is None else first.slot.bill.costs
        for account, cost in zip(self.accounts, costs, strict=True):
            ready_at = max(ready_at, account.ready_at(cost, now))

        return now <= first.wake_at <= ready_at + 1e-6

    def make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """Make a task that can be told from others in each run, and sometimes cancel it before it begins."""
        new: list[asyncio.Task[Any]] = []
        if self.random.random() < 0.03:
            loop.call_soon(self.sabotage, new)

        new.append(asyncio.Task(coro, loop=loop, **options))
        self.task_numbers[new[0]] = self.tasks = self.tasks + 1
        return new[0]

    def sabotage(self, tasks: list[asyncio.Task[Any]]) -> None:
        """Cancel such of these tasks as are the library's own."""
        for task in tasks:
            if task.get_name().startswith("agentloop "):
                task.cancel()

    async def sabotage_at_times(self) -> None:
        """Cancel tasks of others a number of times."""
        choose = self.random.choice
        for _ in range(10):
            await anyio.sleep(choose([0, 0, 0.1, 0.3, 1.0]))
            tasks = [task for task in asyncio.all_tasks() if task in self.task_numbers]
            tasks.sort(key=self.task_numbers.__getitem__)
            own = [task for task in tasks if task.get_name().startswith("agentloop ")]
            how = self.random.random()
            if how < 0.1:
                self.natively_cancelled += 1
                for task in tasks:
                    if task.get_name() != "spared":
                        task.cancel()
            elif how < 0.3:
                self.sabotage(own)
            elif own:
                self.sabotage([choose(own) for _ in range(choose([1, 1, 2]))])

    async def main(self) -> None:
        if self.callbacks_raise:
            self.stray_cancellation = await cancellation()

        deadlines = pool_of(self.limiter).loop._deadlines
        if self.keeps_scopes:
            assert deadlines is not None
            deadlines.stops_timer = False

        tasks = len(anyio.get_running_tasks())
        async with anyio.create_task_group() as group:
            if self.sabotaged:
                asyncio.get_running_loop().set_task_factory(self.make_task)
                group.start_soon(self.sabotage_at_times, name="spared")

            group.start_soon(self.watch, name="spared")
            with anyio.move_on_after(5000) as scope:
                # In an entered loop what streams belongs to the loop.
                if self.streams and self.random.random() < 0.3:
                    self.entered = True
                    try:
                        async with self.loop:
                            await self.make_calls()
                    except InvocationCancelled:
                        assert self.sabotaged
                else:
                    await self.make_calls()

            assert not scope.cancelled_caught, "it never ended"
            group.cancel_scope.cancel()

        left = [task.name for task in anyio.get_running_tasks()]
        assert len(left) == tasks, f"a task is left: {left}"
        assert self.working == self.attempting == 0
        self.check_end()

    async def make_calls(self) -> None:
        var.set("caller")
        async with anyio.create_task_group() as group:
            self.background = group
            for _ in range(self.random.randint(1, 3)):
                self.calls += 1
                group.start_soon(self.make_call, None, 0)

            if self.random.random() < 0.3:
                await anyio.sleep(self.random.choice([0, 0.3, 1.1]))
                limit = self.random.randint(1, 6)
                self.ceiling = max(self.ceiling, limit)
                self.ceiling_now = limit
                self.floor = min(self.floor, limit)
                self.limiter.max_concurrency = limit

            if self.gated and self.random.random() < 0.5:
                await anyio.sleep(self.random.choice([0, 0.3, 1.1]))
                self.limiter.pause()
                self.paused_at = anyio.current_time()
                await anyio.sleep(self.random.choice([0, 0.7, 2.1]))
                self.paused_at = math.inf
                self.limiter.resume()

        # A task that is cancelled natively takes its whole task group with it.
        assert self.checked == self.calls or self.natively_cancelled, "a cancellation that nobody asked for"
        assert var.get() == "caller"

    def check_end(self) -> None:
        assert not self.violations
        pool = pool_of(self.limiter)
        assert_idle(self.limiter, pool)
        assert pool.lines.alarmed is None, "an alarm is set for nobody"
        if self.quiet:
            assert self.loop.metrics.snapshot().in_flight == 0
            return

        for name, results in self.metrics.results.items():
            assert len(results) == 1, f"{name} was recorded {len(results)} times"
            assert results[0].retries == max(0, self.starts[name] - 1)

        assert all(name in self.metrics.results for name in self.starts), "an invocation was not recorded"
        for story in self.stories.values():
            # Queued, then Started and Retry by turns with at most one First chunk, then the Result.
            assert re.fullmatch("Q(S(RS)*F?R?)?R", "".join(story)), story

        now = self.metrics.snapshot()
        skipped = now.counts[Status.SKIPPED]
        starts = sum(self.starts.values())
        assert now.in_flight == 0
        assert sum(now.counts.values()) == len(self.metrics.results) == len(self.stories)
        # What was refused before it could start has no time.
        refused = sum(
            results[0].status is Status.ERROR and not self.starts[name]
            for name, results in self.metrics.results.items()
        )
        assert now.attempt.count == starts, "an attempt was not recorded, or twice"
        assert now.latency.count == now.queue.count == len(self.metrics.results) - skipped - refused
        assert now.retries == sum(count - 1 for count in self.starts.values())


def run_seed(backend: str, seed: int) -> Program:
    """Run one random program, and return it; raise if anything about it is wrong."""
    name, options = virtual_clock(backend, seed=seed)
    program = Program(seed, backend)
    logger = logging.getLogger("agentloop")
    logger.disabled = True  # what settle raises is logged
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if program.sabotaged:
                # AnyIO does not close what it was to run in a task that was cancelled before it began.
                warnings.filterwarnings("ignore", r"coroutine '(Tasks|Worker|Program)\..*' was never awaited")

            random.seed(seed)
            anyio.run(program.main, backend=name, backend_options=options)
            if program.sabotaged:
                gc.collect()
    finally:
        logger.disabled = False

    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--seeds", default="0:2000", help="from:to")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split(":"))
    for seed in range(first, last):
        try:
            run_seed(arguments.backend, seed)
        except BaseException:
            print(f"seed {seed} on {arguments.backend} fails", flush=True)
            raise

    print(f"{last - first} programs hold on {arguments.backend}")


if __name__ == "__main__":
    main()

"""
Deliberate defects, each of which the random programs have to catch: that is how we know they test something.
Those of the store are caught by its random histories.

``python tests/tools/mutants.py`` applies them one by one to a copy of the package, and says what caught each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from planting import plant

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = 5000
# What random programs cannot catch, since they have no account of it: the tests of it have to.
UNIT_TESTS = ""
UNIT_TEST_FILES = ("test_cool_off.py", "test_outage.py", "test_overload.py")
# A defect may make a program run for ever; then this catches it.
SECONDS = 60


class Mutant(NamedTuple):
    name: str
    where: str
    """The qualified name of a function or a class, after a file and ``::`` where it is not the only one."""
    old: str
    """An expression, or statements, that stand there once; see :func:`planting.plant`."""
    new: str
    backend: str = "either"
    program: str = "fuzz.py"

    def plant(self) -> tuple[str, str]:
        """
        Return the path of the module that has the defect, in the package, and its text.

        :raises LookupError: if what is to be replaced does not stand there exactly once
        """
        try:
            return plant(self.where, self.old, self.new)
        except LookupError as exc:
            raise LookupError(f"{self.name!r} cannot be planted: {exc}") from None


MUTANTS = [
    Mutant(
        "a slot granted in the moment of a cancellation is not given back",
        "SlotPool.wait",
        "waiter.slot.give_back()",
        "",
    ),
    Mutant(
        "a cancelled waiter stays in line",
        "SlotPool.wait",
        """
        if waiter.granted:
            waiter.slot.give_back()
        else:
            self.withdraw(waiter)
        """,
        """
        if waiter.granted:
            waiter.slot.give_back()
        """,
    ),
    Mutant(
        "a loan is never returned",
        "Slot._take_back",
        "self.lent = None",
        "",
    ),
    Mutant(
        "the loan of an invocation that has ended is given back under its borrower",
        "Slot._pass_on",
        "borrower is not None and borrower.pool is pool",
        "borrower is not None and borrower.pool is pool and lender is not None",
    ),
    Mutant(
        "a slot is lent to any number at once",
        "SlotPool._acquire",
        "lender = None",
        "",
    ),
    Mutant(
        "a nested invocation is lent no slot",
        "SlotPool.lender",
        """
        slot is not None and (
            slot.hold is RELEASED or ((slot.hold is SUSPENDED or slot.pool is not self) and not anyones)
        )
        """,
        "slot is not None",
    ),
    Mutant(
        "a freed token is offered to nobody",
        "Slot.release",
        """
        if pool.in_line:
            ...
        """,
        "",
    ),
    Mutant(
        "what was paid for an attempt that never began is kept",
        "Slot.release",
        "pool.refund(bill)",
        "",
    ),
    Mutant(
        "a pause does not look who is first in line now",
        "PoolState.pause",
        "self.serve()",
        "",
        "asyncio",  # the only one on which programs catch it
    ),
    Mutant(
        "a pause holds nobody",
        "SlotPool._first",
        "self.admission.paused",
        "False",
    ),
    Mutant(
        "nobody is woken when the first in line gives up",
        "SlotPool.withdraw",
        "self.serve()",
        "",
    ),
    Mutant(
        "those who are lent a slot pay nothing",
        "SlotPool._acquire",
        """
        if admission.gated and not returning:
            ...
        """,
        """
        if lender is not None and slot.bill is not None:
            slot.bill.charges = [meter.reserve(0) for meter in admission.meters]
        elif admission.gated and not returning:
            ...
        """,
    ),
    Mutant(
        "those who wait for a loan pay nothing",
        "SlotPool.offer_loan",
        """
        if waiter.line is self.lines.returning or not self.admission.gated:
            ...
        """,
        """
        if waiter.slot.bill is not None:
            waiter.slot.bill.charges = [meter.reserve(0) for meter in self.admission.meters]

        if True:
            ...
        """,
    ),
    Mutant(
        "loans begin in spite of a cool-off",
        "SlotPool.offer_loan",
        "not self.admission.gated",
        "not self.admission.meters",
    ),
    Mutant(
        "rates are paid before there is a slot",
        "SlotPool.serve_some",
        "now = self.loop.now()",
        """
        now = self.loop.now()
        for waiter in lines.queue:
            bill = waiter.slot.bill
            if bill is not None and admission.ready_at(bill, now) <= now:
                for meter, cost in zip(admission.meters, bill.costs, strict=True):
                    meter.pay(meter.reserve(cost), now)

                bill.costs = tuple(0 for _ in bill.costs)
        """,
    ),
    Mutant(
        "a loan that was not used is not given back",
        "SlotPool.withdraw",
        "waiter.return_loan()",
        "",
    ),
    Mutant(
        "a cool-off concerns only the one who was told",
        "Provider.reject",
        """
        if hold_seconds is not None and self.cool_off.hold(now, hold_seconds, limit.limit):
            ...
        """,
        "",
    ),
    Mutant(
        "any failure cuts the limit",
        "Admission.failed",
        "self.provider is not None and verdict.kind is VerdictKind.OVERLOAD",
        "self.provider is not None",
    ),
    Mutant(
        "there is more than one probe at a time",
        "CoolOff.ready_at",
        "self.probe is not None",
        "False",
        program=UNIT_TESTS,
    ),
    Mutant(
        "the gap between probes stays the same",
        "CoolOff.start",
        "self._gap *= 2",
        "",
    ),
    Mutant(
        "a call that began before a cool-off ends it",
        "Provider.answered",
        "epoch >= self._held_at",
        "True",
    ),
    Mutant(
        "what will not be waited for holds the others",
        "Admission.failed",
        "asked is None or asked > longest_hold",
        "asked is None",
        program=UNIT_TESTS,
    ),
    Mutant(
        "a waiter with a slot on loan takes another when a cool-off ends early",
        "SlotPool.serve_some",
        """
        while served < most and (waiter := self._first()) is not None:
            if not waiter.has_loan:
                self._take(waiter.slot)

            self._grant(waiter)
            served += 1
        """,
        """
        while served < most and (waiter := self._first()) is not None:
            self._take(waiter.slot)
            self._grant(waiter)
            served += 1
        """,
        program=UNIT_TESTS,
    ),
    Mutant(
        "a few failures are an outage, however many run at once",
        "Outage.fail",
        "max(IN_A_ROW, limit)",
        "IN_A_ROW",
        program=UNIT_TESTS,
    ),
    Mutant(
        "a success does not end the row of failures",
        "Outage.succeed",
        "self.row = 0",
        "",
        program=UNIT_TESTS,
    ),
    Mutant(
        "patience does not wait for what is at work",
        "PoolState.is_hopeless",
        "self.work.count(self.running, len(self.lines.borrowing)) <= 0",
        "True",
        program=UNIT_TESTS,
    ),
    Mutant(
        "a break is not noticed",
        "Outage.begin",
        "self.fruitless_since = None",
        "",
        program=UNIT_TESTS,
    ),
    Mutant(
        "cuts are deep while calls from before the last one run",
        "AdaptiveLimit.reject",
        "self._old <= 0 and (not self._taken)",
        "not self._taken",
        program=UNIT_TESTS,
    ),
    Mutant(
        "retries of an overload draw on the retry budget",
        "Failures.next_start",
        "not overload and (not admission.may_retry(now))",
        "not admission.may_retry(now)",
        program=UNIT_TESTS,
    ),
    Mutant(
        "a burst of rejections cuts the limit more than once",
        "AdaptiveLimit.reject",
        """
        if epoch < self._cut_at:
            ...
        """,
        "",
    ),
    Mutant(
        "the limit grows above its ceiling",
        "AdaptiveLimit.complete",
        "min(self.ceiling, self.limit + max(1, int(self.limit * growth)))",
        "self.limit + 2",
    ),
    Mutant(
        "what has left a window is given back",
        "_Window.correct",
        "charge.at + self._seconds > now",
        "True",
    ),
    Mutant(
        "what has flowed back into a bucket is given back too",
        "_Bucket.correct",
        "min(-more, max(0.0, self._full_at - now), *(missing for _, missing in later[:1]))",
        "-more",
    ),
    Mutant(
        "a window opens too early",
        "_Window.ready_at",
        "charges[0].at + seconds <= now",
        "charges[0].at + seconds * 0.8 <= now",
    ),
    Mutant(
        "a bucket fills too fast",
        "_Bucket.__init__",
        "rate.per_seconds / rate.limit",
        "rate.per_seconds / (rate.limit + 1)",
    ),
    Mutant(
        "a budget is paid out of what others have reserved",
        "Purse.can_pay",
        "self._left - reserved + self._rounding",
        "self._left + self._rounding",
        program="budgets.py",
    ),
    Mutant(
        "an attempt that waits to be retried is waited for",
        "Job.rest",
        """
        if self.bill is not None:
            ...
        """,
        "",
        program="budgets.py",
    ),
    Mutant(
        "a nested call is waited for by those that it waits for",
        "Work.lasts_until",
        "waiting = _unended(self.calls) | _unended(self._others)",
        "waiting: set[Attempt] = set()",
        program="budgets.py",
    ),
    Mutant(
        "the retry budget bounds nothing",
        "Failures.next_start",
        "not admission.may_retry(now)",
        "False",
    ),
    Mutant(
        "a stream that goes on pays again",
        "_StreamAttempt._wait_for_room",
        """
        granted = Slot(pool, slot.outer)
        if not pool.acquire_nowait(granted, returning=True):
            await pool.wait(pool.enqueue(granted, returning=True))
        """,
        """
        granted = Slot(pool, slot.outer, slot.bill and slot.bill.again())
        if not pool.acquire_nowait(granted):
            await pool.wait(pool.enqueue(granted))
        """,
        "trio",  # the only one on which programs catch it
    ),
    Mutant(
        "a time-out is judged by the type of the exception",
        "Attempts._conclude",
        "timed_out or raised is None",
        "isinstance(error, TimeoutError) or raised is None",
    ),
    Mutant(
        "a result that was ready is thrown away",
        "Attempts.run",
        """
        if (ended_at >= scope.until or act is not None) and not scope.children:
            ...
        """,
        """
        if scope.scope.cancel_called:
            return (yield from self._conclude(slot, options, scope, caller, None).__await__())
        if (ended_at >= scope.until or act is not None) and not scope.children:
            ...
        """,
    ),
    Mutant(
        "attempts share a context",
        "Attempts._begin",
        "new_context()",
        "globals().setdefault(str(id(options)), new_context())",
    ),
    Mutant(
        "an agent is started after its cancellation",
        "Attempts._begin",
        """
        if not may_start:
            ...
        """,
        "",
    ),
    Mutant(
        "only the scope next to an attempt keeps it from beginning, on asyncio",
        "AsyncioScope.begin",
        "around = around._parent_scope",
        "break",
        "asyncio",
    ),
    Mutant(
        "only the scope next to an attempt keeps it from beginning, on trio",
        "TrioScope.begin",
        "inner._cancel_status._parent.effectively_cancelled",
        "inner._cancel_status._parent._scope.cancel_called",
        "trio",
    ),
    Mutant(
        "an error made out of the caller's cancellation is an error",
        "Attempts._conclude",
        """
        if raised is not None:
            await checkpoint_if_cancelled()
        """,
        """
        if raised is not None:
            pass
        """,
        "trio",  # the only one on which programs catch it
    ),
    Mutant(
        "a stray cancellation ends the batch",
        "outcome_of",
        """
        return Outcome(
            Status.CANCELLED, _caused(InvocationCancelled("the agent was cancelled from within"), raised)
        )
        """,
        "raise raised",
    ),
    Mutant(
        "the marks that an agent left on its task are not removed",
        "Worker.work",
        """
        if cancellations():
            ...
        """,
        "",
        "asyncio",
    ),
    Mutant(
        "a slot is held while its invocation waits to be retried",
        "Single._rest",
        "await anyio.sleep_until(wake_at)",
        """
        held = Slot(self._job.pool, self._job.outer)
        is_held = self._job.pool.acquire_nowait(held)
        await anyio.sleep_until(wake_at)
        _ = held.release() if is_held else None
        """,
    ),
    Mutant(
        "a wait crosses the total time-out",
        "Failures.next_start",
        "wake_at >= total_deadline",
        "wake_at >= total_deadline + 100",
    ),
    Mutant(
        "there is one retry too many",
        "Failures.next_start",
        "self._counted >= config.max_retries",
        "self._counted > config.max_retries",
    ),
    Mutant(
        "retries are guessed",
        "Job._finish",
        "max(0, self.attempts - 1)",
        "len(errors)",
    ),
    Mutant(
        "a fatal verdict stops nothing",
        "Bookkeeping.settle",
        "verdict.kind is VerdictKind.FATAL",
        "False",
    ),
    Mutant(
        "a result is lost",
        "CompletionBatch._deliver",
        "self.channel.send(result)",
        """
        if self.channel._size < 2:
            self.channel.send(result)
        """,
    ),
    Mutant(
        "a result is delivered to the wrong input",
        "InputSource.next_job",
        "self.new_job(item, index, now, self._pool, self.outer)",
        "self.new_job(item, max(0, index - 1), now, self._pool, self.outer)",
    ),
    Mutant(
        "a reader that is cancelled loses a result",
        "Channel.receive",
        "item = self._rest.popleft() if self._rest else self._receive.receive_nowait()",
        """
        item = self._rest.popleft() if self._rest else self._receive.receive_nowait()
        await self._backend.checkpoint()
        """,
    ),
    Mutant(
        "the end of the input ends nothing",
        "Worker.work",
        "batch.check_done()",
        "",
    ),
    Mutant(
        "a parked worker counts as looking for work",
        "Crew.park",
        "self.seeking -= 1",
        "",
    ),
    Mutant(
        "a worker that runs an attempt counts as looking for work",
        "Worker.work",
        "crew.seeking -= 1",
        "",
    ),
    Mutant(
        "what a cancelled batch had yet to retry is forgotten",
        "Batch.run",
        "self._abandon()",
        "",
    ),
    Mutant(
        "what waits to be retried takes up room for input",
        "Bookkeeping._retry",
        "self.source.set_aside(job)",
        "",
    ),
    Mutant(
        "what has ended takes up room for input",
        "Bookkeeping.finish",
        "source.live -= 1",
        "",
    ),
    Mutant(
        "a batch runs without slots",
        "Worker._acquire",
        """
        if job.pool.acquire_nowait(slot):
            ...
        """,
        """
        job.pool.admission.reserve(slot.bill, job.pool.loop.now())
        slot.lender = Slot(job.pool, None)
        slot.is_plain = False
        return slot
        """,
    ),
    Mutant(
        "who does not end first is never timed out",
        "DeadlineQueue.ring",
        "self._wind(at)",
        "",
    ),
    Mutant(
        "a time-out that comes before others is put behind them",
        "DeadlineQueue.watch",
        "scopes and at < self._latest",
        "False",
    ),
    Mutant(
        "an attempt is timed out when that of its worker before would have been",
        "_InsideScope.due",
        "self._inner._deadline <= now",
        "True",
    ),
    Mutant(
        "a moved deadline is not seen to any more",
        "_InsideScope.due",
        "self._watch(self._inner._deadline)",
        "",
        "asyncio",  # the only one on which programs catch it
    ),
    Mutant(
        "what was not read when a stream ended is lost",
        "Channel.close",
        "self._rest.append(self._receive.receive_nowait())",
        """
        self._receive.receive_nowait()
        self._size -= 1
        """,
    ),
    Mutant(
        "a stream is retried after a chunk",
        "Job.next_start",
        "self.failures is None or self.failures.progress is not None",
        "self.failures is None",
    ),
    Mutant(
        "a stream that waits for its reader keeps the slot that it was lent",
        "_StreamAttempt._wait_for_room",
        "slot.lender is None",
        "True",
        "trio",  # the only one on which programs catch it
    ),
    Mutant(
        "a stream that waits for its reader only says that it has given its slot up",
        "Slot.suspend",
        "self._pass_on()",
        "",
    ),
    Mutant(
        "a stream goes on without the slot that it gave back",
        "_StreamAttempt._wait_for_room",
        """
        granted = Slot(pool, slot.outer)
        if not pool.acquire_nowait(granted, returning=True):
            await pool.wait(pool.enqueue(granted, returning=True))

        slot.resume(granted)
        """,
        """
        slot.hold = HELD
        slot.lender = pool.lender(slot.outer)
        """,
    ),
    Mutant(
        "the time that a reader takes is the agent's idleness",
        "_StreamAttempt._wait_for_room",
        "self._idle_since = math.inf",
        "",
    ),
    Mutant(
        "the time that a reader takes counts for the attempt",
        "_StreamAttempt._wait_for_room",
        "self._set_deadline(math.inf)",
        "",
    ),
    Mutant(
        "idleness is measured from the first chunk",
        "_StreamAttempt.run",
        "self._idle_since = at",
        "self._idle_since = min(self._idle_since, at)",
    ),
    Mutant(
        "an agent that yields when its time is up changes the name of its time-out",
        "_StreamAttempt._set_deadline",
        "not self._scope.cancel_called",
        "True",
    ),
    Mutant(
        "the generator of a stream that was left is not closed",
        "_StreamAttempt.run",
        "error = await self._close(iterator)",
        "",
    ),
    Mutant(
        "a truncated stream looks complete",
        "AgentStream._error",
        "error is None",
        "error is None or self.result.chunks",
    ),
    Mutant(
        "chunks of one stream pass for another's",
        "_chunk_event",
        "job.index",
        "job.index // 2",
    ),
    Mutant(
        "the result of a stream overtakes its chunks",
        "StreamBatch._deliver",
        "self.channel.send(ResultEvent(job.invocation, result, job.id or new_id(), now))",
        """
        self.channel._rest.append(ResultEvent(job.invocation, result, job.id or new_id(), now))
        self.channel._size += 1
        """,
    ),
    Mutant(
        "an agent that cancelled its own task loses what it returned",
        "Single.run",
        "not job.waited and not own_task",
        "not job.waited",
        "asyncio",
    ),
    Mutant(
        "a worker that waits for something else keeps its slot",
        "Worker.let_go",
        "self._give_back()",
        "",
    ),
    Mutant(
        "a scope that was left open is not noticed",
        "Attempts.run",
        """
        if scope.children:
            ...
        """,
        "",
    ),
    Mutant(
        "a scope that a stream leaves open is not noticed",
        "_StreamAttempt.run",
        "self._attempt.note(self._attempt.cause, left_open=True)",
        "",
        # On asyncio that the scope cannot be left says the same.
        "trio",
    ),
    Mutant(
        "a task that a scope was left open in does not wait for the others",
        "Tasks.leave_by",
        "await self.park()",
        "",
    ),
    Mutant(
        "a task that a scope was left open in does not wait for the others if it is cancelled",
        "Tasks.leave_by",
        "cancelled and (not spoilt)",
        "cancelled",
    ),
    Mutant(
        "agents may leave scopes open for ever",
        "Bookkeeping.settle",
        "self.crew.spoilt >= self.crew.size",
        "False",
    ),
    Mutant(
        "an error made out of the caller's native cancellation is retried",
        "Attempts._conclude",
        "caller is not None and caller.came(raised)",
        "caller is not None and caller.came(raised) and error is None",
        "asyncio",
    ),
    Mutant(
        "a native cancellation whose mark was taken back is nobody's",
        "CallersCancellation.came",
        "native is not None and native is raised",
        "False",
        "asyncio",
    ),
    Mutant(
        "what was cut short looks complete",
        "BatchReader._error",
        "batch.stopped is None",
        "True",
    ),
    Mutant(
        "a cancellation that a cost raises ends the batch",
        "Job.resolve",
        "is_error(exc)",
        "isinstance(exc, Exception)",
    ),
    Mutant(
        "a cancellation that an event hook raises harms the run",
        "Sink.__call__",
        "is_error(exc)",
        "isinstance(exc, Exception)",
    ),
    Mutant(
        "a stream whose task never began has no end",
        "Background._was_lost",
        "not self._begun and self._kind.loses_tasks",
        "False",
        "asyncio",
    ),
    Mutant(
        "a worker that is to be cancelled is not",
        "wait_for_cancellation",
        "anyio.CancelScope().__enter__().__exit__(None, None, None)",
        "",
        "asyncio",
    ),
    Mutant(
        "a value is set without the lock",
        "ContextStore.set",
        """
        async with run.lock:
            ...
        """,
        """
        if await checkpoint() is None:
            ...
        """,
        program="linearizability.py",
    ),
    Mutant(
        "a transform reads before it has the lock",
        "ContextStore.transform",
        """
        async with run.lock:
            value = fn(self._state.read(key, default))
            ...
        """,
        """
        old = self._state.read(key, default)
        async with run.lock:
            value = fn(old)
            ...
        """,
        program="linearizability.py",
    ),
    Mutant(
        "a comparison is made before the lock is there",
        "ContextStore.compare_and_set",
        """
        async with run.lock:
            value = self._state.read(key, None)
            ...
        """,
        """
        value = self._state.read(key, None)
        async with run.lock:
            ...
        """,
        program="linearizability.py",
    ),
    Mutant(
        "a cancelled edit is committed",
        "Edit.__aexit__",
        "exc_type is None",
        "exc_type is None or not issubclass(exc_type, Exception)",
        program="linearizability.py",
    ),
    Mutant(
        "a draft writes into the state",
        "Draft.__setitem__",
        "self._touched[key] = value",
        "self._touched[key] = self._state[key] = value",
        program="linearizability.py",
    ),
    Mutant(
        "an edit is committed in two steps",
        "Edit.__aexit__",
        "self._state.commit(run, *draft.changes())",
        """
        for name, new in draft.changes()[0].items():
            self._state.commit(run, {name: new})
            await checkpoint()
        """,
        program="linearizability.py",
    ),
    Mutant(
        "a cancelled edit keeps the lock",
        "Edit.__aexit__",
        "run.lock.release()",
        """
        if exc_type is None:
            run.lock.release()
        """,
        program="linearizability.py",
    ),
    Mutant(
        "who waits is asked only when it runs",
        "Audience.notify",
        "wait.is_over(state)",
        "not wait.event.set()",
        program="linearizability.py",
    ),
]

# Which program was the first to catch each one, when that was last looked at. It is tried first: if it does
# not catch the defect any more, another one has to.
CAUGHT_BY: dict[str, dict[str, int]] = {
    "a slot granted in the moment of a cancellation is not given back": {"asyncio": 13, "trio": 90},
    "a cancelled waiter stays in line": {"asyncio": 2, "trio": 2},
    "a loan is never returned": {"asyncio": 1, "trio": 1},
    "the loan of an invocation that has ended is given back under its borrower": {"asyncio": 29, "trio": 26},
    "a slot is lent to any number at once": {"asyncio": 17, "trio": 99},
    "a nested invocation is lent no slot": {"asyncio": 340, "trio": 235},
    "a freed token is offered to nobody": {"asyncio": 50, "trio": 10},
    "what was paid for an attempt that never began is kept": {"asyncio": 618, "trio": 1088},
    "a pause does not look who is first in line now": {"asyncio": 1913},
    "a pause holds nobody": {"asyncio": 26, "trio": 26},
    "nobody is woken when the first in line gives up": {"asyncio": 8, "trio": 8},
    "those who are lent a slot pay nothing": {"asyncio": 6, "trio": 8},
    "those who wait for a loan pay nothing": {"asyncio": 6, "trio": 8},
    "loans begin in spite of a cool-off": {"asyncio": 1786, "trio": 1666},
    "rates are paid before there is a slot": {"asyncio": 8, "trio": 8},
    "a loan that was not used is not given back": {"asyncio": 6, "trio": 8},
    "a cool-off concerns only the one who was told": {"asyncio": 156, "trio": 26},
    "any failure cuts the limit": {"asyncio": 2, "trio": 0},
    "the gap between probes stays the same": {"asyncio": 486, "trio": 288},
    "a call that began before a cool-off ends it": {"asyncio": 156},
    "a burst of rejections cuts the limit more than once": {"asyncio": 2960, "trio": 3869},
    "the limit grows above its ceiling": {"asyncio": 26, "trio": 2},
    "what has left a window is given back": {"asyncio": 1501, "trio": 1176},
    "what has flowed back into a bucket is given back too": {"asyncio": 213, "trio": 163},
    "a window opens too early": {"asyncio": 366, "trio": 38},
    "a bucket fills too fast": {"asyncio": 26, "trio": 16},
    "the retry budget bounds nothing": {"asyncio": 8, "trio": 8},
    "a stream that goes on pays again": {"trio": 263},
    "a time-out is judged by the type of the exception": {"asyncio": 2, "trio": 2},
    "a result that was ready is thrown away": {"asyncio": 19, "trio": 71},
    "attempts share a context": {"asyncio": 0, "trio": 0},
    "an agent is started after its cancellation": {"asyncio": 54, "trio": 36},
    "only the scope next to an attempt keeps it from beginning, on asyncio": {"asyncio": 54},
    "only the scope next to an attempt keeps it from beginning, on trio": {"trio": 36},
    "an error made out of the caller's cancellation is an error": {"trio": 10},
    "a stray cancellation ends the batch": {"asyncio": 37, "trio": 37},
    "the marks that an agent left on its task are not removed": {"asyncio": 510},
    "a slot is held while its invocation waits to be retried": {"asyncio": 20, "trio": 1},
    "a wait crosses the total time-out": {"asyncio": 1616, "trio": 1203},
    "there is one retry too many": {"asyncio": 19, "trio": 16},
    "retries are guessed": {"asyncio": 0, "trio": 0},
    "a fatal verdict stops nothing": {"asyncio": 84, "trio": 84},
    "a result is lost": {"asyncio": 1070, "trio": 132},
    "a result is delivered to the wrong input": {"asyncio": 0, "trio": 2},
    "a reader that is cancelled loses a result": {"asyncio": 29, "trio": 17},
    "the end of the input ends nothing": {"asyncio": 17, "trio": 17},
    "a parked worker counts as looking for work": {"asyncio": 19, "trio": 0},
    "a worker that runs an attempt counts as looking for work": {"asyncio": 0, "trio": 0},
    "what a cancelled batch had yet to retry is forgotten": {"asyncio": 2, "trio": 2},
    "what waits to be retried takes up room for input": {"asyncio": 13, "trio": 14},
    "what has ended takes up room for input": {"asyncio": 13, "trio": 13},
    "a batch runs without slots": {"asyncio": 2, "trio": 2},
    "who does not end first is never timed out": {"asyncio": 448, "trio": 544},
    "a time-out that comes before others is put behind them": {"asyncio": 308, "trio": 873},
    "an attempt is timed out when that of its worker before would have been": {"asyncio": 107, "trio": 125},
    "a moved deadline is not seen to any more": {"asyncio": 2963},
    "what was not read when a stream ended is lost": {"asyncio": 29, "trio": 29},
    "a stream is retried after a chunk": {"asyncio": 29, "trio": 29},
    "a stream that waits for its reader keeps the slot that it was lent": {"trio": 859},
    "a stream that waits for its reader only says that it has given its slot up": {"asyncio": 23, "trio": 95},
    "a stream goes on without the slot that it gave back": {"asyncio": 483, "trio": 723},
    "the time that a reader takes is the agent's idleness": {"asyncio": 133, "trio": 133},
    "the time that a reader takes counts for the attempt": {"asyncio": 107, "trio": 225},
    "idleness is measured from the first chunk": {"asyncio": 105, "trio": 105},
    "an agent that yields when its time is up changes the name of its time-out": {
        "asyncio": 569,
        "trio": 393,
    },
    "the generator of a stream that was left is not closed": {"asyncio": 21, "trio": 157},
    "a truncated stream looks complete": {"asyncio": 29, "trio": 17},
    "chunks of one stream pass for another's": {"asyncio": 17, "trio": 43},
    "the result of a stream overtakes its chunks": {"asyncio": 17, "trio": 17},
    "an agent that cancelled its own task loses what it returned": {"asyncio": 491},
    "a worker that waits for something else keeps its slot": {"asyncio": 12, "trio": 0},
    "a scope that was left open is not noticed": {"asyncio": 13, "trio": 90},
    "a scope that a stream leaves open is not noticed": {"trio": 105},
    "a task that a scope was left open in does not wait for the others": {"asyncio": 13, "trio": 5},
    "a task that a scope was left open in does not wait for the others if it is cancelled": {
        "asyncio": 153,
        "trio": 1060,
    },
    "agents may leave scopes open for ever": {"asyncio": 70, "trio": 252},
    "an error made out of the caller's native cancellation is retried": {"asyncio": 497},
    "a native cancellation whose mark was taken back is nobody's": {"asyncio": 252},
    "what was cut short looks complete": {"asyncio": 23, "trio": 316},
    "a cancellation that a cost raises ends the batch": {"asyncio": 1241, "trio": 46},
    "a cancellation that an event hook raises harms the run": {"asyncio": 20, "trio": 20},
    "a stream whose task never began has no end": {"asyncio": 143},
    "a worker that is to be cancelled is not": {"asyncio": 436},
    "a value is set without the lock": {"asyncio": 53, "trio": 8},
    "a transform reads before it has the lock": {"asyncio": 0, "trio": 0},
    "a comparison is made before the lock is there": {"asyncio": 38, "trio": 38},
    "a cancelled edit is committed": {"asyncio": 39, "trio": 10},
    "a draft writes into the state": {"asyncio": 3, "trio": 3},
    "an edit is committed in two steps": {"asyncio": 0, "trio": 0},
    "a cancelled edit keeps the lock": {"asyncio": 4, "trio": 4},
    "who waits is asked only when it runs": {"asyncio": 6, "trio": 3},
}


def catch_quickly(mutant: Mutant, backend: str) -> str | None:
    """Return what caught the mutant; try first what caught it the last time."""
    seed = CAUGHT_BY.get(mutant.name, {}).get(backend)
    caught = None if seed is None else catch(mutant, backend, seed, seed + 1)
    return caught or catch(mutant, backend)


def other(backend: str) -> str:
    return "trio" if backend == "asyncio" else "asyncio"


def catch(mutant: Mutant, backend: str, first: int = 0, last: int = PROGRAMS) -> str | None:
    """Return what caught the mutant, in a line; ``None`` if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "agentloop"
        shutil.copytree(ROOT / "agentloop", package, ignore=shutil.ignore_patterns("__pycache__"))
        module, text = mutant.plant()
        (package / module).write_text(text, "utf-8")
        tests = ROOT / "tests"
        if mutant.program == UNIT_TESTS:
            options = [
                "-c",
                str(ROOT / "pyproject.toml"),
                "-qxp",
                "no:cacheprovider",
                "-k",
                f"not {other(backend)}",
            ]
            files = [str(tests / "limits" / name) for name in UNIT_TEST_FILES]
            command = [sys.executable, "-m", "pytest", *options, *files]
        else:
            program = [str(tests / "tools" / mutant.program), "--backend", backend]
            command = [sys.executable, *program, "--seeds", f"{first}:{last}"]

        environment = {**os.environ, "PYTHONPATH": folder}
        # A defect that shows in the measured time of a run is none of these.
        environment.pop("COVERAGE_PROCESS_CONFIG", None)
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS if last - first == 1 else 5 * SECONDS,
                cwd=folder,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "it never ended"

        if not done.returncode:
            return None

        if mutant.program == UNIT_TESTS:
            return next(line for line in done.stdout.splitlines() if line.startswith("FAILED"))[:160]

        lines = [line.strip(" |+-") for line in (done.stdout + done.stderr).splitlines()]
        if not lines[0].startswith("seed "):
            raise RuntimeError(f"the random programs did not run: {lines[-1]}")

        errors = [line for line in lines if "Error: " in line or "Deadlock" in line or "Error" in line[:20]]
        return f"{lines[0]}: {errors[-1] if errors else lines[-1]}"[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of the mutants; all if absent")
    parser.add_argument("--programs", type=int, default=PROGRAMS)
    arguments = parser.parse_args()
    survivors = 0
    for mutant in MUTANTS:
        if arguments.names and not any(name in mutant.name for name in arguments.names):
            continue

        for backend in ("asyncio", "trio") if mutant.backend == "either" else (mutant.backend,):
            caught = catch(mutant, backend, last=arguments.programs)
            survivors += caught is None
            print(
                f"{'caught' if caught else 'SURVIVED':8}  {mutant.name}, {backend}\n          {caught}",
                flush=True,
            )

    sys.exit(survivors)


if __name__ == "__main__":
    main()

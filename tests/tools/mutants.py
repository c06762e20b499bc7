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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from planting import plant

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = 5000
# A defect may make a program run for ever; then this catches it.
SECONDS = 60


class Mutant(NamedTuple):
    name: str
    where: str
    """The qualified name of a function or a class, after a file and ``::`` where it is not the only one."""
    old: str
    """An expression, or statements, that stand there once; see :func:`planting.plant`."""
    new: str
    seeds: dict[str, int]
    """The backends on which programs catch it, and the seed of one that has done so there."""
    program: str

    def plant(self) -> tuple[str, str]:
        """
        Return the path of the module that has the defect, in the package, and its text.

        :raises LookupError: if what is to be replaced does not stand there exactly once
        """
        try:
            return plant(self.where, self.old, self.new)
        except LookupError as exc:
            raise LookupError(f"{self.name!r} cannot be planted: {exc}") from None


def read(text: str) -> Iterator[Mutant]:
    """
    Yield the defects that a text describes, with a blank line between them.

    The first line is the name. The second one is the place, the program that catches the defect if it is not
    ``fuzz.py``, and the backends with their seeds if these are known. The change follows, as in a diff.

    What random programs cannot catch, since they have no account of it, the tests of limits have to.
    """
    for block in text.split("\n\n"):
        name, place, *change = block.strip("\n").split("\n")
        where, *catchers = place.removeprefix("@ ").split(", ")
        seeds = dict(catcher.split() for catcher in catchers if catcher[-1].isdigit())
        yield Mutant(
            name,
            where,
            "\n".join(line[2:] for line in change if line[0] in " -"),
            "\n".join(line[2:] for line in change if line[0] in " +"),
            {backend: int(seed) for backend, seed in seeds.items()} or {"asyncio": 0, "trio": 0},
            next((catcher for catcher in catchers if not catcher[-1].isdigit()), "fuzz.py"),
        )


DEFECTS = """\
a slot granted in the moment of a cancellation is not given back
@ SlotPool.wait, asyncio 23, trio 90
- waiter.slot.give_back()

a cancelled waiter stays in line
@ SlotPool.wait, asyncio 2, trio 2
  if waiter.granted:
      waiter.slot.give_back()
- else:
-     self.withdraw(waiter)

a loan is never returned
@ Slot._take_back, asyncio 1, trio 1
- self.lent = None

the loan of an invocation that has ended is given back under its borrower
@ Slot._pass_on, asyncio 29, trio 0
- borrower is None and lender is None
+ lender is None

a slot is lent to any number at once
@ SlotPool._acquire, asyncio 17, trio 99
- lender = None

a nested invocation is lent no slot
@ SlotPool.lender, asyncio 340, trio 235
- slot is not None and (
-     slot.hold is RELEASED or ((slot.hold is SUSPENDED or slot.pool is not self) and not anyones)
- )
+ slot is not None

a freed token is not offered to the line
@ Slot.release, asyncio 50, trio 10
- if pool.in_line:
-     ...

the payment for an attempt that never began is kept
@ Slot.release, asyncio 493, trio 1863
- pool.refund(bill)

a pause does not look at the first in line again
@ PoolState.pause, asyncio 436
- self.serve()

a pause holds back no waiter
@ SlotPool._first, asyncio 26, trio 26
- self.admission.paused
+ False

no waiter is woken when the first in line gives up
@ SlotPool.withdraw, asyncio 8, trio 8
- self.serve()

those who are lent a slot pay nothing
@ SlotPool._acquire, asyncio 6, trio 16
- if admission.gated and not returning:
+ if lender is not None and slot.bill is not None:
+     slot.bill.charges = [meter.reserve(0) for meter in admission.meters]
+ elif admission.gated and not returning:
      ...

those who wait for a loan pay nothing
@ SlotPool.offer_loan, asyncio 6, trio 16
- if waiter.line is self.lines.returning or not self.admission.gated:
+ if waiter.slot.bill is not None:
+     waiter.slot.bill.charges = [meter.reserve(0) for meter in self.admission.meters]
+ if True:
      ...

loans begin in spite of a cool-off
@ SlotPool.offer_loan, asyncio 1796, trio 668
- not self.admission.gated
+ not self.admission.meters

rates are paid before there is a slot
@ SlotPool.serve_some, asyncio 8, trio 8
  now = self.loop.now()
+ for waiter in lines.queue:
+     bill = waiter.slot.bill
+     if bill is not None and admission.ready_at(bill, now) <= now:
+         for meter, cost in zip(admission.meters, bill.costs, strict=True):
+             meter.pay(meter.reserve(cost), now)
+         bill.costs = tuple(0 for _ in bill.costs)

a loan that was not used is not given back
@ SlotPool.withdraw, asyncio 6, trio 13
- waiter.return_loan()

a cool-off holds back only the call that was rejected
@ Provider.reject, asyncio 156, trio 26
- if hold_seconds is not None and self.cool_off.hold(now, hold_seconds, limit.limit):
-     ...

any failure cuts the limit
@ Admission.failed, asyncio 23, trio 0
- self.provider is not None and verdict.kind is VerdictKind.OVERLOAD
+ self.provider is not None

there is more than one probe at a time
@ CoolOff.ready_at, test_cool_off.py
- self.probe is not None
+ False

the gap between probes stays the same
@ CoolOff.start, asyncio 486, trio 288
- self._gap *= 2

a call that began before a cool-off ends it
@ Provider.answered, asyncio 156, trio 1106
- epoch >= self._held_at
+ True

a wait that is not begun holds the others
@ Admission.failed, test_cool_off.py
- asked is None or asked > longest_cool_off
+ asked is None

a waiter with a slot on loan takes another when a cool-off ends early
@ SlotPool.serve_some, test_cool_off.py
  while served < most and (waiter := self._first()) is not None:
-     if not waiter.has_loan:
-         self._count_running(waiter.slot)
+     self._count_running(waiter.slot)
      self._grant(waiter)
      served += 1

a few failures are an outage, however many run at once
@ Outage.fail, test_outage.py
- max(IN_A_ROW, limit)
+ IN_A_ROW

a success does not end the row of failures
@ Outage.succeed, test_outage.py
- self.row = 0

patience does not wait for calls at work
@ PoolState.is_hopeless, test_outage.py
- self.work.count(live, len(self.lines.borrowing)) <= 0
+ True

a break is not noticed
@ Outage.begin, test_outage.py
- self.fruitless_since = None

cuts are deep while calls from before the last one run
@ AdaptiveLimit.reject, test_overload.py
- self._old <= 0 and (not self._taken)
+ not self._taken

retries of an overload draw on the retry budget
@ Failures.next_start, test_outage.py
- not overload and (not admission.may_retry(now))
+ not admission.may_retry(now)

a burst of rejections cuts the limit more than once
@ AdaptiveLimit.reject, asyncio 2960, trio 3869
- if epoch < self._cut_at:
-     ...

the limit grows above its ceiling
@ AdaptiveLimit.complete, asyncio 26, trio 2
- min(self.ceiling, self.limit + max(1, int(self.limit * growth)))
+ self.limit + 2

a payment that has left its window is given back
@ _Window.correct, asyncio 13, trio 1176
- charge.at + self._seconds > now
+ True

a payment that has flowed back into a bucket is given back too
@ _Bucket.correct, asyncio 213, trio 163
- min(-more, max(0.0, self._full_at - now), *(missing for _, missing in later[:1]))
+ -more

a window opens too early
@ _Window.ready_at, asyncio 366, trio 38
- charges[0].at + seconds <= now
+ charges[0].at + seconds * 0.8 <= now

a bucket fills too fast
@ _Bucket.__init__, asyncio 26, trio 16
- rate.per_seconds / rate.limit
+ rate.per_seconds / (rate.limit + 1)

a budget is paid out of what others have reserved
@ Purse.can_pay, budgets.py
- self._left - reserved + self._rounding
+ self._left + self._rounding

an attempt that waits to be retried is waited for
@ Job.schedule_retry, budgets.py
- if self.bill is not None:
-     ...

a nested call is waited for by those that it waits for
@ Work.lasts_until, budgets.py
- waiting = _unended(self.calls) | _unended(self._others)
+ waiting: set[Attempt] = set()

the retry budget bounds nothing
@ Failures.next_start, asyncio 8, trio 8
- not admission.may_retry(now)
+ False

a stream that goes on pays again
@ _limits/away.py::_take, trio 263
- granted = Slot(pool, slot.outer)
- if not pool.acquire_nowait(granted, returning=True):
-     await pool.wait(pool.enqueue(granted, returning=True))
+ granted = Slot(pool, slot.outer, slot.bill and slot.bill.again())
+ if not pool.acquire_nowait(granted):
+     await pool.wait(pool.enqueue(granted))

a time-out is judged by the type of the exception
@ Attempts._conclude, asyncio 2, trio 2
- timed_out or raised is None
+ isinstance(error, TimeoutError) or raised is None

a result that was ready is thrown away
@ Runnable.run_isolated, asyncio 19, trio 71
+ if scope.scope.cancel_called:
+     return (yield from self._conclude(slot, options, scope, before, caller, None).__await__())
  if (ended_at >= scope.until or run is not None) and not scope.children:
      ...

a result that was ready is thrown away by a worker that runs agents directly
@ Runnable.run_directly, asyncio 52, trio 277
+ if scope.scope.cancel_called:
+     return await self._conclude(slot, options, scope, None, None, None)
  if ended_at >= scope.until and not scope.children:
      ...

attempts share a context
@ Runnable.run_isolated, asyncio 1, trio 0
- new_context()
+ globals().setdefault(str(id(options)), new_context())

an agent finds the variables that another one has set
@ Runnable.run_directly, asyncio 19, trio 47
- if len(copy_context()) != inherited.count:
-     ...
- for var, value in inherited.values:
-     ...

an agent finds the inherited variables that another one has set again
@ Runnable.run_directly, asyncio 47, trio 47
- if var.get() is not value:
-     ...

an agent is started after its cancellation
@ Attempts._begin, asyncio 54, trio 36
- if not may_start:
-     ...

a scope that was due counts as queued
@ _InsideScope.due, asyncio 3019
- self._look_at = math.inf
+ self._look_at += 0

only the scope next to an attempt keeps it from beginning, on asyncio
@ AsyncioScope.begin, asyncio 54
- around = around._parent_scope
+ break

only the scope next to an attempt keeps it from beginning, on trio
@ TrioScope.begin, trio 36
- inner._cancel_status._parent.effectively_cancelled
+ inner._cancel_status._parent._scope.cancel_called

an error made out of the caller's cancellation is an error
@ Attempts._conclude, trio 10
  if raised is not None:
-     await checkpoint_if_cancelled()
+     pass

a stray cancellation ends the batch
@ outcome_of, asyncio 37, trio 37
- return Outcome(
-     Status.CANCELLED, _caused(InvocationCancelled("the agent was cancelled from within"), raised)
- )
+ raise raised

the marks that an agent left on its task are not removed
@ Worker.work, asyncio 124
- cancellations() or (crew.latest is self and loop.time_slice.used_up(now))
+ crew.latest is self and loop.time_slice.used_up(now)

a slot is held while its invocation waits to be retried
@ Single._wait_to_retry, asyncio 20, trio 1
+ held = Slot(self._job.pool, self._job.outer)
+ is_held = self._job.pool.acquire_nowait(held)
  await anyio.sleep_until(wake_at)
+ _ = held.release() if is_held else None

a wait crosses the total time-out
@ Failures.next_start, asyncio 2608, trio 1203
- wake_at >= total_deadline
+ wake_at >= total_deadline + 100

there is one retry too many
@ Failures.next_start, asyncio 19, trio 16
- self._counted >= config.max_retries
+ self._counted > config.max_retries

retries are guessed
@ Job._finish_any, asyncio 0, trio 0
- max(0, self.attempts - 1)
+ len(errors)

a fatal verdict stops nothing
@ Bookkeeping.retry_or_finish, asyncio 84, trio 84
- verdict.kind is VerdictKind.FATAL
+ False

a result is lost
@ CompletionBatch._deliver, asyncio 202, trio 132
- self.channel.send(result)
+ if self.channel._size < 2:
+     self.channel.send(result)

a result is delivered to the wrong input
@ InputSource.next_job, asyncio 0, trio 2
- self.new_job(item, index, now, self._pool, self.outer)
+ self.new_job(item, max(0, index - 1), now, self._pool, self.outer)

a reader that is cancelled loses a result
@ Channel.receive, asyncio 29, trio 17
  item = self._unread.popleft() if self._unread else self._receive.receive_nowait()
+ await self._backend.checkpoint()

the end of the input ends nothing
@ Worker._park, asyncio 17, trio 17
- batch.check_done()

a parked worker counts as looking for work
@ Crew.park, asyncio 19, trio 0
- self.seeking -= 1

a worker that runs an attempt counts as looking for work
@ Worker.work, asyncio 0, trio 0
- crew.seeking -= 1

the retries that a cancelled batch had yet to make are forgotten
@ Batch.run, asyncio 2, trio 2
- self._abandon()

a job that waits to be retried takes up room for input
@ Bookkeeping._retry, asyncio 13, trio 14
- self.source.free_room(job)

a job that has ended takes up room for input
@ Bookkeeping.finish, asyncio 13, trio 13
- source.live -= 1

a batch runs without slots
@ Worker._acquire, asyncio 2, trio 2
- if not job.pool.acquire_nowait(slot):
-     ...
+ job.pool.admission.reserve(slot, slot.bill, job.pool.loop.now())
+ slot.lender = Slot(job.pool, None)
+ slot.is_plain = False

who does not end first is never timed out
@ DeadlineQueue.check_due, asyncio 119, trio 544
- self._set_timer(at)

a time-out that comes before others is put behind them
@ DeadlineQueue.watch, asyncio 308, trio 873
- scopes and at < self._latest and self._latest_in_use() > at
+ False

an attempt is timed out when that of its worker before would have been
@ _InsideScope.due, asyncio 17, trio 141
- self._inner._deadline > now
+ False

a moved deadline is not seen to any more
@ _InsideScope.due, asyncio 920
- self._watch(self._inner._deadline)

chunks that were not read when a stream ended are lost
@ Channel.close, asyncio 29, trio 29
- self._unread.append(self._receive.receive_nowait())
+ self._receive.receive_nowait()
+ self._size -= 1

a stream is retried after a chunk
@ Job.next_start, asyncio 29, trio 29
- self.failures is None or self.failures.progress is not None
+ self.failures is None

an agent that waits for a store keeps its slot
@ Slot.step_aside_if_waiting, test_away.py
- self in absent.waits or self.pool.waits_for_calls(self)
+ False

an agent goes on without the slot that it has given back
@ _limits/away.py::_is_due, test_away.py
- slot.hold is SUSPENDED and not waits
+ False

those around an agent that waits for a store keep their slots
@ Slot.step_aside_if_waiting, test_away.py
- around is not None
+ False

the place of an attempt that has ended is not given back
@ Keys.give_back, test_keyed_limiter.py
- self.running -= lender is None
+ self.running -= 0

a stream that waits for its reader keeps the slot that it was lent
@ _limits/away.py::lend_to_reader, trio 859
- slot.hold is HELD and slot.outer is not None
+ False

a stream that waits for its reader only says that it has given its slot up
@ Slot.suspend, asyncio 23, trio 95
- self._pass_on()

a stream goes on without the slot that it gave back
@ _limits/away.py::lend_to_reader, asyncio 685, trio 723
- if goes_on:
-     await _take(slot)
+ slot.hold = HELD
+ slot.lender = slot.pool.lender(slot.outer)

the time that a reader takes is the agent's idleness
@ _StreamAttempt._wait_for_room, asyncio 133, trio 133
- self._idle_since = math.inf

the time that a reader takes counts for the attempt
@ _StreamAttempt._wait_for_room, asyncio 107, trio 225
- self._set_deadline(math.inf)

idleness is measured from the first chunk
@ _StreamAttempt.run, asyncio 105, trio 105
- self._idle_since = at
+ self._idle_since = min(self._idle_since, at)

an agent that yields when its time is up changes the name of its time-out
@ _StreamAttempt._set_deadline, asyncio 569, trio 393
- not self._scope.cancel_called
+ True

the generator of a stream that was left is not closed
@ _StreamAttempt.run, asyncio 21, trio 157
- error = await self._close(iterator)

a truncated stream looks complete
@ AgentStream._error, asyncio 29, trio 17
- error is None
+ error is None or self.result.chunks

chunks of one stream pass for another's
@ _chunk_event, asyncio 17, trio 43
- job.index
+ job.index // 2

the result of a stream overtakes its chunks
@ StreamBatch._deliver, asyncio 17, trio 17
- self.channel.send(ResultEvent(job.invocation, result, job.id or new_id(), now))
+ self.channel._unread.append(ResultEvent(job.invocation, result, job.id or new_id(), now))
+ self.channel._size += 1

a worker that waits for something else keeps its slot
@ Worker.let_go, asyncio 12, trio 0
- self._give_back()

a scope that was left open is not noticed
@ Runnable.run_directly, asyncio 120, trio 120
- if scope.children:
-     ...

a scope that was left open in a context of its own is not noticed
@ Runnable.run_isolated, asyncio 13, trio 70
- if scope.children:
-     ...

a scope that a stream leaves open is not noticed
@ _StreamAttempt.run, trio 105
# On asyncio that the scope cannot be left says the same.
- self._attempt.note(self._attempt.cause, left_open=True)

a task that a scope was left open in does not wait for the others
@ Tasks.leave_by, asyncio 13, trio 5
- await self.park()

a task that a scope was left open in does not wait for the others if it is cancelled
@ Tasks.leave_by, asyncio 153, trio 1060
- cancelled and (not spoilt)
+ cancelled

agents may leave scopes open for ever
@ Bookkeeping.retry_or_finish, asyncio 70, trio 252
- self.crew.spoilt >= self.crew.size
+ False

an error made out of the caller's native cancellation is retried
@ Attempts._conclude, asyncio 78
- before is not None and (caller or CallersCancellation(before)).came(raised)
+ before is not None and (caller or CallersCancellation(before)).came(raised) and error is None

a native cancellation whose mark was taken back is no caller's
@ CallersCancellation.came, asyncio 252
- native is not None and native is raised
+ False

a native cancellation that AnyIO has taken back is lost
@ Tasks.__aexit__, asyncio 4588
- was_native or self._cancellations() > self._cancelled_before
+ self._cancellations() > self._cancelled_before

a native cancellation in the step of a scope's looks like the loss of a task
@ Tasks.leave, asyncio 30945
- bool(await self.__aexit__(type(exc), exc, exc.__traceback__)) and was_cancelled
+ bool(await self.__aexit__(type(exc), exc, exc.__traceback__))

a batch that was cut short looks complete
@ BatchReader._error, asyncio 23, trio 316
- batch.stopped is None
+ True

a cancellation that a cost raises ends the batch
@ Job.resolve, asyncio 38, trio 46
- is_error(exc)
+ isinstance(exc, Exception)

a cancellation that an event hook raises harms the run
@ Sink.__call__, asyncio 20, trio 20
- is_error(exc)
+ isinstance(exc, Exception)

a stream whose task never began has no end
@ Background._was_lost, asyncio 143
- not self._begun and self._kind.loses_tasks
+ False

a worker that is to be cancelled is not
@ wait_for_cancellation, asyncio 436
- anyio.CancelScope().__enter__().__exit__(None, None, None)

a value is set without the lock
@ ContextStore.set, linearizability.py, asyncio 53, trio 8
- async with run.lock:
+ if await checkpoint() is None:
      ...

a transform reads before it has the lock
@ ContextStore.transform, linearizability.py, asyncio 0, trio 0
+ old = self._state.read(key, default)
  async with run.lock:
-     value = fn(self._state.read(key, default))
+     value = fn(old)
      ...

a comparison is made before the lock is there
@ ContextStore.compare_and_set, linearizability.py, asyncio 38, trio 38
+ value = self._state.read(key, None)
  async with run.lock:
-     value = self._state.read(key, None)
      ...

a cancelled edit is committed
@ Edit.__aexit__, linearizability.py, asyncio 39, trio 10
- exc_type is None
+ exc_type is None or not issubclass(exc_type, Exception)

a draft writes into the state
@ Draft.__setitem__, linearizability.py, asyncio 3, trio 3
- self._touched[key] = value
+ self._touched[key] = self._state[key] = value

an edit is committed in two steps
@ Edit.__aexit__, linearizability.py, asyncio 0, trio 0
- self._state.commit(run, *draft.changes())
+ for name, new in draft.changes()[0].items():
+     self._state.commit(run, {name: new})
+     await checkpoint()

a cancelled edit keeps the lock
@ Edit.__aexit__, linearizability.py, asyncio 4, trio 4
- run.lock.release()
+ if exc_type is None:
+     run.lock.release()

a waiter's predicate is asked only when it runs
@ Audience.notify, linearizability.py, asyncio 6, trio 3
- wait.is_over(state)
+ not wait.event.set()
"""

MUTANTS = [*read(DEFECTS)]


def catch_quickly(mutant: Mutant, backend: str, last: int = PROGRAMS) -> str | None:
    """Return what caught the mutant; try first what caught it the last time."""
    seed = mutant.seeds[backend]
    return catch(mutant, backend, seed, seed + 1) or catch(mutant, backend, last=last)


def catch(mutant: Mutant, backend: str, first: int = 0, last: int = PROGRAMS) -> str | None:
    """Return what caught the mutant, in a line; ``None`` if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "agentloop"
        shutil.copytree(ROOT / "agentloop", package, ignore=shutil.ignore_patterns("__pycache__"))
        module, text = mutant.plant()
        (package / module).write_text(text, "utf-8")
        tests = ROOT / "tests"
        if mutant.program.startswith("test_"):
            other = "trio" if backend == "asyncio" else "asyncio"
            options = ["-c", str(ROOT / "pyproject.toml"), "-qxp", "no:cacheprovider", "-k", f"not {other}"]
            command = [sys.executable, "-m", "pytest", *options, str(tests / "limits" / mutant.program)]
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

        if mutant.program.startswith("test_"):
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

        for backend in mutant.seeds:
            caught = catch_quickly(mutant, backend, arguments.programs)
            survivors += caught is None
            print(
                f"{'caught' if caught else 'SURVIVED':8}  {mutant.name}, {backend}\n          {caught}",
                flush=True,
            )

    sys.exit(survivors)


if __name__ == "__main__":
    main()

"""
Deliberate defects, each of which the random programs have to catch: that is how we know they test something.
Those of the store are caught by its random histories.

``python tests/tools/mutants.py`` applies them one by one to a copy of the package, and says what caught each.
"""

# ruff: noqa: E501  # the texts stand as they do in the package
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = 5000
# A defect may make a program run for ever; then this catches it.
SECONDS = 60


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    backend: str = "either"
    program: str = "fuzz.py"


MUTANTS = [
    Mutant(
        "a slot granted in the moment of a cancellation is not given back",
        "_limits/slots.py",
        "                waiter.slot.release()\n",
        "                pass\n",
    ),
    Mutant(
        "a cancelled waiter stays in line",
        "_limits/slots.py",
        "            if waiter.slot is None:\n                self.withdraw(waiter)\n            else:",
        "            if waiter.slot is None:\n                pass\n            else:",
    ),
    Mutant(
        "a loan is never returned",
        "_limits/slots.py",
        "            lender.lent = None\n",
        "",
    ),
    Mutant(
        "the loan of an invocation that has ended is given back under its borrower",
        "_limits/slots.py",
        "        if borrower is not None:\n",
        "        if borrower is not None and lender is not None:\n",
    ),
    Mutant(
        "a slot is lent to any number at once",
        "_limits/slots.py",
        "        if lender is not None and lender.lent:\n            lender = None\n",
        "        if lender is not None and lender.lent:\n            pass\n",
    ),
    Mutant(
        "a nested invocation is lent no slot",
        "_limits/slots.py",
        "        while slot is not None and (\n"
        "            slot.released or ((slot.suspended or slot.pool is not self) and not anyones)\n"
        "        ):\n",
        "        while slot is not None:\n",
    ),
    Mutant(
        "a freed token is offered to nobody",
        "_limits/slots.py",
        "        if self._queue or self._returning:\n            self._grant()\n",
        "",
    ),
    Mutant(
        "what was paid for an attempt that never began is kept",
        "_limits/slots.py",
        "            pool.refund(self.charges)\n",
        "            pass\n",
    ),
    Mutant(
        "a pause does not look who is first in line now",
        "_limits/slots.py",
        "        # Who is first in line now may be another one.\n        self._grant()\n",
        "",
        "asyncio",  # the only one on which programs catch it
    ),
    Mutant(
        "a pause holds nobody",
        "_limits/slots.py",
        "        if not self._queue or self.paused or self.running",
        "        if not self._queue or self.running",
    ),
    Mutant(
        "nobody is woken when the first in line gives up",
        "_limits/slots.py",
        "        # Whoever stood behind it may have waited for nothing else.\n        if self._gated:\n            self._grant()\n",
        "",
    ),
    Mutant(
        "those who are lent a slot pay nothing",
        "_limits/slots.py",
        "        if self._gated and costs is not None:\n            now = self.loop.now()\n",
        "        if self._gated and costs is not None and lender is None:\n            now = self.loop.now()\n",
    ),
    Mutant(
        "those who wait for a loan pay nothing",
        "_limits/slots.py",
        "        if waiter.costs is None or not self._gated:\n",
        "        if True:\n",
    ),
    Mutant(
        "loans begin in spite of a cool-off",
        "_limits/slots.py",
        "        if waiter.costs is None or not self._gated:\n",
        "        if waiter.costs is None or not self.meters:\n",
    ),
    Mutant(
        "rates are paid before there is a slot",
        "_limits/slots.py",
        "        now = self.loop.now()\n        while (waiter := self._next()) is not None:\n",
        "        now = self.loop.now()\n"
        "        for waiter in self._queue:\n"
        "            if self._ready_at(waiter.costs, now) <= now:\n"
        "                for meter, cost in zip(self.meters, waiter.costs, strict=True):\n"
        "                    meter.pay(meter.reserve(cost), now)\n\n"
        "                waiter.costs = tuple(0 for _ in waiter.costs)\n\n"
        "        while (waiter := self._next()) is not None:\n",
    ),
    Mutant(
        "a loan that was not used is not given back",
        "_limits/slots.py",
        "        if loan is not None:\n            loan.release()\n",
        "",
    ),
    Mutant(
        "a cool-off concerns only the one who was told",
        "_limits/slots.py",
        "                governor.hold(now, min(verdict.retry_after, longest_hold))\n",
        "                pass\n",
    ),
    Mutant(
        "any failure cuts the limit",
        "_limits/slots.py",
        "        elif governor is None or verdict.kind is not VerdictKind.OVERLOAD:\n",
        "        elif governor is None:\n",
    ),
    Mutant(
        "a burst of rejections cuts the limit more than once",
        "_limits/overload.py",
        "        if epoch != self.epoch:\n            return\n",
        "",
    ),
    Mutant(
        "the limit grows above its ceiling",
        "_limits/overload.py",
        "self.limit = min(self.ceiling, self.limit + max(1, int(self.limit * growth)))",
        "self.limit = self.limit + 2",
    ),
    Mutant(
        "what has left a window is given back",
        "_limits/rates.py",
        "        if charge.at + self.rate.per_seconds > now:\n",
        "        if True:\n",
    ),
    Mutant(
        "what has flowed back into a bucket is given back too",
        "_limits/rates.py",
        "        back = min(-more, max(0.0, self._full_at - now), *(missing for _, missing in later[:1]))\n",
        "        back = -more\n",
    ),
    Mutant(
        "a window opens too early",
        "_limits/rates.py",
        "        while charges and charges[0].at + seconds <= now:\n",
        "        while charges and charges[0].at + seconds * 0.8 <= now:\n",
    ),
    Mutant(
        "a bucket fills too fast",
        "_limits/rates.py",
        "        self._seconds_each = rate.per_seconds / rate.limit\n",
        "        self._seconds_each = rate.per_seconds / (rate.limit + 1)\n",
    ),
    Mutant(
        "the retry budget bounds nothing",
        "_runtime/job.py",
        "        elif self.pool.ledger is not None and not self.pool.ledger.may_retry(now):\n",
        "        elif False:\n",
    ),
    Mutant(
        "a stream that goes on pays again",
        "_runtime/stream_attempt.py",
        "                granted = pool.acquire_nowait(None, slot.outer)\n"
        "                granted = granted or await pool.wait(pool.enqueue(None, slot.outer))\n",
        "                granted = pool.acquire_nowait(job.costs, slot.outer)\n"
        "                granted = granted or await pool.wait(pool.enqueue(job.costs, slot.outer))\n",
    ),
    Mutant(
        "a time-out is judged by the type of the exception",
        "_runtime/attempt.py",
        "        elif timed_out or raised is None:\n",
        "        elif isinstance(error, TimeoutError) or raised is None:\n",
    ),
    Mutant(
        "a result that was ready is thrown away",
        "_runtime/attempt.py",
        "                return ended_at\n",
        "                if not scope.cancel_called:\n                    return ended_at\n",
    ),
    Mutant(
        "attempts share a context",
        "_runtime/attempt.py",
        "        context = new_context()\n",
        "        context = vars(run_attempt).setdefault(id(plan), new_context())\n",
    ),
    Mutant(
        "an agent is started after its cancellation",
        "_runtime/attempt.py",
        "            # Once cancelled, nothing starts, not even to its first checkpoint.\n"
        "            await wait_for_cancellation()\n",
        "            pass\n",
    ),
    Mutant(
        "an error made out of the caller's cancellation is an error",
        "_runtime/attempt.py",
        "            # An error made out of the caller's cancellation is that cancellation.\n"
        "            await checkpoint_if_cancelled()\n",
        "            pass\n",
    ),
    Mutant(
        "a stray cancellation ends the batch",
        "_runtime/attempt.py",
        '            stray = InvocationCancelled("the agent was cancelled from within")\n',
        "            raise raised\n",
    ),
    Mutant(
        "the marks that an agent left on its task are not removed",
        "_runtime/batch.py",
        "                    timer.close()\n                    await self._pool.loop.forget_cancellations()\n",
        "                    pass\n",
        "asyncio",
    ),
    Mutant(
        "a slot is held while its invocation waits to be retried",
        "_runtime/single.py",
        "            await anyio.sleep_until(wake_at)\n",
        "            held = self._pool.acquire_nowait(job.costs if selective else (), self._outer)\n"
        "            await anyio.sleep_until(wake_at)\n"
        "            _ = held.release() if held else None\n",
    ),
    Mutant(
        "a wait crosses the total time-out",
        "_runtime/job.py",
        "        elif wake_at >= self.deadline:\n",
        "        elif wake_at >= self.deadline + 100:\n",
    ),
    Mutant(
        "there is one retry too many",
        "_runtime/job.py",
        "self.counted_retries >= config.max_retries",
        "self.counted_retries > config.max_retries",
    ),
    Mutant(
        "retries are guessed",
        "_runtime/job.py",
        "            max(0, self.attempts - 1),\n",
        "            len(self.failures or ()),\n",
    ),
    Mutant(
        "a fatal verdict stops nothing",
        "_runtime/batch.py",
        "        if verdict.kind is VerdictKind.FATAL:\n",
        "        if False:\n",
    ),
    Mutant(
        "a result is lost",
        "_runtime/read.py",
        "        self.channel.send(result)\n",
        "        if self.channel._size < 2:\n            self.channel.send(result)\n",
    ),
    Mutant(
        "a result is delivered to the wrong input",
        "_runtime/batch.py",
        "= Job(invocation, index, now, pool)",
        "= Job(invocation, max(0, index - 1), now, pool)",
    ),
    Mutant(
        "a reader that is cancelled loses a result",
        "_runtime/channel.py",
        "        return self._rest.popleft() if self._rest else self._receive.receive_nowait()\n",
        "        item = self._rest.popleft() if self._rest else self._receive.receive_nowait()\n"
        "        await self._backend.checkpoint()\n        return item\n",
    ),
    Mutant(
        "the end of the input ends nothing",
        "_runtime/batch.py",
        "            self._exhausted = True\n            self._check_done()\n\n        return None\n",
        "            self._exhausted = True\n\n        return None\n",
    ),
    Mutant(
        "a parked worker counts as looking for work",
        "_runtime/batch.py",
        "        self._parked[event] = None\n        self._seeking -= 1\n",
        "        self._parked[event] = None\n",
    ),
    Mutant(
        "what a cancelled batch had yet to retry is forgotten",
        "_runtime/batch.py",
        "            self._abandon()\n            self._close_input()\n",
        "            self._close_input()\n",
    ),
    Mutant(
        "a batch runs without slots",
        "_runtime/batch.py",
        "                slot = job.pool.acquire_nowait(job.costs if selective else (), self._outer)\n",
        "                slot = Slot(pool, Slot(pool, None, None), None)\n",
    ),
    Mutant(
        "who does not end first is never timed out",
        "_eventloop/backend.py",
        "                self._wind(deadline)\n                return\n",
        "                return\n",
    ),
    Mutant(
        "a time-out that comes before others is put behind them",
        "_eventloop/backend.py",
        "        if deadline == math.inf or (scopes and deadline < self._latest) or scope in self._alone:\n",
        "        if deadline == math.inf or scope in self._alone:\n",
    ),
    Mutant(
        "an attempt is timed out when that of its worker before would have been",
        "_eventloop/backend.py",
        "            if scope._deadline <= now:\n",
        "            if True:\n",
    ),
    Mutant(
        "a moved deadline is not seen to any more",
        "_eventloop/backend.py",
        "                self.set(scope, scope._deadline)\n",
        "                pass\n",
        "asyncio",  # the only one on which programs catch it
    ),
    Mutant(
        "a timer goes on while its worker waits for something else",
        "_runtime/batch.py",
        "                    timer.close()\n                    slot = await",
        "                    slot = await",
        "asyncio",
    ),
    Mutant(
        "what was not read when a stream ended is lost",
        "_runtime/channel.py",
        "            self._rest.append(self._receive.receive_nowait())\n",
        "            self._receive.receive_nowait()\n            self._size -= 1\n",
    ),
    Mutant(
        "a stream is retried after a chunk",
        "_runtime/job.py",
        "        if config.max_retries == 0 or self.chunks:\n",
        "        if config.max_retries == 0:\n",
    ),
    Mutant(
        "a stream that waits for its reader keeps the slot that it was lent",
        "_runtime/stream_attempt.py",
        "        if slot.lender is None:\n",
        "        if slot.lender is None or True:\n",
        "trio",  # the only one on which programs catch it
    ),
    Mutant(
        "a stream goes on without the slot that it gave back",
        "_runtime/stream_attempt.py",
        "                granted = pool.acquire_nowait(None, slot.outer)\n"
        "                granted = granted or await pool.wait(pool.enqueue(None, slot.outer))\n"
        "                assert granted is not None\n"
        "                slot.resume(granted)\n",
        "                slot.suspended = False\n                slot.lender = pool.lender(slot.outer)\n",
    ),
    Mutant(
        "the time that a reader takes is the agent's idleness",
        "_runtime/stream_attempt.py",
        "        self._idle_since = math.inf\n        self._set_deadline(math.inf)\n",
        "        self._set_deadline(math.inf)\n",
    ),
    Mutant(
        "the time that a reader takes counts for the attempt",
        "_runtime/stream_attempt.py",
        "        self._set_deadline(math.inf)\n",
        "",
    ),
    Mutant(
        "idleness is measured from the first chunk",
        "_runtime/stream_attempt.py",
        "                    self._idle_since = at\n",
        "                    self._idle_since = min(self._idle_since, at)\n",
    ),
    Mutant(
        "an agent that yields when its time is up changes the name of its time-out",
        "_runtime/stream_attempt.py",
        "        if not scope.cancel_called:\n            job.chunk_limit = None\n",
        "        if True:\n            job.chunk_limit = None\n",
    ),
    Mutant(
        "the generator of a stream that was left is not closed",
        "_runtime/stream_attempt.py",
        "            error = await self._close(iterator)\n",
        "",
    ),
    Mutant(
        "a truncated stream looks complete",
        "_runtime/stream.py",
        "        if error is None:\n            return None\n",
        "        if error is None or self.result.chunks:\n            return None\n",
    ),
    Mutant(
        "chunks of one stream pass for another's",
        "_runtime/read.py",
        "    return ChunkEvent(job.invocation, chunk, job.index)\n",
        "    return ChunkEvent(job.invocation, chunk, job.index // 2)\n",
    ),
    Mutant(
        "the result of a stream overtakes its chunks",
        "_runtime/read.py",
        "        self.channel.send(ResultEvent(job.invocation, result, job.id or new_id(), now))\n",
        "        self.channel._rest.append(ResultEvent(job.invocation, result))\n        self.channel._size += 1\n",
    ),
    Mutant(
        "an agent that cancelled its own task loses what it returned",
        "_runtime/single.py",
        "            if not self._waited and not own_task:\n",
        "            if not self._waited:\n",
        "asyncio",
    ),
    Mutant(
        "a native cancellation of a task of ours ends it",
        "_eventloop/tasks.py",
        "                    await checkpoint_if_cancelled()\n                    await self._kind.forget_cancellations()\n        except",
        "                    raise\n        except",
        "asyncio",
    ),
    Mutant(
        "a scope that was left open is not noticed",
        "_runtime/attempt.py",
        "            if not pool.loop.is_left_open(scope):\n",
        "            if True:\n",
    ),
    Mutant(
        "a scope that a stream leaves open is not noticed",
        "_runtime/stream_attempt.py",
        "            self._job.left_open = self._pool.loop.is_left_open(self._closing)\n",
        "            pass\n",
        # On asyncio that the scope cannot be left says the same.
        "trio",
    ),
    Mutant(
        "a task that a scope was left open in does not wait for the others",
        "_eventloop/tasks.py",
        "        if self._is_spoilt():\n            await self._park()\n",
        "",
    ),
    Mutant(
        "agents may leave scopes open for ever",
        "_runtime/batch.py",
        "        if self._spoilt >= self._limit:\n",
        "        if False:\n",
    ),
    Mutant(
        "an error made out of the caller's native cancellation is retried",
        "_runtime/attempt.py",
        "        if caller is not None and caller.came(raised):\n",
        "        if caller is not None and caller.came(raised) and error is None:\n",
        "asyncio",
    ),
    Mutant(
        "a native cancellation whose mark was taken back is nobody's",
        "_eventloop/callers.py",
        "        return self._is_raised() or (native is not None and native is raised)\n",
        "        return self._is_raised()\n",
        "asyncio",
    ),
    Mutant(
        "what was cut short looks complete",
        "_runtime/read.py",
        "        return None if batch.stopped is None else batch.stopped.with_traceback(None)\n",
        "        return None\n",
    ),
    Mutant(
        "a cancellation that a cost raises ends the batch",
        "_runtime/job.py",
        "            if not is_error(exc):\n                raise\n\n            self.status = Status.ERROR\n",
        "            if not isinstance(exc, Exception):\n                raise\n\n            self.status = Status.ERROR\n",
    ),
    Mutant(
        "a cancellation that an event hook raises harms the run",
        "_runtime/observer.py",
        "            if not is_error(exc):\n",
        "            if not isinstance(exc, Exception):\n",
    ),
    Mutant(
        "a stream whose task never began has no end",
        "_runtime/producer.py",
        "                # All tasks of the group have ended, and this one never began.\n"
        "                await self._end_early()\n",
        "                pass\n",
        "asyncio",
    ),
    Mutant(
        "a worker that is to be cancelled is not",
        "_eventloop/context.py",
        "    anyio.CancelScope().__enter__().__exit__(None, None, None)\n",
        "",
        "asyncio",
    ),
    Mutant(
        "a value is set without the lock",
        "_store/store.py",
        "        change = {key: Freezer().freeze(value, key)}\n        run = self._state.enter_run()\n        async with run.lock:\n",
        "        change = {key: Freezer().freeze(value, key)}\n        run = self._state.enter_run()\n        if await checkpoint() is None:\n",
        program="linearizability.py",
    ),
    Mutant(
        "a transform reads before it has the lock",
        "_store/store.py",
        "        async with run.lock:\n            value = fn(thaw(self._state.values.get(key, frozen_default), owner))\n",
        "        old = self._state.values.get(key, frozen_default)\n        async with run.lock:\n            value = fn(thaw(old, owner))\n",
        program="linearizability.py",
    ),
    Mutant(
        "a comparison is made before the lock is there",
        "_store/store.py",
        "        async with run.lock:\n            value = self._state.values.get(key)\n",
        "        value = self._state.values.get(key)\n        async with run.lock:\n",
        program="linearizability.py",
    ),
    Mutant(
        "a cancelled edit is committed",
        "_store/store.py",
        "            if exc_type is None:\n",
        "            if exc_type is None or not issubclass(exc_type, Exception):\n",
        program="linearizability.py",
    ),
    Mutant(
        "a draft writes into the state",
        "_store/draft.py",
        "        self._touched[key] = thaw(value, self._owner)\n",
        "        self._touched[key] = self._state[key] = thaw(value, self._owner)\n",
        program="linearizability.py",
    ),
    Mutant(
        "an edit is committed in two steps",
        "_store/store.py",
        "                self._state.commit(run, *draft.changes())\n",
        "                for name, new in draft.changes()[0].items():\n                    self._state.commit(run, {name: new})\n                    await checkpoint()\n",
        program="linearizability.py",
    ),
    Mutant(
        "a cancelled edit keeps the lock",
        "_store/store.py",
        "            run.lock.release()\n",
        "            if exc_type is None:\n                run.lock.release()\n",
        program="linearizability.py",
    ),
    Mutant(
        "who waits is asked only when it runs",
        "_store/watch.py",
        "            if wait.is_over(state):\n                del",
        "            if not wait.event.set():\n                del",
        program="linearizability.py",
    ),
]

# Which program was the first to catch each one, when that was last looked at. Whether it still does is quickly
# known; if it does not, another one has to.
CAUGHT_BY: dict[str, dict[str, int]] = {
    "a slot granted in the moment of a cancellation is not given back": {"asyncio": 2, "trio": 90},
    "a cancelled waiter stays in line": {"asyncio": 2, "trio": 2},
    "a loan is never returned": {"asyncio": 1, "trio": 1},
    "the loan of an invocation that has ended is given back under its borrower": {"asyncio": 29, "trio": 124},
    "a slot is lent to any number at once": {"asyncio": 99, "trio": 99},
    "a nested invocation is lent no slot": {"asyncio": 340, "trio": 235},
    "a freed token is offered to nobody": {"asyncio": 1, "trio": 1},
    "what was paid for an attempt that never began is kept": {"asyncio": 13, "trio": 1088},
    "a pause does not look who is first in line now": {"asyncio": 1913},
    "a pause holds nobody": {"asyncio": 26, "trio": 26},
    "nobody is woken when the first in line gives up": {"asyncio": 8, "trio": 8},
    "those who are lent a slot pay nothing": {"asyncio": 8, "trio": 8},
    "those who wait for a loan pay nothing": {"asyncio": 8, "trio": 8},
    "loans begin in spite of a cool-off": {"asyncio": 1786, "trio": 1666},
    "rates are paid before there is a slot": {"asyncio": 8, "trio": 8},
    "a loan that was not used is not given back": {"asyncio": 8, "trio": 13},
    "a cool-off concerns only the one who was told": {"asyncio": 26, "trio": 26},
    "any failure cuts the limit": {"asyncio": 8, "trio": 2},
    "a burst of rejections cuts the limit more than once": {"asyncio": 2960, "trio": 3869},
    "the limit grows above its ceiling": {"asyncio": 26, "trio": 2},
    "what has left a window is given back": {"asyncio": 631, "trio": 1176},
    "what has flowed back into a bucket is given back too": {"asyncio": 491, "trio": 26},
    "a window opens too early": {"asyncio": 253, "trio": 38},
    "a bucket fills too fast": {"asyncio": 26, "trio": 16},
    "the retry budget bounds nothing": {"asyncio": 8, "trio": 8},
    "a stream that goes on pays again": {"asyncio": 3717, "trio": 723},
    "a time-out is judged by the type of the exception": {"asyncio": 2, "trio": 42},
    "a result that was ready is thrown away": {"asyncio": 19, "trio": 12},
    "attempts share a context": {"asyncio": 2, "trio": 2},
    "an agent is started after its cancellation": {"asyncio": 54, "trio": 349},
    "an error made out of the caller's cancellation is an error": {"asyncio": 1003, "trio": 10},
    "a stray cancellation ends the batch": {"asyncio": 37, "trio": 37},
    "the marks that an agent left on its task are not removed": {"asyncio": 510},
    "a slot is held while its invocation waits to be retried": {"asyncio": 20, "trio": 1},
    "a wait crosses the total time-out": {"asyncio": 1338, "trio": 1257},
    "there is one retry too many": {"asyncio": 26, "trio": 16},
    "retries are guessed": {"asyncio": 1, "trio": 1},
    "a fatal verdict stops nothing": {"asyncio": 84, "trio": 84},
    "a result is lost": {"asyncio": 1184, "trio": 132},
    "a result is delivered to the wrong input": {"asyncio": 0, "trio": 2},
    "a reader that is cancelled loses a result": {"asyncio": 29, "trio": 17},
    "the end of the input ends nothing": {"asyncio": 18, "trio": 17},
    "a parked worker counts as looking for work": {"asyncio": 13, "trio": 42},
    "what a cancelled batch had yet to retry is forgotten": {"asyncio": 2, "trio": 2},
    "a batch runs without slots": {"asyncio": 2, "trio": 2},
    "who does not end first is never timed out": {"asyncio": 237, "trio": 761},
    "a time-out that comes before others is put behind them": {"asyncio": 308, "trio": 873},
    "an attempt is timed out when that of its worker before would have been": {"asyncio": 17, "trio": 95},
    "a moved deadline is not seen to any more": {"asyncio": 8554},
    "a timer goes on while its worker waits for something else": {"asyncio": 3717},
    "what was not read when a stream ended is lost": {"asyncio": 29, "trio": 29},
    "a stream is retried after a chunk": {"asyncio": 29, "trio": 29},
    "a stream that waits for its reader keeps the slot that it was lent": {"trio": 859},
    "a stream goes on without the slot that it gave back": {"asyncio": 1585, "trio": 659},
    "the time that a reader takes is the agent's idleness": {"asyncio": 133, "trio": 133},
    "the time that a reader takes counts for the attempt": {"asyncio": 17, "trio": 225},
    "idleness is measured from the first chunk": {"asyncio": 105, "trio": 105},
    "an agent that yields when its time is up changes the name of its time-out": {
        "asyncio": 1607,
        "trio": 623,
    },
    "the generator of a stream that was left is not closed": {"asyncio": 21, "trio": 157},
    "a truncated stream looks complete": {"asyncio": 17, "trio": 29},
    "chunks of one stream pass for another's": {"asyncio": 17, "trio": 43},
    "the result of a stream overtakes its chunks": {"asyncio": 17, "trio": 17},
    "an agent that cancelled its own task loses what it returned": {"asyncio": 623},
    "a native cancellation of a task of ours ends it": {"asyncio": 1962},
    "a scope that was left open is not noticed": {"asyncio": 70, "trio": 48},
    "a scope that a stream leaves open is not noticed": {"trio": 105},
    "a task that a scope was left open in does not wait for the others": {"asyncio": 13, "trio": 5},
    "agents may leave scopes open for ever": {"asyncio": 70, "trio": 252},
    "an error made out of the caller's native cancellation is retried": {"asyncio": 1886},
    "a native cancellation whose mark was taken back is nobody's": {"asyncio": 252},
    "what was cut short looks complete": {"asyncio": 23, "trio": 316},
    "a worker that is to be cancelled is not": {"asyncio": 436},
    "a cancellation that a cost raises ends the batch": {"asyncio": 1318, "trio": 46},
    "a cancellation that an event hook raises harms the run": {"asyncio": 20, "trio": 20},
    "a stream whose task never began has no end": {"asyncio": 143},
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


def catch(mutant: Mutant, backend: str, first: int = 0, last: int = PROGRAMS) -> str | None:
    """Return what caught the mutant, in a line; ``None`` if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "agentloop"
        shutil.copytree(ROOT / "agentloop", package, ignore=shutil.ignore_patterns("__pycache__"))
        target = package / mutant.file
        text = target.read_text()
        if text.count(mutant.old) != 1:
            raise LookupError(
                f"{mutant.name!r}: its text stands {text.count(mutant.old)} times in {mutant.file}"
            )

        target.write_text(text.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            str(ROOT / "tests" / "tools" / mutant.program),
            "--backend",
            backend,
            "--seeds",
            f"{first}:{last}",
        ]
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

"""Many invocations at once, by a bounded number of workers."""

from __future__ import annotations

__all__ = ["Batch"]

from typing import Any, TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._errors import BatchStopped, InvocationCancelled
from .._eventloop.tasks import LOST, Tasks
from .._limits.away import come_back
from .._limits.slots import Slot
from .bookkeeping import Bookkeeping
from .ending import RULE_HINT
from .worker import Worker

T = TypeVar("T")


class Batch(Bookkeeping[T]):
    """Runs a batch: a task for each worker, one for an async input, one for the times of retries."""

    async def run(self) -> None:
        """
        Run the batch to its end. When this returns or raises, no task, slot or stream of the batch is left.

        :raises BaseException: the caller's cancellation, or an agent's error that is no ``Exception``
        """
        self._deadline = anyio.current_effective_deadline()
        self._began = self.pool.loop.now()
        self.pool.claim()
        self.pool.begin_call(self, self.outer)
        self.pool.on_resize.add(self._resized)
        self.source.count_unpulled(+1)
        try:
            while not self.done:
                await self._run_tasks()
                if not self.done:
                    # A task was cancelled natively before its first step, and AnyIO has cancelled the others.
                    self.stop(LOST, InvocationCancelled(LOST))

            self.ending.complete()
        finally:
            self.pool.on_resize.discard(self._resized)
            self.source.count_unpulled(-1)
            self.pool.users -= 1
            self._abandon()
            self.pool.end_call(self, self.outer)
            self.ending.forget_tally()
            self.source.close()
            if self.caller_waits and self.outer is not None:
                await come_back(self.outer)

    @property
    def outer(self) -> Slot | None:
        """The slot of the invocation that runs the batch; ``None`` outside of an agent."""
        return self.source.outer

    @property
    def caller_waits(self) -> bool:
        """Whether the caller waits for the end of the batch."""
        return self.skips_remaining

    def wind_down(self, stopped: BatchStopped, until: float | None) -> None:
        """
        Start and retry nothing any more.

        :param stopped: the reason
        :param until: when to cancel running invocations
        """
        self.stop(stopped.reason, stopped.__cause__)
        if until is not None:
            self.start_timer(until, lambda: self.cancel(stopped.reason, None))

    def on_block_left(self) -> None:
        """Do nothing: a caller waits for the whole batch, so none of its work is new."""

    def may_go_on(self, keys: Any) -> bool:
        """Return whether the batch waits for anything besides slots of the pools of some keys."""
        source, retries = self.source, self.retries
        if self.pool.keys is not keys or self.done or retries.count or self.has_work():
            return True

        # It may wait for a reader that has not taken all results, and for an async input.
        attempts = source.pulled - self._ended - len(retries.waiters)
        in_room = 0 if retries.room is None else retries.room.in_room
        waits_for_reader = source.live > attempts + in_room or (
            self.may_start is not None and source.has_ready
        )
        return waits_for_reader or (source.feeder is not None and not source.exhausted)

    async def _run_tasks(self) -> None:
        """Run tasks until the batch is done, or they are cancelled."""
        self.retries.open(self.changed, self._expire)
        tasks = Tasks(self.inherited.context)
        try:
            async with tasks:
                self.tasks = tasks
                self.crew.open(tasks, lambda: Worker(self, tasks).work(), self.has_work)
                if self.by_key is not None:
                    self.by_key.open(self.changed, self.spend, tasks.start_soon, self.may_start)

                if self.source.feeder is not None and not self.source.exhausted:
                    tasks.start_soon(self._feed, "agentloop feeder")

                if self.deadlines is not None:
                    tasks.start_soon(self.deadlines.watch_scopes, "agentloop deadlines")

                self._start_rule()
                self._resized()
            # A task group on asyncio may end without an exception although its tasks were cancelled.
            await checkpoint_if_cancelled()
        except anyio.get_cancelled_exc_class():
            # The exception of an agent or the input wins: a cancellation would be dropped by its scope.
            if tasks.failure is None:
                raise
        finally:
            self.tasks = None
            self.crew.close()
            self.retries.close()
            if self.by_key is not None:
                self.by_key.close()

        if tasks.failure is not None:
            raise tasks.failure

    def _start_rule(self) -> None:
        rule = self.options.config.stop
        if rule is not None and rule.seconds is not None and self.ending.stopped is None:
            reason, grace_seconds = f"{rule.seconds:.10g}s have passed", rule.grace_seconds
            self.start_timer(
                self._began + rule.seconds, lambda: self.stop(reason, None, RULE_HINT, grace_seconds)
            )

    async def _feed(self) -> None:
        assert self.source.feeder is not None
        await self.source.feeder.run(self.source, self.changed)
        self.check_done()

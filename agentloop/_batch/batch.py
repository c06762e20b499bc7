"""Many invocations at once, by a bounded number of workers."""

from __future__ import annotations

__all__ = ["Batch"]

from typing import TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .._errors import InvocationCancelled
from .._eventloop.tasks import LOST, Tasks
from .bookkeeping import Bookkeeping
from .ending import RULE_HINT
from .worker import Worker

T = TypeVar("T")


class Batch(Bookkeeping[T]):
    """Runs a batch: a task for each worker, one for an async input, one for the alarm of retries."""

    async def run(self) -> None:
        """
        Run the batch to its end. When it returns or raises, nothing of it is left.

        :raises BaseException: the caller's cancellation, and what an agent raised that is no ``Exception``
        """
        self._deadline = anyio.current_effective_deadline()
        self._began = self.pool.loop.now()
        self.pool.claim()
        self.pool.begin_call(self, self.outer)
        self.pool.on_raise.add(self._resized)
        self.source.count_to_come(1)
        try:
            while not self.done:
                await self._run_tasks()
                if not self.done:
                    # Natively, and before it could begin, so that AnyIO has cancelled the others too.
                    self.stop(LOST, InvocationCancelled(LOST))

            self.ending.complete()
        finally:
            self.pool.on_raise.discard(self._resized)
            self.source.count_to_come(-1)
            self.pool.users -= 1
            self._abandon()
            self.pool.end_call(self, self.outer)
            # It refers to an error, whose frames may refer to this.
            self._judge = None
            self.source.close()

    async def _run_tasks(self) -> None:
        """Run tasks until the batch is done, or they are cancelled."""
        self.retries.open(self.changed, self._expire)
        try:
            async with Tasks() as tasks:
                self.tasks = tasks
                self.crew.open(tasks, lambda: Worker(self, tasks).work(), self.has_work)
                if self.source.feeder is not None and not self.source.exhausted:
                    tasks.start_soon(self._feed, "agentloop feeder")

                if self.deadlines is not None:
                    tasks.start_soon(self.deadlines.watch_scopes, "agentloop timer")

                self._start_rule()
                self._resized()
        finally:
            self.tasks = None
            self.crew.close()
            self.retries.close()

        # A task group on asyncio may end without an exception although its tasks were cancelled.
        await checkpoint_if_cancelled()
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

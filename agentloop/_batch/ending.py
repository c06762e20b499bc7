"""Why a batch stops, and what it raises then."""

from __future__ import annotations

__all__ = ["BUDGET_HINT", "FATAL_HINT", "PATIENCE_HINT", "RULE_HINT", "Ending", "RuleTally", "blame"]

from typing import Any

from .._errors import BatchStopped, describe
from .._limits.slots import Pool
from .._result import InvocationResult, Status
from .._runtime.job import Job
from .._runtime.outcome import Outcome
from .._stop_rule import StopRule

# Hints for users whose batch was stopped by one failure.
FATAL_HINT = (
    "a classify= that does not judge the error FATAL lets a batch go on, "
    "and a KeyedLimiter the invocations of other keys"
)
RULE_HINT = "as LoopConfig(stop=...) has it"
BUDGET_HINT = "a budget holds for as long as its limiter"
PATIENCE_HINT = "LoopConfig(overload_timeout_seconds=...) sets how long to wait for a provider"


def blame(job: Job[Any], failed: Outcome) -> str:
    """Return the reason of a stop: the invocation that failed, and its error."""
    return f"{job.invocation.agent_id!r} failed with {describe(failed.error)}"


class RuleTally:
    """
    Applies a rule to the results of one batch, in the order in which they end.

    :param rule: the rule
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule
        self.error: BaseException | None = None
        """The error of the last invocation that failed."""
        self._ended = 0
        self._failed = 0
        self._in_a_row = 0

    def add(self, result: InvocationResult[Any]) -> str | None:
        """Count a result, and return why the batch is to stop, if it is."""
        status, rule = result.status, self.rule
        if status is Status.CANCELLED or status is Status.SKIPPED:
            return None

        self._ended += 1
        if status is Status.SUCCESS:
            self._in_a_row = 0
        else:
            self.error = result.exception
            self._failed += 1
            self._in_a_row += 1

        failed, row, ended = self._failed, self._in_a_row, self._ended
        if rule.failures is not None and failed >= rule.failures:
            return f"{failed} failed"

        if rule.in_a_row is not None and row >= rule.in_a_row:
            return f"{row} failed in a row"

        if rule.share is not None and ended >= rule.at_least and failed > rule.share * ended:
            return f"{failed} of {ended} failed, more than {rule.share:.10g} of all"

        return None


def _stopped(reason: str, cause: BaseException | None, hint: str) -> BatchStopped:
    stopped = BatchStopped(reason, hint)
    stopped.__cause__ = cause
    return stopped


class Ending:
    """
    Knows whether a batch was stopped, why, and which exception the batch raises for that.

    A batch can be stopped for any number of reasons; the first one wins. From then on no job is started and
    none is retried. The same holds for the jobs of one key, if each key has its own limiter.

    :param rule: the rule
    """

    def __init__(self, rule: StopRule | None) -> None:
        self.tally = None if rule is None else RuleTally(rule)
        """Decides for each result whether it stops the batch."""
        self.stopped: BatchStopped | None = None
        """Why no job is started any more; ``None`` while jobs may start."""
        self._of_keys: dict[Pool, BatchStopped] = {}
        self._cancelled_by = "the batch was cancelled"
        self._has_skipped = False
        self._complete = False

    @property
    def reason(self) -> str:
        """The reason that cancelled invocations give."""
        return self._cancelled_by if self.stopped is None else self.stopped.reason

    def stop(self, reason: str, cause: BaseException | None, hint: str = "") -> BatchStopped | None:
        """
        Stop the batch.

        :param reason: the reason, in words
        :param cause: the reason as an exception, if there is one
        :param hint: how the user lets such a batch go on
        :return: the exception of this stop; ``None`` if the batch was stopped before
        """
        if self.stopped is None:
            self.stopped = _stopped(reason, cause, hint)
            return self.stopped

        return None

    def stop_key(
        self, pool: Pool, reason: str, cause: BaseException | None, hint: str
    ) -> BatchStopped | None:
        """Stop the jobs of one key, as :meth:`stop` does with all."""
        if self.stopped is None and pool not in self._of_keys:
            self._of_keys[pool] = _stopped(reason, cause, hint)
            return self._of_keys[pool]

        return None

    def stopped_for(self, job: Job[Any]) -> BatchStopped | None:
        """Return why a job is not started any more; ``None`` if it may start."""
        return self.stopped or (self._of_keys.get(job.pool) if self._of_keys else None)

    def cancel(self, reason: str) -> None:
        """Note why the batch is cancelled, for a batch that was not stopped before."""
        self._cancelled_by = reason

    def complete(self) -> None:
        """Note that every pulled input has its result."""
        self._complete = True

    def forget_tally(self) -> None:
        """Drop the rule's last error, whose frames may refer to the batch."""
        self.tally = None

    def end_job(self, job: Job[Any]) -> None:
        """Make a job final that a stopped batch does not start or retry, unless it has ended already."""
        stopped = self.stopped_for(job)
        if stopped is not None and job.end_stopped(stopped):
            self._has_skipped = True

    def error(self, cut_short: bool) -> BatchStopped | None:
        """
        Return the exception to raise once the batch has ended, if inputs were skipped or not pulled.

        :param cut_short: whether inputs were not pulled
        """
        if self._complete:
            stopped = self.stopped or next(iter(self._of_keys.values()), None)
            return stopped if cut_short or self._has_skipped else None

        return BatchStopped(self.reason)

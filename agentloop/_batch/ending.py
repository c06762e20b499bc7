"""How a batch ends, and why."""

from __future__ import annotations

__all__ = ["BUDGET_HINT", "FATAL_HINT", "PATIENCE_HINT", "RULE_HINT", "Ending", "Judge", "blame"]

from typing import Any

from .._errors import BatchStopped, describe
from .._limits.slots import Pool
from .._result import InvocationResult, Status
from .._runtime.job import Job
from .._runtime.outcome import Outcome
from .._stop_rule import StopRule

# What to do about a batch that one failure has stopped.
FATAL_HINT = (
    "a classify= that does not judge the error FATAL lets a batch go on, "
    "and a KeyedLimiter what has another key"
)
RULE_HINT = "as LoopConfig(stop=...) has it"
BUDGET_HINT = "a budget holds for as long as its limiter"
PATIENCE_HINT = "LoopConfig(overload_timeout_seconds=...) says how long to wait for a provider"


def blame(job: Job[Any], failed: Outcome) -> str:
    """Return which invocation has failed, and how, as the reason of a stop."""
    return f"{job.invocation.agent_id!r} failed with {describe(failed.error)}"


class Judge:
    """
    Applies a rule to the results of one batch, in the order in which they end.

    :param rule: what to stop for
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule
        self.error: BaseException | None = None
        """Of the last invocation that failed."""
        self._ended = 0
        self._failed = 0
        self._row = 0

    def judge(self, result: InvocationResult[Any]) -> str | None:
        """Count a result, and return why the batch is to stop, if it is."""
        status, rule = result.status, self.rule
        if status is Status.CANCELLED or status is Status.SKIPPED:
            return None

        self._ended += 1
        if status is Status.SUCCESS:
            self._row = 0
        else:
            self.error = result.exception
            self._failed += 1
            self._row += 1

        failed, row, ended = self._failed, self._row, self._ended
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
    The one place that knows whether a batch was stopped, by what, and what that leaves to raise.

    A batch can be stopped for any number of reasons; the first one wins. From then on no job is started and
    none is retried. The same holds for the jobs of one key, where each key has a limiter of its own.

    :param rule: what to stop for
    """

    def __init__(self, rule: StopRule | None) -> None:
        self.judge = None if rule is None else Judge(rule)
        """Says of each result whether it stops the batch."""
        self.stopped: BatchStopped | None = None
        """Why nothing is started any more, if so."""
        self._of_keys: dict[Pool, BatchStopped] = {}
        self._cancelled_by = "the batch was cancelled"
        self._has_skipped = False
        self._complete = False

    @property
    def reason(self) -> str:
        """Why what still runs is cancelled, if it is."""
        return self._cancelled_by if self.stopped is None else self.stopped.reason

    def stop(self, reason: str, cause: BaseException | None, hint: str = "") -> BatchStopped | None:
        """
        Stop the batch.

        :param reason: what stops it, in words
        :param cause: the same, as an exception, if there is one
        :param hint: what to do to have it go on
        :return: the exception that says so; ``None`` if it was stopped before
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
        """Return why a job is not started any more, if so."""
        return self.stopped or (self._of_keys.get(job.pool) if self._of_keys else None)

    def cancel(self, reason: str) -> None:
        """Say why the batch is cancelled, in case nothing has stopped it before."""
        self._cancelled_by = reason

    def complete(self) -> None:
        """Note that every input that was pulled has its result."""
        self._complete = True

    def forget_judge(self) -> None:
        """Let go of the rule's last error, whose frames may refer to the batch."""
        self.judge = None

    def close(self, job: Job[Any]) -> None:
        """Make final what a stopped batch does not start or retry, unless it has ended by itself."""
        stopped = self.stopped_for(job)
        if stopped is not None and job.close(stopped):
            self._has_skipped = True

    def error(self, cut_short: bool) -> BatchStopped | None:
        """
        Return what to raise once the batch has ended, if inputs were skipped or not pulled.

        :param cut_short: whether inputs were not pulled
        """
        if self._complete:
            stopped = self.stopped or next(iter(self._of_keys.values()), None)
            return stopped if cut_short or self._has_skipped else None

        return BatchStopped(self.reason)

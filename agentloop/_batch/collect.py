"""A batch that returns its results all at once."""

from __future__ import annotations

__all__ = ["CollectingBatch"]

from operator import attrgetter
from typing import TypeVar

from .._invocation import Inputs
from .._limits.limiter import Limiter
from .._result import InvocationResult
from .._runtime.options import RunOptions
from .batch import Batch

T = TypeVar("T")


class CollectingBatch(Batch[T]):
    """A batch that keeps its results, one for each input, in order."""

    skips_remaining = True

    def __init__(self, inputs: Inputs[T], limiter: Limiter, options: RunOptions) -> None:
        super().__init__(inputs, limiter, options)
        self.kept = []

    def results(self) -> list[InvocationResult[T]]:
        """
        Return the results of a batch that has run, and forget them.

        :raises Exception: the exception that the input raised
        :raises BatchStopped: if an async input was not read to its end
        """
        if self.input_error is not None:
            raise self.input_error

        # An error in a result keeps the frames of workers alive, and these refer to the batch.
        results, self.kept = self.kept or [], []
        results.sort(key=attrgetter("index"))
        stopped = self.stopped
        if self.cut_short and stopped is not None:
            stopped.results = results
            raise stopped.with_traceback(None)

        return results

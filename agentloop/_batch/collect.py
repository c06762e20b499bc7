"""A batch whose results are wanted all at once."""

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

    keep_rest = True

    def __init__(self, inputs: Inputs[T], limiter: Limiter, options: RunOptions) -> None:
        super().__init__(inputs, limiter, options)
        self.kept = []

    def results(self) -> list[InvocationResult[T]]:
        """Return the results of a batch that has run, and forget them."""
        # The frames of workers can stay alive with an error that a result holds; they refer to the batch.
        results, self.kept = self.kept or [], []
        results.sort(key=attrgetter("index"))
        return results

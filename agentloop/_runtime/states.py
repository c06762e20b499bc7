"""The states of a job, and the progress of a stream."""

from __future__ import annotations

__all__ = ["ENDED", "QUEUED", "RETRYING", "RUNNING", "Progress", "State"]

import enum


class Progress:
    """
    The chunks that a stream has handed over.

    :param first_at: when it handed over the first chunk
    :ivar chunks: how many it has handed over
    """

    __slots__ = ("chunks", "first_at")

    def __init__(self, first_at: float) -> None:
        self.chunks = 0
        self.first_at = first_at


class State(enum.Enum):
    """The state of a job. The docstring of each method of :class:`Job` names its transition."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    RETRYING = enum.auto()
    ENDED = enum.auto()


QUEUED, RUNNING, RETRYING, ENDED = State

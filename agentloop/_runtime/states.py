"""The states of a job, the progress of a stream, and the part of a crew that an attempt uses."""

from __future__ import annotations

__all__ = ["ENDED", "QUEUED", "RETRYING", "RUNNING", "OtherWorkers", "Progress", "State"]

import enum
from typing import Protocol


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


class OtherWorkers(Protocol):
    """The part of a batch's crew that an attempt uses: it activates another worker when the agent waits."""

    seeking: int
    """How many workers are between two attempts, and will look for a job."""
    can_activate: bool
    """Whether a worker is parked or can be hired."""

    def activate(self) -> None:
        """Wake or hire a worker, if there is work and no worker is seeking."""


class State(enum.Enum):
    """The state of a job. The docstring of each method of :class:`Job` names its transition."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    RETRYING = enum.auto()
    ENDED = enum.auto()


QUEUED, RUNNING, RETRYING, ENDED = State

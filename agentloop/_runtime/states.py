"""Where a job is, and what an attempt knows of those around it."""

from __future__ import annotations

__all__ = ["ENDED", "QUEUED", "RETRYING", "RUNNING", "Helpers", "Progress", "State"]

import enum
from typing import Protocol


class Progress:
    """
    How far a stream has come.

    :param first_at: when it handed over the first chunk
    :ivar chunks: how many it has handed over
    """

    __slots__ = ("chunks", "first_at")

    def __init__(self, first_at: float) -> None:
        self.chunks = 0
        self.first_at = first_at


class Helpers(Protocol):
    """Calls another worker of a batch when an agent waits."""

    seeking: int
    """How many look for something to do already."""
    can_call: bool
    """Whether there is another one to call."""

    def call(self) -> None:
        """Call one, if there is something to do."""


class State(enum.Enum):
    """Where a job is. Each method of :class:`Job` that moves it says from where to where."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    RETRYING = enum.auto()
    ENDED = enum.auto()


QUEUED, RUNNING, RETRYING, ENDED = State

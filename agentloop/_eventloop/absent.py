"""The agents of an event loop that wait for a change by others, and have given their slots back."""

from __future__ import annotations

__all__ = ["Absent"]

from typing import Any

import anyio
from anyio.lowlevel import RunVar


class Absent:
    """The agents of an event loop that wait for a change, over all limiters and loops."""

    def __init__(self) -> None:
        self.waits: dict[Any, int] = {}
        """The slots of agents that wait for a change, and how many of their tasks wait."""
        self.away: set[Any] = set()
        """The slots that agents have given back."""
        self.returning: dict[Any, anyio.Event] = {}
        """The slots for which a task of the agent waits to go on, each with an event for its other tasks."""
        self.reads: dict[Any, int] = {}
        """The calls for whose next item an agent waits, and how many of its tasks do."""
        self.unread: set[Any] = set()
        """The slots of streams that wait for their readers."""

    @classmethod
    def current(cls) -> Absent:
        """Return the instance of the current event loop."""
        try:
            return _current.get()
        except LookupError:
            _current.set(absent := cls())
            return absent


_current: RunVar[Absent] = RunVar("agentloop.absent")

"""The agents of an event loop that wait for others, and have given their slots back meanwhile."""

from __future__ import annotations

__all__ = ["Absent"]

from typing import Any

from anyio.lowlevel import RunVar


class Absent:
    """Who waits for a change in an event loop, whichever limiters and loops they run under."""

    def __init__(self) -> None:
        self.waits: dict[Any, int] = {}
        """The slots of agents that wait for a change, and how many of their tasks do."""
        self.away: dict[Any, bool] = {}
        """The slots that agents have given back, and whether the agents are coming back."""

    @classmethod
    def current(cls) -> Absent:
        """Return that of the current event loop."""
        try:
            return _current.get()
        except LookupError:
            _current.set(absent := cls())
            return absent


_current: RunVar[Absent] = RunVar("agentloop.absent")

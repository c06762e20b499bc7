"""The agents of an event loop that wait for a change by others, and have given their slots back."""

from __future__ import annotations

__all__ = ["Absent"]

from typing import Any

from anyio.lowlevel import RunVar


class Absent:
    """The agents of an event loop that wait for a change, over all limiters and loops."""

    def __init__(self) -> None:
        self.waits: dict[Any, int] = {}
        """The slots of agents that wait for a change, and how many of their tasks wait."""
        self.away: dict[Any, bool] = {}
        """The slots that agents have given back, and whether the agents are coming back."""

    @classmethod
    def current(cls) -> Absent:
        """Return the instance of the current event loop."""
        try:
            return _current.get()
        except LookupError:
            _current.set(absent := cls())
            return absent


_current: RunVar[Absent] = RunVar("agentloop.absent")

"""Tools for testing code that runs on agentloop, on asyncio and on trio alike."""

from agentloop.testing._clock import virtual_clock
from agentloop.testing._deadlock import VirtualClockDeadlock

__all__ = ["VirtualClockDeadlock", "virtual_clock"]

for _public in (VirtualClockDeadlock, virtual_clock):
    _public.__module__ = __name__

del _public

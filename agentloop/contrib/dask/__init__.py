"""
Agents in other processes, here or on other machines, over Dask. Needs the extra ``dask``::

    async with Workers(8) as workers:
        results = await loop.run_all(Invocation.map(workers.remote(ask), prompts))

**Only the call travels.** The loop, its limiter, retries, time-outs, metrics, journal and events stay in the
process that runs the batch, so that all limits are exact and all guarantees hold. A worker process receives
a function and its arguments, and sends back the return value or the exception.
"""

from __future__ import annotations

__all__ = ["RemoteError", "WorkerLost", "Workers", "WorkersStatistics"]

from ._errors import RemoteError, WorkerLost
from ._workers import Workers, WorkersStatistics

for _public in (RemoteError, WorkerLost, Workers, WorkersStatistics):
    _public.__module__ = __name__

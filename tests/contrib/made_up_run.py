"""A run that never was, told to a timeline and a recorder: much faster than running it."""

from __future__ import annotations

import heapq
import random
from pathlib import Path
from typing import Any

from agentloop import (
    Invocation,
    InvocationResult,
    InvocationTimeout,
    LimitEvent,
    MetricsRecorder,
    QueuedEvent,
    ResultEvent,
    RetryEvent,
    StartedEvent,
    Status,
    StopEvent,
    Verdict,
    VerdictKind,
)
from agentloop.contrib.timeline import Timeline

HOSTILE = (
    "</style><script>document.title='owned'</script><img src=http://127.0.0.1:9 onerror=alert(1)>\u202e\ud800"
)


async def nothing() -> None:
    """Never runs."""


class StatusError(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__(f"the server said {status_code}")
        self.status_code = status_code


def make_up(
    path: Path, count: int, *, limit: int = 20, seed: int = 1, trouble: bool = False
) -> MetricsRecorder:
    """
    Write the timeline of a run, some of which fails, to a file, and return what was recorded.

    :param trouble: whether there is a cool-off from the 2nd to the 5th second, and an outage from the 4th to
        the 6th
    """
    rng = random.Random(seed)
    recorder = MetricsRecorder()
    slots = [0.0] * limit
    ends: list[tuple[float, int, LimitEvent | RetryEvent | ResultEvent]] = []
    if trouble:
        held = LimitEvent(limit, at=2, held_until=5)
        ends = [(2, -3, held), (4.5, -2, LimitEvent(9, 4.5, 5, 4)), (6, -1, LimitEvent(9, 6))]

    errors = [StatusError(429), StatusError(500), ConnectionError(HOSTILE)]
    with Timeline(path) as timeline:
        timeline(LimitEvent(limit, at=0.0))
        for number in range(count):
            now = heapq.heappop(slots)
            while ends and ends[0][0] <= now:
                timeline(heapq.heappop(ends)[2])

            agent = Invocation(HOSTILE if number == 0 else f"agent-{number}", nothing)
            timeline(QueuedEvent(agent, id=number, at=now))
            timeline(StartedEvent(agent, id=number, at=now))
            end = now + rng.lognormvariate(-2, 0.6)
            error: Exception | None = None
            status = Status.SUCCESS
            if number % 20 == 0:
                error, status = errors[number // 20 % 3], Status.ERROR
            elif number % 33 == 0:
                error, status, end = InvocationTimeout(2.0), Status.TIMEOUT, now + 2
            elif number % 7 == 0:
                again = RetryEvent(agent, 1, errors[0], Verdict(VerdictKind.OVERLOAD), 0.2, id=number, at=end)
                heapq.heappush(ends, (end, number, again))
                end += 0.2

            result = InvocationResult[Any](
                agent.agent_id,
                status,
                exception=error,
                latency_ms=(end - now) * 1000,
                retries=number % 7 == 0,
            )
            recorder.record(result)
            heapq.heappush(ends, (end, number, ResultEvent(agent, result, id=number, at=end)))
            heapq.heappush(slots, end)

        while ends:
            timeline(heapq.heappop(ends)[2])

        timeline(StopEvent(f"a batch of {count} had enough", at=end))

    return recorder

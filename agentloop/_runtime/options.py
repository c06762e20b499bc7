"""The options of all invocations of a call."""

from __future__ import annotations

__all__ = ["AttemptRunner", "RunOptions"]

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from .._config import LoopConfig
from .._errors import InvocationTimeout, QueueTimeout
from .._eventloop.deadlines import TimeLimit
from .observer import Observer

AttemptRunner: TypeAlias = Callable[..., Any]
"""
An async function that runs an attempt in the agent's context. It gets the job, its slot, the options and the
scope that times it out.
"""


class RunOptions:
    """
    The options of all invocations of a call.

    :param config: the settings
    :param observer: reports what happens
    :param run: runs the attempts of a stream; absent, the agent is called, and its awaitable awaited
    """

    __slots__ = (
        "config",
        "limit",
        "longest_cool_off",
        "observer",
        "only_timeout",
        "queue",
        "run",
        "timeout",
        "total",
    )

    def __init__(self, config: LoopConfig, observer: Observer, run: AttemptRunner | None = None) -> None:
        self.config = config
        self.observer = observer
        self.run = run
        # The limit of each attempt, of all attempts together, and of the wait for the first slot.
        self.timeout = math.inf if config.timeout_seconds is None else config.timeout_seconds
        self.limit = TimeLimit(InvocationTimeout, self.timeout)
        total = config.total_timeout_seconds
        self.total = None if total is None else TimeLimit(InvocationTimeout, total, is_total=True)
        # Whether the limit of each attempt is the only one that can end it.
        self.only_timeout = total is None
        queue = config.queue_timeout_seconds
        self.queue = TimeLimit(QueueTimeout, math.inf if queue is None else queue)
        self.longest_cool_off = config.backoff.max_retry_after_seconds

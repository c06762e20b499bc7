"""
Run many agents at once: bounded, timed, retried and structured, on asyncio and on trio.

An agent is an async callable: a model call, a tool loop, an HTTP request. See :class:`AgentLoop`.
"""

from ._backoff import Backoff
from ._chunk import StreamChunk, StreamEvent, collect_text
from ._config import LoopConfig
from ._errors import (
    AgentLoopError,
    BatchStopped,
    BudgetSpent,
    DeadlockError,
    FirstChunkTimeout,
    IdleTimeout,
    InvocationCancelled,
    InvocationTimeout,
    LeftOpenError,
    LoopClosed,
    QueueFull,
    QueueTimeout,
)
from ._events import (
    ChunkEvent,
    Event,
    FirstChunkEvent,
    LimitEvent,
    QueuedEvent,
    ResultEvent,
    RetryEvent,
    StartedEvent,
    StopEvent,
)
from ._invocation import Invocation
from ._limits.keyed import KeyedLimiter
from ._limits.limiter import Limiter, LimiterStatistics, LoopStatistics
from ._limits.rates import Rate
from ._limits.retry_budget import RetryBudget
from ._loop import AgentLoop
from ._metrics.histogram import Distribution
from ._metrics.recorder import MetricsRecorder, MetricsSnapshot
from ._result import InvocationResult, Status
from ._runtime.current import Attempt, current_attempt
from ._runtime.threads import in_thread
from ._signals import drain_on_signals
from ._signs import response_status
from ._stop_rule import StopRule
from ._store.store import ContextStore
from ._stream.stream import AgentStream
from ._verdict import Verdict, VerdictKind, classify

__version__ = "0.1.0"

__all__ = [
    "AgentLoop",
    "AgentLoopError",
    "AgentStream",
    "Attempt",
    "Backoff",
    "BatchStopped",
    "BudgetSpent",
    "ChunkEvent",
    "ContextStore",
    "DeadlockError",
    "Distribution",
    "Event",
    "FirstChunkEvent",
    "FirstChunkTimeout",
    "IdleTimeout",
    "Invocation",
    "InvocationCancelled",
    "InvocationResult",
    "InvocationTimeout",
    "KeyedLimiter",
    "LeftOpenError",
    "LimitEvent",
    "Limiter",
    "LimiterStatistics",
    "LoopClosed",
    "LoopConfig",
    "LoopStatistics",
    "MetricsRecorder",
    "MetricsSnapshot",
    "QueueFull",
    "QueueTimeout",
    "QueuedEvent",
    "Rate",
    "ResultEvent",
    "RetryBudget",
    "RetryEvent",
    "StartedEvent",
    "Status",
    "StopEvent",
    "StopRule",
    "StreamChunk",
    "StreamEvent",
    "Verdict",
    "VerdictKind",
    "classify",
    "collect_text",
    "current_attempt",
    "drain_on_signals",
    "in_thread",
    "response_status",
]


def _name_their_place() -> None:
    # Tracebacks, pickles and documentation name the place where users find a thing.
    for name in __all__:
        # All but the one alias of types.
        if name != "Event":
            globals()[name].__module__ = __name__


_name_their_place()

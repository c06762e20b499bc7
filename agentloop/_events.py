"""The events of invocations, limiters and batches."""

__all__ = [
    "ChunkEvent",
    "Event",
    "FirstChunkEvent",
    "LimitEvent",
    "QueuedEvent",
    "ResultEvent",
    "RetryEvent",
    "StartedEvent",
    "StopEvent",
]

from typing import Any, Generic, TypeAlias, TypeVar

import attrs

from ._errors import describe
from ._invocation import Invocation
from ._result import InvocationResult
from ._verdict import Verdict

T_co = TypeVar("T_co", covariant=True)


@attrs.frozen
class ChunkEvent(Generic[T_co]):
    """
    One of several streams has yielded a chunk. Only readers of :meth:`AgentLoop.stream_all` get this event.

    :param invocation: the invocation
    :param chunk: the chunk
    :param index: the place of the invocation in the input
    """

    invocation: Invocation[Any]
    chunk: T_co
    index: int = 0


@attrs.frozen
class QueuedEvent:
    """
    An invocation waits for a slot.

    :param invocation: the invocation
    :param id: the number of the invocation: the same in all its events, and unique in this process
    :param at: the time of the event, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    id: int = 0
    at: float = 0.0


@attrs.frozen
class StartedEvent:
    """
    An attempt begins. The sink is called in the agent's context: the agent, and no other, sees a context
    variable that the sink sets.

    :param invocation: the invocation
    :param attempt: the number of the attempt, from 1
    :param id: the number of the invocation: the same in all its events, and unique in this process
    :param at: the time of the event, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    attempt: int = 1
    id: int = 0
    at: float = 0.0


@attrs.frozen
class RetryEvent:
    """
    An attempt failed, and will be retried.

    :param invocation: the invocation
    :param attempt: the number of the failed attempt, from 1
    :param error: its exception
    :param verdict: the judgement of the exception
    :param delay_seconds: how long the next attempt waits before it joins the line for a slot
    :param id: the number of the invocation: the same in all its events, and unique in this process
    :param at: the time of the event, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    attempt: int
    error: BaseException
    verdict: Verdict
    delay_seconds: float
    id: int = 0
    at: float = 0.0

    @property
    def reason(self) -> str:
        """The exception as one printable line of at most 1,000 characters: ``"ValueError: boom"``."""
        return describe(self.error)


@attrs.frozen
class FirstChunkEvent:
    """
    A stream has yielded its first chunk.

    :param invocation: the invocation
    :param id: the number of the invocation: the same in all its events, and unique in this process
    :param at: the time of the event, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    id: int = 0
    at: float = 0.0


@attrs.frozen
class ResultEvent:
    """
    An invocation has ended; no event of it comes after this one.

    :param invocation: the invocation
    :param result: its result
    :param id: the number of the invocation: the same in all its events, and unique in this process
    :param at: the time of the event, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    result: InvocationResult[Any]
    id: int = 0
    at: float = 0.0


@attrs.frozen
class LimitEvent:
    """
    The limit of a limiter, when a run begins to use it and at each change.

    :param limit: how many slots there are now
    :param at: the time of the event, in seconds of the event loop's clock
    :param held_until: until when only probes start, because of a Retry-After; ``None`` if nothing is held
        back. There is no event at the end of this time
    :param outage_since: since when all attempts have failed with signs of an outage; ``None`` if there is
        none
    """

    limit: int
    at: float = 0.0
    held_until: float | None = None
    outage_since: float | None = None


@attrs.frozen
class StopEvent:
    """
    A batch starts nothing new any more, and retries nothing. Running invocations may finish. The first reason
    wins:

    =============================================  ================================================
    ``"'<id>' failed with <error>"``               a fatal verdict
    ``"<n> failed"``                               :class:`StopRule`, ``failures``
    ``"<n> failed in a row"``                      ``in_a_row``
    ``"<n> of <m> failed, more than <s> of all"``  ``share``
    ``"<n>s have passed"``                         ``seconds``
    the reason given; ``"received SIGTERM"``       :meth:`AgentLoop.drain`; :func:`drain_on_signals`
    ``"the loop was left"``                        the end of ``async with loop:``
    ``"<n> agents left a scope open, ..."``        as many as the limit did
    ``"one of its own tasks was cancelled ..."``   natively, before it began
    =============================================  ================================================

    For any reason, the invocations of the batch end like this:

    =================  ================================================================================
    not begun          ``SKIPPED``; of lazy input that was not pulled there is no result
    waits for a retry  ends with its last failure, and a note with the reason
    runs               finishes; is ``CANCELLED`` when the grace of the rule or the drain is over
    runs others        these are run whole, also in a drained loop; a stopped nested batch stops
                       the batch around it only if the agent raises its error
    is a stream        as above; an open one is read to its end
    =================  ================================================================================

    :param reason: the reason, in words
    :param at: the time of the event, in seconds of the event loop's clock
    """

    reason: str
    at: float = 0.0


Event: TypeAlias = (
    QueuedEvent | StartedEvent | RetryEvent | FirstChunkEvent | ResultEvent | LimitEvent | StopEvent
)
"""The events that a sink gets. Later versions may add more, so a sink must ignore unknown ones."""

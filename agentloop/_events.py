"""What is told about invocations while they run."""

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
    One of several streams has yielded a chunk. Only :meth:`AgentLoop.stream_all` gives this event.

    :param invocation: whose stream it is
    :param chunk: what it yielded
    :param index: the place of the invocation in the input
    """

    invocation: Invocation[Any]
    chunk: T_co
    index: int = 0


@attrs.frozen
class QueuedEvent:
    """
    An invocation waits for a slot.

    :param invocation: which one
    :param id: a number that all events of one invocation have, and those of no other in this process
    :param at: when it was, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    id: int = 0
    at: float = 0.0


@attrs.frozen
class StartedEvent:
    """
    An attempt begins. The sink is called in the context that the agent will run in: a context variable that
    it sets is seen by the agent, and by nobody else.

    :param invocation: which one
    :param attempt: which attempt, from 1
    :param id: a number that all events of one invocation have, and those of no other in this process
    :param at: when it was, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    attempt: int = 1
    id: int = 0
    at: float = 0.0


@attrs.frozen
class RetryEvent:
    """
    An attempt failed, and there will be another one.

    :param invocation: which one
    :param attempt: which attempt failed, from 1
    :param error: what it raised
    :param verdict: what that was judged to mean
    :param delay_seconds: how long the next attempt waits, before it stands in line for a slot
    :param id: a number that all events of one invocation have, and those of no other in this process
    :param at: when it was, in seconds of the event loop's clock
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
        """What it raised, as one printable line of at most 1,000 characters: ``"ValueError: boom"``."""
        return describe(self.error)


@attrs.frozen
class FirstChunkEvent:
    """
    A stream has yielded its first chunk.

    :param invocation: whose stream it is
    :param id: a number that all events of one invocation have, and those of no other in this process
    :param at: when it was, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    id: int = 0
    at: float = 0.0


@attrs.frozen
class ResultEvent:
    """
    An invocation has ended; no event of it comes after this one.

    :param invocation: which one
    :param result: what became of it
    :param id: a number that all events of one invocation have, and those of no other in this process
    :param at: when it was, in seconds of the event loop's clock
    """

    invocation: Invocation[Any]
    result: InvocationResult[Any]
    id: int = 0
    at: float = 0.0


@attrs.frozen
class LimitEvent:
    """
    What a limiter allows: told as a run begins to use it, and whenever that changes.

    :param limit: how many slots there are now
    :param at: when it was, in seconds of the event loop's clock
    :param held_until: until when nothing starts but probes, because a server has asked to wait; ``None`` if
        nothing is held back. No event tells that this time has come
    :param outage_since: since when all attempts have failed in ways that speak of the provider; ``None`` if
        there is no outage
    """

    limit: int
    at: float = 0.0
    held_until: float | None = None
    outage_since: float | None = None


@attrs.frozen
class StopEvent:
    """
    A batch starts nothing new any more, and retries nothing. What runs may finish. The first reason wins:

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

    Whatever the reason, this becomes of the invocations of the batch:

    =================  ================================================================================
    not begun          ``SKIPPED``; of lazy input that was not pulled there is no result
    waits for a retry  ends with its last failure, and a note that says why
    runs               finishes; is ``CANCELLED`` when the grace of the rule or the drain is over
    runs others        these are run whole, also in a drained loop; what stops a nested batch
                       stops the batch around it only if the agent raises it
    is a stream        as above; an open one is read to its end
    =================  ================================================================================

    :param reason: why, in words
    :param at: when it was, in seconds of the event loop's clock
    """

    reason: str
    at: float = 0.0


Event: TypeAlias = (
    QueuedEvent | StartedEvent | RetryEvent | FirstChunkEvent | ResultEvent | LimitEvent | StopEvent
)
"""What a sink is given. Later versions may add to them, so a sink ignores those that it does not know."""

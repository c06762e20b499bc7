"""The chunks of an agent server, and their form as server-sent events."""

__all__ = ["StreamChunk", "StreamEvent", "collect_text"]

import enum
import json
import re
import time
from collections.abc import AsyncIterable
from typing import Any

import attrs

from . import _validators as must
from ._errors import AgentLoopError


class StreamEvent(enum.StrEnum):
    """The kind of a chunk. An agent need not use all kinds, and a stream may end without a terminal one."""

    START = "start"
    """The agent has begun."""

    STEP_START = "step_start"
    """A step of the agent has begun."""

    THINKING = "thinking"
    """A piece of the model's thinking, which is no part of its answer."""

    TOOL_CALL = "tool_call"
    """The agent calls a tool."""

    TOOL_RESULT = "tool_result"
    """A tool has returned."""

    TEXT = "text"
    """A piece of the answer."""

    ERROR = "error"
    """The agent has failed; nothing follows."""

    COMPLETE = "complete"
    """The agent is done; nothing follows."""

    CANCELLED = "cancelled"
    """The agent was stopped; nothing follows."""


_TERMINAL = frozenset({StreamEvent.ERROR, StreamEvent.COMPLETE, StreamEvent.CANCELLED})
# The line ends of an event stream, and no others: str.splitlines() knows more.
_LINE_END = re.compile("\r\n|\n|\r")


@attrs.frozen
class StreamChunk:
    """
    One piece of an agent's stream. Streams may carry chunks of any other type too.

    :param event: the kind of the chunk
    :param data: text, or any object; for :meth:`to_sse`, text or JSON data
    :param timestamp: when the chunk was made, in seconds since the epoch, by the wall clock
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if the timestamp is not finite
    """

    event: StreamEvent = attrs.field(validator=must.instance(StreamEvent))
    data: Any = None
    timestamp: float = attrs.field(factory=time.time, validator=must.number(finite=True))

    @property
    def is_terminal(self) -> bool:
        """Whether this is the last chunk of an agent: ``ERROR``, ``COMPLETE`` or ``CANCELLED``."""
        return self.event in _TERMINAL

    def to_sse(self) -> str:
        r"""
        Return the chunk as a server-sent event, to be sent as UTF-8 with the type ``text/event-stream``.

        The name of the event is ``event``. A ``str`` is sent unchanged, so that a client can show a piece of
        the answer without decoding it; all other data is sent as JSON, ``None`` as ``null``. A client cannot
        distinguish the text ``42`` from the number, so let each kind of event have one kind of data. The
        timestamp is not sent.

        Text arrives unchanged, with two exceptions that an event stream cannot carry: every line end arrives
        as ``\n``, and a surrogate that is not part of a pair as U+FFFD. For an exact copy, put text into
        JSON: ``{"text": ...}``.

        In browsers, ``EventSource`` names its own failures ``error`` too, without any ``data``; and it
        connects again when the stream ends, so close it on a terminal event.

        The format: WHATWG HTML Standard, section 9.2, Server-sent events.

        :return: the lines of one event and the blank line that ends it
        :raises TypeError: if the data is neither a ``str`` nor JSON data
        """
        if isinstance(self.data, str):
            # The standard's conversion into scalar values: UTF-8 has no surrogates.
            text = self.data.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        else:
            try:
                text = json.dumps(self.data, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as exc:
                raise TypeError(
                    f"data of a {self.event} chunk must be a str or JSON data to be sent as an event, got a "
                    f"{type(self.data).__name__} ({exc}): make it text, or a dict for the client"
                ) from exc

        # A parser removes one space after the colon, so a space of the text's own is kept.
        lines = [f"event: {self.event}", *(f"data: {line}" for line in _LINE_END.split(text))]
        return "\n".join(lines) + "\n\n"


async def collect_text(chunks: AsyncIterable[StreamChunk | str]) -> str:
    """
    Read a stream to its end and return its text: every ``TEXT`` chunk and every plain ``str``, joined.

    It never returns a text that was cut off: an exception of the stream propagates, and an ``ERROR`` or a
    ``CANCELLED`` chunk raises an error.

    :param chunks: an async iterable, such as the stream of :meth:`AgentLoop.run_streaming`; not closed here
    :return: the text; other chunks are skipped
    :raises AgentLoopError: at a chunk of ``ERROR`` or ``CANCELLED``
    :raises TypeError: if a chunk is neither a ``StreamChunk`` nor a ``str``, or if the data of a ``TEXT``
        chunk is no ``str``
    """
    texts: list[str] = []
    async for chunk in chunks:
        match chunk:
            case str(text) | StreamChunk(event=StreamEvent.TEXT, data=str(text)):
                texts.append(text)
            case StreamChunk(event=StreamEvent.TEXT):
                raise TypeError(f"data of a text chunk must be a str to be collected, got {chunk.data!r}")
            case StreamChunk(event=StreamEvent.ERROR | StreamEvent.CANCELLED):
                raise AgentLoopError(f"the text is cut off by a chunk of {chunk.event}: {chunk.data!r}")
            case StreamChunk():
                pass
            case _:
                raise TypeError(f"chunks must be of type StreamChunk or str to be collected, got {chunk!r}")

    return "".join(texts)

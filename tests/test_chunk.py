"""The chunks of an agent server: what they hold, and what a client reads out of their server-sent events."""

import json
import math
import pickle
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

import attrs
import httpx2
import pytest
from agents import raised_by
from hypothesis import example, given
from hypothesis import strategies as st

from agentloop import AgentLoop, AgentLoopError, Status, StreamChunk, StreamEvent, collect_text
from agentloop.testing import Chunks, FakeAgent

TERMINAL = {StreamEvent.ERROR, StreamEvent.COMPLETE, StreamEvent.CANCELLED}
HOSTILE_PARTS = ["\r", "\n", " ", ":", "data", "event", "id", "retry", "\ufeff", "\0", "\u2028", "\x85", "x"]
HOSTILE = st.lists(st.sampled_from(HOSTILE_PARTS) | st.text(max_size=3)).map("".join)
events = st.sampled_from(StreamEvent)
json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=8,
).filter(lambda data: not isinstance(data, str))


class Message(NamedTuple):
    """What a client dispatches."""

    event: str
    data: str
    last_event_id: str = ""


def parse(stream: bytes) -> list[Message]:
    """Interpret an event stream by the letter of the WHATWG HTML Standard, sections 9.2.5 and 9.2.6."""
    # "UTF-8 decode" strips one byte order mark; the grammar knows three line ends and no others.
    text = stream.decode("utf-8").removeprefix("\ufeff")
    *lines, unfinished = re.split("\r\n|\n|\r", text)
    assert not unfinished, "what has no line end is no line yet"

    messages: list[Message] = []
    data = event_type = last_event_id = ""
    for line in lines:
        if not line:
            # "Dispatch the event": nothing without data; one line end is taken off at the end.
            if data:
                messages.append(Message(event_type or "message", data.removesuffix("\n"), last_event_id))

            data = event_type = ""
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                event_type = value
            elif field == "data":
                data += value + "\n"
            elif field == "id" and "\0" not in value:
                last_event_id = value
            else:
                raise AssertionError(f"a field that to_sse() has no need of: {line!r}")

    assert not data, "what has no blank line after it is thrown away"
    return messages


def sent(*chunks: StreamChunk) -> bytes:
    return "".join(chunk.to_sse() for chunk in chunks).encode()


def as_received(text: str) -> str:
    """Return the text with the only line end that an event stream can carry."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- chunks


def test_events_are_their_lower_case_names() -> None:
    names = "start step_start thinking tool_call tool_result text error complete cancelled"
    assert " ".join(StreamEvent) == " ".join(event.name.lower() for event in StreamEvent) == names


def test_chunk_has_no_data_by_default_and_the_time_of_its_making_by_the_wall_clock() -> None:
    before = time.time()
    chunk = StreamChunk(StreamEvent.START)
    assert chunk.data is None
    assert before <= chunk.timestamp <= time.time()


@pytest.mark.parametrize("event", StreamEvent)
def test_error_complete_and_cancelled_are_terminal_and_no_other_event_is(event: StreamEvent) -> None:
    assert StreamChunk(event).is_terminal is (event in TERMINAL)


def test_chunk_is_frozen_and_can_be_evolved_and_pickled() -> None:
    chunk = StreamChunk(StreamEvent.TOOL_CALL, {"name": "search", "arguments": [1, None]}, 5)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        chunk.data = "b"

    assert attrs.evolve(chunk, data="b") == StreamChunk(StreamEvent.TOOL_CALL, "b", 5)
    assert pickle.loads(pickle.dumps(chunk)) == chunk


@pytest.mark.parametrize("event", ["text", "text\ndata: x", None, Status.ERROR])
def test_event_of_another_type_is_refused(event: Any) -> None:
    with pytest.raises(TypeError, match=f"^event must be of type StreamEvent, got {re.escape(repr(event))}$"):
        StreamChunk(event)


@pytest.mark.parametrize(
    ("timestamp", "error"),
    [("now", TypeError), (None, TypeError), (math.nan, ValueError), (math.inf, ValueError)],
)
def test_timestamp_that_is_no_time_is_refused(timestamp: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^timestamp must be .*, got {timestamp!r}$"):
        StreamChunk(StreamEvent.TEXT, "a", timestamp)


# --- server-sent events


@pytest.mark.parametrize(
    ("chunk", "lines"),
    [
        (StreamChunk(StreamEvent.TEXT, "Hello"), "event: text\ndata: Hello\n\n"),
        (StreamChunk(StreamEvent.TEXT, " world\n"), "event: text\ndata:  world\ndata: \n\n"),
        (StreamChunk(StreamEvent.TEXT, ""), "event: text\ndata: \n\n"),
        (StreamChunk(StreamEvent.TEXT, "42"), "event: text\ndata: 42\n\n"),
        (StreamChunk(StreamEvent.STEP_START), "event: step_start\ndata: null\n\n"),
        (StreamChunk(StreamEvent.TOOL_CALL, {"a": "é\n"}), 'event: tool_call\ndata: {"a": "\\u00e9\\n"}\n\n'),
        (StreamChunk(StreamEvent.COMPLETE, Status.SUCCESS), "event: complete\ndata: success\n\n"),
    ],
)
def test_event_is_a_name_its_data_and_a_blank_line(chunk: StreamChunk, lines: str) -> None:
    assert chunk.to_sse() == lines


@given(events, HOSTILE | st.text())
@example(StreamEvent.TEXT, "")
@example(StreamEvent.TEXT, " one space, and then another  ")
@example(StreamEvent.TEXT, "\r\n\r\n\n\r")
@example(StreamEvent.TEXT, "\v\f\x1c\x1d\x1e\x85\u2028\u2029")
def test_text_arrives_as_it_was_sent(event: StreamEvent, text: str) -> None:
    assert parse(sent(StreamChunk(event, text))) == [Message(event.value, as_received(text))]


@given(events, json_data)
@example(StreamEvent.TEXT, ["\ud83d", "\r\n\u2028", -0.0, 10**30])
def test_json_data_arrives_equal_and_on_one_line(event: StreamEvent, data: Any) -> None:
    [message] = parse(sent(StreamChunk(event, data)))
    assert message.event == event.value
    assert "\n" not in message.data
    assert json.loads(message.data) == data


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\n\n", "\r\r", "\r\n\r\n", "\n\r"], ids=repr)
@pytest.mark.parametrize("field", ["event: complete", "data: {}", "id: 7", "retry: 0", ": comment", "event"])
def test_data_cannot_begin_a_field_or_an_event_of_its_own(end: str, field: str) -> None:
    text = f"before{end}{field}{end}{end}{field}{end}"
    for data in (text, {text: [text]}):
        [message] = parse(sent(StreamChunk(StreamEvent.TEXT, data)))
        assert (message.event, message.last_event_id) == ("text", "")
        assert field in message.data


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ("\ud83d\ude00", "\N{GRINNING FACE}"),
        ("half \ud83d", "half \ufffd"),
        ("\ude00\ud83d.", "\ufffd\ufffd."),
        ("\ud83d\ud83d\ude00", "\ufffd\N{GRINNING FACE}"),
    ],
    ids=ascii,
)
def test_surrogate_without_its_other_half_does_not_stop_the_stream(text: str, received: str) -> None:
    assert parse(sent(StreamChunk(StreamEvent.TEXT, text))) == [Message("text", received)]


def circle() -> list[Any]:
    data: list[Any] = []
    data.append(data)
    return data


def abyss() -> list[Any]:
    data: list[Any] = []
    for _ in range(200_000):
        data = [data]

    return data


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"bytes", "bytes", "Object of type bytes is not JSON serializable"),
        ({"result": {1, 2}}, "dict", "Object of type set is not JSON serializable"),
        ({(1, 2): 3}, "dict", "keys must be str"),
        (ValueError("boom"), "ValueError", "Object of type ValueError is not JSON serializable"),
        ([math.nan], "list", "Out of range float values"),
        (-math.inf, "float", "Out of range float values"),
        (circle(), "list", "Circular reference"),
        (abyss(), "list", "recursion"),
    ],
    ids=["bytes", "set", "key", "exception", "nan", "inf", "circle", "abyss"],
)
def test_data_that_is_no_json_is_refused_and_its_event_named(data: Any, kind: str, reason: str) -> None:
    chunk = StreamChunk(StreamEvent.TOOL_RESULT, data)
    expected = (
        f"^data of a tool_result chunk must be a str or JSON data .*, got a {kind} .*{reason}.*: make it text"
    )
    with pytest.raises(TypeError, match=expected):
        chunk.to_sse()


@given(st.lists(st.tuples(events, HOSTILE)), st.integers(1, 9))
def test_events_that_follow_each_other_stay_apart_however_their_bytes_are_cut_for_httpx2(
    pairs: list[tuple[StreamEvent, str]], size: int
) -> None:
    stream = sent(*(StreamChunk(event, text) for event, text in pairs))
    messages = [Message(event.value, as_received(text)) for event, text in pairs]
    assert parse(stream) == messages
    response = httpx2.Response(
        200,
        headers={"content-type": "text/event-stream"},
        content=(stream[start : start + size] for start in range(0, len(stream), size)),
        request=httpx2.Request("GET", "http://agent"),
    )
    read = list(httpx2.EventSource(response))
    assert [Message(message.event, message.data, message.id) for message in read] == messages
    assert {message.retry for message in read} <= {None}


# --- collecting text


async def stream_of(*chunks: Any) -> AsyncGenerator[Any, None]:
    for chunk in chunks:
        yield chunk


async def test_text_is_joined_and_other_chunks_are_passed_over() -> None:
    chunks = [
        StreamChunk(StreamEvent.START),
        StreamChunk(StreamEvent.THINKING, "not this"),
        StreamChunk(StreamEvent.TEXT, "Oslo "),
        StreamChunk(StreamEvent.TOOL_CALL, {"text": "nor this"}),
        StreamChunk(StreamEvent.TEXT, ""),
        "is ",
        StreamChunk(StreamEvent.TEXT, "north."),
        StreamChunk(StreamEvent.COMPLETE, "nor this"),
    ]
    assert await collect_text(stream_of(*chunks)) == "Oslo is north."
    assert await collect_text(stream_of()) == ""
    assert await collect_text(stream_of(StreamChunk(StreamEvent.COMPLETE))) == ""


@pytest.mark.parametrize("event", [StreamEvent.ERROR, StreamEvent.CANCELLED])
async def test_text_that_the_agent_cut_off_is_not_taken_for_the_whole(event: StreamEvent) -> None:
    stream = stream_of("half a ", StreamChunk(event, "no more money"), "never read")
    with pytest.raises(AgentLoopError, match=f"^the text is cut off by a chunk of {event}: 'no more money'$"):
        await collect_text(stream)

    assert [chunk async for chunk in stream] == ["never read"]


async def test_stream_of_an_agent_can_be_collected_and_ends_with_its_block() -> None:
    agent = FakeAgent(Chunks(["all ", StreamChunk(StreamEvent.TEXT, "of it")]))
    async with AgentLoop().run_streaming("writer", agent) as stream:
        assert await collect_text(stream) == "all of it"

    assert stream.result.status is Status.SUCCESS
    agent = FakeAgent(Chunks(["half", StreamChunk(StreamEvent.ERROR)]))
    with pytest.raises(AgentLoopError, match="cut off"):
        async with AgentLoop().run_streaming("writer", agent) as stream:
            await collect_text(stream)


async def test_what_the_stream_raises_is_raised_as_it_is() -> None:
    error = ConnectionError("gone")
    assert await raised_by(collect_text, FakeAgent(Chunks(["half"], then=error))()) is error


@pytest.mark.parametrize("data", [None, {"text": "a"}, b"a"])
async def test_text_chunk_without_text_and_chunk_of_another_type_are_refused(data: Any) -> None:
    of_text, of_chunk = "data of a text chunk must be a str .*", "chunks must be of type .*"
    for rule, chunk in ((of_text, StreamChunk(StreamEvent.TEXT, data)), (of_chunk, data)):
        with pytest.raises(TypeError, match=f"^{rule}, got {re.escape(repr(data))}$"):
            async with aclosing(stream_of(chunk)) as stream:
                await collect_text(stream)

"""The model server that examples and tests talk to: real sockets, real clocks, both backends."""

import json
import logging
import math
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import anyio
import attrs
import httpx2
import pytest
from anyio.abc import ByteReceiveStream
from model_server import ADVICE, NO_FAULTS, Faults, ModelServer, Outcome, reply_to, serve_model

QUESTION = "What is 17 * 23?"
TIDE = "Explain tides to a child of six, please"
PROMPTS = [f"{QUESTION} ({n})" for n in range(12)]
STORMY = Faults(rate_limited=0.2, server_error=0.2, hang=0.2, disconnect=0.2, hang_seconds=0, gap_seconds=0)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=5, trust_env=False, verify=False) as client:
        yield client


def chat(*texts: str, **fields: object) -> dict[str, object]:
    return {"model": "demo", "messages": [{"role": "user", "content": text} for text in texts], **fields}


async def ask(
    client: httpx2.AsyncClient,
    server: ModelServer,
    prompt: str,
    *,
    path: str = "chat/completions",
    **fields: object,
) -> httpx2.Response:
    with anyio.fail_after(5):
        return await client.post(f"{server.base_url}/{path}", json=chat(prompt, **fields))


async def ask_one(
    client: httpx2.AsyncClient, prompt: str, faults: Faults = NO_FAULTS, **fields: Any
) -> tuple[httpx2.Response, ModelServer]:
    """Ask a server of its own one thing, and return the answer and the server."""
    async with serve_model(faults) as server:
        return await ask(client, server, prompt, **fields), server


async def story(client: httpx2.AsyncClient, server: ModelServer, prompt: str) -> str:
    """Return what one request came to, as its client sees it."""
    try:
        response = await ask(client, server, prompt)
    except httpx2.RemoteProtocolError as exc:
        return str(exc)

    return f"{response.status_code} {response.json().get('id')}"


async def wait_until_disconnects(server: ModelServer, count: int) -> None:
    with anyio.fail_after(5):
        while server.disconnects < count:
            await anyio.sleep(0.002)


async def wait_until_active(server: ModelServer, count: int) -> None:
    with anyio.fail_after(5):
        while server.active != count:
            await anyio.sleep(0.002)


async def receive_all(stream: ByteReceiveStream) -> bytes:
    received = b""
    with anyio.fail_after(5):
        async for data in stream:
            received += data

    return received


def address(server: ModelServer) -> tuple[str, int]:
    return "127.0.0.1", int(server.base_url.removeprefix("http://127.0.0.1:").removesuffix("/v1"))


def http(body: Mapping[str, object], *headers: str) -> bytes:
    """Return a completion request as it goes over the wire."""
    content = json.dumps(body)
    length = f"Content-Length: {len(content)}"
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", length, *headers, "", content]
    return "\r\n".join(lines).encode()


async def exchange(server: ModelServer, request: bytes) -> bytes:
    """Send raw bytes and return everything that comes back until the server closes."""
    async with await anyio.connect_tcp(*address(server)) as stream:
        await stream.send(request)
        return await receive_all(stream)


# Answers


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        ("What is 17 * 23?", "17 * 23 is 391."),
        ("Tell me, what is 2 + 3.", "2 + 3 is 5."),
        ("what is -4-10", "-4 - 10 is -14."),
    ],
)
def test_arithmetic_questions_are_answered_with_the_right_number(prompt: str, reply: str) -> None:
    assert reply_to(prompt) == reply


@pytest.mark.parametrize("prompt", ["what is 2 + 3 * 4?", "what is 1 + 2.5?", "what is love?", "", "\ud800"])
def test_other_prompts_get_a_piece_of_advice_that_depends_on_nothing_else(prompt: str) -> None:
    reply = reply_to(prompt)
    assert reply == reply_to(prompt)
    assert reply.endswith(ADVICE)


async def test_plain_completion_has_the_openai_shape(client: httpx2.AsyncClient) -> None:
    response, _ = await ask_one(client, QUESTION)
    completion = response.json()
    assert response.status_code == 200
    assert completion.pop("id").startswith("chatcmpl-")
    assert completion.pop("created") > 1_700_000_000
    assert completion == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "17 * 23 is 391."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10},
    }


async def test_streamed_completion_arrives_in_chunks_that_join_to_the_plain_reply(
    client: httpx2.AsyncClient,
) -> None:
    response, server = await ask_one(client, TIDE, stream=True)
    events = response.text.split("\n\n")
    assert response.headers["content-type"] == "text/event-stream"
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == reply_to(TIDE)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert server.chunks == len(choices) - 2, "the role and the reason are no text"


async def test_stream_is_sent_as_it_is_made() -> None:
    async with serve_model(Faults(gap_seconds=3600)) as server:
        async with await anyio.connect_tcp(*address(server)) as stream:
            await stream.send(http(chat(TIDE, stream=True)))
            with anyio.fail_after(5):
                first = await stream.receive()

    assert first.count(b"data: ") == 1
    assert b'"delta": {"role": "assistant", "content": ""}' in first


async def test_plain_message_has_the_anthropic_shape(client: httpx2.AsyncClient) -> None:
    response, _ = await ask_one(client, QUESTION, path="messages", max_tokens=99)
    message = response.json()
    assert response.status_code == 200
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [{"type": "text", "text": "17 * 23 is 391."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 5},
    }


async def test_streamed_message_is_the_plain_one_in_events_that_say_their_type(
    client: httpx2.AsyncClient,
) -> None:
    response, server = await ask_one(client, TIDE, path="messages", max_tokens=99, stream=True)
    assert response.headers["content-type"] == "text/event-stream"
    events = [event.split("\ndata: ") for event in response.text.split("\n\n")]
    assert events.pop() == [""]
    fields = [json.loads(data) for _, data in events]
    assert [f"event: {field['type']}" for field in fields] == [name for name, _ in events]
    start, begin, *deltas, end, usage, stop = fields
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    assert begin["content_block"] == {"type": "text", "text": ""}
    assert {delta["type"] for delta in deltas} == {"content_block_delta"}
    assert "".join(delta["delta"]["text"] for delta in deltas) == reply_to(TIDE)
    assert server.chunks == len(deltas)
    assert [end["type"], usage["type"], stop["type"]] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert (usage["delta"]["stop_reason"], usage["usage"]["output_tokens"]) == ("end_turn", len(deltas))


@pytest.mark.parametrize(
    ("faults", "key", "fields", "status", "kind"),
    [
        (Faults(), "key", {}, 400, "invalid_request_error"),
        (Faults(), "wrong", {"max_tokens": 9}, 401, "authentication_error"),
        (Faults(rate_limited=1), "key", {"max_tokens": 9}, 429, "rate_limit_error"),
        (Faults(server_error=1), "key", {"max_tokens": 9}, 500, "api_error"),
        (Faults(overloaded=1), "key", {"max_tokens": 9}, 529, "overloaded_error"),
    ],
)
async def test_refused_message_has_an_error_of_the_anthropic_shape(
    client: httpx2.AsyncClient, faults: Faults, key: str, fields: Mapping[str, object], status: int, kind: str
) -> None:
    client.headers["x-api-key"] = key
    async with serve_model(faults, api_key="key") as server:
        response = await ask(client, server, QUESTION, path="messages", **fields)

    error = response.json()["error"]
    assert (response.status_code, response.json()["type"], error["type"]) == (status, "error", kind)
    assert error["message"]
    assert ("retry-after" in response.headers) is (status == 429)


async def test_models_are_listed(client: httpx2.AsyncClient) -> None:
    async with serve_model() as server:
        response = await client.get(f"{server.base_url}/models?limit=1")

    assert response.status_code == 200
    assert [model["object"] for model in response.json()["data"]] == ["model"]


async def test_one_connection_serves_many_requests(client: httpx2.AsyncClient) -> None:
    async with serve_model() as server:
        responses = [await ask(client, server, QUESTION, stream=n % 2 == 1) for n in range(6)]
        connections = {
            response.extensions["network_stream"].get_extra_info("client_addr") for response in responses
        }

    assert (len(connections), server.statuses, server.disconnects) == (1, {200: 6}, 0)


async def test_request_that_comes_before_the_last_answer_is_answered_in_its_turn() -> None:
    async with serve_model(Faults(gap_seconds=0.01)) as server:
        async with await anyio.connect_tcp(*address(server)) as stream:
            await stream.send(http(chat(QUESTION, stream=True)))
            with anyio.fail_after(5):
                begun = await stream.receive()

            await stream.send(http(chat(QUESTION), "Connection: close"))
            answers = begun + await receive_all(stream)

    assert b"[DONE]" not in begun
    assert answers.index(b"data: [DONE]") < answers.index(b"17 * 23 is 391.")
    assert server.statuses == {200: 2}


# Refusals


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"model": "demo"}',
        b'{"model": "demo", "messages": []}',
        b'{"model": "demo", "messages": "hello"}',
        b'{"model": 1, "messages": [{"role": "user", "content": "hello"}]}',
        b'{"model": "demo", "messages": ["hello"]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": 1}]}',
    ],
)
async def test_bad_body_is_refused_with_400_and_an_error_object(
    client: httpx2.AsyncClient, body: bytes
) -> None:
    async with serve_model() as server:
        response = await client.post(f"{server.base_url}/chat/completions", content=body)

    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["code"] in {"invalid_json", "invalid_body"}
    assert error["message"]
    assert not server.outcomes


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/chat/completions", 405),
        ("HEAD", "/chat/completions", 405),
        ("POST", "/models", 405),
    ],
)
async def test_unknown_path_and_wrong_method_are_refused_and_the_connection_lives_on(
    client: httpx2.AsyncClient, method: str, path: str, status: int
) -> None:
    async with serve_model() as server:
        refusal = await client.request(method, server.base_url + path)
        answer = await ask(client, server, QUESTION)

    streams = [response.extensions["network_stream"] for response in (refusal, answer)]
    assert refusal.status_code == status
    assert ("allow" in refusal.headers) is (status == 405)
    assert answer.status_code == 200
    assert streams[0] is streams[1]


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer key"}])
async def test_only_the_right_api_key_is_let_in(
    client: httpx2.AsyncClient, headers: Mapping[str, str]
) -> None:
    client.headers.update(headers)
    async with serve_model(api_key="key") as server:
        response = await ask(client, server, QUESTION)

    if headers.get("authorization") == "Bearer key":
        assert response.status_code == 200
    else:
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"

    assert "Bearer" not in repr(server)


async def test_body_over_the_limit_is_refused_with_413_and_the_connection_lives_on(
    client: httpx2.AsyncClient,
) -> None:
    async with serve_model() as server:
        refusal = await ask(client, server, "x" * 3_000_000)
        answer = await ask(client, server, "x" * 900_000)

    assert (refusal.status_code, answer.status_code) == (413, 200)


async def test_bytes_that_are_not_http_are_refused_with_400() -> None:
    async with serve_model() as server:
        received = await exchange(server, b"\x16\x03\x01 not http\r\n\r\n")

    assert received.startswith(b"HTTP/1.1 400 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_http"


async def test_headers_without_end_are_refused() -> None:
    async with serve_model() as server:
        received = await exchange(server, b"GET /v1/models HTTP/1.1\r\nX: " + b"x" * 17_000)

    assert received.startswith(b"HTTP/1.1 431 ")


async def test_client_that_asks_before_sending_the_body_is_told_to_go_on() -> None:
    request = http(chat(QUESTION), "Expect: 100-continue", "Connection: close")
    head, end, body = request.partition(b"\r\n\r\n")
    async with serve_model() as server:
        async with await anyio.connect_tcp(*address(server)) as stream:
            await stream.send(head + end)
            with anyio.fail_after(5):
                go_on = await stream.receive()

            await stream.send(body)
            received = await receive_all(stream)

    assert go_on.startswith(b"HTTP/1.1 100 ")
    assert received.startswith(b"HTTP/1.1 200 ")
    assert server.statuses == {200: 1}


# Faults


@pytest.mark.parametrize(
    ("faults", "status", "headers", "code"),
    [
        (
            Faults(rate_limited=1, retry_after_seconds=0.25, delay_seconds=3600),
            429,
            ("1", "250"),
            "rate_limit_exceeded",
        ),
        (Faults(overloaded=1, retry_after_seconds=3, delay_seconds=3600), 503, ("3", "3000"), "overloaded"),
        (Faults(server_error=1), 500, (None, None), "server_error"),
    ],
    ids=["rate_limited", "overloaded", "server_error"],
)
async def test_refused_completion_says_why_and_when_to_come_back(
    client: httpx2.AsyncClient, faults: Faults, status: int, headers: Any, code: str
) -> None:
    response, server = await ask_one(client, QUESTION, faults)
    assert server.statuses == {status: 1}
    assert (response.headers.get("retry-after"), response.headers.get("retry-after-ms")) == headers
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert (error["type"] == "server_error") is (status >= 500)


@pytest.mark.parametrize("path", ["chat/completions", "messages"])
async def test_stream_error_is_an_event_after_part_of_the_reply_and_otherwise_500(
    client: httpx2.AsyncClient, path: str
) -> None:
    async with serve_model(Faults(stream_error=1)) as server:
        plain = await ask(client, server, TIDE, path=path, max_tokens=99)
        stream = await ask(client, server, TIDE, path=path, max_tokens=99, stream=True)

    assert (plain.status_code, stream.status_code) == (500, 200)
    assert 0 < server.chunks < len(reply_to(TIDE).split())
    *_, last, end = stream.text.split("\n\n")
    assert end == ""
    assert "overloaded" in json.loads(last.partition("data: ")[2])["error"]["message"]
    assert last.startswith("event: error\n") is (path == "messages")


async def test_hanging_request_is_noticed_by_the_time_out_of_the_client(client: httpx2.AsyncClient) -> None:
    async with serve_model(Faults(hang=1)) as server:
        client.timeout = httpx2.Timeout(5, read=0.03)
        with pytest.raises(httpx2.ReadTimeout):
            await ask(client, server, QUESTION)

        await wait_until_disconnects(server, 1)
        assert server.active == 0

    assert not server.statuses


async def test_hanging_request_is_dropped_after_its_time(client: httpx2.AsyncClient) -> None:
    async with serve_model(Faults(hang=1, hang_seconds=0.01)) as server:
        with pytest.raises(httpx2.RemoteProtocolError):
            await ask(client, server, QUESTION)

    assert server.disconnects == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_cuts_the_answer_off_in_the_middle(client: httpx2.AsyncClient, stream: bool) -> None:
    async with serve_model(Faults(disconnect=1)) as server:
        with pytest.raises(httpx2.RemoteProtocolError, match="without sending complete message body"):
            await ask(client, server, QUESTION, stream=stream)

    async with serve_model(Faults(disconnect=1)) as server:
        received = await exchange(server, http(chat(QUESTION, stream=stream)))

    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b'"id": "chatcmpl-' in body
    assert b'"finish_reason": "stop"' not in body
    assert (server.outcomes, server.disconnects) == ({"disconnect": 1}, 0)


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
async def test_completions_beyond_the_capacity_are_told_when_to_come_back(
    client: httpx2.AsyncClient, fields: Mapping[str, bool]
) -> None:
    faults = Faults(capacity=2, retry_after_seconds=0.25, gap_seconds=3600, delay_seconds=3600)
    async with serve_model(faults) as server, anyio.create_task_group() as task_group:
        for _ in range(2):
            task_group.start_soon(partial(ask, client, server, QUESTION, **fields))

        await wait_until_active(server, 2)
        response = await ask(client, server, QUESTION, **fields)
        assert (response.status_code, response.headers["retry-after-ms"]) == (429, "250")
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert (server.rejected, server.answering, server.outcomes.total()) == (1, 2, 2)
        # What asks for no completion takes up no capacity, and needs none.
        assert (await client.get(f"{server.base_url}/models")).status_code == 200
        assert (await client.post(f"{server.base_url}/chat/completions")).status_code == 400
        task_group.cancel_scope.cancel()

    assert (server.answering, server.rejected) == (0, 1)


async def test_who_leaves_or_is_answered_makes_room(client: httpx2.AsyncClient) -> None:
    async with serve_model(Faults(capacity=1, hang=1)) as server:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ask, client, server, QUESTION)
            await wait_until_active(server, 1)
            task_group.cancel_scope.cancel()

        await wait_until_disconnects(server, 1)
        server.faults = Faults(capacity=1)
        assert [(await ask(client, server, TIDE)).status_code for _ in range(3)] == [200] * 3

    assert (server.rejected, server.answering) == (0, 0)


async def test_capacity_changes_nothing_of_the_story_but_how_often_it_is_asked(
    client: httpx2.AsyncClient,
) -> None:
    async def tell(faults: Faults) -> tuple[dict[str, list[str]], ModelServer]:
        stories: dict[str, list[str]] = {prompt: [] for prompt in PROMPTS}

        async def tell_one(prompt: str) -> None:
            while len(stories[prompt]) < 2:
                told = await story(client, server, prompt)
                if told != "429 None":
                    stories[prompt].append(told)

        async with serve_model(faults) as server, anyio.create_task_group() as task_group:
            for prompt in PROMPTS:
                task_group.start_soon(tell_one, prompt)

        return stories, server

    faults = Faults(server_error=0.2, disconnect=0.2, delay_seconds=0.01, gap_seconds=0)
    stories, server = await tell(faults)
    again, busy = await tell(attrs.evolve(faults, capacity=2))
    assert (again, busy.outcomes) == (stories, server.outcomes)
    assert (server.rejected, busy.rejected) == (0, busy.statuses[429])
    assert busy.rejected > 0


def test_shares_and_mean_delay_come_out_as_asked() -> None:
    faults = Faults(rate_limited=0.1, server_error=0.2, hang=0.3, disconnect=0.1, delay_seconds=2)
    rng = random.Random(0)
    outcomes, delays = zip(*(faults.draw(rng) for _ in range(20_000)), strict=True)

    shares = {outcome: count / 20_000 for outcome, count in Counter(outcomes).items()}
    asked = {"rate_limited": 0.1, "server_error": 0.2, "hang": 0.3, "disconnect": 0.1, "answer": 0.3}
    assert shares == pytest.approx(asked, abs=0.02)
    assert math.fsum(delays) / len(delays) == pytest.approx(2, rel=0.02)
    assert min(delays) > 0


def test_delay_without_spread_is_always_the_mean() -> None:
    faults = Faults(delay_seconds=2, delay_spread=0)
    assert {faults.draw(random.Random(n)) for n in range(10)} == {("answer", 2)}


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(Faults)])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_faults_refuse_what_is_negative_or_not_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got {value}"):
        Faults(**{name: value})


def test_faults_refuse_shares_that_add_up_to_more_than_all() -> None:
    assert Faults(rate_limited=0.7, server_error=0.1, hang=0.1, disconnect=0.1)
    with pytest.raises(ValueError, match=r"must add up to at most 1, got 1\.2"):
        Faults(rate_limited=0.6, hang=0.6)


# Determinism


async def test_same_seed_tells_the_same_story_in_any_order_of_arrival(client: httpx2.AsyncClient) -> None:
    async def tell(prompts: list[str], seed: int) -> tuple[dict[str, list[str]], Counter[Outcome]]:
        stories: dict[str, list[str]] = {prompt: [] for prompt in prompts}

        async def tell_one(prompt: str) -> None:
            for _ in range(3):
                stories[prompt].append(await story(client, server, prompt))

        async with serve_model(STORMY, seed=seed) as server, anyio.create_task_group() as task_group:
            for prompt in prompts:
                task_group.start_soon(tell_one, prompt)

        return stories, Counter(server.outcomes)

    stories, outcomes = await tell(PROMPTS, seed=1)
    assert await tell(PROMPTS[::-1], seed=1) == (stories, outcomes)
    assert await tell(PROMPTS, seed=2) != (stories, outcomes)
    assert len(outcomes) == 5
    assert any(len(set(told)) == 3 for told in stories.values())


async def test_another_share_changes_only_the_requests_it_is_about(client: httpx2.AsyncClient) -> None:
    async def tell(faults: Faults) -> list[str]:
        async with serve_model(faults) as server:
            return [await story(client, server, prompt) for prompt in PROMPTS]

    calm = await tell(NO_FAULTS)
    windy = await tell(Faults(rate_limited=0.3))
    assert [told for told in windy if told != "429 None"] == [
        plain for plain, told in zip(calm, windy, strict=True) if told != "429 None"
    ]
    assert 0 < windy.count("429 None") < len(windy)


# Clients that leave, and the end of the block


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_ends_the_work_on_its_answer(
    client: httpx2.AsyncClient, stream: bool
) -> None:
    faults = Faults(gap_seconds=3600) if stream else Faults(delay_seconds=3600)
    async with serve_model(faults) as server:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(partial(ask, client, server, QUESTION, stream=stream))
            await wait_until_active(server, 1)
            task_group.cancel_scope.cancel()

        await wait_until_disconnects(server, 1)
        assert server.active == 0

    assert server.disconnects == 1


async def test_client_that_resets_the_connection_is_a_disconnect_too() -> None:
    reset_on_close = struct.pack("ii", 1, 0)
    async with serve_model(Faults(hang=1)) as server:
        with socket.create_connection(address(server)) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
            raw.sendall(http(chat(QUESTION)))
            await wait_until_active(server, 1)

        await wait_until_disconnects(server, 1)


async def test_client_that_leaves_in_the_middle_of_its_request_is_a_disconnect() -> None:
    async with serve_model() as server:
        async with await anyio.connect_tcp(*address(server)) as stream:
            await stream.send(http(chat(QUESTION))[:-1])
            await wait_until_active(server, 1)

        await wait_until_disconnects(server, 1)

    assert not server.statuses


async def test_client_that_leaves_between_requests_is_no_disconnect() -> None:
    async with serve_model() as server:
        async with httpx2.AsyncClient(trust_env=False, verify=False) as client:
            await ask(client, server, QUESTION)

        received = await exchange(server, b"GET /v1/models HTTP/1.0\r\n\r\n")

    assert received.startswith(b"HTTP/1.1 200 ")
    assert (server.requests, server.disconnects, server.active) == (2, 0, 0)


async def test_leaving_the_block_drops_what_is_still_answered(client: httpx2.AsyncClient) -> None:
    dropped: list[Exception] = []

    async def ask_in_vain(server: ModelServer) -> None:
        try:
            await ask(client, server, QUESTION)
        except httpx2.RemoteProtocolError as exc:
            dropped.append(exc)

    async with anyio.create_task_group() as task_group:
        async with serve_model(Faults(hang=1)) as server:
            for _ in range(5):
                task_group.start_soon(ask_in_vain, server)

            await wait_until_active(server, 5)

        assert (server.requests, server.active, server.disconnects) == (5, 0, 0)
        with pytest.raises(httpx2.ConnectError):
            await ask(client, server, QUESTION)

    assert len(dropped) == 5


async def test_error_in_the_block_is_raised_as_it_is() -> None:
    error = LookupError("mine")
    with pytest.raises(LookupError) as caught:
        async with serve_model():
            raise error

    assert caught.value is error


async def test_cancelling_the_block_passes_through_and_leaves_nothing(client: httpx2.AsyncClient) -> None:
    servers: list[ModelServer] = []

    async def serve() -> None:
        async with serve_model(Faults(hang=1)) as server:
            servers.append(server)
            await ask(client, server, QUESTION)

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(serve)
        with anyio.fail_after(5):
            while not servers or not servers[0].active:
                await anyio.sleep(0.002)

        task_group.cancel_scope.cancel()

    assert (servers[0].requests, servers[0].active) == (1, 0)
    with pytest.raises(httpx2.ConnectError):
        await ask(client, servers[0], QUESTION)


async def test_bug_in_one_request_costs_only_its_connection(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_model() as server:
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "model_server"):
            patch.delattr("model_server.reply_to")
            with pytest.raises(httpx2.RemoteProtocolError):
                await ask(client, server, QUESTION)

        answer = await ask(client, server, QUESTION)

    assert answer.status_code == 200
    assert "NameError" in caplog.text


# Under load


async def test_storm_of_requests_adds_up_and_leaves_nothing(client: httpx2.AsyncClient) -> None:
    faults = attrs.evolve(STORMY, hang_seconds=0.01, delay_seconds=0.005)
    stories: list[str] = []

    async def tell(prompt: str) -> None:
        async with room:
            stories.append(await story(client, server, prompt))

    room = anyio.CapacityLimiter(20)
    async with serve_model(faults) as server, anyio.create_task_group() as task_group:
        for n in range(60):
            task_group.start_soon(tell, f"{TIDE} {n}")

    outcomes = server.outcomes
    assert len(stories) == server.requests == outcomes.total() == 60
    assert server.statuses == {
        200: outcomes["answer"] + outcomes["disconnect"],
        429: outcomes["rate_limited"],
        500: outcomes["server_error"],
    }
    assert (server.active, server.disconnects) == (0, 0)

"""
A small model server for examples and tests, with faults on request.

It speaks as OpenAI does (``GET /v1/models``, ``POST /v1/chat/completions``) and as Anthropic does (``POST
/v1/messages``), plain and streaming, on asyncio and on trio::

    async with serve_model(Faults(rate_limited=0.1, hang=0.01), seed=7) as server:
        ...  # talk to server.base_url, then look at server.statuses

What happens to a request depends only on the seed, the prompt and how many times that prompt was sent
before, never on the order of arrival: the same seed tells the same story again. What is beyond the
``capacity``, if there is one, counts as never sent. Given ``tools`` in OpenAI's format, it asks for one
wherever a value that the tool takes was mentioned. By itself it runs as
``python examples/model_server.py --port 8000 --backend trio --capacity 4``.
"""

import json
import logging
import math
import operator
import random
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, Literal

import anyio
import attrs
import h11
from anyio.abc import SocketAttribute, SocketStream
from telling import Parser, port, status_of

ToolCall = dict[str, Any]
Outcome = Literal[
    "rate_limited", "server_error", "hang", "disconnect", "overloaded", "stream_error", "answer"
]

# A new one goes to the end, so that it changes no story that is told without it.
FAULTS: tuple[Outcome, ...] = (
    "rate_limited",
    "server_error",
    "hang",
    "disconnect",
    "overloaded",
    "stream_error",
)
MESSAGES = "/v1/messages"
ROUTES = {"/v1/models": "GET", "/v1/chat/completions": "POST", MESSAGES: "POST"}
ANTHROPIC_ERRORS = {
    401: "authentication_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
THOUGHT = "reasoning_content"  # where other servers than OpenAI's have it
MAX_BODY_BYTES = 1_000_000
MAX_SEARCHED = 2_000_000
ARITHMETIC = re.compile(r"what is (-?\d{1,15}) ?([-+*]) ?(-?\d{1,15})(?![\d.]*\d|\s*[-+*/^])", re.IGNORECASE)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
ADVICE = (
    "start with the part you are least sure of; the rest gets easier.",
    "ask the person who will use it, and write down what surprised you.",
    "change one thing, measure again, and only then change the next.",
    "sleep on it; the second draft is where it gets good.",
    "two small tools that fit together beat a big one that almost fits.",
    "do it by hand three times before you teach a machine to do it.",
)


@attrs.frozen(kw_only=True)
class Faults:
    """What goes wrong, as a share of all completions, and how long things take. By default nothing does."""

    capacity: int = 0  #: completions answered at once; more get 429 and a Retry-After; 0 is no bound
    rate_limited: float = 0.0  #: share answered at once with 429 and a Retry-After
    server_error: float = 0.0  #: share answered with 500
    hang: float = 0.0  #: share never answered, and dropped after ``hang_seconds``
    disconnect: float = 0.0  #: share cut off in the middle of the answer
    overloaded: float = 0.0  #: share answered at once with 503 and a Retry-After, or with Anthropic's 529
    stream_error: float = 0.0  #: share of streams that end with an error event; plain answers are 500 instead
    retry_after_seconds: float = 0.2
    hang_seconds: float = 60.0
    delay_seconds: float = 0.0  #: mean of the log-normal delay before an answer
    delay_spread: float = 0.5  #: sigma of that delay: 0 is always the mean, 1 is a long tail
    gap_seconds: float = 0.002  #: between two chunks of a stream

    def __attrs_post_init__(self) -> None:
        for name, value in attrs.asdict(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {value}")

        total = math.fsum(getattr(self, name) for name in FAULTS)
        if total > 1:
            raise ValueError(f"{', '.join(FAULTS)} must add up to at most 1, got {total:g}")

    @property
    def too_many(self) -> "_HTTPError":
        """The 429, which says when to come back."""
        return _HTTPError(429, "rate_limit_exceeded", "too many requests; try again later", self.retry_after)

    @property
    def retry_after(self) -> dict[str, str]:
        """The headers that say when to come back."""
        # The standard one knows whole seconds only; both companies' clients read the exact one first.
        seconds = self.retry_after_seconds
        return {"retry-after-ms": f"{seconds * 1000:.0f}", "retry-after": str(math.ceil(seconds))}

    def draw(self, rng: random.Random) -> tuple[Outcome, float]:
        """Return what happens to one completion, and after how many seconds."""
        # Both are always drawn, so that another share or delay changes nothing else of the story.
        roll, normal = rng.random(), rng.gauss()
        delay = self.delay_seconds * math.exp(self.delay_spread * normal - self.delay_spread**2 / 2)
        for outcome in FAULTS:
            roll -= getattr(self, outcome)
            if roll < 0:
                return outcome, delay

        return "answer", delay


NO_FAULTS = Faults()


@attrs.define(eq=False)
class ModelServer:
    """A running server: where it is, and what it has seen so far."""

    base_url: str
    faults: Faults = attrs.field(repr=False)
    seed: int
    api_key: str | None = attrs.field(repr=False)
    requests: int = 0
    disconnects: int = 0  #: clients that left before their answer was complete
    chunks: int = 0  #: pieces of text that were sent in streams
    answering: int = 0  #: completions that take up capacity now
    rejected: int = 0  #: completions that were beyond it
    statuses: Counter[int] = attrs.field(factory=lambda: Counter[int]())
    outcomes: Counter[Outcome] = attrs.field(factory=lambda: Counter[Outcome]())
    _attempts: Counter[str] = attrs.field(factory=lambda: Counter[str](), repr=False)
    _connections: set["_Connection"] = attrs.field(factory=lambda: set["_Connection"](), repr=False)

    @property
    def active(self) -> int:
        """How many requests are being received or answered now."""
        return sum(connection.busy for connection in self._connections)

    @contextmanager
    def admit(self) -> Generator[None]:
        """Give a completion its share of the capacity, or refuse it before it counts as an attempt."""
        if 0 < self.faults.capacity <= self.answering:
            self.rejected += 1
            raise self.faults.too_many

        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1

    def begin(self, prompt: str) -> tuple[Outcome, float, random.Random]:
        """Count one more completion for this prompt, and decide what happens to it."""
        self._attempts[prompt] += 1
        # A string seeds alike in every process; ascii() because a prompt may hold lone surrogates.
        rng = random.Random(ascii((self.seed, prompt, self._attempts[prompt])))
        outcome, delay = self.faults.draw(rng)
        self.outcomes[outcome] += 1
        return outcome, delay, rng

    async def serve_connection(self, stream: SocketStream) -> None:
        connection = _Connection(self, stream)
        self._connections.add(connection)
        try:
            async with stream:
                await connection.serve()
        except (anyio.BrokenResourceError, anyio.EndOfStream):
            self.disconnects += connection.busy
        except Exception:  # a bug here costs this client its connection, and nobody else
            logging.getLogger(__name__).exception("closed one connection")
        finally:
            self._connections.remove(connection)


@asynccontextmanager
async def serve_model(
    faults: Faults = NO_FAULTS, *, seed: int = 0, port: int = 0, api_key: str | None = None
) -> AsyncGenerator[ModelServer, None]:
    """
    Serve on 127.0.0.1 while the block runs; leaving it drops what is still being answered.

    :param faults: what goes wrong, and how long things take
    :param seed: another seed tells another story
    :param port: 0 picks a free one
    :param api_key: when given, requests without it, as bearer token or ``x-api-key``, are answered with 401
    """
    failure: Exception | None = None
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    base_url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}/v1"
    server = ModelServer(base_url, faults, seed, api_key)
    async with listener, anyio.create_task_group() as connections:
        connections.start_soon(listener.serve, server.serve_connection, connections, name="model server")
        try:
            yield server
        except Exception as exc:  # kept from the task group, which would wrap it in an exception group
            failure = exc

        connections.cancel_scope.cancel("the serve_model() block was left")

    if failure is not None:
        raise failure


class _HTTPError(Exception):
    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def payload(self, path: str) -> dict[str, object]:
        """Return the body of the answer, as the API at this path puts it."""
        if path == MESSAGES:
            kind = ANTHROPIC_ERRORS.get(self.status, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}

        kind = "requests" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


STREAM_ERROR = _HTTPError(529, "overloaded", "the model is overloaded; try again later")


def _parse(path: str, body: bytes) -> tuple[str, list[str], bool, list[ToolCall] | None]:
    """Return the model, the texts of the messages, whether to stream, and the tools to call."""
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise _HTTPError(400, "invalid_json", f"the body must be JSON: {exc}") from exc

    match fields:
        case {"model": str(), "messages": [_, *_]} if path == MESSAGES and "max_tokens" not in fields:
            raise _HTTPError(400, "invalid_body", "the body must have 'max_tokens'")
        case {"model": str(model), "messages": [_, *_] as messages}:
            texts = [_text(message) for message in messages]
            tools = None if path == MESSAGES else fields.get("tools")
            return model, texts, fields.get("stream") is True, _tools_to_call(tools, texts)
        case _:
            raise _HTTPError(400, "invalid_body", "the body must have 'model' and a list of 'messages'")


def _text(message: Any) -> str:
    match message:
        case {"role": "assistant", "tool_calls": [_, *_] as calls}:
            return json.dumps(calls)
        case {"role": str(), "content": str(text)}:
            return text
        case _:
            raise _HTTPError(400, "invalid_body", "each message must have 'role' and 'content', both strings")


def _tools_to_call(tools: Any, texts: list[str]) -> list[ToolCall] | None:
    """Return a call for each value of a tool's enums that was mentioned; ``None`` if none ever was."""
    try:
        functions = [tool["function"] for tool in tools or ()]
        takes = [
            (str(function["name"]), key, str(value))
            for function in functions
            for key, schema in function.get("parameters", {}).get("properties", {}).items()
            for value in schema.get("enum", ())
        ]
    except (TypeError, KeyError, AttributeError) as exc:
        raise _HTTPError(400, "invalid_body", "each tool must be a function, with a JSON schema") from exc

    said = "\n".join(texts)
    if len(takes) * len(said) > MAX_SEARCHED:  # each value is looked for in the whole text
        raise _HTTPError(400, "too_many_values", "the tools take too many values for so long a conversation")

    mentioned = [
        (f"call_{name}_{value}", {"name": name, "arguments": json.dumps({key: value})})
        for name, key, value in takes
        if re.search(rf"\b{re.escape(value)}\b", said, re.IGNORECASE)
    ]
    # What was asked for stands in the messages again, by its id.
    calls = [
        {"id": id_, "type": "function", "function": call}
        for id_, call in mentioned
        if json.dumps(id_) not in said
    ]
    return calls if mentioned else None


def reply_to(prompt: str) -> str:
    """Return the model's reply: the answer to an arithmetic question, otherwise a piece of advice."""
    if found := ARITHMETIC.search(prompt):
        left, sign, right = found.groups()
        return f"{left} {sign} {right} is {OPERATORS[sign](int(left), int(right))}."

    topic = " ".join(prompt.split()[:6])
    return f'On "{topic}": {random.Random(ascii(prompt)).choice(ADVICE)}'


def _text_of(calls: list[ToolCall] | None, prompt: str) -> str:
    """Return what the model says, or thinks before it calls tools."""
    if calls is None:
        return reply_to(prompt)

    values = [value for call in calls for value in json.loads(call["function"]["arguments"]).values()]
    if not values:
        return f"I have no more questions. {' '.join(prompt.split())}"

    return f"I need to know more about {' and '.join(values)}."


@attrs.frozen
class _Reply:
    """A reply as one of the APIs puts it: whole, and as the server-sent events of a stream."""

    whole: Mapping[str, object]
    first: bytes
    piece: Callable[[str], bytes]
    last: bytes
    error: bytes


def _chat_completion(
    serial: str, model: str, asked: int, pieces: list[str], calls: list[ToolCall] | None
) -> _Reply:
    head = {"id": f"chatcmpl-{serial}", "created": int(time.time()), "model": model}
    part, reason = (THOUGHT, "tool_calls") if calls else ("content", "stop")
    message: dict[str, object] = {"role": "assistant", "content": None, part: "".join(pieces)}
    if calls:
        message["tool_calls"] = calls

    spent = {"prompt_tokens": asked, "completion_tokens": len(pieces), "total_tokens": asked + len(pieces)}
    choices = [{"index": 0, "message": message, "finish_reason": reason}]

    def event(delta: Mapping[str, object], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
        return f"data: {json.dumps(chunk)}\n\n".encode()

    return _Reply(
        whole={**head, "object": "chat.completion", "choices": choices, "usage": spent},
        first=event({"role": "assistant", "content": ""}),
        piece=lambda text: event({part: text}),
        last=b"".join(event({"tool_calls": [{"index": n, **call}]}) for n, call in enumerate(calls or ()))
        + event({}, reason)
        + b"data: [DONE]\n\n",
        error=f"data: {json.dumps(STREAM_ERROR.payload(''))}\n\n".encode(),
    )


def _message(serial: str, model: str, asked: int, pieces: list[str]) -> _Reply:
    head = {"id": f"msg_{serial}", "type": "message", "role": "assistant", "model": model}
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    content = [{"type": "text", "text": "".join(pieces)}]
    usage = {"input_tokens": asked, "output_tokens": len(pieces)}
    nothing: dict[str, object] = {"content": [], "usage": {**usage, "output_tokens": 0}, **dict.fromkeys(end)}

    def event(kind: str, **fields: object) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()

    def block(kind: str, **fields: object) -> bytes:
        return event(f"content_block_{kind}", index=0, **fields)

    return _Reply(
        whole={**head, **end, "content": content, "usage": usage},
        first=event("message_start", message={**head, **nothing})
        + block("start", content_block={"type": "text", "text": ""}),
        piece=lambda text: block("delta", delta={"type": "text_delta", "text": text}),
        last=block("stop") + event("message_delta", delta=end, usage=usage) + event("message_stop"),
        error=event("error", error=STREAM_ERROR.payload(MESSAGES)["error"]),
    )


class _Connection:
    """One client's keep-alive connection; requests on it are answered one after another."""

    def __init__(self, server: ModelServer, stream: SocketStream) -> None:
        self.server = server
        self.stream = stream  # anyio has set TCP_NODELAY on it
        self.http = h11.Connection(h11.SERVER)
        self.head_only = False

    @property
    def busy(self) -> bool:
        # h11 leaves these states when it is given the last part, so before the client can have seen it.
        return self.http.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY)

    async def serve(self) -> None:
        """
        Answer requests until one of them ends the connection.

        :raises EndOfStream: if the client left
        """
        try:
            while isinstance(request := await self._receive(), h11.Request):
                self.server.requests += 1
                self.head_only = request.method == b"HEAD"
                body = b""
                while isinstance(event := await self._receive(), h11.Data):
                    if len(body) <= MAX_BODY_BYTES:  # the rest is read, so that a 413 arrives, but not kept
                        body += event.data

                await self._answer_unless_client_leaves(request, body)
                if (self.http.our_state, self.http.their_state) != (h11.DONE, h11.DONE):
                    return

                self.http.start_next_cycle()
                self.head_only = False
        except h11.RemoteProtocolError as exc:
            if self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await self._send_json(
                    exc.error_status_hint, _HTTPError(400, "bad_http", str(exc)).payload("")
                )

    async def _receive(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            if self.http.they_are_waiting_for_100_continue:
                await self._send(h11.InformationalResponse(status_code=100, headers=[]))

            self.http.receive_data(await self.stream.receive())

        return event

    async def _send(self, *events: h11.Event) -> None:
        data = b""
        for event in events:
            if isinstance(event, h11.Response):
                self.server.statuses[event.status_code] += 1

            if not (self.head_only and isinstance(event, h11.Data)):
                data += self.http.send(event) or b""

        await self.stream.send(data)

    async def _send_json(
        self, status: int, payload: object, headers: Mapping[str, str] = {}, *, cut: bool = False
    ) -> None:
        body = json.dumps(payload).encode()
        fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        phrase = "Overloaded" if status == 529 else HTTPStatus(status).phrase
        response = h11.Response(status_code=status, headers=list(fields.items()), reason=phrase)
        if cut:
            await self._send(response, h11.Data(data=body[: len(body) // 2]))
        else:
            await self._send(response, h11.Data(data=body), h11.EndOfMessage())

    async def _answer_unless_client_leaves(self, request: h11.Request, body: bytes) -> None:
        client_left = False

        async def watch() -> None:
            nonlocal client_left
            try:
                # What an eager client sends before it has its answer waits here for its turn.
                self.http.receive_data(await self.stream.receive())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                client_left = True
                if self.busy:
                    answering.cancel_scope.cancel("the client left")

        async with anyio.create_task_group() as answering:
            answering.start_soon(watch, name="watch for the client leaving")
            try:
                await self._answer(request, body)
            except anyio.BrokenResourceError:
                client_left = True

            answering.cancel_scope.cancel("the request was answered")

        if client_left:
            raise anyio.EndOfStream

    async def _answer(self, request: h11.Request, body: bytes) -> None:
        path, method = request.target.partition(b"?")[0].decode(), request.method.decode()
        key = self.server.api_key
        try:
            if path not in ROUTES:
                raise _HTTPError(404, "unknown_url", f"there is no {path}, only {', '.join(ROUTES)}")

            if method != ROUTES[path]:
                message = f"use {ROUTES[path]}, not {method}"
                raise _HTTPError(405, "method_not_supported", message, {"allow": ROUTES[path]})

            keys = ((b"authorization", f"Bearer {key}".encode()), (b"x-api-key", f"{key}".encode()))
            if key is not None and not any(field in request.headers for field in keys):
                raise _HTTPError(401, "invalid_api_key", "incorrect or missing API key")

            if len(body) > MAX_BODY_BYTES:
                raise _HTTPError(413, "too_large", f"the body must be at most {MAX_BODY_BYTES} bytes")

            if path == "/v1/models":
                model = {"id": "demo", "object": "model", "created": 0, "owned_by": "model_server"}
                await self._send_json(200, {"object": "list", "data": [model]})
            else:
                completion = _parse(path, body)
                with self.server.admit():
                    await self._complete(path, *completion)
        except _HTTPError as exc:
            await self._send_json(exc.status, exc.payload(path), exc.headers)

    async def _complete(
        self, path: str, model: str, texts: list[str], stream: bool, calls: list[ToolCall] | None
    ) -> None:
        faults = self.server.faults
        outcome, delay, rng = self.server.begin("\n".join(texts))
        if outcome == "rate_limited":
            raise faults.too_many

        if outcome == "overloaded":
            status, headers = (529, {}) if path == MESSAGES else (503, faults.retry_after)
            raise _HTTPError(status, "overloaded", "the model is overloaded; try again later", headers)

        await anyio.sleep(delay)
        if outcome == "server_error" or (outcome == "stream_error" and not stream):
            raise _HTTPError(500, "server_error", "the server had an error; try again")

        if outcome == "hang":
            await anyio.sleep(faults.hang_seconds)
            return  # without an answer, which closes the connection

        pieces = re.findall(r"\s*\S+", _text_of(calls, texts[-1]))
        cut = rng.randrange(1, len(pieces)) if outcome in ("disconnect", "stream_error") else None
        make = _message if path == MESSAGES else partial(_chat_completion, calls=calls)
        asked = sum(len(text.split()) for text in texts)
        reply = make(f"{rng.getrandbits(96):024x}", model, asked, pieces)
        if stream:
            last = {"disconnect": None, "stream_error": reply.error}.get(outcome, reply.last)
            await self._stream(reply, pieces[:cut], last)
        else:
            await self._send_json(200, reply.whole, cut=cut is not None)

    async def _stream(self, reply: _Reply, pieces: list[str], last: bytes | None) -> None:
        headers = [("content-type", "text/event-stream"), ("cache-control", "no-cache")]
        start = h11.Response(status_code=200, headers=headers, reason="OK")
        await self._send(start, h11.Data(data=reply.first))
        for piece in pieces:
            await anyio.sleep(self.server.faults.gap_seconds)
            self.server.chunks += 1  # before the client can have seen it
            await self._send(h11.Data(data=reply.piece(piece)))

        if last is not None:
            await self._send(h11.Data(data=last), h11.EndOfMessage())


async def _run(faults: Faults, seed: int, port: int, api_key: str | None) -> None:
    async with serve_model(faults, seed=seed, port=port, api_key=api_key) as server:
        print(server.base_url, flush=True)
        try:
            await anyio.sleep_forever()
        finally:
            statuses = ", ".join(f"{count}x {status}" for status, count in sorted(server.statuses.items()))
            print(f"\n{server.requests} requests, answered with: {statuses or 'nothing'}")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--port", type=port, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key")
    defaults: dict[str, float] = attrs.asdict(NO_FAULTS)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)

    options = vars(parser.read())
    backend, seed, at, api_key = (options.pop(name) for name in ("backend", "seed", "port", "api_key"))
    try:
        faults = Faults(**options)
    except ValueError as exc:
        parser.error(str(exc))

    return status_of(_run, faults, seed, at, api_key, backend=backend)


if __name__ == "__main__":
    sys.exit(main())

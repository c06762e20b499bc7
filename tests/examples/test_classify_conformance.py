"""What the clients that people use really raise, over real sockets, and what ``classify`` makes of it."""

import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from threading import Thread
from typing import Any

import anyio
import attrs
import httpx2
import pytest
from model_server import Faults, serve_model

from agentloop import Verdict, VerdictKind, classify

TRANSIENT, OVERLOAD, PERMANENT, FATAL = VerdictKind

KEY = "right"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@attrs.frozen
class Call:
    """One question, and how it is asked."""

    base_url: str
    stream: bool
    key: str
    timeout: httpx2.Timeout
    content: str | list[str]  # a list is more than this server knows, which it refuses

    @property
    def fields(self) -> Any:
        return {"model": "demo", "messages": [{"role": "user", "content": self.content}]}

    @asynccontextmanager
    async def http(self) -> AsyncGenerator[httpx2.AsyncClient]:
        async with httpx2.AsyncClient(trust_env=False, verify=False, timeout=self.timeout) as client:
            yield client


async def httpx2_to(call: Call, path: str, headers: dict[str, str], fields: Any) -> AsyncIterator[str]:
    body = {**fields, "stream": call.stream}
    async with (
        call.http() as http,
        http.stream("POST", f"{call.base_url}/{path}", json=body, headers=headers) as response,
    ):
        response.raise_for_status()
        async for line in response.aiter_lines():
            yield line


def httpx2_as_openai(call: Call) -> AsyncIterator[str]:
    return httpx2_to(call, "chat/completions", {"Authorization": f"Bearer {call.key}"}, call.fields)


def httpx2_as_anthropic(call: Call) -> AsyncIterator[str]:
    return httpx2_to(call, "messages", {"X-Api-Key": call.key}, {**call.fields, "max_tokens": 99})


# What takes long to be imported is so where it is called: in one process of the runner.


async def openai(call: Call) -> AsyncIterator[str]:
    from openai import AsyncOpenAI

    async with call.http() as http:
        client = AsyncOpenAI(
            base_url=call.base_url, api_key=call.key, max_retries=0, http_client=http, timeout=call.timeout
        )
        if call.stream:
            async with await client.chat.completions.create(**call.fields, stream=True) as stream:
                async for chunk in stream:
                    yield chunk.choices[0].delta.content or ""
        else:
            completion = await client.chat.completions.create(**call.fields)
            yield completion.choices[0].message.content or ""


async def anthropic(call: Call) -> AsyncIterator[str]:
    from anthropic import AsyncAnthropic

    async with call.http() as http:
        client = AsyncAnthropic(
            base_url=call.base_url.removesuffix("/v1"),
            api_key=call.key,
            max_retries=0,
            http_client=http,
            timeout=call.timeout,
        )
        if call.stream:
            async with client.messages.stream(**call.fields, max_tokens=99) as stream:
                async for text in stream.text_stream:
                    yield text
        else:
            message = await client.messages.create(**call.fields, max_tokens=99)
            yield str(message.content)


async def pydantic_ai(call: Call) -> AsyncIterator[str]:
    from openai import AsyncOpenAI
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async with call.http() as http:
        client = AsyncOpenAI(
            base_url=call.base_url, api_key=call.key, max_retries=0, http_client=http, timeout=call.timeout
        )
        agent = Agent(OpenAIChatModel("demo", provider=OpenAIProvider(openai_client=client)))
        if call.stream:
            async with agent.run_stream(call.content) as result:
                async for text in result.stream_text(delta=True, debounce_by=None):
                    yield text
        else:
            yield (await agent.run(call.content)).output


Client = Callable[[Call], AsyncIterator[str]]


async def failure(call: Call, client: Client) -> tuple[int, Exception]:
    """Return how much came before the exception, and the exception."""
    received = 0
    try:
        async with aclosing(client(call)) as texts:
            async for text in texts:
                received += bool(text)
    except Exception as exc:
        return received, exc

    raise AssertionError("nothing was raised")


@contextmanager
def server_that_resets() -> Iterator[str]:
    """Read one request of each connection and reset it: a close without lingering sends an RST, not a FIN."""

    def reset() -> None:
        try:
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    received = b""
                    while not received.endswith(b"}"):  # as all of these requests do
                        received += connection.recv(65536) or b"}"
        except OSError:  # the listener was shut down
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=reset)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@asynccontextmanager
async def server(case: str) -> AsyncGenerator[str]:
    """Serve what goes wrong in one way only, and give the URL."""
    if case == "reset":
        with server_that_resets() as url:
            yield url
    elif case == "refused":
        with socket.socket() as nobody:  # has a port, so that nobody else gets it, and does not listen
            nobody.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
    else:
        faults: dict[str, float] = {case: 1} if case in attrs.asdict(Faults()) else {}
        if case == "closed":
            faults = {"hang": 1, "hang_seconds": 0}

        async with serve_model(Faults(**faults, retry_after_seconds=7), api_key=KEY) as model:
            yield model.base_url


# What each client raises, so that no verdict is about another failure than the one that is meant.
RAISED = {
    "rate_limited": ("HTTPStatusError", "RateLimitError", "RateLimitError", "ModelRateLimitError"),
    "overloaded": ("HTTPStatusError", "InternalServerError", "OverloadedError", "ModelOverloadedError"),
    "server_error": ("HTTPStatusError", "InternalServerError", "InternalServerError", "ModelServerError"),
    "hang": ("ReadTimeout", "APITimeoutError", "APITimeoutError", "ModelTimeoutError"),
    "closed": ("RemoteProtocolError", "APIConnectionError", "APIConnectionError", "ModelConnectionError"),
    "reset": ("ReadError", "APIConnectionError", "APIConnectionError", "ModelConnectionError"),
    "refused": ("ConnectError", "APIConnectionError", "APIConnectionError", "ModelConnectionError"),
    "disconnect": ("RemoteProtocolError", "APIConnectionError", "APIConnectionError", "ModelConnectionError"),
    "bad key": ("HTTPStatusError", "AuthenticationError", "AuthenticationError", "ModelAuthenticationError"),
    "bad request": ("HTTPStatusError", "BadRequestError", "BadRequestError", "ModelRequestRejectedError"),
}
VERDICTS = {
    "rate_limited": Verdict(OVERLOAD, retry_after=7),
    "overloaded": Verdict(OVERLOAD, retry_after=7),
    "bad key": Verdict(FATAL),
    "bad request": Verdict(PERMANENT),
}
every_case = pytest.mark.parametrize("case", RAISED)
plain_and_stream = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


async def check(client: Client, case: str, stream: bool) -> None:
    async with server(case) as base_url:
        call = Call(
            base_url,
            stream,
            key="wrong" if case == "bad key" else KEY,
            timeout=httpx2.Timeout(5, read=0.05 if case == "hang" else 5),
            content=["What is", "17 * 23?"] if case == "bad request" else "What is 17 * 23?",
        )
        received, exc = await failure(call, client)

    raised = RAISED[case][
        ("httpx2", "openai", "anthropic", "pydantic_ai").index(client.__name__.partition("_as_")[0])
    ]
    verdict = VERDICTS.get(case, Verdict(TRANSIENT))
    if client in (httpx2_as_anthropic, anthropic) and case == "overloaded":
        verdict = Verdict(OVERLOAD)  # 529, which does not say when to come back

    if client is anthropic and case == "disconnect" and stream:
        raised = "RemoteProtocolError"  # which this SDK lets through

    assert (type(exc).__name__, classify(exc)) == (raised, verdict)
    assert (received > 0) == (stream and case == "disconnect")


@every_case
@plain_and_stream
@pytest.mark.parametrize("client", [httpx2_as_openai, httpx2_as_anthropic, openai, anthropic])
async def test_failure_of_a_client_is_judged_for_what_it_is(client: Client, case: str, stream: bool) -> None:
    await check(client, case, stream)


@every_case
@plain_and_stream
@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # the only one that it runs on
async def test_failure_of_a_pydantic_ai_agent_is_judged_for_what_it_is(case: str, stream: bool) -> None:
    await check(pydantic_ai, case, stream)


# Both SDKs leave open what they read such a stream with: a loop of its own closes it, and trio says so.
@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("client", "raised", "verdict"),
    [
        (openai, "APIError", Verdict(TRANSIENT)),  # server_error
        (anthropic, "APIStatusError", Verdict(OVERLOAD)),  # overloaded_error
    ],
    ids=["openai", "anthropic"],
)
def test_error_event_in_a_stream_is_judged_by_its_name_whatever_status_the_stream_had(
    client: Client, raised: str, verdict: Verdict, backend: str
) -> None:
    async def main() -> tuple[int, Exception]:
        async with server("stream_error") as base_url:
            return await failure(Call(base_url, True, KEY, httpx2.Timeout(5), "What is 17 * 23?"), client)

    received, exc = anyio.run(main, backend=backend)
    assert received > 0
    assert (type(exc).__name__, classify(exc)) == (raised, verdict)
    assert getattr(exc, "status_code", 200) == 200

"""
Ask a model many questions at once through the ``openai`` SDK: for whole answers, or for many streams.

Install ``agentloop-anyio[clients,examples]``; in a checkout, ``pip install -e ".[clients,examples]"``. Then::

    python examples/openai_batch.py [--stream] [--backend trio]

talks to a server of its own that limits rates, fails, hangs and hangs up. If ``OPENAI_MODEL`` is set, it
talks to a real one: to OpenAI, with ``OPENAI_API_KEY``, or to any that speaks alike at ``OPENAI_BASE_URL``.

What the SDK raises is judged by the loop's default ``classify``: a 429 waits at least as long as Retry-After
says, a 401 stops the batch. The SDK's own retries are off: the loop cannot see them, so they would hide the
overload from it, hold its slots, and multiply with its retries (3 x 3 requests instead of 3).
"""

import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx2
from model_server import Faults, serve_model
from openai import AsyncOpenAI, OpenAIError
from telling import QUESTIONS, Parser, status_of, tell_result, tell_retry

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    ChunkEvent,
    Invocation,
    InvocationResult,
    LoopConfig,
    ResultEvent,
)

MODEL = os.environ.get("OPENAI_MODEL")
FAULTS = Faults(rate_limited=0.15, server_error=0.15, hang=0.1, disconnect=0.1, delay_seconds=0.05)
SEED = 698  # with which each of these happens at least once
CONFIG = LoopConfig(
    max_concurrency=4,
    timeout_seconds=60 if MODEL else 2,
    first_chunk_timeout_seconds=20 if MODEL else 1,  # in streams only
    max_retries=2,
    backoff=Backoff(initial_seconds=0.05),
)


async def ask(client: AsyncOpenAI, question: str) -> str:
    """The agent: what it returns is its output, and what the SDK raises is judged by the loop."""
    completion = await client.chat.completions.create(
        model=MODEL or "demo", messages=[{"role": "user", "content": question}]
    )
    return completion.choices[0].message.content or ""


async def ask_streaming(client: AsyncOpenAI, question: str) -> AsyncIterator[str]:
    """The same as a stream: an async generator function."""
    stream = await client.chat.completions.create(
        model=MODEL or "demo", messages=[{"role": "user", "content": question}], stream=True
    )
    async with stream:
        async for chunk in stream:
            if chunk.choices and (text := chunk.choices[0].delta.content):
                yield text


async def run_answers(loop: AgentLoop, client: AsyncOpenAI) -> list[InvocationResult[str]]:
    results = await loop.run_all(Invocation.map(partial(ask, client), QUESTIONS, "q"))
    print("\nOne result for each question, in their order")
    for result in results:
        tell_result(result, result.output or "")

    return results


async def run_streams(loop: AgentLoop, client: AsyncOpenAI) -> list[InvocationResult[None]]:
    texts = [""] * len(QUESTIONS)
    results: list[InvocationResult[None]] = []
    try:
        async with loop.stream_all(Invocation.map(partial(ask_streaming, client), QUESTIONS, "q")) as events:
            async for event in events:
                match event:
                    case ChunkEvent(index=index, chunk=chunk):
                        texts[index] += chunk
                    case ResultEvent(result=result):
                        results.append(result)
    except BatchStopped as stopped:  # the key is refused, say
        print(f"\nStopped: {stopped.reason}")

    print("\nOne result for each stream, in the order in which they ended")
    for result in results:
        tell_result(result, texts[result.index])

    first = loop.metrics.snapshot().first_chunk
    print(f"\nThe first words came after {first.p50_ms:.0f} ms (median), {first.max_ms:.0f} ms (slowest)")
    return results


@asynccontextmanager
async def connect() -> AsyncGenerator[AsyncOpenAI]:
    """Give a client of a real server or of one of our own, without retries and time-outs of the SDK's."""
    if MODEL:
        try:
            client = AsyncOpenAI(max_retries=0, timeout=None)
        except OpenAIError as exc:  # no key
            sys.exit(f"error: {exc}")

        async with client:
            yield client
    else:
        http = httpx2.AsyncClient(trust_env=False, timeout=None)  # past any proxy
        async with (
            serve_model(FAULTS, seed=SEED) as server,
            AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, http_client=http) as client,
        ):
            yield client


async def run(backend: str, stream: bool) -> bool:
    loop = AgentLoop(CONFIG, on_event=tell_retry)
    async with connect() as client:
        print(f"{len(QUESTIONS)} questions for {MODEL or 'demo'} at {client.base_url}, on {backend}\n")
        results = await (run_streams if stream else run_answers)(loop, client)
        return any(result.success for result in results)


def main() -> int:
    parser = Parser(__doc__, "OPENAI_MODEL, OPENAI_API_KEY and OPENAI_BASE_URL, to ask a real model")
    parser.add_argument("--stream", action="store_true", help="stream them")
    found = parser.read()
    return status_of(run, found.backend, found.stream, backend=found.backend)


if __name__ == "__main__":
    sys.exit(main())

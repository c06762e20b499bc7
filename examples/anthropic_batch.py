"""
Ask Claude many questions at once through the ``anthropic`` SDK, or one by one, word by word.

Install ``agentloop-anyio[clients,examples]``; in a checkout, ``pip install -e ".[clients,examples]"``. Then::

    python examples/anthropic_batch.py [--stream] [--backend trio]

talks to a server of its own that is overloaded, limits rates, fails, hangs and hangs up. If
``ANTHROPIC_MODEL`` is set, it talks to the real one, with ``ANTHROPIC_API_KEY``, or to what is at
``ANTHROPIC_BASE_URL``.

What the SDK raises is judged by the loop's default ``classify``: 429 and 529 are overload, which lowers the
loop's limit for a while and does not count towards ``max_retries``. The SDK's own retries are off: the loop
cannot see them, so they would hide the overload from it, hold its slots, and multiply with its retries.
"""

import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx2
from anthropic import AsyncAnthropic
from model_server import Faults, serve_model
from telling import QUESTIONS, Parser, status_of, tell_result, tell_retry

from agentloop import AgentLoop, Backoff, BatchStopped, Invocation, LoopConfig

MODEL = os.environ.get("ANTHROPIC_MODEL")
FAULTS = Faults(
    rate_limited=0.1, overloaded=0.1, server_error=0.1, hang=0.1, disconnect=0.1, delay_seconds=0.05
)
SEED = 100561  # with which each of these happens at least once
CONFIG = LoopConfig(
    max_concurrency=4,
    timeout_seconds=60 if MODEL else 2,
    first_chunk_timeout_seconds=20 if MODEL else 1,  # in streams only
    max_retries=2,
    backoff=Backoff(initial_seconds=0.05),
)


async def ask(client: AsyncAnthropic, question: str) -> str:
    """The agent: what it returns is its output, and what the SDK raises is judged by the loop."""
    message = await client.messages.create(
        model=MODEL or "demo", max_tokens=500, messages=[{"role": "user", "content": question}]
    )
    return "".join(block.text for block in message.content if block.type == "text")


async def ask_streaming(client: AsyncAnthropic, question: str) -> AsyncIterator[str]:
    """The same as a stream: an async generator function."""
    async with client.messages.stream(
        model=MODEL or "demo", max_tokens=500, messages=[{"role": "user", "content": question}]
    ) as stream:
        async for text in stream.text_stream:
            yield text


async def run_answers(loop: AgentLoop, client: AsyncAnthropic) -> int:
    """Show each answer as soon as it is there. Return how many there are."""
    answered = 0
    try:
        async with loop.as_completed(Invocation.map(partial(ask, client), QUESTIONS, "q")) as results:
            async for result in results:
                tell_result(result, result.output or "")
                answered += result.success
    except BatchStopped as stopped:  # the key is refused, say
        print(f"  stopped: {stopped.reason}")

    return answered


async def run_streams(loop: AgentLoop, client: AsyncAnthropic) -> int:
    """Show one answer after the other, word by word. Return how many are complete."""
    answered = 0
    for number, question in enumerate(QUESTIONS):
        print(f"  > {question}")
        async with loop.run_streaming(f"q-{number}", ask_streaming, client, question) as stream:
            started = False
            try:
                async for text in stream:
                    print(text if started else f"    {text}", end="", flush=True)
                    started = True

                print()
            except Exception as exc:  # what the SDK raised, after the words that came before it
                print("\n" * started + f"    [{type(exc).__name__}]")

        answered += stream.result.success

    return answered


@asynccontextmanager
async def connect() -> AsyncGenerator[AsyncAnthropic]:
    """Give a client of a real server or of one of our own, without retries and time-outs of the SDK's."""
    if MODEL:
        async with AsyncAnthropic(max_retries=0, timeout=None) as client:
            yield client
    else:
        http = httpx2.AsyncClient(trust_env=False, timeout=None)  # past any proxy
        async with serve_model(FAULTS, seed=SEED) as server:
            base_url = server.base_url.removesuffix("/v1")  # which this SDK adds
            async with AsyncAnthropic(
                base_url=base_url, api_key="none", max_retries=0, http_client=http
            ) as client:
                yield client


async def run(backend: str, stream: bool) -> bool:
    loop = AgentLoop(CONFIG, on_event=tell_retry)
    async with connect() as client:
        print(f"{len(QUESTIONS)} questions for {MODEL or 'demo'} at {client.base_url}, on {backend}\n")
        answered = await (run_streams if stream else run_answers)(loop, client)

    seen = loop.metrics.snapshot()
    print(
        f"\n{answered} of {len(QUESTIONS)} answered; {seen.retries} retries, {seen.overloads} after overload"
    )
    return answered > 0


def main() -> int:
    parser = Parser(__doc__, "ANTHROPIC_MODEL, ANTHROPIC_API_KEY and ANTHROPIC_BASE_URL, to ask a real model")
    parser.add_argument("--stream", action="store_true", help="stream them")
    found = parser.read()
    return status_of(run, found.backend, found.stream, backend=found.backend)


if __name__ == "__main__":
    sys.exit(main())

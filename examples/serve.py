"""
Serve an agent over HTTP, as a service has to: bounded, timed, streamed, and drained when it is to end.

``python examples/serve.py`` shows itself: it starts, sends itself more requests than it can take, lets a
client leave, and drains. ``python examples/serve.py --port 8000`` serves until SIGTERM or Ctrl-C::

    curl -N "http://127.0.0.1:8000/?prompt=What+is+17*23"
    curl "http://127.0.0.1:8000/metrics"

It needs ``pip install -e ".[serve]"``: Starlette on Hypercorn, which serves on asyncio and on trio.

Each request is one invocation, and its answer the invocation's stream, as server-sent events. Where too many
wait already, the limiter refuses one more, and the server answers with 503 and a Retry-After. A client that
leaves takes its invocation with it. When the server is told to stop, it takes no new requests, answers those
that it has begun, and ends by that signal.
"""

import importlib
import math
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import httpx2
import hypercorn
from anyio.abc import TaskStatus
from model_server import Faults, serve_model
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streaming import write
from telling import Parser, port, status_of

from agentloop import (
    AgentLoop,
    Invocation,
    Limiter,
    LoopConfig,
    QueueFull,
    Status,
    StreamChunk,
    StreamEvent,
    drain_on_signals,
)
from agentloop.contrib.prometheus import LoopCollector

MAX_CONCURRENCY = 4
MAX_WAITING = 4
SEED = 4
SHOWN = ("agentloop_invocations_total", "agentloop_retries_total", "agentloop_limit")
FAULTS = Faults(rate_limited=0.1, server_error=0.1, gap_seconds=0.03)
CONFIG = LoopConfig(
    timeout_seconds=30,
    total_timeout_seconds=60,
    first_chunk_timeout_seconds=10,
    idle_timeout_seconds=10,
)


class Endpoint:
    """
    One request, one invocation, one stream of events.

    :param loop: a loop that has been entered, so that streams belong to it and not to whoever reads them
    :param agent: an async generator function of a prompt
    :param draining: is set when the loop is drained
    """

    def __init__(
        self, loop: AgentLoop, agent: Callable[[str], AsyncIterator[StreamChunk]], draining: anyio.Event
    ) -> None:
        self.loop = loop
        self.agent = agent
        self.draining = draining
        self.drained = anyio.Event()
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prompt = Request(scope).query_params.get("prompt", "")
        refusal = self.refuse(prompt)
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        self.open += 1
        try:
            # Starlette stops reading when the client leaves, and this closes what it read from.
            async with aclosing(self.events(prompt)) as events:
                headers = {"cache-control": "no-store"}
                response = StreamingResponse(events, headers=headers, media_type="text/event-stream")
                await response(scope, receive, with_status_held_back(send))
        except QueueFull as full:
            headers = {"retry-after": str(max(1, math.ceil(full.retry_after_seconds or 1)))}
            refusal = PlainTextResponse(f"{full.waiting} requests wait already\n", 503, headers)
            await refusal(scope, receive, send)
        finally:
            self.open -= 1

    def refuse(self, prompt: str) -> Response | None:
        """Say why this request is not begun, if it is not."""
        if not prompt:
            return PlainTextResponse("write /?prompt=...\n", 400)

        if self.draining.is_set():
            return PlainTextResponse("this server is about to end\n", 503, {"connection": "close"})

        return None

    async def events(self, prompt: str) -> AsyncGenerator[str, None]:
        try:
            async with self.loop.run_streaming("writer", self.agent, prompt) as stream:
                async for chunk in stream:
                    yield chunk.to_sse()
        except QueueFull:
            raise
        except Exception as exc:  # the status may have been sent, so an event has to tell
            yield StreamChunk(StreamEvent.ERROR, type(exc).__name__).to_sse()


def with_status_held_back(send: Send) -> Send:
    """Send the status with the first event, so that a refused request, which has none, can get another."""
    held: list[Message] = []

    async def send_later(message: Message) -> None:
        if message["type"] == "http.response.start":
            held.append(message)
            return

        while held:
            await send(held.pop())

        await send(message)

    return send_later


def with_short_lifespan(app: ASGIApp) -> ASGIApp:
    """Begin and end at once: there is nothing to prepare, and Starlette logs a server that was cancelled."""

    async def serve_requests(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return

        for moment in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{moment}.complete"})

    return serve_requests


async def serve(
    sock: socket.socket,
    backend: str,
    loop: AgentLoop,
    draining: anyio.Event,
    *,
    task_status: TaskStatus[Endpoint],
) -> None:
    """Serve until the loop is drained, and then until every request that was begun is answered."""
    config = hypercorn.Config()
    config.bind = [f"fd://{sock.detach()}"]
    # Every invocation is bounded by itself; who cannot wait for them may send a second signal.
    config.graceful_timeout = math.inf
    config.loglevel = "WARNING"
    async with (
        serve_model(FAULTS, seed=SEED) as model_server,
        httpx2.AsyncClient(base_url=model_server.base_url, timeout=None, trust_env=False) as model,
        loop,
    ):
        registry = CollectorRegistry()
        registry.register(LoopCollector({"agent": loop}))

        async def metrics(_: Request) -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        endpoint = Endpoint(loop, partial(write, model), draining)
        app = Starlette(routes=[Route("/", endpoint, methods=["GET"]), Route("/metrics", metrics)])
        task_status.started(endpoint)
        worker = importlib.import_module(f"hypercorn.{backend}")
        await worker.serve(with_short_lifespan(app), config, shutdown_trigger=draining.wait)
        endpoint.drained.set()


# --- what it shows of itself


async def visit(client: httpx2.AsyncClient, prompt: str) -> int:
    """A client: read the events to the end, and return how many there were."""
    async with client.sse("/", params={"prompt": prompt}) as events:
        events.response.raise_for_status()
        names = [event.event async for event in events]

    if names[-1] != StreamEvent.COMPLETE:
        raise ConnectionError(f"the last event is {names[-1]}")

    return len(names)


async def send_burst(endpoint: Endpoint, client: httpx2.AsyncClient) -> None:
    slots = endpoint.loop.limiter.max_concurrency
    print(f"\nA burst of 12 requests, for {slots} slots and {MAX_WAITING} places to wait")
    # The clients are a loop too, which waits as long as the server says before it tries again.
    clients = AgentLoop(LoopConfig(max_concurrency=12))
    prompts = [f"Tip {number} for teaching otters" for number in range(12)]
    results = await clients.run_all(Invocation.map(partial(visit, client), prompts))
    turned_away = [result for result in results if result.retries]
    print(f"  at once      {len(results) - len(turned_away)} were let in")
    if turned_away:
        error: Any = turned_away[0].failures[0]
        status, seconds = error.response.status_code, error.response.headers["retry-after"]
        print(f"  later        {len(turned_away)}, told by {status} to come back in {seconds} s")

    print(f"  in the end   {sum(result.success for result in results)} have all of their answer")


async def leave_early(endpoint: Endpoint, client: httpx2.AsyncClient) -> None:
    print("\nA client that leaves after 5 events")
    count = 0
    with anyio.CancelScope() as stay:
        async with client.sse("/", params={"prompt": "Wake a teenager"}) as events:
            async for _ in events:
                count += 1
                if count == 5:
                    stay.cancel("the client has read enough")

    with anyio.fail_after(5):
        while endpoint.open:
            await anyio.sleep(0.001)

    print(f"  the agent    {endpoint.loop.metrics.snapshot().counts[Status.CANCELLED]} was cancelled")
    print(f"  the server   {endpoint.loop}")


async def read_metrics(client: httpx2.AsyncClient) -> None:
    print("\n/metrics, among others")
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith(SHOWN) and not line.endswith(" 0.0"):
            print(f"  {line}")


async def stop(endpoint: Endpoint, client: httpx2.AsyncClient) -> None:
    print("\nA drain, as at SIGTERM, while a request is being answered")
    names: list[str] = []
    async with client.sse("/", params={"prompt": "Pack for the moon"}) as events:
        async for event in events:
            names.append(event.event)
            if len(names) == 3:
                endpoint.loop.drain()
                endpoint.draining.set()
                print(f"  a new one    is {await knock(str(client.base_url))}")

    print(f"  that one     goes on to the end: {names[-1]} after {len(names)} events")


async def knock(base_url: str) -> str:
    async with httpx2.AsyncClient(timeout=5, trust_env=False) as client:
        try:
            response = await client.get(base_url, params={"prompt": "Is anybody there?"})
        except httpx2.TransportError:
            return "refused"

    return "refused" if response.status_code == 503 else f"answered with {response.status_code}"


async def main(backend: str, at: int | None) -> None:
    loop = AgentLoop(CONFIG, limiter=Limiter(MAX_CONCURRENCY, max_waiting=MAX_WAITING))
    if at is None:
        await run(backend, at, loop, anyio.Event())
    else:
        async with drain_on_signals(loop, grace_seconds=None) as draining:
            await run(backend, at, loop, draining)


async def run(backend: str, at: int | None, loop: AgentLoop, draining: anyio.Event) -> None:
    with socket.create_server(("127.0.0.1", at or 0)) as sock:
        base_url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        async with anyio.create_task_group() as group:
            endpoint = await group.start(serve, sock, backend, loop, draining)
            if at is not None:
                print(f"{base_url}/?prompt=..., on {backend}; end it with SIGTERM or Ctrl-C", flush=True)
            else:
                print(f"Agent at {base_url}, on {backend}", flush=True)
                try:
                    async with httpx2.AsyncClient(base_url=base_url, timeout=30, trust_env=False) as client:
                        await send_burst(endpoint, client)
                        await leave_early(endpoint, client)
                        await read_metrics(client)
                        await stop(endpoint, client)
                finally:  # after Ctrl-C too the server ends by itself: hypercorn logs when it is cancelled
                    draining.set()
                    with anyio.move_on_after(5, shield=True):
                        await endpoint.drained.wait()

            await endpoint.drained.wait()
            counts = endpoint.loop.metrics.snapshot().counts
            told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
            print(f"\nDrained: {told or 'there was nothing to do'}; {endpoint.open} left open")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--port", type=port, help="serve there until SIGTERM (default: show itself, and end)")
    options = parser.read()
    sys.exit(status_of(main, options.backend, options.port, backend=options.backend))

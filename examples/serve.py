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
from functools import partial
from typing import Any

import anyio
import httpx2
import hypercorn
from anyio.abc import TaskStatus
from model_server import Faults, serve_model
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from serve_clients import knock, read_metrics, visit
from serve_endpoint import Endpoint, with_short_lifespan
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from streaming import write
from telling import Parser, port, status_of

from agentloop import (
    AgentLoop,
    Invocation,
    Limiter,
    LoopConfig,
    Status,
    drain_on_signals,
)
from agentloop.contrib.prometheus import LoopCollector

MAX_CONCURRENCY = 4
MAX_WAITING = 4
SEED = 4
FAULTS = Faults(rate_limited=0.1, server_error=0.1, gap_seconds=0.03)
CONFIG = LoopConfig(
    timeout_seconds=30,
    total_timeout_seconds=60,
    first_chunk_timeout_seconds=10,
    idle_timeout_seconds=10,
)


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

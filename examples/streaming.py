"""
Serve what an agent streams as server-sent events, over real HTTP, to a client that leaves halfway.

``python examples/streaming.py`` needs nothing else. It runs all three parties, with sockets between them::

    client  <-- events --  agent server  <-- events --  model server

When the client leaves, the agent server stops reading its stream. That ends the agent, and with it the
agent's request to the model server, which then stops too: no word is made that nobody will read.
"""

import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import h11
import httpx2
from anyio.abc import SocketAttribute, SocketStream
from model_server import Faults, reply_to, serve_model
from telling import Parser, status_of

from agentloop import AgentLoop, InvocationResult, LoopConfig, StreamChunk, StreamEvent

Results = list[InvocationResult[None]]

FAULTS = Faults(server_error=0.3, disconnect=0.3, gap_seconds=0.04)
SEED = 241  # with which the model fails in one way for the first prompt, in another for the second, then not
SCENES = (
    ("The model fails before it says a word, so it is asked again", "What is 17 * 23?", 0),
    ("The model breaks off in the middle, and the client is told", "Pack for the moon", 0),
    ("The client leaves after 5 events, so the model stops", "Wake a teenager", 5),
)


async def write(model: httpx2.AsyncClient, prompt: str) -> AsyncIterator[StreamChunk]:
    """The agent: an async generator function that asks the model, and yields what it says as it comes."""
    body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "stream": True}
    words = 0
    async with model.sse("chat/completions", method="POST", json=body) as events:
        events.response.raise_for_status()
        # Not before the model has agreed: only what fails before the first chunk is retried.
        yield StreamChunk(StreamEvent.START, {"model": body["model"]})
        async for event in events:
            if event.data != "[DONE]":
                completion: Any = event.json()
                if text := completion["choices"][0]["delta"].get("content"):
                    words += 1
                    yield StreamChunk(StreamEvent.TEXT, text)

    yield StreamChunk(StreamEvent.COMPLETE, {"words": words})


async def answer(loop: AgentLoop, model: httpx2.AsyncClient, results: Results, socket: SocketStream) -> None:
    """The agent server: answer one request with the agent's chunks, as long as the client is there."""
    http = h11.Connection(h11.SERVER)

    async def send(event: h11.Event) -> None:
        await socket.send(http.send(event) or b"")

    async def send_chunk(chunk: StreamChunk) -> None:
        await send(h11.Data(data=chunk.to_sse().encode()))

    async with socket:
        while not isinstance(request := http.next_event(), h11.Request):
            http.receive_data(await socket.receive())

        prompt = parse_qs(urlsplit(request.target).query)[b"prompt"][0].decode()
        headers = {"content-type": "text/event-stream", "cache-control": "no-store", "connection": "close"}
        await send(h11.Response(status_code=200, headers=list(headers.items())))
        async with loop.run_streaming("writer", write, model, prompt) as stream:
            try:
                async with anyio.create_task_group() as relay:
                    relay.start_soon(cancel_when_client_leaves, socket, relay.cancel_scope)
                    try:
                        async for chunk in stream:
                            await send_chunk(chunk)
                    except Exception as exc:  # the status has been sent, so an event has to tell
                        await send_chunk(StreamChunk(StreamEvent.ERROR, type(exc).__name__))

                    await send(h11.EndOfMessage())
                    relay.cancel_scope.cancel("the answer is complete")
            except* anyio.BrokenResourceError:  # the client left while something was sent
                pass

        results.append(stream.result)


async def cancel_when_client_leaves(socket: SocketStream, scope: anyio.CancelScope) -> None:
    try:
        while True:
            await socket.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        scope.cancel("the client left")


async def read(client: httpx2.AsyncClient, prompt: str, leave_after: int) -> None:
    """The client: show the events as they come; with ``leave_after``, disconnect after so many."""
    count, before = 0, ""
    with anyio.CancelScope() as stay:
        async with client.sse("/", params={"prompt": prompt}) as events:
            async for event in events:
                count += 1
                label = "" if event.event == before else f"\n  {event.event:14}"
                print(label, event.data, sep="", end="", flush=True)
                before = event.event
                if count == leave_after:
                    stay.cancel("the client has read enough")

    print("\n  (the client closes its connection)" if stay.cancelled_caught else "")


async def tell(backend: str) -> None:
    loop = AgentLoop(LoopConfig(max_retries=2, first_chunk_timeout_seconds=10, idle_timeout_seconds=5))
    results: Results = []
    async with (
        serve_model(FAULTS, seed=SEED) as server,
        httpx2.AsyncClient(base_url=server.base_url, timeout=None, trust_env=False) as model,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as connections,
    ):
        connections.start_soon(listener.serve, partial(answer, loop, model, results), connections)
        base_url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        print(f"Agent at {base_url}, model at {server.base_url}, on {backend}")
        async with httpx2.AsyncClient(base_url=base_url, timeout=5, trust_env=False) as client:
            for number, (title, prompt, leave_after) in enumerate(SCENES, 1):
                print(f"\n{number}. {title}", end="")
                requests, chunks, left = server.requests, server.chunks, server.disconnects
                await read(client, prompt, leave_after)
                with anyio.fail_after(5):
                    while server.active or len(results) < number:
                        await anyio.sleep(0.001)

                result, now, asked = results[-1], loop.statistics(), server.requests - requests
                ended = f"{result.status} after {result.chunks} chunks"
                sent = f"{server.chunks - chunks} of {len(reply_to(prompt).split())} words sent"
                gone = ", then its client was gone" if server.disconnects > left else ""
                print(f"  agent server  {ended}; {now.running} running, {now.waiting} waiting")
                print(f"  model server  asked {asked}x, {sent}{gone}; {server.active} active")

        connections.cancel_scope.cancel("the story is told")


def main() -> int:
    backend = Parser(__doc__).read().backend
    return status_of(tell, backend, backend=backend)


if __name__ == "__main__":
    sys.exit(main())

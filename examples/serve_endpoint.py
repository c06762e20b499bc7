"""The endpoint of serve.py: one request is one invocation, and its answer the stream of that."""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import anyio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentloop import AgentLoop, QueueFull, StreamChunk, StreamEvent


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

"""The example of a server, run as a user runs it, with real sockets and signals; and its endpoint alone."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import httpx2
import pytest
import serve
from examples_run import every_backend, run, start

from agentloop import AgentLoop, Limiter, LoopConfig, Status, StreamChunk, StreamEvent
from agentloop.testing import Chunks, FakeAgent, FakeHTTPError, Stall

pytestmark = pytest.mark.long


@contextmanager
def serving(backend: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give a server of its own process, and where it is."""
    with start("serve", "--backend", backend, "--port", "0") as process:
        try:
            assert process.stdout is not None
            found = re.match(rf"(http://127\.0\.0\.1:\d+)/.*, on {backend}; ", process.stdout.readline())
            assert found
            yield process, found[1]
        finally:
            process.kill()


# --- run as a user runs it


@every_backend
def test_demonstration_tells_what_a_server_has_to_do(backend: str) -> None:
    with start("serve", "--backend", backend) as process:
        out, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (0, "")
    rows = dict(re.findall(r"^  (\S+(?: \S+)*)  +(\S.*)$", out, re.MULTILINE))
    let_in = int(re.match(r"\d+", rows["at once"])[0])
    # One that was let in may have ended before the last of the burst came.
    assert 8 <= let_in <= 12
    assert let_in == 12 or rows["later"] == f"{12 - let_in}, told by 503 to come back in 1 s"
    assert rows["in the end"] == "12 have all of their answer"
    assert rows["the agent"] == "1 was cancelled"
    assert rows["the server"] == "<AgentLoop 0 running, 0 waiting, limit 4>"
    assert 'agentloop_invocations_total{loop="agent",status="success"} 12.0' in out
    assert rows["a new one"] == "is refused"
    assert re.fullmatch(r"goes on to the end: complete after \d+ events", rows["that one"])
    assert re.search(r"\nDrained: 13 success, 1 cancelled(, \d+ skipped)?; 0 left open\n$", out)
    assert out.isascii()
    assert all(len(line) <= 80 for line in out.splitlines())


@every_backend
def test_signal_lets_what_runs_finish_and_refuses_what_is_new(backend: str) -> None:
    with serving(backend) as (process, url):

        async def main() -> None:
            async with httpx2.AsyncClient(base_url=url, timeout=20, trust_env=False, verify=False) as client:
                # A connection that is kept alive, and does not keep the server alive.
                metrics = await client.get("/metrics")
                assert 'agentloop_limit{loop="agent"} 4.0' in metrics.text
                assert (await client.get("/")).status_code == 400
                assert (await client.get("/else")).status_code == 404
                assert (await client.post("/", params={"prompt": "Why"})).status_code == 405
                names: list[str] = []
                async with client.sse("/", params={"prompt": "Pack for the moon"}) as events:
                    assert events.response.headers["content-type"].startswith("text/event-stream")
                    async for event in events:
                        if not names:
                            process.send_signal(signal.SIGTERM)
                            await wait_until_refused(url)

                        names.append(event.event)

                assert names[0] == "start"
                assert names[-1] == "complete"
                assert len(names) > 5

        anyio.run(main, backend=backend)
        assert process.wait(timeout=20) == -signal.SIGTERM
        out, err = process.communicate()
        assert (out, err) == ("\nDrained: 1 success; 0 left open\n", "")


async def wait_until_refused(url: str) -> None:
    """Wait until a new connection is refused, or a request on it."""
    with anyio.fail_after(10):
        while True:
            async with httpx2.AsyncClient(timeout=10, trust_env=False, verify=False) as client:
                try:
                    response = await client.get(f"{url}/metrics")
                except httpx2.TransportError:
                    return

                assert response.status_code == 200
                await anyio.sleep(0.01)


@pytest.mark.parametrize(
    ("backend", "signum", "status"),
    [("asyncio", signal.SIGINT, 130), ("trio", signal.SIGTERM, -signal.SIGTERM)],
)
def test_idle_server_ends_at_once(backend: str, signum: signal.Signals, status: int) -> None:
    with serving(backend) as (process, _):
        process.send_signal(signum)
        out, err = process.communicate(timeout=20)
        drained = "\nDrained: there was nothing to do; 0 left open\n"
        assert (process.returncode, out, err) == (status, drained, "")


def test_unknown_backend_is_refused() -> None:
    done = run("serve", "--backend", "curio")
    assert (done.status, done.out) == (2, "")
    assert "argument --backend: invalid choice: 'curio'" in done.err


# --- the endpoint by itself, on a clock that jumps


class Client:
    """A request, as a server hands it on, with what was sent in answer to it."""

    def __init__(self, endpoint: serve.Endpoint, query: bytes = b"prompt=Why") -> None:
        self.endpoint = endpoint
        self.scope: dict[str, Any] = {
            "type": "http", "method": "GET", "path": "/", "query_string": query, "headers": [],
            "asgi": {"version": "3.0", "spec_version": "2.1"},
        }  # fmt: skip
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.left = anyio.Event()

    async def run(self) -> None:
        await self.endpoint(self.scope, self.receive, self.send)

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            self.body += message["body"]


@asynccontextmanager
async def endpoint_of(agent: FakeAgent, **config: Any) -> AsyncIterator[serve.Endpoint]:
    limiter = Limiter(4, max_waiting=serve.MAX_WAITING)
    async with AgentLoop(LoopConfig(**config), limiter=limiter) as loop:
        yield serve.Endpoint(loop, agent, anyio.Event())


TEXT = StreamChunk(StreamEvent.TEXT, "so")


async def test_exactly_as_many_are_let_in_as_have_a_place() -> None:
    agent = FakeAgent(Chunks([TEXT], after_seconds=10))
    async with endpoint_of(agent) as endpoint:
        for seconds in ("1", "13"):  # no place is lost in between
            clients = [Client(endpoint) for _ in range(20)]
            async with anyio.create_task_group() as group:
                for client in clients:
                    group.start_soon(client.run)

                await anyio.sleep(1)
                assert (endpoint.open, agent.running, endpoint.loop.statistics().waiting) == (8, 4, 4)

            assert [client.status for client in clients].count(200) == 8
            refused = [client for client in clients if client.status == 503]
            assert len(refused) == 12
            # Each takes ten seconds, four at a time, and one more would be the fifth of those who wait.
            assert {client.headers["retry-after"] for client in refused} == {seconds}
            assert endpoint.open == 0

    assert len(agent.calls) == 16


async def test_client_that_stops_reading_and_leaves_takes_its_invocation_with_it() -> None:
    class StuckClient(Client):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if self.body:
                await anyio.sleep_forever()

    agent = FakeAgent(Chunks([TEXT], then=Stall()))
    async with endpoint_of(agent) as endpoint:
        client = StuckClient(endpoint)
        async with anyio.create_task_group() as group:
            group.start_soon(client.run)
            await anyio.sleep(1)
            client.left.set()

        assert (endpoint.open, agent.running, endpoint.loop.statistics().running) == (0, 0, 0)


@pytest.mark.parametrize("seconds", [0, 5, 15])
async def test_client_that_leaves_takes_its_invocation_with_it(seconds: int) -> None:
    agent = FakeAgent(Chunks([TEXT], after_seconds=10, then=Stall()))
    async with endpoint_of(agent) as endpoint:
        client = Client(endpoint)
        async with anyio.create_task_group() as group:
            group.start_soon(client.run)
            await anyio.sleep(seconds)
            client.left.set()

        assert (endpoint.open, agent.running, endpoint.loop.statistics().running) == (0, 0, 0)
        assert all(call.cancelled for call in agent.calls)
        assert endpoint.loop.metrics.snapshot().counts[Status.SUCCESS] == 0

    assert (b"data: so" in client.body) == (seconds > 10)


async def test_failure_is_told_as_an_event() -> None:
    agent = FakeAgent(
        FakeHTTPError(404), Chunks([TEXT], then=ValueError("secret")), Chunks([TEXT], then=Stall())
    )
    async with endpoint_of(agent, idle_timeout_seconds=5) as endpoint:
        bodies = []
        for _ in range(3):
            client = Client(endpoint)
            await client.run()
            bodies.append(client.body.decode())

    text = "event: text\ndata: so\n\n"
    assert bodies == [
        "event: error\ndata: FakeHTTPError\n\n",
        f"{text}event: error\ndata: ValueError\n\n",
        f"{text}event: error\ndata: IdleTimeout\n\n",
    ]


async def test_request_without_a_prompt_or_to_a_server_that_drains_is_refused() -> None:
    async with endpoint_of(FakeAgent(Stall())) as endpoint:
        empty = Client(endpoint, b"")
        await empty.run()
        endpoint.draining.set()
        late = Client(endpoint)
        await late.run()

    assert (empty.status, late.status) == (400, 503)
    assert late.headers["connection"] == "close"

"""The example of a streaming endpoint: what a person sees who runs it, on both backends."""

from __future__ import annotations

import re
import sys
from functools import cache, partial
from typing import NamedTuple

import anyio
import examples_run
import httpx2
import pytest
import streaming
from anyio.abc import SocketAttribute
from examples_run import BACKENDS, every_backend
from model_server import Faults, reply_to, serve_model

from agentloop import AgentLoop, InvocationResult, Status

pytestmark = pytest.mark.long


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Scene(NamedTuple):
    """What one client and its two servers have shown."""

    title: str
    rows: dict[str, str]
    chunks: int
    """How many the agent yielded, by its result."""

    sent: int
    """How many words the model server says that it sent."""

    reply: str
    """The whole of what the model would have said."""


@cache
def output(backend: str) -> str:
    return examples_run.output("streaming", "--backend", backend)


def scenes(backend: str) -> list[Scene]:
    _, *parts = output(backend).split("\n\n")
    told: list[Scene] = []
    for part, (_, prompt, _) in zip(parts, streaming.SCENES, strict=True):
        title, *lines = part.splitlines()
        rows = {name: text.strip() for name, _, text in (line.strip().partition("  ") for line in lines)}
        ended = re.search(r"after (\d+) chunks; 0 running, 0 waiting$", rows["agent server"])
        sent = re.search(r"(\d+) of (\d+) words sent", rows["model server"])
        assert ended
        assert sent
        reply = reply_to(prompt)
        assert int(sent[2]) == len(reply.split())
        told.append(Scene(title, rows, int(ended[1]), int(sent[1]), reply))

    return told


@every_backend
def test_output_is_short_plain_and_names_its_backend(backend: str) -> None:
    out = output(backend)
    assert out.splitlines()[0].endswith(f", on {backend}")
    assert out.isascii()
    assert len(out.splitlines()) < 30
    assert max(map(len, out.splitlines())) <= 80


@every_backend
def test_failure_before_the_first_chunk_is_retried_and_the_client_gets_the_whole_reply(backend: str) -> None:
    scene = scenes(backend)[0]
    assert list(scene.rows) == ["start", "text", "complete", "agent server", "model server"]
    assert scene.rows["text"] == scene.reply
    assert scene.rows["agent server"].startswith("success ")
    assert scene.rows["model server"].startswith("asked 2x, ")
    assert scene.rows["model server"].endswith(" words sent; 0 active")
    assert scene.sent == len(scene.reply.split())
    assert scene.chunks == scene.sent + 2, "one before the words, and one after them"


@every_backend
def test_failure_in_the_middle_comes_as_an_event_after_what_was_said(backend: str) -> None:
    scene = scenes(backend)[1]
    assert list(scene.rows) == ["start", "text", "error", "agent server", "model server"]
    assert scene.rows["text"].split() == scene.reply.split()[: scene.sent]
    assert 0 < scene.sent < len(scene.reply.split())
    assert scene.chunks == scene.sent + 1, "the error came from the server, not from the agent"
    assert scene.rows["error"] == "RemoteProtocolError"
    assert scene.rows["agent server"].startswith("error ")
    assert scene.rows["model server"].startswith("asked 1x, ")


@every_backend
def test_client_that_leaves_halfway_ends_the_request_to_the_model(backend: str) -> None:
    scene = scenes(backend)[2]
    assert list(scene.rows) == [
        "start",
        "text",
        "(the client closes its connection)",
        "agent server",
        "model server",
    ]
    assert scene.reply.startswith(scene.rows["text"])
    assert scene.rows["agent server"].startswith("cancelled ")
    assert scene.rows["model server"].startswith("asked 1x, ")
    assert scene.rows["model server"].endswith(" words sent, then its client was gone; 0 active")
    # Each word may be on its way from one to the next, but no word comes from nowhere.
    assert 4 <= len(scene.rows["text"].split()) <= scene.chunks - 1 <= scene.sent < len(scene.reply.split())


async def test_client_that_leaves_is_noticed_while_the_model_says_nothing() -> None:
    loop = AgentLoop()
    results: list[InvocationResult[None]] = []
    async with (
        serve_model(Faults(gap_seconds=3600)) as server,
        httpx2.AsyncClient(base_url=server.base_url, timeout=None, trust_env=False, verify=False) as model,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as connections,
    ):
        connections.start_soon(listener.serve, partial(streaming.answer, loop, model, results), connections)
        with anyio.fail_after(5):
            port = listener.extra(SocketAttribute.local_port)
            async with await anyio.connect_tcp("127.0.0.1", port) as client:
                await client.send(b"GET /?prompt=Why HTTP/1.1\r\nHost: agent\r\n\r\n")
                received = b""
                while b"event: start\ndata: " not in received:
                    received += await client.receive()

                assert (loop.statistics().running, server.active) == (1, 1)

            while not results or server.active:
                await anyio.sleep(0.002)

        connections.cancel_scope.cancel()

    assert (results[0].status, results[0].chunks) == (Status.CANCELLED, 1)
    assert (server.chunks, server.disconnects) == (0, 1)
    assert loop.statistics().running == 0


def test_unknown_backend_is_refused() -> None:
    done = examples_run.run("streaming", "--backend", "curio")
    assert (done.status, done.out) == (2, "")
    assert "argument --backend: invalid choice: 'curio'" in done.err


def test_missing_trio_is_told_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streaming.anyio, "get_available_backends", lambda: ("asyncio",))
    monkeypatch.setattr(sys, "argv", ["streaming.py", "--backend", "trio"])
    with pytest.raises(SystemExit) as caught:
        streaming.main()

    assert caught.value.code == 2
    assert "pip install trio" in capsys.readouterr().err

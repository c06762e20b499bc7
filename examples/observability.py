"""
See what a run does while it runs, and what it did: every adapter at once, against a server with faults.

``python examples/observability.py`` starts an OpenAI-compatible server of its own, sends prompts, plain and
streamed, and leaves behind a timeline for Perfetto, a report, the numbers as JSON and, where
``prometheus_client`` is installed, what Prometheus would be told. With ``rich`` it shows how far it is; with
OpenTelemetry's API it makes a span of each invocation.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from model_server import Faults, serve_model
from telling import Parser, status_of, whole

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    ChunkEvent,
    Event,
    Invocation,
    LoopConfig,
    drain_on_signals,
)
from agentloop.contrib.report import write_report
from agentloop.contrib.timeline import Timeline

FAULTS = Faults(
    capacity=12,
    server_error=0.15,
    hang=0.02,
    disconnect=0.03,
    retry_after_seconds=0.1,
    delay_seconds=0.05,
    gap_seconds=0.005,
)
CONFIG = LoopConfig(
    max_concurrency=20, timeout_seconds=0.8, max_retries=2, backoff=Backoff(initial_seconds=0.05)
)


def body(prompt: str, stream: bool) -> dict[str, object]:
    return {"model": "demo", "messages": [{"role": "user", "content": prompt}], "stream": stream}


async def ask(client: httpx2.AsyncClient, prompt: str) -> str:
    response = await client.post("chat/completions", json=body(prompt, stream=False))
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


async def tell(client: httpx2.AsyncClient, prompt: str) -> AsyncIterator[str]:
    async with client.stream("POST", "chat/completions", json=body(prompt, stream=True)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield str(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))


def adapter(module: str, name: str) -> Any:
    """Return an adapter, or ``None`` where what it needs is not installed."""
    try:
        return getattr(importlib.import_module(f"agentloop.contrib.{module}"), name)
    except ImportError:
        return None


async def run(directory: Path, count: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    make_span_sink = adapter("opentelemetry", "OpenTelemetrySink")
    progress = adapter("progress", "progress")
    spans: list[Callable[[Event], object]] = [make_span_sink()] if make_span_sink else []
    timeline = Timeline(directory / "timeline.json")
    loop = AgentLoop(CONFIG, on_event=[*spans, timeline])
    shown: AbstractAsyncContextManager[Any] = progress(loop, total=count) if progress else nullcontext()
    chunks = 0
    try:
        async with (
            # Ctrl-C lets what runs finish, and then there is a report too.
            drain_on_signals(loop, grace_seconds=2),
            serve_model(FAULTS, seed=7) as server,
            httpx2.AsyncClient(base_url=server.base_url, timeout=None, trust_env=False) as client,
            shown,
        ):
            print(f"{count} prompts; Ctrl-C ends it early, with a report", flush=True)
            questions = [f"What is {number + 17} * 23?" for number in range(count - count // 5)]
            await loop.run_all(Invocation.map(partial(ask, client), questions, agent_id="question"))

            topics = [f"Tip {number} for testing" for number in range(count // 5)]
            streams = Invocation.map(partial(tell, client), topics, agent_id="stream")
            with suppress(BatchStopped):  # by Ctrl-C
                async with loop.stream_all(streams) as events:
                    async for event in events:
                        chunks += isinstance(event, ChunkEvent)
    finally:
        timeline.close()
        report(directory, count, loop)
        snapshot = loop.metrics.snapshot()
        print(", ".join(f"{number} {status}" for status, number in snapshot.counts.items() if number))
        print(f"{chunks} chunks, {snapshot.retries} retries, p95 {snapshot.latency.p95_ms:.0f} ms\n")
        for name, hint in HINTS.items():
            if (directory / name).exists():
                print(f"{directory / name}\n    {hint}")


def report(directory: Path, count: int, loop: AgentLoop) -> None:
    """Write what is left to write."""
    snapshot = loop.metrics.snapshot()
    title = f"{count} prompts, {CONFIG.max_concurrency} at once"
    write_report(directory / "report.html", snapshot, directory / "timeline.json", title=title)
    (directory / "metrics.json").write_text(json.dumps(snapshot.to_dict(), indent=1), "utf-8")
    collector = adapter("prometheus", "LoopCollector")
    if collector is not None:
        prometheus: Any = importlib.import_module("prometheus_client")
        registry = prometheus.CollectorRegistry()
        registry.register(collector({"prompts": loop}))
        (directory / "metrics.prom").write_bytes(prometheus.generate_latest(registry))


HINTS = {
    "report.html": "open it in a browser",
    "timeline.json": "open it at https://ui.perfetto.dev, which reads it in your browser",
    "metrics.json": "all counts and distributions",
    "metrics.prom": "what Prometheus is told",
}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("directory", nargs="?", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--count", type=whole, default=400, help="how many prompts (default: 400)")
    options = parser.read()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="agentloop-"))
    return status_of(run, directory, options.count, backend=options.backend)


if __name__ == "__main__":
    sys.exit(main())

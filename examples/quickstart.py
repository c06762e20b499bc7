"""
Send 200 prompts to a model server that fails in every way servers fail, and get one result for each.

``python examples/quickstart.py`` needs nothing else: it starts an OpenAI-compatible server of its own, whose
faults depend on ``--seed`` alone, so that a second run tells the same story. It takes fewer at once than it
is sent, and refuses the rest with HTTP 429: the limiter finds out how many. To ask a real one, such as vLLM
or Ollama: ``python examples/quickstart.py --base-url http://localhost:11434/v1``.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import BinaryIO, cast

import httpx2
from model_server import Faults, ModelServer, serve_model
from quickstart_story import clip, learned, progress, show, story, timing
from telling import Parser, seconds, status_of, whole

from agentloop import (
    AgentLoop,
    BatchStopped,
    Invocation,
    InvocationResult,
    Limiter,
    LoopConfig,
    drain_on_signals,
)

FAULTS = Faults(
    capacity=10,
    retry_after_seconds=0.1,
    server_error=0.16,
    hang=0.02,
    disconnect=0.06,
    delay_seconds=0.08,
    hang_seconds=3600,
)


async def ask(client: httpx2.AsyncClient, model: str, prompt: str) -> str:
    """The agent: an async function that returns or raises. All else is up to the loop."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    response = await client.post("chat/completions", json=body)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


async def ask_all(options: argparse.Namespace) -> bool:
    """Ask every prompt and tell what came of it. Return whether each of them got a result."""
    embedded: AbstractAsyncContextManager[ModelServer | None] = (
        nullcontext() if options.base_url else serve_model(FAULTS, seed=options.seed)
    )
    prompts: Sequence[str] = options.prompts
    limit: int = options.concurrency
    limiter = Limiter(limit)
    loop = AgentLoop(LoopConfig(timeout_seconds=options.timeout, max_retries=2), limiter=limiter)
    results: list[InvocationResult[str]] = []
    stopped: BatchStopped | None = None
    async with (
        drain_on_signals(loop),  # at the first Ctrl-C what runs may finish, a second one cancels it
        embedded as server,
        httpx2.AsyncClient(
            base_url=server.base_url if server else options.base_url,
            headers=options.headers,
            limits=httpx2.Limits(max_connections=limit, max_keepalive_connections=limit),
            timeout=None,  # the loop times each attempt as a whole
            trust_env=server is None,  # a proxy would not find the embedded server
        ) as client,
    ):
        invocations = Invocation.map(partial(ask, client, options.model), prompts, agent_id="prompt")
        start = time.perf_counter()
        try:
            with progress(len(prompts)) as advance:
                async with loop.as_completed(invocations) as completed:
                    async for result in completed:
                        results.append(result)
                        advance()
        except (
            BatchStopped
        ) as exc:  # by Ctrl-C; or with a key that is refused, no other prompt would fare better
            stopped = exc
        finally:  # whatever has happened: what has been finished is worth reading
            elapsed = time.perf_counter() - start
            results.sort(key=lambda result: result.index)
            show(story(prompts, results, server))
            if stopped:
                show([("The batch was stopped", [("because", clip(stopped.reason))])])

            show([timing(loop, len(results), elapsed, options.backend), learned(limiter, results, server)])

    return len(results) == len(prompts)


def made_up(count: int) -> list[str]:
    """Return prompts that are all different."""
    who, what = ("otters", "pigeons", "toddlers", "robots"), ("chess", "jazz", "yoga", "patience", "algebra")
    questions = (f"What is {n + 17} * 23?" for n in range(0, count, 2))
    requests = (f"Tip {n} for teaching {who[n // 2 % 4]} {what[n // 2 % 5]}" for n in range(1, count + 1, 2))
    return [prompt for pair in zip(questions, requests, strict=True) for prompt in pair][:count]


def lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = [line.strip() for line in file if line.strip()]
    except (OSError, ValueError) as exc:
        raise argparse.ArgumentTypeError(f"cannot read {path!r}: {exc}") from exc

    if not found:
        raise argparse.ArgumentTypeError(f"there is no prompt in {path!r}")

    return found


def url(value: str) -> str:
    try:
        parsed = httpx2.URL(value)
        if parsed.scheme in ("http", "https") and parsed.host and 0 < (parsed.port or 1) < 65536:
            return value.rstrip("/")
    except httpx2.InvalidURL:
        pass

    raise argparse.ArgumentTypeError(f"must look like http://localhost:8000/v1, got {value!r}")


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "OPENAI_API_KEY, with --base-url")
    add = parser.add_argument
    add("--prompts", type=lines, metavar="FILE", help="one prompt per line (default: made-up ones)")
    add("--count", type=whole, metavar="N", help="how many at most (default: 200, or the whole FILE)")
    add("--concurrency", type=whole, metavar="N", default=20, help="how many at once (default: 20)")
    add("--seed", type=int, metavar="N", default=5762, help="of the embedded server's faults (default: 5762)")
    add("--base-url", type=url, metavar="URL", help="of a real server (default: embed one)")
    add("--model", metavar="NAME", help="what to ask there (default: the first that it lists)")
    add("--timeout", type=seconds, metavar="SECONDS", help="per attempt (default: 2; 60 with --base-url)")
    options = parser.read()
    options.timeout = options.timeout or (60.0 if options.base_url else 2.0)
    options.prompts = (options.prompts or made_up(options.count or 200))[: options.count]
    if not options.base_url:
        # The embedded server knows a prompt that is sent again by its text, so no two may be alike.
        first = {prompt: n for n, prompt in reversed([*enumerate(options.prompts)])}
        options.prompts = [p if first[p] == n else f"{p} (again, {n})" for n, p in enumerate(options.prompts)]

    key = os.environ.get("OPENAI_API_KEY") if options.base_url else None
    options.headers = {"Authorization": f"Bearer {key}"} if key else {}
    return options


def find_model(options: argparse.Namespace) -> str:
    """Ask a real server for its models, and so find out whether it is there."""
    where = f"{options.base_url}/models"
    try:
        response = httpx2.get(where, headers=options.headers, timeout=10)
        response.raise_for_status()
        return str(options.model or response.json()["data"][0]["id"])
    except Exception as exc:  # whatever can go wrong between here and an answer that makes sense
        problem = clip(f"{type(exc).__name__}: {exc}".partition(" for url ")[0])
        hint = "start one there, check --base-url and OPENAI_API_KEY, or leave --base-url out"
        sys.exit(f"quickstart.py: error: no model server at {where} ({problem}): {hint}")


async def run(options: argparse.Namespace) -> bool:
    place = options.base_url or f"an embedded server, seed {options.seed}"
    print(f"{len(options.prompts)} prompts for {options.model} at {place}")
    print(f"{options.concurrency} at once, {options.timeout:g} s per attempt, up to 2 retries", flush=True)
    return await ask_all(options)


def main() -> int:
    options = parse()
    # A model may answer in letters that this terminal does not have.
    cast("io.TextIOWrapper[BinaryIO]", sys.stdout).reconfigure(errors="replace")
    try:
        options.model = find_model(options) if options.base_url else "demo"
        status = status_of(run, options, backend=options.backend)
    except KeyboardInterrupt:  # while the server is asked what it has
        status = 130

    if status == 130:
        print("Interrupted.", file=sys.stderr)

    return status


if __name__ == "__main__":
    sys.exit(main())

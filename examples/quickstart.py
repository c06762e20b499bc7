"""
Send 200 prompts to a model server that fails in every way servers fail, and get one result for each.

``python examples/quickstart.py`` needs nothing else: it starts an OpenAI-compatible server of its own, whose
faults depend on ``--seed`` alone, so that a second run tells the same story. It takes fewer at once than it
is sent, and refuses the rest with HTTP 429: the limiter finds out how many. To ask a real one, such as vLLM
or Ollama: ``python examples/quickstart.py --base-url http://localhost:11434/v1``.
"""

import argparse
import importlib.util
import io
import itertools
import math
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from functools import partial
from typing import BinaryIO, NoReturn, cast

import anyio
import httpx2
from model_server import Faults, ModelServer, Outcome, serve_model

from agentloop import (
    AgentLoop,
    BatchStopped,
    Invocation,
    InvocationResult,
    Limiter,
    LoopConfig,
    Status,
    VerdictKind,
    classify,
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
FAULT_NAMES: dict[Outcome, str] = {
    "server_error": "HTTP 500",
    "hang": "InvocationTimeout",
    "disconnect": "RemoteProtocolError",
}
MAP = "Each prompt: . first try, 1-9 retries, E error, T time-out, S skipped, ? none"
USUAL = (Status.SUCCESS, Status.ERROR, Status.TIMEOUT)
Section = tuple[str, Sequence[tuple[str, str]]]  # a title, and rows of a label and a value


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


def story(
    prompts: Sequence[str], results: Sequence[InvocationResult[str]], server: ModelServer | None
) -> Iterator[Section]:
    """Tell what happened, overload apart, which is the same in every run with the same seed."""
    if answered := [result for result in results if result.success]:
        hardest = max(answered, key=lambda result: len(retried(result)))
        samples = {result.index: clip(result.output or "") for result in (*answered[:2], hardest)}
        yield "Some answers", [(clip(prompts[index], 36), answer) for index, answer in samples.items()]

    if results:
        marks = {result.index: mark(result) for result in results}
        line = "".join(marks.get(index, "?") for index in range(min(max(marks) + 1, 500)))
        yield MAP, [(f"prompt-{start}", line[start : start + 50]) for start in range(0, len(line), 50)]

    complete = Counter(r.agent_id for r in results) == Counter(f"prompt-{n}" for n in range(len(prompts)))
    part = f"{len(results)} of {len(prompts)} prompts have a result"
    counts = Counter(result.status for result in results)
    rows = [(status.value, f"{counts[status]:5}") for status in Status if counts[status] or status in USUAL]
    rows.append(("retries made", f"{sum(len(retried(result)) for result in results):5}"))
    yield "Every prompt has exactly one result" if complete else part, rows

    seen = Counter(cause(exc) for result in results for exc in result.failures if not is_overload(exc))
    rows = [(name, f"{count:5} seen by the loop") for name, count in seen.most_common()]
    if server:
        dealt = server.outcomes
        rows = [
            (name, f"{seen[name]:5} seen by the loop, {dealt[key]} dealt out by the server")
            for key, name in FAULT_NAMES.items()
        ]

    if rows:
        yield "What went wrong on the way", rows

    if failed := [result for result in results if not result.success]:
        rows = [(result.agent_id, reason(result)) for result in failed[:10]]
        yield f"{len(failed)} failed in the end", [*rows, ("...", "")] if failed[10:] else rows


def mark(result: InvocationResult[str]) -> str:
    if not result.success:
        return result.status.value[0].upper()

    return str(min(len(retried(result)), 9)) if retried(result) else "."


def retried(result: InvocationResult[str]) -> list[Exception]:
    """Return what the loop retried, but for overload: that is a matter of time, and not of the seed."""
    return [exc for exc in result.failures[: result.retries] if not is_overload(exc)]


def is_overload(exc: Exception) -> bool:
    return classify(exc).kind is VerdictKind.OVERLOAD


def cause(exc: Exception) -> str:
    if isinstance(exc, httpx2.HTTPStatusError):
        return f"HTTP {exc.response.status_code}"

    return type(exc).__name__


def reason(result: InvocationResult[str]) -> str:
    # An HTTP error goes on with its URL, which is the same for all, and a link to an encyclopedia.
    error = clip((result.error or "").partition(" for url ")[0])
    attempts = [*retried(result), *result.failures[result.retries :]]
    return f"{error} (attempts: {', '.join(cause(exc) for exc in attempts)})"


def clip(text: str, width: int = 200) -> str:
    """Return the text as one line, which does nothing to a terminal."""
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def timing(loop: AgentLoop, count: int, elapsed: float, backend: str) -> Section:
    metrics = loop.metrics.snapshot()
    times = [("latency", metrics.latency), ("queue", metrics.queue)]
    rows = [(k, f"p50 {d.p50_ms:.0f} ms, p95 {d.p95_ms:.0f} ms, p99 {d.p99_ms:.0f} ms") for k, d in times]
    wall_time = f"{elapsed:.1f} s on {backend}, {count / elapsed:.0f} prompts a second"
    return "Timing", [*rows, ("wall time", wall_time)]


def learned(
    limiter: Limiter, results: Sequence[InvocationResult[str]], server: ModelServer | None
) -> Section:
    """Tell what became of the limit, which follows what the server takes."""
    seen = Counter(cause(exc) for result in results for exc in result.failures if is_overload(exc))
    rows = [(name, f"{count} seen by the loop, not counted above") for name, count in seen.most_common()]
    title = "What the limiter learned"
    if server:
        dealt = f"{server.rejected} dealt out by the server"
        rows = [("HTTP 429", f"{seen['HTTP 429']} seen by the loop, {dealt}, not counted above")]
        title += f" about a server that takes {server.faults.capacity} at once"

    now = limiter.statistics()
    limit = f"{now.max_concurrency} at once, cut {now.cuts}x, {now.limit} at the end"
    return title, [*rows, ("limit", limit)]


def has_rich() -> bool:
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


@contextmanager
def progress(total: int) -> Generator[Callable[[], object]]:
    """Give a function to call for each result, and show how far it is."""
    if has_rich():
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            yield partial(bar.advance, bar.add_task("asking", total=total))
    else:
        print("done:", end="", flush=True)
        numbers = itertools.count(1)
        step = -(-total // 10)

        def advance() -> None:
            if (number := next(numbers)) % step == 0 or number == total:
                print(f" {number}", end="", flush=True)

        try:
            yield advance
        finally:
            print()


def show(sections: Iterable[Section]) -> None:
    """Print the sections: framed and coloured on a terminal, elsewhere as plain text of 80 columns."""
    if not has_rich():
        for title, rows in sections:
            print(f"\n{title}")
            indent = max(len(label) for label, _ in rows) + 4
            for label, value in rows:
                left = f"  {label}".ljust(indent)
                print(textwrap.fill(value, 80, initial_indent=left, subsequent_indent=" " * indent) or left)

        return

    from rich import console, panel, table, text

    terminal = console.Console()
    for title, rows in sections:
        grid = table.Table.grid("", "", padding=(0, 2))
        for label, value in rows:
            styled = text.Text(value)
            if title == MAP:
                for pattern, style in (r"\.", "green"), (r"\d", "yellow"), ("[A-Z]", "bold red"):
                    styled.highlight_regex(pattern, style)

            grid.add_row(text.Text(label, "cyan"), styled)

        heading = text.Text(title, "bold")
        terminal.print(panel.Panel(grid, title=heading, title_align="left", width=min(terminal.width, 90)))


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


def whole(value: str) -> int:
    if value.isdecimal() and int(value) > 0:
        return int(value)

    raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {value!r}")


def seconds(value: str) -> float:
    try:
        if 0 < (number := float(value)) < math.inf:
            return number
    except ValueError:
        pass

    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {value!r}")


def url(value: str) -> str:
    try:
        parsed = httpx2.URL(value)
        if parsed.scheme in ("http", "https") and parsed.host and 0 < (parsed.port or 1) < 65536:
            return value.rstrip("/")
    except httpx2.InvalidURL:
        pass

    raise argparse.ArgumentTypeError(f"must look like http://localhost:8000/v1, got {value!r}")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # without the usage, which would be six lines


def parse() -> argparse.Namespace:
    parser = OneLineParser(description="Send prompts to a model server that fails in every way servers fail.")
    add = parser.add_argument
    add("--backend", choices=["asyncio", "trio"], default="asyncio")
    add("--prompts", type=lines, metavar="FILE", help="one prompt per line (default: made-up ones)")
    add("--count", type=whole, metavar="N", help="how many at most (default: 200, or the whole FILE)")
    add("--concurrency", type=whole, metavar="N", default=20, help="how many at once (default: 20)")
    add("--seed", type=int, metavar="N", default=5762, help="of the embedded server's faults (default: 5762)")
    add("--base-url", type=url, metavar="URL", help="of a real server (default: embed one)")
    add("--model", metavar="NAME", help="what to ask there (default: the first that it lists)")
    add("--timeout", type=seconds, metavar="SECONDS", help="per attempt (default: 2; 60 with --base-url)")
    options = parser.parse_args()
    if options.backend not in anyio.get_available_backends():
        parser.error(f"--backend {options.backend} needs a package: pip install {options.backend}")

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


def main() -> int:
    options = parse()
    # A model may answer in letters that this terminal does not have.
    cast("io.TextIOWrapper[BinaryIO]", sys.stdout).reconfigure(errors="replace")
    status = 130  # 128 and the number of SIGINT, as shells have it
    try:
        options.model = find_model(options) if options.base_url else "demo"
        place = options.base_url or f"an embedded server, seed {options.seed}"
        print(f"{len(options.prompts)} prompts for {options.model} at {place}")
        print(
            f"{options.concurrency} at once, {options.timeout:g} s per attempt, up to 2 retries", flush=True
        )
        status = 0 if anyio.run(ask_all, options, backend=options.backend) else 1
    except* KeyboardInterrupt:  # in an exception group, on trio
        print("Interrupted.", file=sys.stderr)
    except* BrokenPipeError:  # whoever reads what we print has had enough, as "head" has after ten lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return status


if __name__ == "__main__":
    sys.exit(main())

"""What quickstart.py tells of a run: framed and coloured on a terminal, elsewhere as plain text."""

import importlib.util
import itertools
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import httpx2
from model_server import ModelServer, Outcome

from agentloop import AgentLoop, InvocationResult, Limiter, Status, VerdictKind, classify

FAULT_NAMES: dict[Outcome, str] = {
    "server_error": "HTTP 500",
    "hang": "InvocationTimeout",
    "disconnect": "RemoteProtocolError",
}
MAP = "Each prompt: . first try, 1-9 retries, E error, T time-out, S skipped, ? none"
USUAL = (Status.SUCCESS, Status.ERROR, Status.TIMEOUT)
Section = tuple[str, Sequence[tuple[str, str]]]  # a title, and rows of a label and a value


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

    fine = (Status.SUCCESS, Status.SKIPPED)
    if failed := [result for result in results if result.status not in fine]:
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
    return f"{error} (attempts: {', '.join(map(cause, attempts))})" if attempts else error


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

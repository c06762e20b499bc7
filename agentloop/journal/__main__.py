"""Prints the contents of a journal: ``python -m agentloop.journal show FILE``, also while it is written."""

from __future__ import annotations

__all__ = ["main"]

import argparse
import json
import os
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any, TextIO

from .._errors import JournalError
from .._metrics.histogram import Distribution
from ._entries import all_rows, read_metrics
from ._file import connect, explain, inspect

RUNS = 10
ERRORS = 5


def show(path: str, out: TextIO) -> int:
    """Print the runs, the counts by agent and status, latencies and the last errors."""
    runs = _read(path, "SELECT run, began, ended, outcome, host, pid, version FROM runs ORDER BY run DESC")
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}", file=out)
    for run, began, ended, outcome, host, pid, version in reversed(runs[:RUNS]):
        state = f"{outcome} after {ended - began:.0f}s" if ended else "running, or killed"
        print(f"  {run}  {_date(began)}  {state}  on {host}, process {pid}, version {version}", file=out)

    counts: Counter[tuple[str, str, int]] = Counter()
    for _, agent, status, stale in all_rows(path, "id, agent, status, stale"):
        counts[agent, status, stale] += 1

    print(f"{counts.total()} result{'s' * (counts.total() != 1)}", file=out)
    for (agent, status, stale), count in sorted(counts.items()):
        print(f"  {count:>9,} {status}{' of another version' * stale}  {agent}", file=out)

    metrics = read_metrics(path).snapshot()
    for name, distribution in (("latency", metrics.latency), ("queue", metrics.queue)):
        if counts:
            print(_line(name, distribution), file=out)

    sql = f"SELECT at, agent_id, error FROM results WHERE error IS NOT NULL ORDER BY at DESC LIMIT {ERRORS}"
    errors = _read(path, sql)
    if errors:
        print("the last errors", file=out)
        for at, agent_id, error in reversed(errors):
            print(f"  {_date(at)}  {agent_id}  {error}", file=out)

    return 0


def export(path: str, out: TextIO) -> int:
    """Write each result as a line of JSON."""
    for _, key, index, agent, status, output, error in all_rows(
        path, "id, key, idx, agent, status, output, error"
    ):
        line = {
            "custom_id": key.hex() if isinstance(key, bytes) else str(key),
            "index": index,
            "agent": agent,
            "status": status,
            "response": None if output is None else _response(output),
            "error": error,
        }
        print(json.dumps(line, ensure_ascii=False), file=out)

    return 0


def check(path: str, out: TextIO) -> int:
    """Check the file for damage."""
    problems = [problem for (problem,) in _read(path, "PRAGMA integrity_check")]
    if problems == ["ok"]:
        ((count,),) = _read(path, "SELECT count(*) FROM results")
        print(f"{path} is good: {count} results", file=out)
        return 0

    print(*problems, f"save what can be read by `sqlite3 {path} .recover`", sep="\n", file=out)
    return 1


def _read(path: str, sql: str) -> list[tuple[Any, ...]]:
    try:
        with closing(connect(path)) as connection:
            return connection.execute(sql).fetchall()
    except sqlite3.Error as exc:
        raise explain(path, exc) from exc


def _response(output: str | bytes) -> Any:
    text = output if isinstance(output, str) else output.decode(errors="backslashreplace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _line(name: str, times: Distribution) -> str:
    return (
        f"{name}: mean {times.mean_ms:,.1f} ms, p50 {times.p50_ms:,.1f}, p95 {times.p95_ms:,.1f}, "
        f"p99 {times.p99_ms:,.1f}, longest {times.max_ms:,.1f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    parser = argparse.ArgumentParser(
        "python -m agentloop.journal", description="Print the contents of a journal."
    )
    commands = parser.add_subparsers(required=True, dest="command")
    for name, text in (
        ("show", "runs, counts by agent and status, latencies and the last errors"),
        ("export", "one line of JSON for each result"),
        ("check", "look for damage"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file")
        if name == "export":
            command.add_argument("out", nargs="?", help="where to write; standard output if absent")

    options = parser.parse_args(arguments)
    path: str = options.file
    try:
        if not inspect(path):
            raise JournalError(f"{path}: there is no journal")

        if options.command == "export" and options.out is not None:
            with open(options.out, "w", encoding="utf-8") as out:
                return export(path, out)

        return {"show": show, "export": export, "check": check}[options.command](path, sys.stdout)
    except sqlite3.Error as exc:
        print(explain(path, exc), file=sys.stderr)
    except BrokenPipeError:
        # The reader has closed the pipe; the interpreter would report an error when it flushes the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (JournalError, OSError) as exc:
        print(exc, file=sys.stderr)

    return 1


if __name__ == "__main__":
    sys.exit(main())

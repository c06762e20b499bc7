"""An agent that knows how often it was called, and batches of it."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio

from agentloop import AgentLoop, Invocation, InvocationResult
from agentloop.journal import Journal


class Asker:
    """
    Makes an agent, and counts its calls.

    :param seconds: how long each takes
    :param fails: what it raises for an item, if anything
    """

    def __init__(
        self, seconds: float = 0.0, fails: Callable[[Any], BaseException | None] = lambda _: None
    ) -> None:
        self.calls: list[Any] = []
        self.ended: list[Any] = []

        async def ask(x: Any) -> Any:
            self.calls.append(x)
            await anyio.sleep(seconds)
            self.ended.append(x)
            error = fails(x)
            if error is not None:
                raise error

            return {"answer": x}

        self.ask = ask

    @property
    def counts(self) -> Counter[Any]:
        return Counter(self.calls)

    def inputs(self, items: Iterable[Any]) -> Any:
        return Invocation.map(self.ask, items)


async def run(verb: str, loop: AgentLoop, inputs: Any, journal: Journal) -> list[InvocationResult[Any]]:
    """Run a batch by either verb, and return the results in input order."""
    if verb == "run_all":
        return await loop.run_all(inputs, journal=journal)

    async with loop.as_completed(inputs, journal=journal) as done:
        results = [result async for result in done]

    return sorted(results, key=lambda result: result.index)


async def night(
    path: Path, inputs: Any, loop: AgentLoop | None = None, verb: str = "run_all", **settings: Any
) -> list[InvocationResult[Any]]:
    """Open a journal for a batch, close it, and return the results."""
    async with Journal(path, **settings) as journal:
        return await run(verb, loop or AgentLoop(), inputs, journal)


def replayed(results: list[InvocationResult[Any]]) -> list[int]:
    """Return the places of the results that were replayed."""
    return [result.index for result in results if result.replayed]


def rows(path: Path, columns: str = "*") -> list[Any]:
    """Return what is in a journal, as anybody can read it; of one column the values alone."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        found = connection.execute(f"SELECT {columns} FROM results ORDER BY id").fetchall()

    return [row[0] if len(row) == 1 else row for row in found]


def integrity(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def execute(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)

"""
Random histories of a journal beside a model of it: a multiset of what is done.

``AGENTLOOP_HISTORIES`` says how many.
"""

import os
import random
import shutil
import tempfile
from collections import Counter
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import anyio
import attrs
import pytest
from agents import backends, run_scheduled
from asking import integrity, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop import AgentLoop, Invocation, InvocationResult, LoopConfig
from agentloop.journal import Journal

EXAMPLES = int(os.environ.get("AGENTLOOP_HISTORIES", "30"))
ITEMS = "abcdef"
KEYED = "XYZ"


@attrs.frozen
class Batch:
    """One batch: what it runs, and which items fail in it."""

    items: list[str]
    failing: frozenset[str]
    verb: Literal["run_all", "as_completed"]
    limit: int


@attrs.frozen
class Opening:
    """One opening of the journal, and how it ends: by itself, or cancelled or killed at a time."""

    batches: list[Batch]
    end: Literal["complete", "cancel", "kill"]
    at: float
    rerun: bool
    seed: int


def unique_keys(items: list[str]) -> list[str]:
    return [item for index, item in enumerate(items) if item not in KEYED or item not in items[:index]]


BATCHES = st.builds(
    Batch,
    st.lists(st.sampled_from(ITEMS + KEYED), max_size=12).map(unique_keys),
    st.frozensets(st.sampled_from(ITEMS + KEYED), max_size=3),
    st.sampled_from(["run_all", "as_completed"]),
    st.integers(1, 4),
)
OPENINGS = st.builds(
    Opening,
    st.lists(BATCHES, min_size=1, max_size=3),
    st.sampled_from(["complete", "complete", "cancel", "kill"]),
    st.floats(0.0, 8.0),
    st.sampled_from([False, False, False, True]),
    st.integers(0, 1000),
)


class World:
    """Runs openings, and compares each with what a multiset says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = 0
        self.kept: Counter[str] = Counter()
        """How many results of each item are kept."""
        self.rows: Counter[str] = Counter()
        """How many rows each item has."""

    async def open(self, opening: Opening) -> None:
        self.random = random.Random(opening.seed)
        self.calls: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.inputs: Counter[str] = Counter()
        self.version += opening.rerun
        if opening.rerun:
            self.kept.clear()

        # Which kept results no input has taken.
        self.free = self.kept.copy()
        changed: Any = "rerun" if opening.rerun else "refuse"
        copy = self.path.with_name(f"{self.path.stem}x.db")
        journal = Journal(self.path, version=self.version, changed=changed, durable=False)
        async with journal, anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                if opening.end != "complete":
                    group.start_soon(self.interrupt, opening, scope, copy)

                for batch in opening.batches:
                    self.inputs += Counter(batch.items)
                    await self.run(batch, journal)

            group.cancel_scope.cancel()

        if copy.exists():
            self.path = copy
            self.check_killed()
        else:
            assert self.read() == self.kept + self.done
            if not scope.cancelled_caught:
                wanted = {item: self.inputs[item] if item in ITEMS else 1 for item in self.inputs}
                assert self.count_rows() == self.rows | Counter(wanted)

        self.kept, self.rows = self.read(), self.count_rows()
        assert integrity(self.path) == "ok"

    async def interrupt(self, opening: Opening, scope: anyio.CancelScope, copy: Path) -> None:
        await anyio.sleep(opening.at)
        if opening.end == "kill":
            # What a killed process leaves is what is in its files at that moment.
            self.committed = self.kept + self.delivered
            for suffix in ("", "-wal"):
                shutil.copy(f"{self.path}{suffix}", f"{copy}{suffix}")

        scope.cancel()

    async def run(self, batch: Batch, journal: Journal) -> None:
        loop = AgentLoop(LoopConfig(max_concurrency=batch.limit, max_retries=0))
        self.failing, before = batch.failing, self.calls.copy()
        # What else is in the arguments is no matter where there is a key.
        inputs = [
            Invocation(item, work, (item,)) if item in ITEMS else Invocation(item, work, (item, 0), key=item)
            for item in batch.items
        ]
        results: list[InvocationResult[Any]] = []
        if batch.verb == "run_all":
            results = await loop.run_all(inputs, journal=journal)
            assert [result.index for result in results] == [*range(len(inputs))]
            for result in results:
                self.note(result)
        else:
            async with loop.as_completed(inputs, journal=journal) as done:
                async for result in done:
                    results.append(result)
                    self.note(result)

        # It has come to its end.
        replayed = Counter(result.agent_id for result in results if result.replayed)
        for item, count in Counter(batch.items).items():
            expected = min(count, self.free[item])
            assert replayed[item] == expected
            assert self.calls[item] - before[item] == count - expected
            if item in ITEMS:
                self.free[item] -= expected
            else:
                self.free[item] = int(expected or item not in batch.failing)

        assert len(results) == len(inputs)

    def note(self, result: InvocationResult[Any]) -> None:
        assert result.success is (result.replayed or result.agent_id not in self.failing)
        assert result.output == (result.agent_id * 2 if result.success else None)
        self.delivered[result.agent_id] += result.success and not result.replayed

    def check_killed(self) -> None:
        """What was delivered is in the file, and nothing that did not end."""
        found = self.read()
        assert self.committed <= found <= self.kept + self.done

    def read(self) -> Counter[str]:
        """Return how many results of each item are kept."""
        found = rows(self.path, "agent_id, status, stale")
        return Counter(item for item, status, stale in found if status == "success" and not stale)

    def count_rows(self) -> Counter[str]:
        return Counter(rows(self.path, "agent_id"))


CURRENT: ContextVar[World] = ContextVar("CURRENT")


async def work(item: str, _: int = 0) -> str:
    world = CURRENT.get()
    world.calls[item] += 1
    await anyio.sleep(world.random.choice([0, 0.5, 1, 1]))
    if item in world.failing:
        raise ValueError(item)

    world.done[item] += 1
    return item * 2


@pytest.mark.long
@backends
def test_journal_is_a_multiset_of_what_is_done(backend: Literal["asyncio", "trio"]) -> None:
    @settings(max_examples=EXAMPLES)
    @given(st.lists(OPENINGS, min_size=1, max_size=5))
    def check(openings: list[Opening]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            world = World(Path(directory, "night.db"))
            CURRENT.set(world)
            for opening in openings:
                run_scheduled(backend, None, world.open, opening)

    check()

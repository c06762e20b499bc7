"""
Assigns entries to inputs.

**The journal is a multiset.** Equal inputs without keys of their own differ by a number ``n``. Each takes an
entry that no other has taken: a kept one before another, and else a new one with the lowest free ``n``. So
the inputs that ran when a process was killed have the same numbers in the next run, and the same idempotency
keys.

**Taken entries** are a list with a number for each row of the file: the number of the batch that took it, or
0. Look-ups read the file, where new rows appear when they are committed; until then their numbers are in
``_running``.

**Thousands of equal inputs** would make each look-up pass over all rows before it. So for inputs with more
than one row, the position of the last look-up is remembered, for at most ``REMEMBERED`` inputs.
"""

from __future__ import annotations

__all__ = ["Claims", "Found", "Place"]

import logging
import math
import sqlite3
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ._identity import Identity, is_same

_logger = logging.getLogger("agentloop")

# For how many inputs with several entries the position of the last look-up is remembered.
REMEMBERED = 10_000


class Found(NamedTuple):
    """A row of the file."""

    id: int
    n: int
    kept: int
    written: int
    status: str
    output: str | bytes | None
    error: str | None
    retries: int
    latency_ms: float
    queue_ms: float


class Place(NamedTuple):
    """
    The entry that an input has taken.

    :param identity: the identity of the input
    :param n: its number among equal inputs
    :param found: the row, if there is one
    """

    identity: Identity
    n: int
    found: Found | None


class Claims:
    """
    Finds the entries of inputs, and tracks which ones are taken.

    :param reader: reads the file
    :param last_row: the number of its last row
    :param keep: the statuses of results that are kept
    """

    def __init__(self, reader: sqlite3.Connection, last_row: int, keep: frozenset[str]) -> None:
        self._reader = reader
        self._last_row = last_row
        self._taken = array("I", bytes(4 * (last_row + 1)))
        self._running: dict[tuple[str, Any], set[int]] = {}
        self._agents: dict[str, Callable[..., Any]] = {}
        # Whether the first agent was looked for in the file, or the file was empty.
        self._knows_one = not last_row
        # For each input with several entries: the next position for a kept one, another, a free number.
        self._marks: OrderedDict[tuple[str, Any], list[float]] = OrderedDict()
        names = ", ".join(map(repr, sorted(keep)))
        kept = f"(stale = 0 AND status IN ({names}))" if names else "0"
        self._select = (
            f"SELECT id, n, {kept} AS kept, written, status, output, error, retries, latency_ms, queue_ms "
            "FROM results WHERE agent = ? AND key = ?"
        )

    def take(self, identity: Identity, batch: int) -> Place:
        """
        Take the entry for an input.

        :param batch: the number of the batch that takes it
        :raises TypeError: if another function has the same name, and equal arguments may not be equal inputs
        :raises ValueError: if another input has the key
        :raises sqlite3.Error: if the file cannot be read
        """
        group = (identity.agent, identity.key)
        self._meet(identity)
        running = self._running.get(group)
        if identity.is_hashed:
            found, n = self._find(group, running)
        else:
            found, n = next(self._rows(group, ""), None), 0
            if running or (found is not None and self._taken[found.id] == batch):
                raise ValueError(f"key {identity.key!r} is there twice: of {identity.agent}")

        if found is not None:
            n = found.n
            self._taken[found.id] = batch

        if found is None or not found.kept:
            self._running.setdefault(group, set()).add(n)

        return Place(identity, n, found)

    def new_row(self, batch: int) -> int:
        """Return the number of a new row, which a batch has taken."""
        self._last_row += 1
        self._taken.append(batch)
        return self._last_row

    def end(self, place: Place) -> None:
        """Note that an input has ended: its row is in the file, or there will be none."""
        group = (place.identity.agent, place.identity.key)
        running = self._running.get(group)
        if running is not None:
            running.discard(place.n)
            if not running:
                del self._running[group]

    def release(self, row: int) -> None:
        """Leave a row to another input; 0 for a number that has no row."""
        self._taken[row] = 0
        # Entries that look-ups have passed may be free again.
        self._marks.clear()

    def _meet(self, identity: Identity) -> None:
        agent, fn = identity.agent, identity.fn
        known = self._agents.get(agent)
        if known is None:
            self._agents[agent] = fn
            self._look_for(agent)
        elif identity.is_hashed and not is_same(known, fn):
            raise TypeError(
                f"two functions are called {agent}, and a journal tells functions apart by their names: "
                "give their invocations keys, or the functions names of their own"
            )

    def _look_for(self, agent: str) -> None:
        """Warn if the file has no results of the first agent of a run: it may have been renamed."""
        if self._knows_one:
            return

        self._knows_one = True
        if self._reader.execute("SELECT 1 FROM results WHERE agent = ? LIMIT 1", (agent,)).fetchone():
            return

        (other,) = self._reader.execute("SELECT agent FROM results LIMIT 1").fetchone()
        _logger.warning(
            "the journal has results of %s and none of %s: if that is its new name, all of it runs again",
            other,
            agent,
        )

    def _rows(self, group: tuple[str, Any], condition: str, *values: float) -> Iterator[Found]:
        rows = self._reader.execute(f"{self._select} {condition}", (*group, *values))
        return map(Found._make, rows)

    def _find(self, group: tuple[str, Any], running: set[int] | None) -> tuple[Found | None, int]:
        """Return the row to take, if there is one, and else the lowest number that is free."""
        marks = self._marks.get(group)
        if marks is None:
            rows = list(self._rows(group, "ORDER BY n LIMIT 2"))
            if len(rows) < 2:
                if rows and not self._taken[rows[0].id]:
                    return rows[0], 0

                return None, self._free(group, running or (), 0) if rows or running else 0

            marks = self._marks[group] = [0, 0, 0]
            if len(self._marks) > REMEMBERED:
                self._marks.popitem(last=False)

        for mark, kept in ((0, 1), (1, 0)):
            if marks[mark] < math.inf:
                for row in self._rows(group, "AND kept = ? AND n >= ? ORDER BY n", kept, marks[mark]):
                    if not self._taken[row.id]:
                        marks[mark] = row.n + 1
                        return row, 0

                marks[mark] = math.inf

        n = self._free(group, running or (), int(marks[2]))
        marks[2] = n + 1
        return None, n

    def _free(self, group: tuple[str, Any], running: Iterable[int], n: int) -> int:
        """Return the lowest number from ``n`` on that belongs to no row and no running input."""
        sql = "SELECT n FROM results WHERE agent = ? AND key = ? AND n >= ?"
        used = {number for (number,) in self._reader.execute(sql, (*group, n))}.union(running)
        while n in used:
            n += 1

        return n

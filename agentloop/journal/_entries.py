"""Reads the entries of a journal in short pieces: a reader that stays open lets the -wal file grow."""

from __future__ import annotations

__all__ = ["Entries", "Entry", "read_metrics"]

import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any

import anyio.to_thread
import attrs

from .._metrics.recorder import MetricsRecorder
from .._result import InvocationResult, Status
from ._codec import Codec
from ._file import connect, explain

# How many rows are read at once.
PIECE = 500
COLUMNS = "id, agent, key, idx, agent_id, status, output, error, retries, latency_ms, queue_ms, at, run"


@attrs.frozen
class Entry:
    """
    One result in a journal.

    :param agent: the qualified name of the function
    :param key: the key of the invocation, or the hash of its arguments in hexadecimal digits
    :param index: its place in the input of the run that wrote it
    :param agent_id: the name that the invocation was given
    :param status: how it ended
    :param output: the agent's return value; ``None`` without one
    :param error: the error, in one line; ``None`` on success
    :param retries: how many retries were made
    :param latency_ms: from the first start to the end
    :param queue_ms: the wait for the first slot
    :param at: when it was written, in seconds since 1970
    :param run: the number of the run that wrote it
    """

    agent: str
    key: str | int
    index: int
    agent_id: str
    status: Status
    output: Any
    error: str | None
    retries: int
    latency_ms: float
    queue_ms: float
    at: float
    run: int


def read_rows(path: str, columns: str, after: int, status: str | None = None) -> list[tuple[Any, ...]]:
    """
    Return the next rows of the results. The first column must be ``id``.

    :param after: the ``id`` of the row before
    :param status: the status of the rows; ``None`` for all
    :raises JournalError: if the file cannot be read
    """
    where, values = ("", ()) if status is None else ("AND status = ?", (status,))
    try:
        with closing(connect(path)) as connection:
            sql = f"SELECT {columns} FROM results WHERE id > ? {where} ORDER BY id LIMIT {PIECE}"
            return connection.execute(sql, (after, *values)).fetchall()
    except sqlite3.Error as exc:
        raise explain(path, exc) from exc


def all_rows(path: str, columns: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of the results, read in short pieces."""
    after = 0
    while rows := read_rows(path, columns, after):
        yield from rows
        after = rows[-1][0]


def read_metrics(path: str) -> MetricsRecorder:
    """
    Return the metrics of all results: their counts, latencies, waits and retries.

    :raises JournalError: if the file cannot be read
    """
    recorder = MetricsRecorder()
    for _, status, latency, queue, retries in all_rows(path, "id, status, latency_ms, queue_ms, retries"):
        recorder.record(
            InvocationResult("", Status(status), latency_ms=latency, queue_ms=queue, retries=retries)
        )

    return recorder


class Entries(AsyncIterator[Entry]):
    """
    The entries of a journal, in the order in which they were first written.

    No connection stays open between two entries, so the iterator needs no closing.

    :param path: the file
    :param status: the status of the entries; ``None`` for all
    :param codec: decodes outputs
    """

    def __init__(self, path: str, status: Status | None, codec: Codec) -> None:
        self._path = path
        self._status = None if status is None else status.value
        self._codec = codec
        self._rows: deque[tuple[Any, ...]] = deque()
        self._after = 0

    async def __anext__(self) -> Entry:
        if not self._rows:
            rows = await anyio.to_thread.run_sync(read_rows, self._path, COLUMNS, self._after, self._status)
            if not rows:
                raise StopAsyncIteration

            self._after = rows[-1][0]
            self._rows.extend(rows)

        row, agent, key, index, agent_id, status, output, *rest = self._rows.popleft()
        return Entry(
            agent,
            key.hex() if isinstance(key, bytes) else key,
            index,
            agent_id,
            Status(status),
            self._codec.decode(self._path, row, agent, output) if status == Status.SUCCESS else None,
            *rest,
        )

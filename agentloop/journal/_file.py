"""
The file of a journal: an SQLite database in WAL mode.

**One connection writes**, in a worker thread. The others are opened read-only: SQLite before 3.51.3 can
corrupt a database in WAL mode when two connections write or checkpoint at once, and one writer never meets
that.

**The lock** is a second file beside it, on which SQLite itself holds an exclusive lock. The kernel gives that
up when the process is killed, it works between two journals of one process too, and any process can read the
journal meanwhile. A file that SQLite may have open is never opened by other means: closing it would release
the locks.
"""

from __future__ import annotations

__all__ = ["JournalFile", "Row", "connect", "explain"]

import os
import platform
import socket
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from .._errors import JournalError, JournalInUse, JournalMismatch

# "agnt"
APPLICATION_ID = 0x61676E74
SCHEMA = 1
BUSY_SECONDS = 10.0
# A reader that stays open lets the -wal file grow; it is cut to this size afterwards.
WAL_BYTES = 1 << 26

CREATE = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE runs (
    run INTEGER PRIMARY KEY, began REAL NOT NULL, ended REAL, outcome TEXT,
    version TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, python TEXT NOT NULL
);
CREATE TABLE results (
    id INTEGER PRIMARY KEY, agent TEXT NOT NULL, key NOT NULL, n INTEGER NOT NULL,
    run INTEGER NOT NULL, idx INTEGER NOT NULL, agent_id TEXT NOT NULL,
    status TEXT NOT NULL, output, error TEXT,
    retries INTEGER NOT NULL, latency_ms REAL NOT NULL, queue_ms REAL NOT NULL, at REAL NOT NULL,
    written INTEGER NOT NULL, stale INTEGER NOT NULL DEFAULT 0,
    UNIQUE (agent, key, n)
);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA};
"""


class Row(NamedTuple):
    """A row of the results, to be written."""

    id: int
    agent: str
    key: str | int | bytes
    n: int
    run: int
    idx: int
    agent_id: str
    status: str
    output: str | bytes | None
    error: str | None
    retries: int
    latency_ms: float
    queue_ms: float
    at: float
    written: int


WRITE = f"""
INSERT INTO results ({", ".join(Row._fields)}) VALUES ({", ".join("?" * len(Row._fields))})
ON CONFLICT (id) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in Row._fields[4:])}, stale = 0
"""


def connect(path: str, mode: str = "ro", timeout: float = BUSY_SECONDS) -> sqlite3.Connection:
    """Connect to a file: ``rw`` to write, ``ro`` to read only."""
    uri = f"{Path(os.path.abspath(path)).as_uri()}?mode={mode}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False
    )
    if mode == "ro":
        connection.execute("PRAGMA query_only = 1")

    return connection


def explain(path: str, exc: Exception) -> JournalError:
    """Return the error for a file that cannot be used."""
    code, hint = _code(exc), ""
    if code == sqlite3.SQLITE_NOTADB:
        hint = ": this is not a journal"
    elif code == sqlite3.SQLITE_CORRUPT:
        hint = (
            f": look at it with `python -m agentloop.journal check {path}`, and save what can be read by "
            f"`sqlite3 {path} .recover`"
        )

    error = JournalError(f"{path}: {exc}{hint}")
    error.__cause__ = exc
    return error


def _code(exc: Exception) -> int:
    """Return the primary code of an SQLite error, without its extended part."""
    code: int = getattr(exc, "sqlite_errorcode", 0)
    return code & 0xFF


def inspect(path: str) -> bool:
    """
    Return whether a file is a journal; ``False`` if it is missing or empty.

    :raises JournalError: if it is another file, or a journal of a newer version
    """
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return False

    with closing(connect(path)) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()

    if application != APPLICATION_ID and (tables or application):
        raise JournalError(f"{path} is not a journal, but another database")

    if schema > SCHEMA:
        raise JournalError(f"{path} was written by a newer version of agentloop, of schema {schema}")

    return bool(tables)


class JournalFile:
    """
    An open file. Its methods wait for the disk, so they are called in worker threads. Each can be called
    again after its caller was cancelled, and then waits for the first call.

    :param path: its path
    :param version: the version of the outputs, as JSON
    :param changed: how to treat the results of another version
    :param durable: whether commits survive a loss of power
    """

    def __init__(self, path: str, version: str, changed: str, durable: bool) -> None:
        self.path = path
        self.version = version
        self.salt: bytes = b""
        """Random bytes that make idempotency keys unique to this journal."""
        self.run: int = 0
        """The number of this run."""
        self.last_row: int = 0
        """The highest number of an entry when the file was opened."""
        self.reader: sqlite3.Connection | None = None
        self._changed = changed
        self._durable = durable
        self._lock = threading.Lock()
        self._locked: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._inode = 0

    def open(self) -> None:
        """
        Open the file, or create it.

        :raises JournalError: if it cannot be used; then nothing is overwritten
        """
        with self._lock:
            if self.reader is not None:
                return

            try:
                inspect(self.path)
                self._acquire()
                self._open()
                self.reader = connect(self.path)
            except (sqlite3.Error, OSError) as exc:
                self._close()
                raise explain(self.path, exc) from exc
            except BaseException:
                self._close()
                raise

    def _acquire(self) -> None:
        path = f"{self.path}-lock"
        _create(path)
        self._locked = connect(path, "rw", 0)
        try:
            # The lock file is never written, so it needs no journal for a rollback.
            self._locked.execute("PRAGMA journal_mode = OFF")
            self._locked.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as exc:
            if _code(exc) == sqlite3.SQLITE_BUSY:
                raise JournalInUse(f"{self.path} is in use by another run") from None

            raise

    def _open(self) -> None:
        _create(self.path)
        self._inode = os.stat(self.path).st_ino
        self._writer = writer = connect(self.path, "rw")
        (mode,) = writer.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise JournalError(f"{self.path} needs a local disk: SQLite cannot use WAL mode there")

        writer.execute(f"PRAGMA synchronous = {'FULL' if self._durable else 'NORMAL'}")
        writer.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        writer.execute("BEGIN IMMEDIATE")
        # Checked again, now that no other process can write.
        (tables,) = writer.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            for statement in filter(str.strip, CREATE.split(";")):
                writer.execute(statement)

            known = [("version", self.version), ("salt", os.urandom(16))]
            writer.executemany("INSERT INTO meta VALUES (?, ?)", known)

        meta = dict(writer.execute("SELECT name, value FROM meta"))
        self.salt = meta["salt"]
        if meta["version"] != self.version:
            self._change(writer, meta["version"])

        (self.last_row,) = writer.execute("SELECT coalesce(max(id), 0) FROM results").fetchone()
        now, python = time.time(), platform.python_version()
        self.run = (
            writer.execute(
                "INSERT INTO runs (began, version, host, pid, python) VALUES (?, ?, ?, ?, ?)",
                (now, self.version, socket.gethostname(), os.getpid(), python),
            ).lastrowid
            or 0
        )
        writer.execute("COMMIT")

    def _change(self, writer: sqlite3.Connection, found: str) -> None:
        if self._changed == "refuse":
            raise JournalMismatch(self.path, found, self.version)

        writer.execute("UPDATE results SET stale = ?", (self._changed == "rerun",))
        writer.execute("UPDATE meta SET value = ? WHERE name = 'version'", (self.version,))

    def commit(self, group: Group) -> None:
        """
        Write rows in one transaction.

        :raises JournalError: if the write fails; then no row is written
        """
        with self._lock:
            writer = self._writer
            if group.committed:
                return

            assert writer is not None
            try:
                if os.stat(self.path).st_ino != self._inode:
                    raise FileNotFoundError("it was replaced by another file")

                writer.execute("BEGIN IMMEDIATE")
                writer.executemany(WRITE, group.rows)
                writer.execute("COMMIT")
            except Exception as exc:
                if writer.in_transaction:
                    writer.execute("ROLLBACK")

                raise explain(self.path, exc) from exc

            group.committed = True

    def close(self, outcome: str) -> None:
        """
        Close the file.

        :param outcome: how the run has ended
        """
        with self._lock:
            if self._writer is not None:
                try:
                    self._writer.execute(
                        "UPDATE runs SET ended = ?, outcome = ? WHERE run = ?",
                        (time.time(), outcome, self.run),
                    )
                except sqlite3.Error:
                    pass  # the run stays without an end

            self._close()

    def _close(self) -> None:
        for connection in (self.reader, self._writer, self._locked):
            if connection is not None:
                connection.close()

        self.reader = self._writer = self._locked = None


class Group:
    """Rows that are committed together."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.committed = False


def _create(path: str) -> None:
    """Create a file for its owner alone, if it is not there."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        pass

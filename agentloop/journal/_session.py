"""A journal's side of one batch."""

from __future__ import annotations

__all__ = ["BatchSession", "Entered", "Writing"]

import hashlib
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Protocol

from .._errors import JournaledError, JournalError
from .._eventloop.errors import is_error
from .._invocation import Invocation
from .._result import InvocationResult, Status
from .._runtime.journaled import Claim
from ._claims import Claims, Place
from ._codec import Codec
from ._file import JournalFile, Row, explain
from ._identity import identify


class Entered(Protocol):
    """An open journal."""

    @property
    def file(self) -> JournalFile: ...
    @property
    def codec(self) -> Codec: ...
    def check(self) -> None:
        """
        Raise an error in a forked process, or after the block.

        :raises RuntimeError: ...
        """

    def count_replayed(self) -> None: ...
    def enqueue(self, writing: Writing) -> None: ...
    def flush(self) -> None: ...


class Writing:
    """
    A result to be written.

    :param session: the session of the batch
    :param claim: the entry
    :param result: the result
    :param on_done: called with whether it was committed
    """

    __slots__ = ("claim", "on_done", "row", "session")

    def __init__(
        self,
        session: BatchSession,
        claim: EntryClaim,
        result: InvocationResult[Any],
        on_done: Callable[[bool], object],
    ) -> None:
        self.session: BatchSession = session
        self.claim: EntryClaim = claim
        self.row: Row = claim.make_row(result)
        self.on_done: Callable[[bool], object] = on_done


class BatchSession:
    """
    A journal's side of one batch. Results that could not be written are kept until all running invocations of
    the batch have ended, and then tried once more.

    :param journal: the journal
    :param claims: tracks the taken entries
    :param number: the number of the batch
    :param on_failure: called the first time that results could not be written
    """

    def __init__(
        self,
        journal: Entered,
        claims: Claims,
        number: int,
        on_failure: Callable[[JournalError], object],
    ) -> None:
        self.journal = journal
        self.claims = claims
        self.number = number
        self.has_failed: bool = False
        self._on_failure = on_failure
        self._held: list[Writing] = []

    def claim(self, invocation: Invocation[Any]) -> EntryClaim:
        self.journal.check()
        identity = identify(invocation)
        try:
            place = self.claims.take(identity, self.number)
        except sqlite3.Error as exc:
            raise explain(self.journal.file.path, exc) from exc

        return EntryClaim(self, invocation.agent_id, place)

    def write(self, claim: Claim, result: InvocationResult[Any], on_done: Callable[[bool], object]) -> None:
        assert isinstance(claim, EntryClaim)
        writing = Writing(self, claim, result, on_done)
        if self.has_failed:
            self._held.append(writing)
        else:
            self.journal.enqueue(writing)

    def flush(self) -> None:
        held, self._held = self._held, []
        for writing in held:
            self.journal.enqueue(writing)

        self.journal.flush()

    def release(self, row: int) -> None:
        self.claims.release(row)

    def hold(self, writing: Writing) -> None:
        """Keep a result that could not be written, to try once more."""
        self._held.append(writing)

    def fail(self, error: JournalError) -> None:
        """Stop the batch, since a result could not be written."""
        self.has_failed = True
        self._on_failure(error)


class EntryClaim:
    """
    The entry that an input has taken.

    :param session: the session of the batch
    :param agent_id: the name that the invocation was given
    :param place: the entry
    """

    __slots__ = ("_agent_id", "_data", "_place", "_session", "error", "row")

    def __init__(self, session: BatchSession, agent_id: str, place: Place) -> None:
        self.error: Exception | None = None
        self.row: int = 0 if place.found is None else place.found.id
        self._session = session
        self._agent_id = agent_id
        self._place = place
        self._data: str | bytes | None = None

    def replay(self, index: int) -> InvocationResult[Any] | None:
        found = self._place.found
        if found is None or not found.kept:
            return None

        journal, status = self._session.journal, Status(found.status)
        output, error = None, None
        if status is Status.SUCCESS:
            output = journal.codec.decode(
                journal.file.path, found.id, self._place.identity.agent, found.output
            )
        else:
            error = JournaledError(found.error)

        journal.count_replayed()
        return InvocationResult(
            self._agent_id,
            status,
            output,
            error,
            found.latency_ms,
            found.queue_ms,
            found.retries,
            index=index,
            replayed=True,
        )

    def idempotency_key(self) -> str:
        found, (identity, n, _) = self._place.found, self._place
        file = self._session.journal.file
        # The key changes once a final result was recorded, and with the version.
        parts = (file.version, identity.agent, repr(identity.key), n, 0 if found is None else found.written)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16, key=file.salt).hexdigest()

    def encode(self, output: Any) -> Exception | None:
        codec, agent = self._session.journal.codec, self._place.identity.agent
        try:
            self._data = codec.encode(agent, output)
        except BaseException as exc:
            if not is_error(exc):
                raise

            error = TypeError(
                f"the output of {self._agent_id!r} cannot be put into the journal: {exc}; pass "
                "Journal(encode=..., decode=...)"
            )
            error.__cause__ = exc
            if codec.is_proven(agent):
                return error

            self.error = error

        return None

    def make_row(self, result: InvocationResult[Any]) -> Row:
        """Return the row to write."""
        journal, (identity, n, found) = self._session.journal, self._place
        if found is None:
            self.row = self._session.claims.new_row(self._session.number)

        data, self._data = self._data, None
        return Row(
            self.row,
            identity.agent,
            identity.key,
            n,
            journal.file.run,
            result.index,
            result.agent_id.encode(errors="replace").decode(),
            result.status.value,
            data,
            result.error,
            result.retries,
            result.latency_ms,
            result.queue_ms,
            time.time(),
            1 if found is None else found.written + 1,
        )

    def end(self) -> None:
        """Note that the row is in the file."""
        self._session.claims.end(self._place)

    def release(self) -> None:
        self.end()
        self._session.release(self.row)

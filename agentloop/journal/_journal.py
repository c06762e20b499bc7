"""The public class of a journal."""

from __future__ import annotations

__all__ = ["Journal", "JournalStatistics"]

import json
import os
from collections.abc import AsyncIterator, Callable, Collection
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import anyio.to_thread
import attrs
from anyio.lowlevel import current_token

from .. import _validators as must
from .._batch.journaled import AnyJournal
from .._errors import JournalError
from .._metrics.recorder import MetricsRecorder
from .._misuse import EnteredOnly, name_parameters
from .._result import Status
from . import _json
from ._codec import Codec
from ._entries import Entries, Entry, read_metrics
from ._file import JournalFile
from ._session import BatchSession
from ._writer import Writer

KEEPABLE = (Status.SUCCESS, Status.ERROR, Status.TIMEOUT)


@attrs.frozen
class JournalStatistics:
    """
    The counts of an open journal.

    :param replayed: how many results of earlier runs it has delivered
    :param written: how many results it has written
    """

    replayed: int
    written: int


@name_parameters()
class Journal(AnyJournal, EnteredOnly):
    """
    A file that holds the results of batches, so that an interrupted batch goes on where it stopped::

        async with Journal("night.db", version={"model": "x-large", "prompt": 7}) as journal:
            results = await loop.run_all(Invocation.map(ask, prompts), journal=journal)

    Run again, after a crash or a ``kill -9`` too, this delivers the results that the file has at once, with
    ``replayed=True``, and runs all other inputs.

    **Guarantees.** There is one result for each input. No result reaches the list of ``run_all()`` or a
    reader before it is committed. **Not guaranteed.** Side effects happen at least once: inputs that ran when
    the process was killed, or ended in the last 25 milliseconds before, run again. Their
    ``current_attempt().idempotency_key`` is the same then, so that a provider can recognize them.

    **The identity of an input** is the name of its function, ``module.qualname``, and its key. The key is
    ``Invocation.key``, or else a hash of the arguments as JSON. Equal inputs without a key have an entry
    each, so inputs can be reordered, inserted, removed and repeated between runs. A key of its own names one
    entry: a batch may have it once, and a later batch gets its result. Arguments that JSON cannot carry, and
    methods of objects, need a key. After a function is renamed, its inputs run again.

    **Recorded** are ``SUCCESS``, ``ERROR`` and ``TIMEOUT``, each as one row; cancelled and skipped
    invocations are not. Of arguments only the hash is written, of errors their line. An input whose result is
    not kept runs again, and its row is replaced.

    **Outputs** are written as JSON, and must decode to equal values: dicts with text keys, lists, texts,
    numbers, booleans and ``None``, and no tuples. For other types there are ``encode`` and ``decode``::

        Journal(path, encode=Answer.model_dump_json, decode=Answer.model_validate_json)            # pydantic
        Journal(path, encode=msgspec.json.encode, decode=msgspec.json.Decoder(Answer).decode)      # msgspec
        Journal(
            path,
            encode=lambda answer: json.dumps(converter.unstructure(answer)),                       # cattrs
            decode=lambda data: converter.structure(json.loads(data), Answer),
        )

    An output that cannot be encoded is that input's ``ERROR``; but if it is the first of its agent, the batch
    stops with a :exc:`JournalError` that has it in ``unwritten``. Both functions run in the event loop, so a
    large output holds up others.

    **The file** must be on a local disk: network drives lose locks. Beside it are ``-wal`` and ``-shm`` while
    it is open, and ``-lock``. Copy it when it is closed, or by ``sqlite3 night.db .backup``. Only its owner
    may read it. ``python -m agentloop.journal show night.db`` prints a summary, at any time.

    **When it fails**, for example on a full disk, the batch starts nothing new, running invocations finish,
    and the journal tries once more. Then the batch raises a :exc:`JournalError` with the unwritten results in
    ``unwritten``. The file stays good.

    It can be used by any number of batches of one event loop at once, in agents too. ``async with`` can be
    used once.

    :param path: the file; created if it does not exist
    :param version: everything besides the inputs that outputs depend on, as JSON: the model, the prompt,
        parameters
    :param changed: what to do if the file is of another version: ``"refuse"`` it, ``"keep"`` its results as
        those of the new version, or ``"rerun"`` all of them
    :param keep: the statuses of results that are delivered again; inputs with other results run again
    :param encode: a function that returns ``str`` or ``bytes`` for an output
    :param decode: a function that returns the output for the return value of ``encode``
    :param durable: whether commits survive a loss of power, rather than only a kill
    :raises TypeError: if a value is of the wrong type, or ``version`` is no JSON
    :raises ValueError: if ``changed`` or ``keep`` is none of these, or only one of ``encode`` and ``decode``
        is given
    """

    _usage = "write `async with Journal(...) as journal:`"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        version: Any = None,
        changed: Literal["refuse", "keep", "rerun"] = "refuse",
        keep: Collection[Status] = (Status.SUCCESS,),
        encode: Callable[[Any], str | bytes] | None = None,
        decode: Callable[[Any], Any] | None = None,
        durable: bool = True,
    ) -> None:
        if changed not in ("refuse", "keep", "rerun"):
            raise ValueError(f"changed must be one of 'refuse', 'keep', 'rerun', got {changed!r}")

        if isinstance(keep, str) or not isinstance(keep, Collection) or not set(keep) <= set(KEEPABLE):
            raise ValueError(
                f"keep must hold statuses that are recorded, SUCCESS, ERROR, TIMEOUT, got {keep!r}"
            )

        if (encode is None) is not (decode is None):
            raise ValueError("encode and decode must be given together")

        if not isinstance(durable, bool):
            raise TypeError(f"durable must be a bool, got {durable!r}")

        for name, function in (("encode", encode), ("decode", decode)):
            if function is not None:
                must.check_plain_function(name, function)

        try:
            _json.check(version, strict=False)
            text = json.dumps(version, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise TypeError(f"version must be JSON, got {version!r}: {exc}") from exc

        path = os.fspath(path)
        self._path = path
        self._codec = Codec(encode or _json.encode, decode or _json.decode)
        kept = frozenset(map(str, keep))
        self._writer = Writer(JournalFile(path, text, changed, durable), self._codec, kept)
        self._token: object = None
        self._batches = 0

    def __repr__(self) -> str:
        now = self._writer
        state = "not open" if self._token is None else "closed" if now.claims is None else "open"
        return f"<Journal {self._path!r} {state}, {now.replayed} replayed, {now.written} written>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Journal cannot be pickled, since one process writes the file: bring the results to that one"
        )

    async def __aenter__(self) -> Self:
        if self._token is not None:
            raise RuntimeError("a journal can be opened once: make another Journal")

        self._token = current_token()
        await self._writer.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._writer.close(exc)

    def statistics(self) -> JournalStatistics:
        """Return the counts since the file was opened."""
        return JournalStatistics(self._writer.replayed, self._writer.written)

    async def metrics(self) -> MetricsRecorder:
        """
        Return the metrics of all runs: counts, latencies, waits and retries of the results in the file.
        Single attempts, backoffs and overloads are missing, since rows do not hold them.

        :raises JournalError: if the file cannot be read
        """
        return await anyio.to_thread.run_sync(read_metrics, self._path)

    def entries(self, status: Status | None = None) -> AsyncIterator[Entry]:
        """
        Return an async iterable of the entries of all runs.

        :param status: the status of the entries; ``None`` for all
        :raises JournalError: while iterating, if the file cannot be read, or an output cannot be decoded
        """
        return Entries(self._path, status, self._codec)

    def begin(self, on_failure: Callable[[JournalError], object]) -> BatchSession:
        """
        Serve a batch. Only batches call this.

        :param on_failure: called the first time that results of the batch could not be written
        :raises RuntimeError: if the journal is not open in this event loop
        """
        if self._token is None:
            raise RuntimeError(f"this journal is not open: {self._usage}")

        self._writer.check()
        if self._token != current_token():
            raise RuntimeError("this journal is open in another event loop")

        assert self._writer.claims is not None
        self._batches += 1
        return BatchSession(self._writer, self._writer.claims, self._batches, on_failure)

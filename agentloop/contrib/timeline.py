"""
A timeline of a run, in a file that opens in Perfetto (https://ui.perfetto.dev) and in ``chrome://tracing``.

The format is the JSON array of Google's "Trace Event Format" (Nat Duca and Dan Sinclair, 2016): duration
events (``B``, ``E``) for attempts, async events (``b``, ``e``) for waits, instants (``i``), counters (``C``)
and metadata (``M``), with times in microseconds. "The ] at the end of the array is optional", so the file
can be opened at any time, also after the process was killed.
"""

from __future__ import annotations

__all__ = ["Timeline"]

import heapq
import io
import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from agentloop import (
    Event,
    FirstChunkEvent,
    InvocationTimeout,
    LimitEvent,
    QueuedEvent,
    ResultEvent,
    RetryEvent,
    StartedEvent,
    Status,
    StopEvent,
    response_status,
)

_logger = logging.getLogger("agentloop")

_FLUSH_BYTES = 1 << 16
_SEPARATOR = b",\n"
# Shorter waits are left out, and counters are written at most this often.
_SHORTEST_US = 1000.0
_MAX_TEXT = 500
# Reserved names of colours in Chrome's trace viewer (catapult's color_scheme.html). Perfetto ignores them.
_COLOURS = {Status.ERROR: "terrible", Status.TIMEOUT: "bad", Status.CANCELLED: "grey"}
_name_of_type: Callable[[type], str] = vars(type)["__name__"].__get__
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Timeline:
    """
    Writes the events of loops to a timeline while they run::

        with Timeline("run.json") as timeline:
            loop = AgentLoop(on_event=timeline)
            ...

    Each slot has a lane. The attempts in it follow each other, and failed ones are marked. Waits for a slot
    and backoffs have tracks, and so have the limit and the numbers of invocations that run, wait, and wait to
    retry. A span ``held`` is a cool-off, in which only probes start. A span ``outage`` is a time in which the
    provider was out. An agent that runs others keeps its lane, although it lends them its slot. Replayed
    results are not drawn.

    Each event is in the file after at most ``flush_seconds``, also if the process is killed then. So memory
    grows with the number of open invocations only. The file holds whole records at any time. If it cannot be
    written, the events of that time are lost. Once there is room again, later events are written.

    Runs that follow each other follow each other in the file. Give loops with different limiters a sink each
    by :meth:`named`.

    :param path: the file; it is overwritten
    :param flush_seconds: the longest time that an event stays in memory
    :raises OSError: if the file cannot be opened
    """

    def __init__(self, path: str | os.PathLike[str], *, flush_seconds: float = 1.0) -> None:
        self._path = os.fspath(path)
        self._file = io.FileIO(self._path, "w")
        self._buffer = bytearray()
        self._size = 0
        # The event loop's thread writes, and the flusher's thread flushes.
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._flush_seconds = flush_seconds
        self._flusher = threading.Thread(target=self._flush_often, name="timeline", daemon=True)
        self._clock = _Clock()
        self._tids = itertools.count(1)
        self._groups: dict[str, _Group] = {}
        self._default = self.named("agentloop")
        self._flusher.start()

    def __repr__(self) -> str:
        state = (
            "closed" if self._closed.is_set() else f"{sum(g.running for g in self._groups.values())} running"
        )
        return f"<Timeline {self._path!r} {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """
        Write one event.

        :raises ValueError: if the timeline has been closed
        :raises OSError: if the file cannot be written; the events in memory are lost
        """
        self._default(event)

    def named(self, name: str) -> Callable[[Event], None]:
        """
        Return a sink whose loops are drawn as a group with this name. The same name gives the same group.

        :param name: the name of the group in the timeline
        :raises ValueError: if the timeline has been closed
        """
        with self._lock:
            if name not in self._groups:
                group = self._groups[name] = _Group(self, len(self._groups) + 1)
                self.write({"name": "process_name", "ph": "M", "pid": group.pid, "args": {"name": name}})

            group = self._groups[name]

        def sink(event: Event) -> None:
            if not isinstance(event, Event):
                return  # an event of a later version

            with self._lock:
                if not self._clock.has_begun:
                    # Chrome shows labels beside the name of a process. A report reads the time of day.
                    began = f"began {datetime.now().astimezone().isoformat(timespec='seconds')}"
                    self.write(
                        {"name": "process_labels", "ph": "M", "pid": group.pid, "args": {"labels": began}}
                    )

                is_idle = not any(group.open for group in self._groups.values())
                group.handle(event, self._clock.read(event, is_idle))

        return sink

    def flush(self) -> None:
        """
        Write the events that are still in memory.

        :raises OSError: if the file cannot be written; these events are lost
        """
        with self._lock:
            self._flush()

    def close(self) -> None:
        """
        Write the events that are still in memory, and close the file. A second call does nothing.

        :raises OSError: if the file cannot be written; it lacks its end then, which viewers do not need
        """
        with self._lock:
            if self._closed.is_set():
                return

            try:
                for group in self._groups.values():
                    group.close(self._clock.now)

                self._flush()
                self._append(b"\n]\n" if self._size else b"[\n]\n")
            finally:
                self._closed.set()
                self._file.close()

        self._flusher.join()

    # -- called by groups, with the lock acquired

    def new_tid(self) -> int:
        """Return a number that no other lane in this file has."""
        return next(self._tids)

    def write(self, record: dict[str, Any]) -> None:
        """
        Add a record to the file.

        :param record: an event of Chrome's Trace Event Format, as JSON data
        :raises ValueError: if the timeline has been closed
        """
        if self._closed.is_set():
            raise ValueError(
                f"the timeline {self._path!r} has been closed; close it when its loops have ended"
            )

        if self._buffer:
            self._buffer += _SEPARATOR

        self._buffer += _encode(record).encode()
        if len(self._buffer) >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        # A separator precedes its record, so that the file lacks only its closing bracket at any time.
        data = (_SEPARATOR if self._size else b"[\n") + self._buffer if self._buffer else b""
        # Clear it even if it cannot be written: a full disk must not fill the memory too.
        self._buffer.clear()
        self._append(data)

    def _append(self, data: bytes) -> None:
        """Write all of the data or none of it: half a record would make the file invalid."""
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            # A pipe or a device cannot be truncated.
            with suppress(OSError):
                self._file.truncate(self._size)
                self._file.seek(self._size)

            raise

        self._size += len(data)

    def _flush_often(self) -> None:
        has_failed = False
        while not self._closed.wait(self._flush_seconds):
            try:
                with self._lock:
                    self._flush()
            except OSError:
                # There may be room again later.
                if not has_failed:
                    has_failed = True
                    _logger.exception("%r cannot be written, so a part of it is lost", self)


class _Clock:
    """
    The time of the timeline, in microseconds since the first event.

    It never goes back, although each run may have a clock of its own.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._epoch: float | None = None
        self._began = 0.0

    @property
    def has_begun(self) -> bool:
        return self._epoch is not None

    def read(self, event: Event, is_idle: bool) -> float:
        # Each run may have a clock with an epoch of its own. The first event of a run is a LimitEvent.
        if self._epoch is None:
            self._epoch, self._began = event.at, time.perf_counter()
        elif isinstance(event, LimitEvent) and (is_idle or (event.at - self._epoch) * 1e6 < self.now):
            elapsed = max(self.now / 1e6, time.perf_counter() - self._began)
            self._epoch = event.at - elapsed

        # An input of a sequence is queued since its batch began, so its event may have an earlier time.
        self.now = max(self.now, round((event.at - self._epoch) * 1e6, 1))
        return self.now


class _Numbers:
    """Numbers from 1 on. ``take()`` returns the smallest one that is free."""

    def __init__(self) -> None:
        self.highest = 0
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)

        self.highest += 1
        return self.highest

    def give_back(self, number: int) -> None:
        heapq.heappush(self._free, number)


class _OpenInvocation:
    """An invocation that has not ended."""

    __slots__ = ("delay_us", "lane", "since", "status", "wait")

    def __init__(self, now: float) -> None:
        self.since = now
        self.status = "waiting"
        self.delay_us = 0.0
        self.lane = self.wait = 0


class _Group:
    """The lanes and tracks of the loops that share a limiter."""

    def __init__(self, timeline: Timeline, pid: int) -> None:
        self.pid = pid
        self.open: dict[int, _OpenInvocation] = {}
        self._timeline = timeline
        self._lanes = _Numbers()
        self._tids: list[int] = []
        # A wait takes the smallest free number, so viewers draw as few tracks as there were waits at once.
        self._waits = _Numbers()
        self._now = {"running": 0, "waiting": 0, "retrying": 0}
        self._counted = dict(self._now)
        self._counted_at = self._changed_at = 0.0
        # The begin of each open span of trouble, by kind, and the time at which the cool-off ends by itself.
        self._troubles: dict[str, float] = {}
        self._held_until = math.inf

    @property
    def running(self) -> int:
        return self._now["running"]

    def handle(self, event: Event, now: float) -> None:
        if now >= self._held_until:
            self._end_trouble("held", now)

        match event:
            case LimitEvent():
                self._write("limit", "C", now, args={"slots": event.limit})
                self._handle_trouble(event, now)
            case StopEvent():
                reason = {"reason": _clip(event.reason)}
                self._write("batch stopped", "i", now, cat="stop", s="g", cname="terrible", args=reason)
            case QueuedEvent():
                opened = self.open[event.id] = _OpenInvocation(now)
                opened.wait = self._waits.take()
                self._move(opened, None, "waiting", now)
            case StartedEvent():
                self._start(event, self.open[event.id], now)
            case RetryEvent():
                opened = self.open[event.id]
                args: dict[str, Any] = {
                    "verdict": str(event.verdict.kind),
                    "delay_seconds": round(event.delay_seconds, 6),
                    "reason": _reason(event.error),
                    "error": _clip(event.reason),
                }
                # By type(): isinstance() may call a property of the error.
                is_timeout = issubclass(type(event.error), InvocationTimeout)
                status = Status.TIMEOUT if is_timeout else Status.ERROR
                self._end(opened, status, args, now)
                self._move(opened, "running", "retrying", now)
                opened.delay_us = event.delay_seconds * 1e6
                opened.wait = self._waits.take()
            case FirstChunkEvent():
                tid = self._tids[self.open[event.id].lane - 1]
                self._write("first chunk", "i", now, tid=tid, cat="chunk", s="t")
            case ResultEvent() if event.result.replayed:
                pass  # an earlier run ended it
            case _:  # ResultEvent
                self._finish(event, self.open.pop(event.id), now)

    def _start(self, event: StartedEvent, opened: _OpenInvocation, now: float) -> None:
        name = _clip(event.invocation.agent_id)
        self._write_wait(opened, name, now)
        opened.lane = self._lanes.take()
        if opened.lane > len(self._tids):
            tid = self._timeline.new_tid()
            self._tids.append(tid)
            lane = {"ph": "M", "pid": self.pid, "tid": tid}
            self._timeline.write({"name": "thread_name", **lane, "args": {"name": f"slot {opened.lane}"}})
            self._timeline.write({"name": "thread_sort_index", **lane, "args": {"sort_index": opened.lane}})

        category = "attempt" if event.attempt == 1 else "attempt,retry"
        args = {"id": event.id, "attempt": event.attempt}
        self._write(name, "B", now, tid=self._tids[opened.lane - 1], cat=category, args=args)
        self._move(opened, opened.status, "running", now)

    def _finish(self, event: ResultEvent, opened: _OpenInvocation, now: float) -> None:
        result = event.result
        args: dict[str, Any] = {}
        if result.exception is not None:
            args = {"reason": _reason(result.exception), "error": _clip(result.error or "")}

        if result.chunks:
            args["chunks"] = result.chunks

        if opened.status == "running":
            self._end(opened, result.status, args, now)
        else:
            name = _clip(result.agent_id)
            self._write_wait(opened, name, now)
            # The StopEvent stands for all skipped invocations.
            if result.status is not Status.SKIPPED:
                args = {"agent": name, "status": result.status, **args}
                colour = _COLOURS.get(result.status, "grey")
                self._write(result.status, "i", now, cat=result.status, s="p", cname=colour, args=args)

        self._move(opened, opened.status, None, now)

    def _end(self, opened: _OpenInvocation, status: Status, args: dict[str, Any], now: float) -> None:
        """End an attempt, and mark it if it failed."""
        tid = self._tids[opened.lane - 1]
        self._lanes.give_back(opened.lane)
        if status is not Status.SUCCESS:
            # Written before the end, so that viewers draw it inside the attempt.
            title = status if status is Status.CANCELLED else f"{status}: {args.get('reason')}"
            self._write(title, "i", now, tid=tid, cat=status, s="t", cname=_COLOURS.get(status, "grey"))

        # Without a name: viewers end the open event of the lane.
        self._write(None, "E", now, tid=tid, args={"status": status, **args})

    def _write_wait(self, opened: _OpenInvocation, name: str, now: float) -> None:
        """Write a wait once it has ended, unless it was too short: most waits are."""
        due = min(opened.since + opened.delay_us, now)
        for kind, begin, end in ("backoff", opened.since, due), ("queued", due, now):
            if end - begin >= _SHORTEST_US:
                wait: dict[str, Any] = {"cat": kind, "id": f"{self.pid}.{opened.wait}"}
                self._write(kind, "b", begin, **wait, args={"agent": name})
                self._write(kind, "e", end, **wait)

        self._waits.give_back(opened.wait)

    def _move(self, opened: _OpenInvocation, source: str | None, target: str | None, now: float) -> None:
        # A change that is undone within a millisecond is not written.
        if now >= self._counted_at + _SHORTEST_US:
            self.count(self._changed_at)

        if source is not None:
            self._now[source] -= 1

        if target is not None:
            self._now[target] += 1
            opened.status, opened.since, opened.delay_us = target, now, 0.0

        self._changed_at = now

    def _handle_trouble(self, event: LimitEvent, now: float) -> None:
        # Infinite while all keys of a KeyedLimiter are paused; a pause is no cool-off.
        if event.held_until is None or event.held_until == math.inf:
            self._end_trouble("held", now)
        else:
            seconds = event.held_until - event.at
            self._begin_trouble("held", now, {"seconds": round(seconds, 3)})
            self._held_until = now + seconds * 1e6

        if event.outage_since is None:
            self._end_trouble("outage", now)
        else:
            # An outage is recognized after some failures, but began with the first of them.
            self._begin_trouble("outage", max(0.0, now - (event.at - event.outage_since) * 1e6), {})

    def _begin_trouble(self, kind: str, at: float, args: dict[str, Any]) -> None:
        # Written at once: if the run is killed, it may be the cause.
        if kind not in self._troubles:
            self._troubles[kind] = at
            self._write(kind, "b", at, cat=kind, id=f"{self.pid}.{kind}", args=args)

    def _end_trouble(self, kind: str, now: float) -> None:
        # If no invocation is open, the span ends with the last one: later, there was nothing to hold back.
        at = now if self.open else self._changed_at
        if kind == "held":
            at, self._held_until = min(at, self._held_until), math.inf

        if kind in self._troubles:
            self._write(kind, "e", max(at, self._troubles.pop(kind)), cat=kind, id=f"{self.pid}.{kind}")

    def close(self, now: float) -> None:
        """Write the last counts, and end the open spans of trouble."""
        self.count(now)
        for kind in tuple(self._troubles):
            self._end_trouble(kind, now)

    def count(self, now: float) -> None:
        """Write the numbers of invocations by state, if they have changed."""
        if self._counted != self._now:
            self._counted, self._counted_at = dict(self._now), now
            self._write("invocations", "C", now, args=self._counted)

    def _write(self, name: str | None, phase: str, at: float, **fields: Any) -> None:
        record: dict[str, Any] = {} if name is None else {"name": name}
        self._timeline.write({**record, "ph": phase, "pid": self.pid, "ts": round(at, 1), **fields})


def _reason(exc: BaseException) -> str:
    """Return the type of an error, and the status of its response if it has one."""
    # A metaclass may make a property of type(exc).__name__.
    name, status = _name_of_type(type(exc)), response_status(exc)
    return name if status is None else f"{name} {status}"


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}..."

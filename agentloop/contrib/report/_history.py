"""Reads the file of a timeline into totals, in bounded memory."""

from __future__ import annotations

__all__ = ["LEVELS", "TROUBLES", "RunHistory"]

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TextIO, TypeAlias, TypeVar

from agentloop import Status

from ._text import duration

LEVELS = ("running", "retrying", "waiting")
TROUBLES: Sequence[str] = ("held", "outage")

_BINS = 240
_MAX_REASONS = 1000
_SHOWN_OUTAGES = 3
# Bounds that no timeline of ours reaches: characters of a line, lanes and groups, invocations in a state.
_LONGEST_LINE, _MAX_KNOWN, _HIGHEST_LEVEL = 1 << 17, 1 << 16, 1e12
_MAX_TEXT = 500
_COUNTERS = (*LEVELS, "slots")
_MICROSECOND, _LONGEST = timedelta(microseconds=1), timedelta(days=36500)
_Key: TypeAlias = tuple[str, str]
_K = TypeVar("_K")
_V = TypeVar("_V")


class _Bins:
    """Levels and counts over time, in a bounded number of bins. Their width doubles when they are full."""

    def __init__(self) -> None:
        self.width = 1.0
        self.end = 0.0
        self.rows: list[dict[str, float]] = []

    def add(self, levels: Mapping[str, float], begin: float, end: float) -> None:
        """Add levels that lasted from ``begin`` to ``end``, in microseconds."""
        self._reach(end)
        for index in range(int(begin / self.width), int(end / self.width) + 1):
            part = min(end, (index + 1) * self.width) - max(begin, index * self.width)
            row = self.rows[index]
            for name, level in levels.items():
                row[name] = row.get(name, 0.0) + level * part

    def count(self, name: str, at: float) -> None:
        """Count one event at a time in microseconds."""
        self._reach(at)
        row = self.rows[int(at / self.width)]
        row[name] = row.get(name, 0.0) + 1

    def mean(self, row: Mapping[str, float], name: str) -> float:
        return row.get(name, 0.0) / (row.get("time") or math.inf)

    def merged(self, most: int) -> list[dict[str, float]]:
        """Return the bins merged into at most ``most``."""
        size = -(-len(self.rows) // most) or 1
        return [_sum(self.rows[start : start + size]) for start in range(0, len(self.rows), size)]

    def _reach(self, end: float) -> None:
        self.end = max(self.end, end)
        while end >= self.width * _BINS:
            self.rows = self.merged(-(-len(self.rows) // 2) or 1)
            self.width *= 2

        while len(self.rows) <= end / self.width:
            self.rows.append({})


class _Reason:
    """Failures of one kind."""

    def __init__(self, agent: str, error: str) -> None:
        self.final = self.retried = 0
        self.agent = agent
        self.error = error


class _Group:
    """The cool-offs and outages that one group of loops met."""

    def __init__(self) -> None:
        self.name = ""
        self.outages: list[tuple[float, float]] = []
        """Begin and end of the first few outages, in microseconds."""
        self.counts = dict.fromkeys(TROUBLES, 0)
        self.totals_us = dict.fromkeys(TROUBLES, 0.0)

    def add(self, kind: str, begin: float, end: float) -> None:
        """Add a cool-off or an outage."""
        self.counts[kind] += 1
        self.totals_us[kind] += end - begin
        if kind == "outage" and len(self.outages) < _SHOWN_OUTAGES:
            self.outages.append((begin, end))


class RunHistory:
    """The totals of a timeline, in bounded memory."""

    def __init__(self) -> None:
        self.bins = _Bins()
        self.reasons: dict[_Key, _Reason] = {}
        self.stops: list[str] = []
        self.began: datetime | None = None
        self.groups: dict[str, _Group] = {}
        self._troubles: dict[_Key, float] = {}
        self._levels: dict[_Key, float] = {}
        # The sum of each level over all groups, and the time up to which it is in the bins.
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._added_until = 0.0
        self._agents: dict[tuple[Any, Any], str] = {}

    def read(self, file: TextIO) -> None:
        """
        Read a file with one record per line. It may be damaged or come from another program, so each line,
        number and name costs a bounded amount of time and memory.
        """
        while line := file.readline(_LONGEST_LINE):
            try:
                self._add_record(json.loads(line.strip().rstrip(",")))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                pass  # a bracket, half a line at the end of a killed run, or another program's record

        end = max([self.bins.end, *self._troubles.values()])
        self._add_levels(end)
        for key, begin in self._troubles.items():
            self._add_trouble(key, begin, end)

    def moment(self, at: float) -> str:
        """Return a time in microseconds as a time of day, if the timeline has one."""
        if at >= self.bins.end:
            return "the end"

        if self.began is None:
            return duration(at / 1000)

        last = self.began + self.bins.end * _MICROSECOND
        date = "" if self.began.date() == last.date() else "%Y-%m-%d "
        return f"{self.began + at * _MICROSECOND:{date}%H:%M:%S}"

    def _add_record(self, record: dict[str, Any]) -> None:
        phase, lane = record["ph"], (record["pid"], record.get("tid"))
        # Rounded as Timeline rounds.
        at = round(max(0.0, float(record.get("ts", 0.0))), 1)
        if at > _LONGEST / _MICROSECOND:
            raise ValueError("the time is beyond any run")

        if phase == "B":
            _put(self._agents, lane, str(record["name"])[:_MAX_TEXT])
        elif phase == "E":
            self._ended(record["args"], self._agents.pop(lane), at)
        elif phase == "C":
            levels = {name: float(record["args"][name]) for name in _COUNTERS if name in record["args"]}
            if not all(0 <= level <= _HIGHEST_LEVEL for level in levels.values()):
                raise ValueError("a level is negative or beyond any run")

            self._add_levels(at)
            for name, level in levels.items():
                before = self._levels.get((str(record["pid"]), name), 0.0)
                _put(self._levels, (str(record["pid"]), name), level)
                self._totals[name] += level - before
        elif phase == "i" and record["s"] == "p":
            self._ended(record["args"], str(record["args"]["agent"])[:_MAX_TEXT], at)
        elif phase == "i" and record["s"] == "g" and len(self.stops) < 5:
            self.stops.append(str(record["args"]["reason"])[:_MAX_TEXT])
        elif phase == "b" and record["cat"] in TROUBLES:
            _put(self._troubles, (str(record["pid"]), record["cat"]), at)
        elif phase == "e" and record["cat"] in TROUBLES:
            key = str(record["pid"]), record["cat"]
            begin = self._troubles.pop(key)
            self._add_trouble(key, begin, max(begin, at))
        elif phase == "M" and record["name"] == "process_name":
            self._group(str(record["pid"])).name = str(record["args"]["name"])[:_MAX_TEXT]
        elif phase == "M" and record["name"] == "process_labels":
            began = datetime.fromisoformat(record["args"]["labels"].removeprefix("began "))
            # Raises OverflowError if a later moment could be beyond the end of the calendar.
            self.began = began + _LONGEST - _LONGEST

    def _group(self, pid: str) -> _Group:
        if pid not in self.groups:
            _put(self.groups, pid, _Group())

        return self.groups[pid]

    def _add_trouble(self, key: _Key, begin: float, end: float) -> None:
        pid, kind = key
        self._group(pid).add(kind, begin, end)
        self.bins.add({kind: 1.0}, begin, end)

    def _ended(self, args: dict[str, Any], agent: str, at: float) -> None:
        status = str(args["status"])
        self.bins.count("succeeded" if status == Status.SUCCESS else "failed", at)
        if "error" not in args:
            return

        key = (str(args["reason"])[:_MAX_TEXT], status[:_MAX_TEXT])
        if key not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            key = ("other reasons", "")

        reason = self.reasons.setdefault(key, _Reason(agent, str(args["error"])[:_MAX_TEXT]))
        if "delay_seconds" in args:
            reason.retried += 1
        else:
            reason.final += 1

    def _add_levels(self, until: float) -> None:
        if until > self._added_until:
            self.bins.add({"time": 1.0, **self._totals}, self._added_until, until)
            self._added_until = until


def _put(known: dict[_K, _V], key: _K, value: _V) -> None:
    """
    Set a value.

    :raises ValueError: if the key is new and there are ``_MAX_KNOWN`` already
    """
    if key not in known and len(known) >= _MAX_KNOWN:
        raise ValueError("there are too many keys")

    known[key] = value


def _sum(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value

    return total

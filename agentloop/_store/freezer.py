"""How values become frozen, and what cannot be."""

from __future__ import annotations

__all__ = ["Freezer", "path_of", "same"]

import operator
from collections.abc import Iterable, Iterator
from typing import Any

from .frozen import (
    FROZEN,
    SETTLED,
    FrozenDict,
    FrozenList,
    FrozenSet,
    FrozenTuple,
    LiveDict,
    LiveList,
    LiveSet,
    Owner,
)

_CONTAINERS: tuple[type, ...] = (dict, list, set, tuple)
_PENDING = object()
# To read and write past the methods of a live value.
_PlainDict: type[dict[Any, Any]] = dict
_PlainList: type[list[Any]] = list


def same(one: Any, other: Any) -> bool:
    """Tell whether two frozen values are one, which tuples that were taken apart and frozen again are too."""
    if one is other:
        return True

    return type(one) is type(other) is FrozenTuple and len(one) == len(other) and all(map(same, one, other))


def path_of(steps: Iterable[Any]) -> str:
    """Return how one would write the way to a nested value: ``plan.steps[3].when``."""
    parts = (f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]" for step in steps)
    return "".join(parts).removeprefix(".")


class _Refused(Exception):
    def __init__(self, kind: type[Exception], problem: str) -> None:
        self.kind = kind
        self.problem = problem
        self.steps: list[Any] = []
        """From the inside out."""


class Freezer:
    """
    Freezes values: what is foreign is copied, what belongs to ``owner`` is frozen where it stands, as in
    Clojure's transients.

    :param owner: whose live values need no copy; nobody's if absent
    """

    def __init__(self, owner: Owner | None = None) -> None:
        self._owner = owner
        # By identity, and with the value itself, so that its identity is not given to another one.
        self._seen: dict[int, tuple[Any, Any]] = {}

    def freeze(self, value: Any, key: str) -> Any:
        """
        Return the value frozen; itself where nothing in it can be changed, or where it is no container.

        :param value: what is to be kept
        :param key: where; for the message of an error
        :raises TypeError: if a dict, list or set in it is of a subclass, or a tuple of a subclass
            holds containers
        :raises ValueError: if it contains itself, or is nested deeper than Python can follow
        """
        try:
            return self._freeze(value)
        except _Refused as refused:
            path = path_of([key, *reversed(refused.steps)])
            raise refused.kind(f"the value at {path} {refused.problem}") from None
        except RecursionError:
            raise ValueError(f"the value at {path_of([key])} is nested too deeply") from None

    def _freeze(self, value: object) -> Any:
        kind = type(value)
        if kind in SETTLED or not isinstance(value, _CONTAINERS):
            return value

        _, known = self._seen.get(id(value), (None, None))
        if known is _PENDING:
            raise _Refused(ValueError, "contains itself: keep a key or an index in its place")

        if known is not None:
            return known

        self._seen[id(value)] = value, _PENDING
        frozen = self._convert(kind, value)
        self._seen[id(value)] = value, frozen
        return frozen

    def _convert(self, kind: type, value: Any) -> Any:
        if kind is LiveDict and value.owner_ is self._owner:
            return self._settle_dict(value)

        if kind is LiveList and value.owner_ is self._owner:
            return self._settle_list(value)

        if kind is LiveSet and value.owner_ is self._owner:
            return _settle(value, FrozenSet, value.origin_)

        if kind is dict or kind is LiveDict:
            return FrozenDict(self._items(_PlainDict.items(value)))

        if kind is list or kind is LiveList:
            return FrozenList(item for _, item in self._items(enumerate(_PlainList.__iter__(value))))

        if kind is set or kind is LiveSet:
            return FrozenSet(value)

        if issubclass(kind, tuple):
            members: tuple[Any, ...] = value
            items = [item for _, item in self._items(enumerate(members))]
            if not any(type(item) in FROZEN for item in items):
                return value

            if kind is tuple:
                return FrozenTuple(items)

        base = next(base for base in _CONTAINERS if isinstance(value, base))
        raise _Refused(
            TypeError,
            f"is a {kind.__name__}, of which a store could give back only the {base.__name__}: "
            f"convert it to a plain {base.__name__}",
        )

    def _items(self, items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        step = None
        try:
            for step, item in items:
                yield step, self._freeze(item)
        except _Refused as refused:
            refused.steps.append(step)
            raise

    def _settle_dict(self, live: LiveDict) -> Any:
        origin = live.origin_
        opened = [(key, _PlainDict.__getitem__(live, key)) for key in live.opened_ if key in live]
        for key, item in self._items(opened):
            _PlainDict.__setitem__(live, key, item)
            if origin is not None and not same(item, origin[key]):
                origin = None

        del live.opened_
        return _settle(live, FrozenDict, origin)

    def _settle_list(self, live: LiveList) -> Any:
        items, origin = _PlainList.__iter__, live.origin_
        opened = [(index, item) for index, item in enumerate(items(live)) if type(item) not in SETTLED]
        for index, item in self._items(opened):
            _PlainList.__setitem__(live, index, item)

        is_same = len(live) == len(origin) and (
            all(map(operator.is_, items(live), origin)) or all(map(same, items(live), origin))
        )
        return _settle(live, FrozenList, origin if is_same else None)


def _settle(live: Any, kind: Any, origin: Any) -> Any:
    # Whoever still holds the live value finds that it can no longer be changed. What it was a copy of is
    # dropped, since otherwise every version would keep all those before it.
    live.__class__ = kind
    live.origin_ = None
    return live if origin is None else origin

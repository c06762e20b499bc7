"""Copies of dicts, lists, sets and tuples, all the way down, and of nothing else."""

from __future__ import annotations

__all__ = ["copied", "same"]

import copy
from collections.abc import Callable
from operator import is_
from typing import Any, TypeVar

T = TypeVar("T")

_PLAIN = frozenset([dict, list, set, tuple])
_CONTAINERS = tuple(_PLAIN)
# Types without contents to copy; checked first.
_LEAVES: frozenset[type] = frozenset([str, int, float, bool, type(None), bytes, complex])
# For the type checker, to which type(Any) is unknown.
_type: Callable[[Any], type[Any]] = type
# These methods read and write past those of a subclass.
_Dict: type[dict[Any, Any]] = dict
_List: type[list[Any]] = list
_Tuple: type[tuple[Any, ...]] = tuple


def copied(value: T) -> T:
    """
    Return a copy of a dict, list, set or tuple, and of all of these in it. Any other object is returned
    itself, and so is a tuple with nothing to copy in it.

    Subclasses keep their type: ``copy.copy()`` makes the copies. An object in two places stays one object,
    also in itself. Any depth is allowed, except for tuples in tuples.

    :raises RecursionError: if tuples are nested deeper than Python can follow
    """
    return value if type(value) in _LEAVES else _Copying().copy(value)


class _Copying:
    __slots__ = ("_copies", "_originals", "_shallow")

    def __init__(self) -> None:
        # By the ids of the originals. The originals are kept alive, so that their ids are not used again.
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []
        # Copies of dicts and lists whose items are not copied yet.
        self._shallow: list[Any] = []

    def copy(self, value: Any) -> Any:
        made = self._copy(value)
        for shallow in self._shallow:
            if issubclass(_type(shallow), dict):
                for key, item in _Dict.items(shallow):
                    if type(item) not in _LEAVES:
                        _Dict.__setitem__(shallow, key, self._copy(item))
            else:
                for index, item in enumerate(_List.__iter__(shallow)):
                    if type(item) not in _LEAVES:
                        _List.__setitem__(shallow, index, self._copy(item))

        return made

    def _copy(self, value: Any) -> Any:
        kind = _type(value)
        if kind not in _PLAIN and not issubclass(kind, _CONTAINERS):
            return value

        made = self._copies.get(id(value))
        if made is None:
            made = self._copy_tuple(kind, value) if issubclass(kind, tuple) else self._copy_level(kind, value)
            self._copies[id(value)] = made
            self._originals.append(value)

        return made

    def _copy_level(self, kind: type, value: Any) -> Any:
        made = value.copy() if kind in _PLAIN else copy.copy(value)
        # An object whose copy is itself counts as immutable.
        if made is not value and not issubclass(kind, set):
            self._shallow.append(made)

        return made

    def _copy_tuple(self, kind: Any, value: Any) -> Any:
        items = [self._copy(item) for item in _Tuple.__iter__(value)]
        if all(map(is_, items, _Tuple.__iter__(value))):
            return value

        if kind is tuple:
            return tuple(items)

        # Among subclasses, only named tuples have a known constructor.
        return kind._make(items) if hasattr(kind, "_make") else value


def same(one: Any, other: Any) -> bool:
    """
    Return whether a copy is unchanged: two values have the same structure and order, and the same objects. No
    method of the objects is called.

    It may return false for equal values, as for containers of a subclass.
    """
    pairs, partners = [(one, other)], dict[int, Any]()
    while pairs:
        one, other = pairs.pop()
        kind = _type(one)
        if one is other:
            continue

        if kind is not type(other) or kind not in _PLAIN or len(one) != len(other):
            return False

        if id(one) in partners or id(other) in partners:
            # An object in two places of one value must be in the same two places of the other.
            if partners.get(id(one)) is not other or partners.get(id(other)) is not one:
                return False

            continue

        partners[id(one)], partners[id(other)] = other, one
        if kind is set:
            if {*map(id, one)} != {*map(id, other)}:
                return False

            continue

        if kind is dict:
            if not all(map(is_, one, other)):
                return False

            one, other = one.values(), other.values()

        pairs += [pair for pair in zip(one, other, strict=True) if pair[0] is not pair[1]]

    return True

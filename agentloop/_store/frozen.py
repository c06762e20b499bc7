"""
Values that are shared because nobody can change them, and copies of them that are made on first touch.

What a store holds is frozen: dicts, lists and sets that refuse to be changed. What it hands out is alive:
an ordinary dict, list or set with one level of copies, of which a child is copied when it is first looked at.
So an edit copies what lies on the way to what it changes, and the rest is shared (path copying: Driscoll,
Sarnak, Sleator and Tarjan, "Making data structures persistent", 1989).

All of them are real dicts, lists and sets, complete at any moment: C code that reads past their methods, as
``json``, ``==`` and ``PyDict_Next`` do, reads the truth.
"""

from __future__ import annotations

__all__ = [
    "FROZEN",
    "SETTLED",
    "FrozenDict",
    "FrozenList",
    "FrozenSet",
    "FrozenTuple",
    "LiveDict",
    "LiveList",
    "LiveSet",
    "Owner",
    "thaw",
]

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, Self, SupportsIndex, TypeAlias

Owner: TypeAlias = object
"""Who may freeze a live value where it stands: the one edit that it was made for."""

# What cannot be changed, and holds nothing that can; looked up before anything else.
_LEAVES: frozenset[type] = frozenset([str, int, float, bool, type(None), bytes, complex])
_MISSING = object()


class _Dict(dict[Any, Any]):
    __slots__ = ("opened_", "origin_", "owner_")
    # Only of a live one: the keys under which something may not be frozen; what it is a copy of, as long as
    # it is the same; whose it is. Templates look for an attribute before they look for a key, so no name here
    # is one that somebody might use for a key.
    opened_: set[Any]
    origin_: _Dict | None
    owner_: Owner

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (dict(self),)


class _List(list[Any]):
    __slots__ = ("origin_", "owner_")
    origin_: _List
    owner_: Owner

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(self),)


class _Set(set[Any]):
    __slots__ = ("origin_", "owner_")
    origin_: _Set | None
    owner_: Owner

    def __repr__(self) -> str:
        return repr(set(self))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return set, (set(self),)


class FrozenDict(_Dict):
    """A dict that is shared."""

    __slots__ = ()


class FrozenList(_List):
    """A list that is shared."""

    __slots__ = ()


class FrozenSet(_Set):
    """A set that is shared. It is no ``frozenset``, which is another type to whoever put it in."""

    __slots__ = ()


class FrozenTuple(tuple[Any, ...]):
    """A tuple that holds frozen values; one that does not is left as it is."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return tuple, (tuple(self),)


FROZEN: frozenset[type] = frozenset([FrozenDict, FrozenList, FrozenSet, FrozenTuple])
SETTLED = _LEAVES | FROZEN
"""The types of values that need no freezing."""


class LiveDict(_Dict):
    """A dict that is somebody's own, with shared values until they are looked at."""

    __slots__ = ()

    def __init__(self, origin: Mapping[Any, Any], owner: Owner) -> None:
        # Copies the table in one piece, which holds for a frozen dict as well: it iterates as dict does.
        super().__init__(origin)
        self.opened_ = set()
        self.origin_ = origin if isinstance(origin, FrozenDict) else None
        self.owner_ = owner

    def _open(self, key: Any, frozen: Any) -> Any:
        value = thaw(frozen, self.owner_)
        super().__setitem__(key, value)
        self.opened_.add(key)
        return value

    def _open_all(self) -> None:
        for key, value in [*super().items()]:
            if type(value) in FROZEN:
                self._open(key, value)

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        return self._open(key, value) if type(value) in FROZEN else value

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __iter__(self) -> Iterator[Any]:
        # Its own only so that dict(), ** and | ask for each item instead of copying the table.
        return super().__iter__()

    def items(self) -> Any:
        self._open_all()
        return super().items()

    def values(self) -> Any:
        self._open_all()
        return super().values()

    def copy(self) -> dict[Any, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.origin_ = None
        if type(value) not in _LEAVES:
            self.opened_.add(key)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        self.origin_ = None

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default

        return self[key]

    def pop(self, key: Any, default: Any = _MISSING) -> Any:
        if key not in self and default is not _MISSING:
            return default

        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[Any, Any]:
        key, value = super().popitem()
        self.origin_ = None
        return key, thaw(value, self.owner_)

    def clear(self) -> None:
        super().clear()
        self.origin_ = None

    def update(self, /, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self


class LiveList(_List):
    """
    A list that is somebody's own, with shared items until they are looked at.

    What changes it needs no note: it is compared with its origin in the end, since C code such as ``heapq``
    changes a list past its methods.
    """

    __slots__ = ()

    def __init__(self, origin: FrozenList, owner: Owner) -> None:
        super().__init__(origin)
        self.origin_ = origin
        self.owner_ = owner

    def _open_all(self) -> None:
        for index, item in enumerate(super().__iter__()):
            if type(item) in FROZEN:
                super().__setitem__(index, thaw(item, self.owner_))

    def __getitem__(self, index: Any) -> Any:
        if type(index) is slice:
            self._open_all()

        item = super().__getitem__(index)
        if type(item) in FROZEN:
            item = thaw(item, self.owner_)
            super().__setitem__(index, item)

        return item

    def __iter__(self) -> Iterator[Any]:
        self._open_all()
        return super().__iter__()

    def __reversed__(self) -> Iterator[Any]:
        self._open_all()
        return super().__reversed__()

    def pop(self, index: SupportsIndex = -1) -> Any:
        return thaw(super().pop(index), self.owner_)

    def copy(self) -> list[Any]:
        return list(self)

    def __add__(self, other: Any) -> Any:
        return list(self) + other

    def __radd__(self, other: Any) -> Any:
        # list + list looks past the methods of the second one.
        return other + list(self)

    def __mul__(self, times: SupportsIndex) -> list[Any]:
        return list(self) * times

    __rmul__ = __mul__

    # What is then in two places of the list has to be one object.

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, list(self) if value is self and type(index) is slice else value)

    def extend(self, items: Iterable[Any]) -> None:
        super().extend(list(self) if items is self else items)

    def __iadd__(self, items: Any) -> Self:
        self.extend(items)
        return self

    def __imul__(self, times: SupportsIndex) -> Self:
        self._open_all()
        return super().__imul__(times)


class LiveSet(_Set):
    """A set that is somebody's own. What is in a set cannot be changed, so there is nothing to copy later."""

    __slots__ = ()

    def __init__(self, origin: FrozenSet, owner: Owner) -> None:
        super().__init__(origin)
        self.origin_ = origin
        self.owner_ = owner


def _refuse(_self: object, *_args: object, **_kwargs: object) -> NoReturn:
    raise TypeError(
        "this is read-only, because it is what a ContextStore holds: change the draft that "
        "`async with store.edit() as draft:` gives, or a copy.deepcopy() of this"
    )


def _noting_change(name: str) -> Callable[..., Any]:
    change: Callable[..., Any] = getattr(set, name)

    def method(self: LiveSet, *args: Any) -> Any:
        self.origin_ = None
        return change(self, *args)

    return method


_SET_CHANGES = (
    "add clear difference_update discard intersection_update pop remove symmetric_difference_update update "
    "__iand__ __ior__ __isub__ __ixor__"
)
for _kind, _names in (
    (FrozenDict, "clear pop popitem setdefault update __delitem__ __ior__ __setitem__"),
    (FrozenList, "append clear extend insert pop remove reverse sort "
                 "__delitem__ __iadd__ __imul__ __setitem__"),
    (FrozenSet, _SET_CHANGES),
):  # fmt: skip
    for _name in _names.split():
        setattr(_kind, _name, _refuse)

for _name in _SET_CHANGES.split():
    setattr(LiveSet, _name, _noting_change(_name))


def _thaw_tuple(items: FrozenTuple, owner: Owner) -> tuple[Any, ...]:
    return tuple(thaw(item, owner) for item in items)


_THAW: dict[type, Callable[[Any, Owner], Any]] = {
    FrozenDict: LiveDict,
    FrozenList: LiveList,
    FrozenSet: LiveSet,
    FrozenTuple: _thaw_tuple,
}


def thaw(value: object, owner: Owner) -> Any:
    """Return a live copy of a frozen value, and any other value as it is."""
    make = _THAW.get(type(value))
    return make(value, owner) if make is not None else value

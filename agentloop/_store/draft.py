"""The draft of an edit: the state of a store, with changes over it."""

from __future__ import annotations

__all__ = ["Draft", "check_key"]

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Any, Self

from .copying import copied, same


def check_key(key: Any) -> None:
    """Raise ``TypeError`` if a key is no ``str``."""
    if not isinstance(key, str):
        raise TypeError(f"a key of a ContextStore must be a str, got {key!r}")


class Draft(MutableMapping[str, Any]):
    """
    A mutable mapping over a state that it does not change.

    Its cost depends on the touched keys, not on the size of the state: the value of a key is copied when it
    is first read.

    :param state: the state; it must not change while the draft is in use
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        # The values that were set, or were read and may have been changed since.
        self._touched: dict[str, Any] = {}
        # Deleted keys of the state. A key that was set again is in both, and comes at the end.
        self._deleted: set[str] = set()
        self._ended = False

    def __repr__(self) -> str:
        return "<draft that has ended>" if self._ended else f"<draft of {len(self)} keys>"

    def __getitem__(self, key: str) -> Any:
        self._check()
        if key in self._touched:
            return self._touched[key]

        if key in self._deleted:
            raise KeyError(key)

        value = self._touched[key] = copied(self._state[key])
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._check()
        check_key(key)
        self._touched[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)

        self._touched.pop(key, None)
        if key in self._state:
            self._deleted.add(key)

    def __contains__(self, key: object) -> bool:
        self._check()
        return key in self._touched or (key in self._state and key not in self._deleted)

    def __iter__(self) -> Iterator[str]:
        self._check()
        for key in self._state:
            if key not in self._deleted:
                yield key

        yield from [*self._added()]

    def __reversed__(self) -> Iterator[str]:
        keys: list[str] = [*self]
        return reversed(keys)

    def __len__(self) -> int:
        self._check()
        return len(self._state) - len(self._deleted) + sum(1 for _ in self._added())

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def popitem(self) -> tuple[str, Any]:
        """Remove the last item and return it, as ``dict`` does."""
        for key in reversed(self):
            return key, self.pop(key)

        raise KeyError("popitem(): the draft is empty")

    def clear(self) -> None:
        """Remove all items."""
        self._check()
        self._touched.clear()
        self._deleted.update(self._state)

    def end(self) -> None:
        """Refuse any further use."""
        self._ended = True

    def changes(self) -> tuple[dict[str, Any], Collection[str]]:
        """
        Compare the touched values with the state.

        :return: copies of the changed values, and the deleted keys, which are to be deleted first
        """
        changes = {
            key: copied(value)
            for key, value in self._touched.items()
            if self._is_added(key) or not same(value, self._state[key])
        }
        return changes, self._deleted

    def _added(self) -> Iterator[str]:
        return (key for key in self._touched if self._is_added(key))

    def _is_added(self, key: str) -> bool:
        return key not in self._state or key in self._deleted

    def _check(self) -> None:
        if self._ended:
            raise RuntimeError(
                "the block of this draft has ended: take a snapshot() to look at the store, or open another "
                "`async with store.edit() as draft:`"
            )

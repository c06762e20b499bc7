"""How many inputs of each key a batch may hold, if each key has its own limiter."""

from __future__ import annotations

__all__ = ["KeyRoom"]

from .._limits.slots import Pool

# How many invocations of a key may wait, per slot of it, before they take the room of other inputs.
WAITING_PER_SLOT = 8


class KeyRoom:
    """
    Counts the waiting invocations of each key, in line or to be retried, and how many of these take room.

    :param bounded: whether any of them take room
    """

    def __init__(self, bounded: bool) -> None:
        self._bounded = bounded
        self._waiting: dict[Pool, int] = {}
        self._in_room: dict[Pool, int] = {}

    @property
    def in_room(self) -> int:
        """How many invocations take room, over all keys."""
        return sum(self._in_room.values())

    def add_waiting(self, pool: Pool) -> bool:
        """
        Count one more waiting invocation.

        :return: whether it takes no room
        """
        self._waiting[pool] = waiting = self._waiting.get(pool, 0) + 1
        if not self._bounded or waiting <= WAITING_PER_SLOT * pool.max_concurrency:
            return True

        self._in_room[pool] = self._in_room.get(pool, 0) + 1
        return False

    def remove_waiting(self, pool: Pool) -> bool:
        """
        Count one waiting invocation fewer.

        :return: whether none took room; if one did, its room goes to the invocation that waits no more
        """
        self._waiting[pool] -= 1
        if not self._waiting[pool]:
            del self._waiting[pool]

        in_room = self._in_room.get(pool, 0)
        if not in_room:
            return True

        self._in_room[pool] = in_room - 1
        if in_room == 1:
            del self._in_room[pool]

        return False

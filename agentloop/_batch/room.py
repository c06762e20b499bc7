"""How much input a batch may have at once, where each key has a limiter of its own."""

from __future__ import annotations

__all__ = ["KeyRoom"]

from .._limits.slots import Pool

# How many invocations of a key may wait, per slot of it, before they take room of other input.
WAITING_PER_SLOT = 8


class KeyRoom:
    """
    Counts the invocations of each key that wait, in line or to be retried, and how many of these take room.

    :param bounded: whether any of them do
    """

    def __init__(self, bounded: bool) -> None:
        self._bounded = bounded
        self._waiting: dict[Pool, int] = {}
        self._in_room: dict[Pool, int] = {}

    @property
    def in_room(self) -> int:
        """How many of all keys take room."""
        return sum(self._in_room.values())

    def set_aside(self, pool: Pool) -> bool:
        """
        Count one more that waits.

        :return: whether it takes no room
        """
        self._waiting[pool] = waiting = self._waiting.get(pool, 0) + 1
        if not self._bounded or waiting <= WAITING_PER_SLOT * pool.max_concurrency:
            return True

        self._in_room[pool] = self._in_room.get(pool, 0) + 1
        return False

    def take_back(self, pool: Pool) -> bool:
        """
        Count one fewer that waits.

        :return: whether it took no room, or another one takes none from now on
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

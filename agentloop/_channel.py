"""The way from what produces to the one who reads, who may be slower."""

from __future__ import annotations

__all__ = ["BUFFER", "PATIENCE_SECONDS", "Channel"]

import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import anyio
from anyio.lowlevel import current_token

T = TypeVar("T")

BUFFER = 16
"""How many chunks a producer may be ahead of its reader."""
LOW = BUFFER // 4
"""How many of them are left when the producer goes on."""
PATIENCE_SECONDS = 5.0
"""How long a loop that is being left waits for a reader that takes nothing."""


class Channel(Generic[T]):
    """
    A memory object stream with a bounded buffer, in which nobody waits.

    An item that a memory object stream hands straight to a waiting receiver is lost when that one is
    cancelled natively (``asyncio.wait_for(anext(stream), 1)``). So both sides wait on events beside the
    stream, and what is in it is put and taken without waiting: that loses nothing, and costs less.
    """

    def __init__(self) -> None:
        # The bound is kept by waiting after an item was put, so that what was produced is never in nobody's
        # hands.
        self._send, self._receive = anyio.create_memory_object_stream[T](math.inf)
        self._backend = current_token().backend_class
        self._size = 0
        self._arrived: anyio.Event | None = None
        self._room: anyio.Event | None = None
        self._rest: deque[T] = deque()
        self._ended = False
        self._taken = 0
        self.abandoned = False
        """Whether nobody will take anything any more, so that waiting for room is in vain."""
        self._on_stall: Callable[[], object] | None = None

    def put(self, item: T) -> bool:
        """
        Hand an item over; there is always room for one.

        :return: whether there is for no other, so that the producer should wait for room
        """
        self._send.send_nowait(item)
        self._size = size = self._size + 1
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None

        return size >= BUFFER

    async def wait_for_room(self) -> None:
        """
        Wait until the reader has taken most of what is there. To wake the producer for every single item
        would cost a switch of tasks each; to wake it when nothing is left would let the reader wait.
        """
        while self._size > LOW and not self.abandoned:
            if self._room is None:
                self._room = anyio.Event()

            if self._on_stall is None:
                await self._room.wait()
                continue

            # Not the size: what one is taken, another producer may have filled up.
            taken = self._taken
            with anyio.move_on_after(PATIENCE_SECONDS):
                await self._room.wait()

            if self._taken == taken:
                self._on_stall()

    def hurry(self, on_stall: Callable[[], object]) -> None:
        """
        From now on, be patient no longer than ``PATIENCE_SECONDS`` with a reader that takes nothing.

        :param on_stall: is called then, and cancels the producers
        """
        self._on_stall = on_stall
        self._wake_producers()

    def abandon(self) -> None:
        """Let nobody wait for room any more: the reader has left, or all is cancelled."""
        self.abandoned = True
        self._wake_producers()

    def _wake_producers(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None

    async def take(self) -> T:
        """
        Wait for an item. Cancellation, native cancellation too, loses none.

        :raises EndOfStream: when all were taken and no more will come
        """
        # To look for a cancellation costs a tenth of all that a chunk does. A reader that waits finds out
        # anyway, and one that never waits after three more at the latest.
        if not self._taken & 3:
            await self._backend.checkpoint_if_cancelled()

        while not self._size:
            if self._ended:
                raise anyio.EndOfStream

            if self._arrived is None:
                self._arrived = self._backend.create_event()

            await self._arrived.wait()

        # Nothing waits from here on, so what was taken is also returned.
        self._size -= 1
        self._taken += 1
        if self._room is not None and self._size <= LOW:
            self._wake_producers()

        return self._rest.popleft() if self._rest else self._receive.receive_nowait()

    def end(self) -> None:
        """Say that no item will come any more. What is there can still be taken."""
        # The reader may never come back, and a stream that is left open would be reported.
        while len(self._rest) < self._size:
            self._rest.append(self._receive.receive_nowait())

        self._send.close()
        self._receive.close()
        self._ended = True
        if self._arrived is not None:
            self._arrived.set()

    def drop(self) -> None:
        """Drop what nobody will take any more, once it has ended."""
        self._rest.clear()
        self._size = 0

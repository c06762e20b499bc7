"""A bounded buffer between producers and a slower reader."""

from __future__ import annotations

__all__ = ["BUFFER", "PATIENCE_SECONDS", "Channel"]

import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import anyio
from anyio.lowlevel import current_token

from .._eventloop.loop import Event, kind_of_loop

T = TypeVar("T")

BUFFER = 16
"""How many items the buffer holds, and how many producers run at once."""
LOW = BUFFER // 4
"""How many items are left in the buffer when waiting producers go on."""
TURN = BUFFER // 2
"""How many items a producer sends before it makes room for waiting ones."""
STARVED_SECONDS = 0.001
"""How long a reader waits for the running producers before all others go on as well."""
PATIENCE_SECONDS = 5.0
"""How long a loop that is being left waits for a reader that takes nothing."""


class _Place:
    """A producer's place in line."""

    __slots__ = ("has_room", "wake")

    wake: Callable[[], object]
    """Called when there is room."""

    def __init__(self) -> None:
        self.has_room = False


class Channel(Generic[T]):
    """
    A bounded buffer around a memory object stream. No task waits on the stream itself.

    A memory object stream hands an item straight to a waiting receiver. A native cancellation of the receiver
    loses that item (``asyncio.wait_for(anext(stream), 1)``). So both sides wait on events beside the stream,
    and send and receive without waiting: that loses nothing, and costs less.

    Producers share the buffer. A producer that has filled it waits in line. Once the reader has taken all but
    ``LOW`` items, the first in line go on, as many as would fill the buffer with one item each: waking a
    producer for every item would cost a switch of tasks for each item, and waking all of them at once one for
    each producer. After ``TURN`` items a producer joins the end of the line, if there is one. A new producer
    waits in the same line. So of any number of producers, ``BUFFER`` run at once, and all together are less
    than twice ``BUFFER`` items ahead.

    But a running agent mostly waits for its model, and 16 requests at once may be too few. So when the reader
    has waited with an empty buffer for ``STARVED_SECONDS``, and the line is not empty, the whole line goes
    on. Then no producer waits until the buffer holds an item for each running one: the reader is the slower
    side again.

    :param on_taken: called with each item that the reader takes, until :meth:`close`
    """

    def __init__(self, on_taken: Callable[[T], object] | None = None) -> None:
        # Producers wait for room before they produce an item, so that a produced item always has room.
        self._send, self._receive = anyio.create_memory_object_stream[T](math.inf)
        self._on_taken = on_taken
        self._backend = current_token().backend_class
        self._new_event = kind_of_loop().new_event()
        self._size = 0
        self._arrived: Event | None = None
        self._advancing = 0
        self._line: deque[_Place] = deque()
        # The place of the next new producer, and whether there was room for it.
        self._next: _Place | None = None
        self._admits = False
        # Whether the running producers were too few for the reader.
        self._starved = False
        self._unread: deque[T] = deque()
        self._ended = False
        self._taken = 0
        self.abandoned = False
        """Whether no reader will take any more items, so that producers do not wait for room."""
        self._on_stall: Callable[[], object] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the reader must wait for an item."""
        return not (self._size or self._ended)

    def has_room(self, on_room: Callable[[], object]) -> bool:
        """
        Return whether one more producer may begin.

        :param on_room: called when it may begin, if it may not now
        """
        if self._admits or self.abandoned:
            return True

        if not self._is_full() and (self._starved or self._size + self._advancing < BUFFER):
            return True

        if self._next is None:
            self._next = _Place()
            self._next.wake = on_room
            # Second in line, so that running and new producers take turns.
            self._join(self._next, 1)

        return False

    def enter(self) -> None:
        """Count one more running producer. It must call :meth:`leave` at its end."""
        self._advancing += 1
        self._admits = False

    def leave(self) -> None:
        """Count a producer as ended. The first in line gets its room."""
        self._advancing -= 1
        self._let_in()

    def send(self, item: T, number: int = 0) -> bool:
        """
        Send an item; there is always room for one.

        :param number: how many items the producer has sent
        :return: whether the producer must :meth:`wait_for_room` before it goes on
        """
        self._send.send_nowait(item)
        self._size = size = self._size + 1
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None

        # The common case inline, for speed: the buffer has room, and the line is empty.
        return (size >= BUFFER or bool(self._line)) and self._is_full(number)

    def _is_full(self, number: int = 0) -> bool:
        """Return whether a producer that has sent ``number`` items must wait."""
        if self._starved:
            # The line is empty.
            self._starved = self._size < max(BUFFER, self._advancing)
            return not self._starved

        return self._size >= BUFFER or (bool(self._line) and number % TURN == 0)

    async def wait_for_room(self) -> None:
        """
        Wait in line. The producer counts as running again afterwards, also if this raises: its agent may
        yield once more.
        """
        if self.abandoned:
            return

        place = _Place()
        self._join(place, len(self._line))
        self._advancing -= 1
        try:
            while not place.has_room:
                event = self._new_event()
                place.wake = event.set
                if self._on_stall is None:
                    await event.wait()
                    continue

                taken = self._taken
                with anyio.move_on_after(PATIENCE_SECONDS):
                    await event.wait()

                if self._taken == taken and not place.has_room:
                    self._on_stall()
        except BaseException:
            if not place.has_room:
                self._line.remove(place)
                self._advancing += 1

            raise

    def _join(self, place: _Place, index: int) -> None:
        if not self._line and self._arrived is not None:
            # A waiting reader is woken, since it must now wait with the time limit of STARVED_SECONDS.
            self._arrived.set()
            self._arrived = None

        self._line.insert(index, place)

    def limit_patience(self, on_stall: Callable[[], object]) -> None:
        """
        From now on, wait at most ``PATIENCE_SECONDS`` for a reader that takes nothing.

        :param on_stall: called after that time; cancels the producers
        """
        self._on_stall = on_stall
        for place in tuple(self._line):
            # The woken producer stays in line, and waits again with a time limit.
            place.wake()

    def abandon(self) -> None:
        """Let no producer wait for room any more: the reader has left, or the producers are cancelled."""
        self.abandoned = True
        self._let_in(all_of_them=True)

    def _let_in(self, all_of_them: bool = False) -> None:
        """Let the first in line go on, once the buffer is low."""
        line = self._line
        room = BUFFER - self._size - self._advancing if self._size <= LOW else 0
        while line and (room > 0 or all_of_them):
            place = line.popleft()
            place.has_room = True
            room -= 1
            if place is self._next:
                self._next = None
                self._admits = True
            else:
                self._advancing += 1

            place.wake()

    async def receive(self) -> T:
        """
        Wait for an item. Cancellation, native cancellation too, loses none.

        :raises EndOfStream: when all items were taken and no more will come
        """
        # Checking for a cancellation is a tenth of the cost of a chunk. A reader that waits notices one
        # anyway, and a reader that never waits notices it after three more chunks at the latest.
        if not self._taken & 3:
            await self._backend.checkpoint_if_cancelled()

        while not self._size:
            if self._ended:
                raise anyio.EndOfStream

            await self.wait_for_item()

        # No await from here on, so a taken item is always returned.
        self._size -= 1
        self._taken += 1
        if self._line and self._size <= LOW:
            self._let_in()

        item = self._unread.popleft() if self._unread else self._receive.receive_nowait()
        if self._on_taken is not None:
            self._on_taken(item)

        return item

    async def wait_for_item(self) -> None:
        """Wait until an item can be taken, or no more will come."""
        while not (self._size or self._ended):
            if self._arrived is None:
                self._arrived = self._new_event()

            if not self._line:
                await self._arrived.wait()
                continue

            with anyio.move_on_after(STARVED_SECONDS) as scope:
                await self._arrived.wait()

            if scope.cancelled_caught and not self._size:
                self._starved = bool(self._line)
                self._let_in(all_of_them=True)

    def close(self) -> None:
        """End the stream for the reader. Items in the buffer can still be taken."""
        # The reader may never come back, and AnyIO warns about a stream that is left open.
        while len(self._unread) < self._size:
            self._unread.append(self._receive.receive_nowait())

        self._send.close()
        self._receive.close()
        self._ended = True
        # These are not called any more, and they refer to the owner of this channel.
        self._on_stall = self._on_taken = None
        self._let_in(all_of_them=True)
        if self._arrived is not None:
            self._arrived.set()

    def drop(self) -> list[T]:
        """Drop and return the items that no reader will take, after :meth:`close`."""
        dropped = [*self._unread]
        self._unread.clear()
        self._size = 0
        return dropped

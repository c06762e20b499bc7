"""The waiters and watchers of a store, in one event loop."""

from __future__ import annotations

__all__ = ["Audience", "Watch", "refuse_awaitable"]

import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextvars import copy_context
from types import MappingProxyType
from typing import Any, Self

import anyio
from anyio.lowlevel import checkpoint

from .._limits.away import lend_while
from .draft import Draft


def refuse_awaitable(name: str, result: Any, instead: str) -> None:
    """Raise ``TypeError`` if a function that must be plain has returned an awaitable."""
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()

        raise TypeError(f"{name} must be a plain function, but it returned an awaitable: {instead}")


class _Wait:
    """A task's wait for a condition."""

    def __init__(self, predicate: Callable[[Mapping[str, Any]], Any]) -> None:
        self._predicate = predicate
        self._context = copy_context()
        self.event = anyio.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def is_over(self, state: Mapping[str, Any]) -> bool:
        """Call the predicate, in the context of the waiting task, and keep its result or its exception."""
        is_over, draft = True, Draft(state)
        try:
            now = MappingProxyType(draft)
            self.result = self._context.run(self._predicate, now)
            if self.result is now:
                self.result = dict(draft)

            refuse_awaitable("predicate", self.result, "it must not wait; look at the state only")
            is_over = bool(self.result)
        except BaseException as exc:  # raised in the waiting task, never in the writing one
            self.error = exc
        finally:
            # A later read would see another state.
            draft.end()

        return is_over


class Watch(AsyncIterator[Any]):
    """
    The current value at first, and then the newest one each time it may have changed.

    :param check: refuses a task that may not wait here
    :param read: returns the value at this moment
    """

    def __init__(self, check: Callable[[], object], read: Callable[[], Any]) -> None:
        self._check = check
        self._read = read
        self._is_new = True
        self._has_ended = False
        self._news: anyio.Event | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        self._check()
        await checkpoint()
        while not (self._is_new or self._has_ended):
            if self._news is None:
                self._news = anyio.Event()

            await lend_while(self._news.wait)

        if self._has_ended:
            raise StopAsyncIteration

        # No await from here on, so a value that counts as read is always returned.
        value = self._read()
        self._is_new = False
        return value

    def wake(self) -> None:
        """Note that the value may have changed."""
        self._is_new = True
        news, self._news = self._news, None
        if news is not None:
            news.set()

    def end(self) -> None:
        """End the iteration."""
        self._has_ended = True
        self.wake()


class Audience:
    """The waits for conditions, and the watches of a key or, under ``None``, of all keys."""

    def __init__(self) -> None:
        self._waits: dict[_Wait, None] = {}
        self._watches: dict[str | None, dict[Watch, None]] = {}

    def notify(self, state: Mapping[str, Any], keys: Iterable[str]) -> None:
        """
        Check the conditions, and wake the tasks that a change concerns. This never fails, and never waits.

        :param state: the current state
        :param keys: the keys that have changed
        """
        for wait in [*self._waits]:
            if wait.is_over(state):
                del self._waits[wait]
                wait.event.set()

        if self._watches:
            for key in (*keys, None):
                for watch in self._watches.get(key, ()):
                    watch.wake()

    async def wait_for(self, predicate: Callable[[Mapping[str, Any]], Any], state: Mapping[str, Any]) -> Any:
        """
        Return the first true result of the predicate, which is called now and at each change.

        :param state: the current state
        """
        wait = _Wait(predicate)
        if not wait.is_over(state):
            self._waits[wait] = None
            try:
                await lend_while(wait.event.wait)
            finally:
                self._waits.pop(wait, None)

        if wait.error is not None:
            raise wait.error

        return wait.result

    def add(self, key: str | None, watch: Watch) -> None:
        """Add a watch of a key; of all keys if it is ``None``."""
        self._watches.setdefault(key, {})[watch] = None

    def remove(self, key: str | None, watch: Watch) -> None:
        """Remove a watch, and end its iteration."""
        watches = self._watches[key]
        del watches[watch]
        if not watches:
            del self._watches[key]

        watch.end()

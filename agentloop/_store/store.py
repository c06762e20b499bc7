"""State that concurrent agents share."""

from __future__ import annotations

__all__ = ["ContextStore"]

import json
import math
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, TypeVar, cast, overload

from anyio.lowlevel import checkpoint

from .. import _validators as must
from .copying import copied
from .draft import check_key
from .edit import Edit
from .json import encode
from .state import State, copy_all
from .watch import Watch, refuse_awaitable

T = TypeVar("T")


class ContextStore:
    """
    State that concurrent agents share: a mapping from strings to values that changes in atomic steps.

    It can be made anywhere, inside an event loop or not, and serve several runs in turn, on either backend,
    but not two event loops at once. It is linearizable: each operation happens at one moment between its call
    and its return. An operation that is cancelled, times out or raises has not happened. Writers take turns,
    first come, first served; readers never wait, and see the last commit.

    Values are copied on the way in and on the way out: dicts, lists, sets and tuples, all the way down, and
    subclasses of these, which keep their type. So a value belongs to its reader alone, and has the types that
    it had when it was set. Objects of any other type are shared by reference, so let them be immutable: the
    store does not see them change. Within the value of a key, an object in two places stays one object. A
    read takes time in proportion to its value, and a snapshot in proportion to the store.

    The task inside an :meth:`edit` cannot use the store in another way: it would wait for itself, and gets an
    error. If it waits inside the block for another task that writes, such as a nested agent, both wait for
    ever without an error: pass that task the draft, or let it use ``edit(timeout_seconds=...)``, which ends
    such a wait.

    :param initial: the first state
    :raises TypeError: if it is no mapping, or a key is no ``str``
    """

    def __init__(self, initial: Mapping[str, Any] | None = None) -> None:
        self._state = State(copy_all("initial", {} if initial is None else initial))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled store is a new one with the same state.
        return type(self), (dict(self._state.values),)

    def __repr__(self) -> str:
        return f"<ContextStore {len(self._state.values)} keys, version {self._state.version}>"

    async def get(self, key: str, default: Any = None) -> Any:
        """
        Return a copy of the value of a key.

        :param key: the key
        :param default: returned, without a copy, if there is no such key
        :raises TypeError: if the key is no ``str``
        """
        check_key(key)
        self._state.enter_run()
        await checkpoint()
        return self._state.read(key, default)

    async def set(self, key: str, value: Any) -> None:
        """
        Set a key to a copy of a value.

        :param key: the key
        :param value: the new value; it is copied at once, before any wait
        :raises TypeError: if the key is no ``str``
        """
        check_key(key)
        change = {key: copied(value)}
        run = self._state.enter_run()
        async with run.lock:
            self._state.commit(run, change)

    async def update(self, mapping: Mapping[str, Any]) -> None:
        """
        Set several keys at once.

        :param mapping: their values, which are copied at once, before any wait
        :raises TypeError: if it is no mapping, or a key is no ``str``
        """
        changes = copy_all("mapping", mapping)
        run = self._state.enter_run()
        async with run.lock:
            self._state.commit(run, changes)

    async def delete(self, key: str) -> bool:
        """
        Delete a key.

        :param key: the key
        :return: whether there was one
        :raises TypeError: if the key is no ``str``
        """
        check_key(key)
        run = self._state.enter_run()
        async with run.lock:
            if key not in self._state.values:
                return False

            self._state.commit(run, {}, [key])
            return True

    async def snapshot(self) -> dict[str, Any]:
        """
        Return a copy of the whole state.

        The store never changes it, and changing it does not change the store. It takes time in proportion to
        the state, and no other task runs meanwhile.
        """
        self._state.enter_run()
        await checkpoint()
        return self._state.snapshot()

    async def transform(self, key: str, fn: Callable[[Any], T], default: Any = None) -> T:
        """
        Replace the value of a key by a function of it, in one step.

        :param key: the key
        :param fn: a plain function that is given a copy of the value, which it may change, and returns the
            new value, which is copied. It runs once, while no other task can write, so it should be quick
        :param default: the value for ``fn``, copied too, if there is no such key
        :return: a copy of the new value
        :raises TypeError: if the key is no ``str``, or ``fn`` is no plain function. An exception of ``fn``
            propagates. In each case the state is unchanged
        """
        check_key(key)
        _check_plain(
            "fn", fn, "to await between reading and writing, use `async with store.edit() as draft:`"
        )
        default = copied(default)
        run = self._state.enter_run()
        async with run.lock:
            value = fn(self._state.read(key, default))
            refuse_awaitable(
                "fn", value, "to await between reading and writing, use `async with store.edit() as draft:`"
            )
            change, result = {key: copied(value)}, copied(value)
            self._state.commit(run, change)

        return result

    async def compare_and_set(self, key: str, expected: Any, new: Any) -> bool:
        """
        Set a key if its value is the expected one.

        :param key: the key
        :param expected: compared by ``==`` with a copy of the value; a key that does not exist has the value
            ``None``
        :param new: the new value; it is copied at once, before any wait
        :return: whether it was set
        :raises TypeError: if the key is no ``str``. An exception of the comparison propagates
        """
        check_key(key)
        change = {key: copied(new)}
        run = self._state.enter_run()
        async with run.lock:
            value = self._state.read(key, None)
            if not (value is expected or value == expected):
                return False

            self._state.commit(run, change)
            return True

    def edit(
        self, *, timeout_seconds: float | None = None
    ) -> AbstractAsyncContextManager[MutableMapping[str, Any], None]:
        """
        Make several changes in one step, with awaits in between::

            async with store.edit() as draft:
                draft["plan"]["steps"].append(await ask("What next?"))

        The draft is a mutable mapping of its own: no other task sees its changes until the block ends, and no
        other task writes meanwhile. It is committed whole when the block ends, by ``return`` too; after an
        error or a cancellation it is dropped. The value of a key is copied when it is first read, and only
        keys that were read or set are compared and committed: an edit takes time in proportion to these
        values, not to the store. So keep values that change often under keys of their own.

        :param timeout_seconds: how long to wait for others to finish writing; ``None`` is without limit
        :return: an async context manager that gives the draft
        :raises TimeoutError: on entering, if others were not finished by then
        :raises TypeError: if ``timeout_seconds`` is no number
        :raises ValueError: if ``timeout_seconds`` is not above 0
        :raises RuntimeError: on entering, if this task is inside another edit of the store already; on
            leaving, if another task entered
        """
        must.check_number("timeout_seconds", timeout_seconds, above=0, optional=True)
        return Edit(self._state, math.inf if timeout_seconds is None else timeout_seconds)

    async def wait_for(self, predicate: Callable[[Mapping[str, Any]], T]) -> T:
        """
        Wait until a condition holds.

        The predicate is called at once, and then within each commit, so it misses no state, however
        short-lived. It runs in the task that commits, so it should be quick.

        An agent that waits lends its slot, so that the invocation that makes the change can run, and a batch
        begins one more. The agent goes on once it has a slot again: it is first in the line for slots. This
        wait for a slot also follows, shielded from cancellation, when a scope of the agent's own ends the
        wait; only an attempt that is cancelled itself does not wait for a slot. The agent's time-outs go on.

        :param predicate: a plain function of the state: a read-only mapping, which can be used only inside
            the function. The value of a key is copied when it is read
        :return: the first true value that the predicate returned
        :raises TypeError: if the predicate is no plain function. An exception of it propagates here
        """
        _check_plain("predicate", predicate, "it must not wait; look at the state only")
        run = self._state.enter_run()
        await checkpoint()
        result: T = await run.audience.wait_for(predicate, self._state.values)
        return result

    @overload
    def watch(
        self, key: None = None, default: None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[dict[str, Any]], None]: ...
    @overload
    def watch(
        self, key: str, default: Any = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Any], None]: ...
    def watch(
        self, key: str | None = None, default: Any = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Any], None]:
        """
        Watch a key for changes::

            async with store.watch("progress") as values:
                async for value in values:
                    print(value)

        It gives the current value at first, and after that the newest one whenever the key was set again. A
        slow reader skips values in between, and never delays a writer. Being cancelled while waiting for a
        value loses none. Leaving the block ends the iteration. An agent that waits for a value lends its
        slot, as in :meth:`wait_for`.

        :param key: the key; all of them if absent, and then each value is a :meth:`snapshot`
        :param default: the value while there is no such key
        :return: an async context manager that gives an endless async iterable of values, the reader's own
        :raises TypeError: if the key is no ``str``
        """
        if key is not None:
            check_key(key)

        return _Watching(self._state, key, default)

    async def to_json(self) -> str:
        """
        Return the whole state as a JSON object, for :meth:`from_json`.

        Tuples become lists; any other value that would not decode to an equal one is refused. It takes time
        in proportion to the state, and no other task runs meanwhile.

        :raises TypeError: if a value is of a type that JSON does not have, such as a set, an enum or another
            subclass of ``str`` or ``int``, or a key is no plain ``str``; the error names the place
        :raises ValueError: if a number is one that JSON does not have, such as NaN, and the error names the
            place; if a value contains itself or is nested too deeply
        """
        self._state.enter_run()
        await checkpoint()
        return encode(self._state.values)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """
        Make a store of the return value of :meth:`to_json`.

        :param text: the JSON; bytes are UTF-8, or UTF-16 or UTF-32
        :raises ValueError: if the text is no JSON, or no object
        """
        value: Any = json.loads(text)
        if not issubclass(kind := type(cast("object", value)), dict):
            raise ValueError(f"the text must be a JSON object, got a {kind.__name__}")

        return cls(value)


class _Watching(AbstractAsyncContextManager[AsyncIterator[Any], None]):
    def __init__(self, state: State, key: str | None, default: Any) -> None:
        self._state = state
        self._key = key
        self._default = default

    async def __aenter__(self) -> Watch:
        self._audience = self._state.enter_run().audience
        self._values = Watch(self._state.enter_run, self._read)
        self._audience.add(self._key, self._values)
        return self._values

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._audience.remove(self._key, self._values)

    def _read(self) -> Any:
        if self._key is None:
            return self._state.snapshot()

        return self._state.read(self._key, self._default)


def _check_plain(name: str, fn: Any, instead: str) -> None:
    if not callable(fn):
        raise TypeError(f"{name} must be a function, got {fn!r}")

    if must.is_async(fn):
        raise TypeError(f"{name} must be a plain function, got an async one, {fn!r}: {instead}")

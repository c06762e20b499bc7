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
    State that concurrent agents share: a mapping from strings to values, which changes one whole step at a
    time.

    It can be made anywhere, inside an event loop or not, and serve several runs in turn, on either backend,
    but not two event loops at once. It is linearizable: each operation happens at one moment between its call
    and its return. One that is cancelled, times out or raises has not happened. Writers take turns, first
    come, first served; readers never wait, and see what was committed last.

    Values are copied on the way in and on the way out: dicts, lists, sets and tuples, all the way down, and
    subclasses of these, which keep their type. So a value is the reader's own, and as plain as it was put in.
    Objects of any other type are shared by reference, so let them be immutable: the store does not see them
    change. Within the value of a key, what is one object in two places stays one. A read costs what it reads,
    and a snapshot what the store holds.

    The task that is inside :meth:`edit` cannot use the store otherwise: it would wait for itself. The same
    holds, unseen, for a task that it waits for inside the block, such as a nested agent, and that writes:
    pass it the draft, or give it ``edit(timeout_seconds=...)``, which ends such a wait.

    :param initial: what to begin with
    :raises TypeError: if it is no mapping, or a key is no ``str``
    """

    def __init__(self, initial: Mapping[str, Any] | None = None) -> None:
        self._state = State(copy_all("initial", {} if initial is None else initial))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or what comes out of a pickle, is another store with the same state.
        return type(self), (dict(self._state.values),)

    def __repr__(self) -> str:
        return f"<ContextStore {len(self._state.values)} keys, version {self._state.version}>"

    async def get(self, key: str, default: Any = None) -> Any:
        """
        Return a copy of the value of a key.

        :param key: which one
        :param default: what to return, as it is, if there is no such key
        :raises TypeError: if the key is no ``str``
        """
        check_key(key)
        self._state.enter_run()
        await checkpoint()
        return self._state.read(key, default)

    async def set(self, key: str, value: Any) -> None:
        """
        Set a key to a copy of a value.

        :param key: which one
        :param value: what it becomes; it is copied before anything is waited for
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

        :param mapping: their values, which are copied before anything is waited for
        :raises TypeError: if it is no mapping, or a key is no ``str``
        """
        changes = copy_all("mapping", mapping)
        run = self._state.enter_run()
        async with run.lock:
            self._state.commit(run, changes)

    async def delete(self, key: str) -> bool:
        """
        Delete a key.

        :param key: which one
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
        Return a copy of all that was committed.

        The store never changes it, and changing it does not change the store. It takes time in proportion to
        the state, and lets nobody else run meanwhile.
        """
        self._state.enter_run()
        await checkpoint()
        return self._state.snapshot()

    async def transform(self, key: str, fn: Callable[[Any], T], default: Any = None) -> T:
        """
        Replace the value of a key by what a function makes of it, in one step.

        :param key: which one
        :param fn: a plain function of the value, which is its own to change; what it returns is the new
            value, and is copied. It runs once, while nobody else can write, so it should be quick
        :param default: what ``fn`` is given a copy of if there is no such key
        :return: a copy of the new value
        :raises TypeError: if the key is no ``str``, or ``fn`` is no plain function; what ``fn`` raises is
            raised as it is. Then nothing has changed
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

        :param key: which one
        :param expected: compared by ``==`` with a copy of the value; a key that does not exist has the value
            ``None``
        :param new: what it becomes; it is copied before anything is waited for
        :return: whether it was set
        :raises TypeError: if the key is no ``str``; what the comparison raises is raised as it is
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
        Change several things in one step, with time to think in between::

            async with store.edit() as draft:
                draft["plan"]["steps"].append(await ask("What next?"))

        The draft is a mutable mapping of its own: nobody else sees what happens to it until the block ends,
        and nobody else writes meanwhile. It is committed whole when the block ends, by ``return`` too; by an
        error or a cancellation it is dropped. The value of a key is copied when it is first looked at, and
        only keys that were looked at or set are compared and committed: it costs what these hold, whatever
        the size of the store. So keep what changes often under keys of its own.

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

        The predicate is asked at once, and then at each commit before anything else can happen, so no state
        is missed, however short-lived. It runs in the task that commits, so it should be quick.

        An agent that waits lends its slot, so that the invocation can run that makes the change, and a batch
        begins one more. The agent goes on once it has a slot again: in the line for slots it is first. That
        also holds where a scope of its own ends the wait, and is shielded from cancellation then; only an
        attempt that is cancelled itself does not wait for a slot. Its time-outs go on.

        :param predicate: a plain function of the state: a read-only mapping, which only the function can use.
            The value of a key is copied when it is looked at
        :return: the first true value that the predicate returned
        :raises TypeError: if the predicate is no plain function; what it raises is raised here, as it is
        """
        _check_plain("predicate", predicate, "what it awaits it would miss; look at the state only")
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
        See a key change::

            async with store.watch("progress") as values:
                async for value in values:
                    print(value)

        It gives the value that is there now and then, whenever that has been set again, the newest one: a
        reader that is slow skips what came between, and costs a writer nothing. Being cancelled while waiting
        for a value loses none. Leaving the block ends it. An agent that waits for a value lends its slot, as
        in :meth:`wait_for`.

        :param key: which one; all of them if absent, and then each value is a :meth:`snapshot`
        :param default: what is given while there is no such key
        :return: an async context manager that gives an endless async iterable of values, the reader's own
        :raises TypeError: if the key is no ``str``
        """
        if key is not None:
            check_key(key)

        return _Watching(self._state, key, default)

    async def to_json(self) -> str:
        """
        Return all that was committed as a JSON object, for :meth:`from_json`.

        Tuples become lists; what else would come back as something else is refused. It takes time in
        proportion to the state, and lets nobody else run meanwhile.

        :raises TypeError: if there is something that JSON does not have, such as a set, an enum or another
            subclass of ``str`` or ``int``, or a key that is no plain ``str``; the error says where
        :raises ValueError: if there is a number that JSON does not have, such as NaN, and the error says
            where; if a value contains itself or is nested too deeply
        """
        self._state.enter_run()
        await checkpoint()
        return encode(self._state.values)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """
        Make a store of what :meth:`to_json` returned.

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

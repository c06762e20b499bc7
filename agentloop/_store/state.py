"""The state of a store, and its lock and waiters in one event loop. All of it is synchronous."""

from __future__ import annotations

__all__ = ["Run", "State", "copy_all"]

from collections.abc import Collection, Mapping
from typing import Any

import anyio

from .._eventloop.handover import Handover, LoopState
from .copying import copied
from .draft import check_key
from .watch import Audience


class Run(LoopState):
    """The lock and the waiters of a store in one event loop."""

    def __init__(self, runs: Handover[Run]) -> None:
        super().__init__(runs)
        self.lock = anyio.Lock()
        self.editor: anyio.TaskInfo | None = None
        self.audience = Audience()

    def is_in_use(self) -> bool:
        """Return whether the event loop is running: it keeps the store for as long."""
        return self.is_running()


class State:
    """
    Values by key, which no other object refers to.

    Every change is synchronous, so that cancellation cannot tear it.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.version = 0
        self._runs = Handover[Run](
            "store", ": use one store per event loop, or go there by anyio.from_thread.run()"
        )

    def read(self, key: str, default: Any) -> Any:
        """Return a copy of a value, or the default if there is none."""
        return copied(self.values[key]) if key in self.values else default

    def snapshot(self) -> dict[str, Any]:
        """Return copies of all values."""
        return copied(self.values)

    def commit(self, run: Run, changes: Mapping[str, Any], deleted: Collection[str] = ()) -> None:
        """
        Make a change, and wake the waiters that it concerns. The caller must hold the lock.

        :param run: the return value of :meth:`enter_run`
        :param changes: new values, which no other object refers to
        :param deleted: keys to delete first; they exist
        """
        if not changes and not deleted:
            return

        # One call or one assignment makes the change, so a Ctrl-C leaves the old or the new state.
        if deleted:
            state = {key: value for key, value in self.values.items() if key not in deleted}
            state.update(changes)
            self.values = state
        else:
            self.values.update(changes)

        self.version += 1
        run.audience.notify(self.values, {*changes, *deleted})

    def enter_run(self) -> Run:
        """
        Return the lock and the waiters in the current event loop.

        :raises RuntimeError: if it is in use in another event loop, or this task is inside an edit
        """
        run = self._runs.current()
        if run is None:
            run = Run(self._runs)
            self._runs.take(run)
        elif run.editor is not None and run.editor == anyio.get_current_task():
            raise RuntimeError(
                "this task is inside `async with store.edit() as draft:`, and would wait for itself: use the "
                "draft, or leave the block first"
            )

        return run


def copy_all(name: str, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return copies of the values of a mapping, without objects that two values share.

    :param name: its name in error messages
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(mapping).__name__}")

    values: dict[str, Any] = {}
    for key, value in mapping.items():
        check_key(key)
        values[key] = copied(value)

    return values

"""The state of a store, and what it has in the event loop it is used in. Nothing here waits."""

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
    """What a store has in one event loop: whose turn it is to write, and who waits for changes."""

    def __init__(self, runs: Handover[Run]) -> None:
        super().__init__(runs)
        self.lock = anyio.Lock()
        self.editor: anyio.TaskInfo | None = None
        self.audience = Audience()

    def is_in_use(self) -> bool:
        """Return whether the event loop is running: a store is its own for as long."""
        return self.is_running()


class State:
    """
    Values by key, which nobody else refers to.

    Every change of it is synchronous, so that no cancellation can tear it.
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
        Make a change, and tell whom it concerns. Only who holds the lock may.

        :param run: what :meth:`enter_run` returned
        :param changes: new values, which nobody else refers to
        :param deleted: keys to delete first; they exist
        """
        if not changes and not deleted:
            return

        # Whatever strikes here, a Ctrl-C included, the state is the old one or the new one: one call or one
        # assignment makes the change.
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
        Return what the store has in the current event loop.

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
    Return copies of the values of a mapping, each by itself.

    :param name: what to call it in the message of an error
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(mapping).__name__}")

    values: dict[str, Any] = {}
    for key, value in mapping.items():
        check_key(key)
        values[key] = copied(value)

    return values

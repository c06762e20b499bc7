"""Edits: several changes of a store in one step."""

from __future__ import annotations

__all__ = ["Edit"]

from collections.abc import MutableMapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

import anyio

from .draft import Draft
from .state import State


class Edit(AbstractAsyncContextManager[MutableMapping[str, Any], None]):
    """
    An edit of a store: waits for the lock, gives a draft, and commits it.

    :param timeout_seconds: how long to wait for others to finish writing
    """

    def __init__(self, state: State, timeout_seconds: float) -> None:
        self._state = state
        self._timeout_seconds = timeout_seconds

    async def __aenter__(self) -> Draft:
        run = self._state.enter_run()
        with anyio.move_on_after(self._timeout_seconds) as scope:
            await run.lock.acquire()

        if scope.cancelled_caught:
            owner = run.lock.statistics().owner
            raise TimeoutError(
                f"waited {self._timeout_seconds:g} s to edit the store, while task "
                f"{owner.name if owner else None!r} was writing: keep the block of its edit() short, or wait "
                "longer"
            )

        # No await before the block begins, so a cancellation cannot leave the lock held.
        run.editor = anyio.get_current_task()
        self._run = run
        self._draft = Draft(self._state.values)
        return self._draft

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        run, draft = self._run, self._draft
        if run.editor != anyio.get_current_task():
            draft.end()
            raise RuntimeError(
                "an edit must be left by the task that entered it, which alone can release the lock: nothing "
                "was committed"
            )

        # No await here either: a commit cannot be cancelled halfway.
        try:
            if exc_type is None:
                self._state.commit(run, *draft.changes())
        finally:
            draft.end()
            run.editor = None
            run.lock.release()

"""Distinguishes a native cancellation by the caller from one that an agent causes in the same task."""

from __future__ import annotations

__all__ = ["CallersCancellation"]

import asyncio
import gc
import sys
import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

GROUPS_LEAVE_MARKS = sys.version_info < (3, 13)


class CallersCancellation:
    """
    Distinguishes a native cancellation of the current task by its caller from one that an agent causes.

    Both raise the count of requested cancellations (``Task.cancelling()``), but the count alone is not
    enough:

    - Before CPython 3.13 an ``asyncio.TaskGroup`` leaves the count raised when one of its tasks fails while
      its block is being left: it cancels the task that waits there, and never takes that back. So when a
      cancellation reaches the agent, this checks whether the agent waits in such a block.
    - AnyIO takes back too many when a task group with nested task groups is cancelled natively. So a
      cancellation that leaves the agent as the same object counts as the caller's too.

    Few calls need it, so it is made when an exception has reached the agent.

    :param before: the :meth:`count` when the attempt began
    """

    def __init__(self, before: int) -> None:
        self._before = before
        # The groups that have left a mark on the task since then.
        self._groups: set[int] = set()
        self._native: BaseException | None = None

    @staticmethod
    def count() -> int:
        """Return the count of requested cancellations of the current task, without the marks of groups."""
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling() - (_leaked.get(task, 0) if GROUPS_LEAVE_MARKS else 0)

    def reaches(self, coroutine: object, thrown: BaseException) -> None:
        """
        Inspect an agent before an exception is thrown into it.

        :param coroutine: the agent
        :param thrown: the exception
        """
        for group in _failing_groups(coroutine) if GROUPS_LEAVE_MARKS else ():
            if id(group) not in self._groups:
                self._groups.add(id(group))
                task: Any = asyncio.current_task()
                _leaked[task] = _leaked.get(task, 0) + 1

        if self.count() > self._before and not _is_of_a_scope(thrown):
            self._native = thrown

    @types.coroutine
    def watch(self, coroutine: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
        """Await a coroutine, and inspect it before an exception is thrown into it."""
        try:
            step = coroutine.send(None)
            while True:
                try:
                    sent = yield step
                except BaseException as exc:
                    self.reaches(coroutine, exc)
                    step = coroutine.throw(exc)
                else:
                    step = coroutine.send(sent)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def came(self, raised: BaseException | None) -> bool:
        """
        Return whether the caller cancelled the task natively since the call began.

        :param raised: the exception of the agent
        """
        native = self.take()
        return self.count() > self._before or (native is not None and native is raised)

    def take(self) -> BaseException | None:
        """Return the last native cancellation that has reached the agent, once."""
        # Its traceback refers to this object, which must not refer back.
        native, self._native = self._native, None
        return native


# How many marks failing task groups were seen to leave on a task. An agent may run others in its own task,
# which count the marks on their own agents.
_leaked: WeakKeyDictionary[asyncio.Task[Any], int] = WeakKeyDictionary()


def _is_of_a_scope(exc: BaseException) -> bool:
    """Return whether a cancellation is of an AnyIO scope, by its text."""
    text = exc.args[0] if exc.args else None
    return isinstance(text, str) and "cancel scope" in text


def _failing_groups(awaited: Any) -> list[asyncio.TaskGroup]:
    """Return the asyncio task groups that a coroutine waits to leave, and that have cancelled its task."""
    groups: list[asyncio.TaskGroup] = []
    while awaited is not None:
        for kind in ("cr", "ag", "gi"):
            frame = getattr(awaited, f"{kind}_frame", None)
            if frame is not None:
                if frame.f_code is asyncio.TaskGroup.__aexit__.__code__:
                    group, left_by = frame.f_locals["self"], frame.f_locals["et"]
                    # A group that was cancelled in its body takes its cancellation back.
                    if group._parent_cancel_requested and left_by is not asyncio.CancelledError:
                        groups.append(group)

                awaited = getattr(awaited, f"{kind}_yieldfrom" if kind == "gi" else f"{kind}_await")
                break
        else:
            # A step of an async generator has no attribute for its generator.
            inside = gc.get_referents(awaited) if type(awaited).__name__ in _STEPS else []
            awaited = next((one for one in inside if hasattr(one, "ag_frame")), None)

    return groups


_STEPS = ("async_generator_asend", "async_generator_athrow")

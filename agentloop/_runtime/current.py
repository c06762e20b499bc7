"""The current attempt, as its agent can read it."""

from __future__ import annotations

__all__ = [
    "Attempt",
    "AttemptSlot",
    "LaterSlot",
    "Timing",
    "attempt_elsewhere",
    "current_attempt",
    "idempotency_key",
]

import functools
import os
import uuid
from abc import abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

import attrs

from .._eventloop.deadlines import AttemptScope, TimeLimit
from .._limits.admission import Bill
from .._limits.slots import Pool, Slot, current_slot


@attrs.frozen
class Attempt:
    """
    The attempt that an agent runs in. :func:`current_attempt` returns it.

    :param agent_id: the name of the agent, as in ``Invocation.agent_id``
    :param number: which attempt it is, from 1
    :param failures: the exceptions of the attempts before it, in order
    :param idempotency_key: 32 hexadecimal digits, the same for all attempts of one invocation and different
        for every other invocation, in other processes too
    """

    agent_id: str
    number: int
    failures: tuple[Exception, ...]
    idempotency_key: str


attempt_elsewhere: ContextVar[Attempt | None] = ContextVar("agentloop.attempt_elsewhere", default=None)
"""The attempt in another process on whose behalf the current code runs."""


def current_attempt() -> Attempt:
    """
    Return the attempt that the current code runs in: the innermost one where agents are nested.

    The agent can call it, and so can tasks and worker threads that the agent starts. A task that outlives its
    attempt still gets that attempt::

        async def pay(order: Order) -> Receipt:
            return await bank.pay(order, idempotency_key=current_attempt().idempotency_key)

    :raises RuntimeError: outside of an agent
    """
    slot = current_slot.get()
    if isinstance(slot, AttemptSlot):
        return slot.attempt()

    attempt = attempt_elsewhere.get()
    if attempt is not None:
        return attempt

    raise RuntimeError(
        "current_attempt() was called outside of an agent: call it in a function that an AgentLoop runs, or "
        "in a task or a worker thread that this function starts"
    )


class Timing(NamedTuple):
    """The deadline and the total time limit of an attempt."""

    scope: AttemptScope
    deadline: float
    """When all attempts must have ended."""
    total: TimeLimit | None
    """The time limit of all attempts, if there is one."""


class AttemptSlot(Slot):
    """A slot that knows the attempt for which it was acquired."""

    @abstractmethod
    def attempt(self) -> Attempt:
        """Return the attempt, as its agent can read it."""

    @abstractmethod
    def timing(self) -> Timing | None:
        """Return the deadline of the attempt, if it has begun."""

    def attempt_scope(self) -> AttemptScope | None:
        timing = self.timing()
        return None if timing is None else timing.scope


class LaterSlot(AttemptSlot):
    """
    The slot of an attempt after the first one.

    It does not refer to the job. Otherwise a task that outlives the attempt would keep the job alive.

    :param make_attempt: returns the attempt, as its agent can read it
    """

    def __init__(
        self, pool: Pool, outer: Slot | None, bill: Bill | None, make_attempt: Callable[[], Attempt]
    ) -> None:
        super().__init__(pool, outer, bill)
        self._make_attempt = make_attempt
        self._timing: Timing | None = None

    def enter(self, timing: Timing) -> None:
        """Note the deadline of the attempt, which begins now."""
        self._timing = timing

    def attempt(self) -> Attempt:
        return self._make_attempt()

    def timing(self) -> Timing | None:
        return self._timing


def idempotency_key(number: int) -> str:
    """
    Return the key of an invocation.

    :param number: the number of the invocation in events, unique in this process
    """
    return f"{_first_key(os.getpid()) + number:032x}"


@functools.cache
def _first_key(process: int) -> int:
    # A forked process has another id, and so draws another key. Half of the range is left to count in.
    del process
    return uuid.uuid4().int >> 1

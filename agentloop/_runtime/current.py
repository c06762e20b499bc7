"""What an agent can find out about the attempt that it is."""

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
from contextvars import ContextVar
from typing import NamedTuple

import anyio
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
    :param failures: what the attempts before it raised, in order
    :param idempotency_key: 32 hexadecimal digits, the same for all attempts of one invocation and different
        for every other invocation, in other processes too
    """

    agent_id: str
    number: int
    failures: tuple[Exception, ...]
    idempotency_key: str


attempt_elsewhere: ContextVar[Attempt | None] = ContextVar("agentloop.attempt_elsewhere", default=None)
"""The attempt of another process that the current code is called for."""


def current_attempt() -> Attempt:
    """
    Return the attempt that the current code runs in: the innermost one, where agents run agents.

    It can be called in the agent itself, in tasks and in worker threads that the agent starts. A task that is
    left over from an attempt goes on to see that one::

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
    """What times an attempt out."""

    scope: AttemptScope
    deadline: float
    """When all attempts have to be over."""
    total: TimeLimit | None
    """What that is for."""


class AttemptSlot(Slot):
    """A slot that knows the attempt for which it was acquired."""

    __slots__ = ()

    @abstractmethod
    def attempt(self) -> Attempt:
        """Return what the agent may know of the attempt."""

    @abstractmethod
    def timing(self) -> Timing | None:
        """Return what times the attempt out; ``None`` for a stream, which moves its deadlines itself."""

    def cancel_scope(self) -> anyio.CancelScope | None:
        timing = self.timing()
        return None if timing is None else timing.scope.scope


class LaterSlot(AttemptSlot):
    """
    The slot of an attempt after the first one.

    It does not refer to the job, which would keep the job alive, and all that the job refers to, as long as a
    task is left over from the attempt.

    :param known: what the agent may know of the attempt
    """

    __slots__ = ("_known", "_timing")

    def __init__(self, pool: Pool, outer: Slot | None, bill: Bill | None, known: Attempt) -> None:
        super().__init__(pool, outer, bill)
        self._known = known
        self._timing: Timing | None = None

    def enter(self, timing: Timing) -> None:
        """Note what times the attempt out, which begins now."""
        self._timing = timing

    def attempt(self) -> Attempt:
        return self._known

    def timing(self) -> Timing | None:
        return self._timing


def idempotency_key(number: int) -> str:
    """
    Return the key of an invocation.

    :param number: what events call the invocation, which is unique in this process
    """
    return f"{(_first_key(os.getpid()) + number) % 2**128:032x}"


@functools.cache
def _first_key(process: int) -> int:
    # A forked process has another number, and so draws another key.
    del process
    return uuid.uuid4().int

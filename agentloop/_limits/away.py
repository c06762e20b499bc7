"""
The slots of agents that wait for a change by other agents.

An agent that waits for a store holds a slot. The invocation that will make the change may need it: with one
slot, both would wait for ever. So the agent *steps aside*: its attempt is suspended, like that of a stream
that waits for its reader, and the slot goes back to the pool, or to the lender if it was on loan. When none
of its tasks waits any more, the agent *comes back*: before it goes on, it waits for a slot, in the line of
returning attempts, which go first and pay nothing. One waiting task of an agent is enough to step aside.

An invocation whose calls end only when such an agent has ended has no use for its slot either. So it steps
aside as well, and comes back when its last call ends. An agent that reads results or chunks while its call
goes on keeps the slot, since it may go on at any time.

A batch runs one more invocation for each agent that has stepped aside. So the invocation that makes the
change is begun, even if it comes last.
"""

from __future__ import annotations

__all__ = ["come_back", "lend_while"]

import math
import sys
from collections.abc import Awaitable, Callable

import anyio

from .slots import RELEASED, Slot, current_slot


async def lend_while(wait: Callable[[], Awaitable[object]]) -> None:
    """
    Call a wait. An agent that waits lends its slot meanwhile, and has one again before it goes on.

    The agent's time-outs go on. After a cancellation of its attempt, this does not wait for a slot. After a
    cancellation of the agent's own scope, or a native one, it does, shielded, since the agent may go on.

    :param wait: an async function that waits, and raises only cancellation
    """
    slot = current_slot.get()
    if slot is None or slot.hold is RELEASED or not slot.pool.is_current():
        await wait()
        return

    pool, waits = slot.pool, slot.pool.loop.absent.waits
    waits[slot] = waits.get(slot, 0) + 1
    pool.begin_stall(slot)
    slot.step_aside_if_waiting()
    try:
        await wait()
    finally:
        waits[slot] -= 1
        if not waits[slot]:
            del waits[slot]
            pool.end_stall(slot)
            await come_back(slot)


async def come_back(slot: Slot) -> None:
    """
    Wait for a slot for an agent that has stepped aside, if none of its tasks waits for a change any more.

    It does not wait if the agent will not go on: if its attempt is cancelled, or the program ends.
    """
    away, pool = slot.pool.loop.absent.away, slot.pool
    if slot not in away or slot in pool.loop.absent.waits or pool.waits_for_calls(slot):
        return

    if isinstance(sys.exception(), KeyboardInterrupt | SystemExit):
        return

    away[slot] = True
    try:
        await _take(slot)
    except anyio.get_cancelled_exc_class():
        if slot in away and not _is_ending(slot):
            scope = slot.cancel_scope()
            with anyio.CancelScope(deadline=math.inf if scope is None else scope.deadline, shield=True):
                await _take(slot)

        raise


async def _take(slot: Slot) -> None:
    pool = slot.pool
    granted = Slot(pool, slot.outer)
    if not pool.acquire_nowait(granted, returning=True):
        await pool.wait(pool.enqueue(granted, returning=True))

    if slot in pool.loop.absent.away:
        slot.resume(granted)
    else:
        # Another task of the agent was faster, or the agent has ended.
        granted.give_back()


def _is_ending(slot: Slot) -> bool:
    """Return whether the attempt of a slot is cancelled, rather than a scope within it."""
    scope = slot.cancel_scope()
    if anyio.current_effective_deadline() != -math.inf:
        return False

    if scope is None or scope.cancel_called:
        return True

    # With the shield, scopes around the attempt do not count.
    shield, scope.shield = scope.shield, True
    is_cancelled_within = anyio.current_effective_deadline() == -math.inf
    scope.shield = shield
    return not is_cancelled_within

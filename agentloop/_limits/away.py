"""
The slots of agents that wait for a change by other agents.

An agent that waits for a store holds a slot. The invocation that will make the change may need it: with one
slot, both would wait for ever. So the agent *steps aside*: its attempt is suspended, like that of a stream
that waits for its reader, and the slot goes back to the pool, or to the lender if it was on loan. When none
of its tasks waits any more, the agent *comes back*: before it goes on, it waits for a slot, in the line of
returning attempts, which go first and pay nothing. One waiting task of an agent is enough to step aside.

An invocation whose calls end only when such an agent has ended has no use for its slot either. So it steps
aside as well, and comes back when its last call ends. An agent that reads results or chunks does so while it
waits for the next one.

A batch runs one more invocation for each agent that has stepped aside. So the invocation that makes the
change is begun, even if it comes last.
"""

from __future__ import annotations

__all__ = ["come_back", "lend_to_call", "lend_to_reader", "lend_while"]

import math
import sys
from collections.abc import Awaitable, Callable

import anyio

from .slots import HELD, RELEASED, SUSPENDED, Slot, current_slot


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


async def lend_to_reader(slot: Slot, wait: Callable[[], Awaitable[object]]) -> None:
    """
    Call the wait of a stream for its reader, and give the slot back meanwhile if the reader is an agent.

    Such a reader may run other invocations before it reads on. They may need the slot, or both would wait for
    each other. So if other tasks of the stream's agent wait for a change and go on before the reader has
    read, they do so without a slot.

    :param slot: the slot of the stream
    :param wait: an async function that waits, and raises only cancellation
    """
    absent = slot.pool.loop.absent
    if slot.hold is HELD and slot.outer is not None:
        slot.suspend()

    absent.unread.add(slot)
    goes_on = True
    try:
        await wait()
    except anyio.get_cancelled_exc_class():
        # A scope of the agent's own may be cancelled. A native cancellation ends the attempt.
        goes_on = anyio.current_effective_deadline() == -math.inf
        raise
    finally:
        absent.unread.remove(slot)
        if goes_on:
            await _take(slot)


async def lend_to_call(call: object, slot: Slot, wait: Callable[[], Awaitable[object]]) -> None:
    """
    Call the wait of an agent for the next item of its call. If the call waits for a change, the agent lends
    its slot meanwhile, and has one again before it goes on.

    :param slot: the slot of the agent that has made the call
    :param wait: an async function that waits, and raises only cancellation
    """
    if slot is not current_slot.get():
        # Another agent reads, and the one that has made the call may work meanwhile.
        await wait()
        return

    reads = slot.pool.loop.absent.reads
    reads[call] = reads.get(call, 0) + 1
    slot.step_aside_again()
    # The agent may have been the only one that could still go on.
    slot.pool.refuse_deadlocked()
    try:
        await wait()
    finally:
        reads[call] -= 1
        if not reads[call]:
            del reads[call]

        await come_back(slot)


async def come_back(slot: Slot) -> None:
    """
    Wait for a slot for an agent that has stepped aside, if none of its tasks waits for a change any more.

    It does not wait if the agent will not go on: if its attempt is cancelled, or the program ends.
    """
    if slot in slot.pool.loop.absent.away and not slot.pool.waits_for_calls(slot):
        await _take(slot)


async def _take(slot: Slot, deadline: float = math.inf, shield: bool = False) -> None:
    pool, returning = slot.pool, slot.pool.loop.absent.returning
    if isinstance(sys.exception(), KeyboardInterrupt | SystemExit):
        return

    try:
        with anyio.CancelScope(deadline=deadline, shield=shield):
            while _is_due(slot):
                if slot in returning:
                    # Another task of the agent waits for the slot.
                    await returning[slot].wait()
                    continue

                returning[slot] = anyio.Event()
                try:
                    granted = Slot(pool, slot.outer)
                    if not pool.acquire_nowait(granted, returning=True):
                        await pool.wait(pool.enqueue(granted, returning=True))

                    if _is_due(slot):
                        slot.resume(granted)
                    else:
                        # Meanwhile the agent has ended, or another task of it waits.
                        granted.give_back()

                    return
                finally:
                    returning.pop(slot).set()
    except anyio.get_cancelled_exc_class():
        # A shield does not stop native cancellations, so several may come.
        if _is_due(slot) and (scope := _ongoing(slot)) is not None:
            await _take(slot, scope.deadline, shield=True)

        raise


def _is_due(slot: Slot) -> bool:
    """Return whether an agent that has given its slot back takes one again before it goes on."""
    absent = slot.pool.loop.absent
    waits = (slot in absent.away and slot in absent.waits) or (
        slot.outer is not None and slot in absent.unread
    )
    return slot.hold is SUSPENDED and not waits


def _ongoing(slot: Slot) -> anyio.CancelScope | None:
    """Return the scope of a slot's attempt; ``None`` if it is cancelled, rather than a scope within it."""
    attempt = slot.attempt_scope()
    if attempt is None or (attempt.closing is not None and attempt.closing.shield):
        return None

    scope = attempt.scope
    if scope is None or anyio.current_effective_deadline() != -math.inf:
        return scope

    if scope.cancel_called:
        return None

    # With the shield, scopes around the attempt do not count.
    shield, scope.shield = scope.shield, True
    is_cancelled_within = anyio.current_effective_deadline() == -math.inf
    scope.shield = shield
    return scope if is_cancelled_within else None

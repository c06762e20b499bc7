"""The virtual clock for tests, which jumps instead of waiting."""

from typing import Any, Literal


def virtual_clock(
    backend: Literal["asyncio", "trio"], *, seed: int | None = None
) -> tuple[str, dict[str, Any]]:
    """
    Make a run whose clock jumps to the next timer as soon as no task can go on.

    Hours of sleeping take milliseconds, for ``anyio.current_time()`` and for every timer. The clock
    starts at 1000 seconds and moves only by jumping. The result is for one run::

        backend, options = virtual_clock("trio", seed=7)
        anyio.run(main, backend=backend, backend_options=options)

    or, returned from an ``anyio_backend`` fixture, for tests run by AnyIO's pytest plugin. There, on asyncio,
    a deadlocked test ends the event loop, and with it any async fixtures of a wider scope.

    The clock never jumps while ``anyio.to_thread`` or ``loop.run_in_executor`` work is under way.
    It does jump over waits for sockets and other processes, if nothing can be read from them at once.

    A run in which no event can wake any task ends with :exc:`VirtualClockDeadlock`, after all its tasks were
    unwound. A deadlock is not reported if a task may be woken from outside: by a thread started during the
    run, a socket, a pipe, a signal handler, or, if the event loop does not run in the main thread, the
    threads that were there before.

    :param backend: the event loop to run on
    :param seed: run tasks that are ready at the same time in an order shuffled by this seed; the same
        seed gives the same run. ``None`` leaves the order to the event loop
    :return: the backend's name and the options for it
    :raises ValueError: if there is no such backend
    :raises RuntimeError: if this version of Python or trio is not one whose scheduler can be steered
    """
    if backend == "asyncio":
        from agentloop.testing._clock_asyncio import backend_options
    elif backend == "trio":
        # trio is an optional dependency, so it is imported only here.
        from agentloop.testing._clock_trio import backend_options
    else:
        raise ValueError(f'backend must be "asyncio" or "trio", got {backend!r}')

    return backend, backend_options(seed)

"""What the benchmarks share: rounds in which every way runs once, and the event loops they run in."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import multiprocessing
import random
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import anyio

from agentloop._eventloop.loop import describe

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "trio": ("trio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
}


class Samples(dict[str, list[float]]):
    """What each way took in each round."""

    def median(self, way: str) -> float:
        return statistics.median(self[way])

    def ratio(self, way: str, base: str) -> float:
        """Return the median of the ratios, each taken within a round, where the machine was in one mood."""
        return statistics.median(one / other for one, other in zip(self[way], self[base], strict=True))


async def alternate(ways: Mapping[str, Callable[[], Awaitable[float]]], rounds: int) -> Samples:
    """
    Run every way once in each round, in an order that changes, so that what else the machine does hits all.

    The garbage of one way is collected before the next begins; within a way the collector runs as it does
    for users.
    """
    samples, order, shuffle = Samples({name: [] for name in ways}), [*ways], random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            gc.collect()
            samples[name].append(await ways[name]())

    return samples


def check(returned: list[Any], count: int, times: int = 1) -> None:
    """
    Refuse a way that has not all results.

    :param returned: what it returned: the outputs of the agents, each of which is its index, or our results
    :param times: how many outputs each agent has
    """
    outputs = [getattr(one, "output", one) for one in returned]
    if len(outputs) != count * times or set(outputs) != set(range(count)):
        found = f"{len(outputs)} outputs of {len(set(outputs))} agents"
        raise AssertionError(f"{found} have come, not {count * times} of {count}")


def run(main: Callable[..., Awaitable[Any]], backend: str, *args: Any) -> Any:
    """Run ``main`` in an event loop of the backend."""
    name, options = BACKENDS[backend]
    return anyio.run(main, *args, backend=name, backend_options=options)


async def _describe() -> str:
    return describe()


def insides(backend: str) -> str:
    """Say whether looking inside of AnyIO and trio, which is faster, works with those that are installed."""
    return f"deadlines and cancellations on {backend}: {run(_describe, backend)}"


def installed() -> list[str]:
    """Return the backends that can be used."""
    return [name for name in BACKENDS if name == "asyncio" or importlib.util.find_spec(name)]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows ``--backend``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=installed(), default="asyncio")
    return parser


def fresh_processes() -> ProcessPoolExecutor:
    """Return what runs each call in a new process, which has loaded the library and done nothing else."""
    if sys.platform == "win32":
        return ProcessPoolExecutor(1, max_tasks_per_child=1)

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agentloop", "anyio._backends._asyncio", "anyio._backends._trio"])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def memory_mib(which: str = "VmRSS") -> float:
    """Return the memory that the process has now, or at its peak (``VmHWM``); 0 where there is no Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0

    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(which)) / 1024

"""
How a ContextStore grows: what an operation costs at 20, 2,000 and 20,000 keys, each with a nested task.

    python benchmarks/store.py --backend trio

Microseconds, the median of many. "one dict" is the same edit where all tasks stand inside one key.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from agentloop import ContextStore

SIZES = (20, 2_000, 20_000)
REPEATS = 200


def tasks(count: int) -> dict[str, Any]:
    return {
        f"t{n}": {"status": {"now": "todo", "by": None}, "notes": ["a", "b"], "n": n} for n in range(count)
    }


async def median_us(operation: Callable[[], Awaitable[Any]]) -> float:
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        await operation()
        times.append(time.perf_counter() - start)

    return statistics.median(times) * 1e6


async def main() -> None:
    print(f"{'keys':>7} {'get':>7} {'set':>7} {'edit':>7} {'one dict':>8} {'snapshot':>8} {'deepcopy':>9}")
    for size in SIZES:
        values = tasks(size)
        store, nested = ContextStore(values), ContextStore({"tasks": values})

        async def edit(store: ContextStore = store) -> None:
            async with store.edit() as draft:
                draft["t7"]["status"]["now"] = "done"

        async def edit_nested(nested: ContextStore = nested) -> None:
            async with nested.edit() as draft:
                draft["tasks"]["t7"]["status"]["now"] = "done"

        columns = [
            await median_us(lambda store=store: store.get("t7")),
            await median_us(lambda store=store: store.set("t7", {"status": {"now": "done"}})),
            await median_us(edit),
            await median_us(edit_nested),
            await median_us(store.snapshot),
        ]
        start = time.perf_counter()
        copy.deepcopy(values)
        columns.append((time.perf_counter() - start) * 1e6)
        get, set_, edited, edited_nested, snapshot, deep = columns
        print(
            f"{size:>7} {get:>7.0f} {set_:>7.0f} {edited:>7.0f} {edited_nested:>8.0f} "
            f"{snapshot:>8.0f} {deep:>9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    anyio.run(main, backend=parser.parse_args().backend)

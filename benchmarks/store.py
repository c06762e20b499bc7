"""
How a ContextStore grows: what an operation costs at 20, 2,000 and 20,000 keys, each with a nested task.

    python benchmarks/store.py --backend trio

Microseconds, the median of many. An edit costs what the keys hold that it touches, so "edit" is flat, and
"one dict", the same edit where all tasks stand inside one key, grows with them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import rounds

from agentloop import ContextStore

SIZES = (20, 2_000, 20_000)
REPEATS = 200
COLUMNS = ("get", "set", "edit", "one dict", "snapshot", "deepcopy")


def tasks(count: int) -> dict[str, Any]:
    return {
        f"t{n}": {"status": {"now": "todo", "by": None}, "notes": ["a", "b"], "n": n} for n in range(count)
    }


async def median_us(operation: Callable[[], Awaitable[Any]], repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        await operation()
        times.append(time.perf_counter() - start)

    return statistics.median(times) * 1e6


async def measure(size: int, repeats: int) -> dict[str, float]:
    """Return what each operation takes on a store of so many keys, in microseconds."""
    values = tasks(size)
    store, nested = ContextStore(values), ContextStore({"tasks": values})

    async def edit() -> None:
        async with store.edit() as draft:
            draft["t7"]["status"]["now"] = "done"

    async def edit_nested() -> None:
        async with nested.edit() as draft:
            draft["tasks"]["t7"]["status"]["now"] = "done"

    async def deepcopy() -> None:
        copy.deepcopy(values)

    done = {
        "get": await median_us(lambda: store.get("t7"), repeats),
        "set": await median_us(lambda: store.set("t7", {"status": {"now": "set"}}), repeats),
        "edit": await median_us(edit, repeats),
        # These take in proportion to the size.
        "one dict": await median_us(edit_nested, -(-repeats // 20)),
        "snapshot": await median_us(store.snapshot, -(-repeats // 20)),
        "deepcopy": await median_us(deepcopy, 1),
    }
    snapshots = await store.snapshot(), (await nested.snapshot())["tasks"]
    assert all(snapshot["t7"]["status"]["now"] == "done" for snapshot in snapshots), "an edit is lost"
    return done


async def show(repeats: int) -> None:
    print(f"{'keys':>7}", *(f"{column:>8}" for column in COLUMNS), flush=True)
    for size in SIZES:
        found = await measure(size, repeats)
        print(f"{size:>7}", *(f"{found[column]:>8.0f}" for column in COLUMNS), flush=True)


async def small_and_large(large: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    return await measure(SIZES[0], repeats), await measure(large, repeats)


def ratio(one: float, other: float) -> str:
    return f"{one / other:,.{0 if one > 10 * other else 1}f}x"


def figures(backend: str, quick: bool) -> dict[str, str]:
    """Return what the table of all benchmarks says about this."""
    size, repeats = (SIZES[1], 3) if quick else (SIZES[-1], REPEATS)
    small, large = rounds.run(small_and_large, backend, size, repeats)
    return {
        f"An edit of {size:,} keys, time relative to one of {SIZES[0]}": ratio(large["edit"], small["edit"]),
        f"An edit of {size:,} keys, times as fast as a deep copy": ratio(large["deepcopy"], large["edit"]),
    }


def main() -> None:
    parser = rounds.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    rounds.run(show, options.backend, options.repeats)


if __name__ == "__main__":
    main()

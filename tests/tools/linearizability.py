"""
Random concurrent histories of a ContextStore, and a search for an order that explains each of them.

A history is linearizable if its operations can be put into one order in which each happens between its call
and its return, and which a plain dict run through one by one would answer in the same way: Herlihy and Wing,
"Linearizability: a correctness condition for concurrent objects", 1990. The search is that of Wing and Gong,
"Testing and verifying concurrent objects", 1993, with Lowe's memory of what was tried before ("Testing for
linearizability", 2017).

An operation that was cancelled must not have happened: that is what the store promises, so it is not even
searched for.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import anyio
import attrs
from anyio.lowlevel import checkpoint

from agentloop import ContextStore
from agentloop.testing import virtual_clock

KEYS = ("x", "y")


class Operation(NamedTuple):
    kind: str
    arguments: tuple[Any, ...]
    called: int
    returned: int
    result: Any


class Model(dict[str, Any]):
    """The same operations on a plain dict, one by one."""

    def apply(self, kind: str, *arguments: Any) -> Any:
        return getattr(self, f"do_{kind}")(*arguments)

    def do_get(self, key: str) -> Any:
        return self.get(key)

    def do_set(self, key: str, value: Any) -> None:
        self[key] = value

    def do_update(self, mapping: tuple[tuple[str, Any], ...]) -> None:
        self.update(mapping)

    def do_delete(self, key: str) -> bool:
        return self.pop(key, self) is not self

    def do_snapshot(self) -> Any:
        return sorted(self.items())

    def do_transform(self, key: str, amount: int) -> Any:
        self[key] = self.get(key, 0) * 3 + amount
        return self[key]

    def do_compare_and_set(self, key: str, expected: Any, new: Any) -> bool:
        if self.get(key) != expected:
            return False

        self[key] = new
        return True

    def do_edit(self, amount: int) -> Any:
        # Reads both keys, and swaps them.
        seen = self.get("x", 0), self.get("y", 0)
        self["x"], self["y"] = seen[1] + amount, seen[0]
        return seen

    def do_wait_for(self, key: str, at_least: int) -> Any:
        value = self.get(key, 0)
        # It did not return before this held; there is no moment to return at another state.
        return value if value >= at_least else None


def is_linearizable(history: list[Operation], initial: dict[str, Any]) -> bool:
    """Search for an order of the operations that explains what each of them returned."""
    tried: set[tuple[int, tuple[tuple[str, Any], ...]]] = set()
    stack = [((1 << len(history)) - 1, Model(initial))]
    while stack:
        left, model = stack.pop()
        if not left:
            return True

        place = left, tuple(sorted(model.items()))
        if place in tried:
            continue

        tried.add(place)
        pending = [number for number in range(len(history)) if left >> number & 1]
        first_return = min(history[number].returned for number in pending)
        for number in pending:
            operation = history[number]
            # Whatever was called after another one had returned comes after it.
            if operation.called < first_return:
                after = Model(model)
                if after.apply(operation.kind, *operation.arguments) == operation.result:
                    stack.append((left & ~(1 << number), after))

    return False


@attrs.define
class Trial:
    """One run: clients that do random things at once, and are cancelled at random moments."""

    seed: int
    make_store: Callable[[dict[str, Any]], ContextStore] = ContextStore
    clients: int = 4
    operations: int = 4
    initial: dict[str, Any] = attrs.field(factory=dict[str, Any])
    history: list[Operation] = attrs.field(factory=list[Operation])
    cancelled: int = 0
    _time: int = 0
    _random: random.Random = attrs.field(factory=random.Random)

    def tick(self) -> int:
        self._time += 1
        return self._time

    async def main(self) -> None:
        self._random.seed(self.seed)
        self.initial = {key: self._random.randrange(3) for key in KEYS if self._random.random() < 0.7}
        store = self.make_store(self.initial)
        async with anyio.create_task_group() as group:
            for _ in range(self.clients):
                plan = [self._draw() for _ in range(self.operations)]
                group.start_soon(self._client, store, plan)

        # The final state is one more observation, and needs a lock that is free.
        with anyio.fail_after(1):
            called = self.tick()
            async with store.edit() as draft:
                final = sorted(draft.items())

        self.history.append(Operation("snapshot", (), called, self.tick(), final))

    def _draw(self) -> tuple[str, tuple[Any, ...], int, int | None]:
        """Return what to do, in how many steps if it can be slow, and when to be cancelled."""
        draw = self._random
        key, small = draw.choice(KEYS), partial(draw.randrange, 3)
        kind, arguments = draw.choice(
            [
                ("get", (key,)),
                ("set", (key, small())),
                ("update", ((("x", small()), ("y", small())),)),
                ("delete", (key,)),
                ("snapshot", ()),
                ("transform", (key, small())),
                ("compare_and_set", (key, draw.choice([None, 0, 1, 2]), small())),
                ("edit", (small(),)),
                ("edit", (small(),)),
                ("wait_for", (key, small())),
            ]
        )
        never = kind == "wait_for"
        return kind, arguments, draw.randrange(3), draw.randrange(9) if never or draw.random() < 0.3 else None

    async def _client(
        self, store: ContextStore, plan: list[tuple[str, tuple[Any, ...], int, int | None]]
    ) -> None:
        for kind, arguments, steps, patience in plan:
            async with anyio.create_task_group() as group:
                called = self.tick()
                group.start_soon(self._operate, group.cancel_scope, store, kind, arguments, steps, called)
                if patience is not None:
                    for _ in range(patience):
                        await checkpoint()

                    group.cancel_scope.cancel()

    async def _operate(
        self,
        scope: anyio.CancelScope,
        store: ContextStore,
        kind: str,
        arguments: tuple[Any, ...],
        steps: int,
        called: int,
    ) -> None:
        try:
            result = await self._perform(store, kind, arguments, steps)
        except BaseException:
            self.cancelled += scope.cancel_called
            raise

        self.history.append(Operation(kind, arguments, called, self.tick(), result))

    async def _perform(self, store: ContextStore, kind: str, arguments: tuple[Any, ...], steps: int) -> Any:
        match kind, arguments:
            case "edit", (amount,):
                async with store.edit() as draft:
                    x = draft.get("x", 0)
                    for _ in range(steps):
                        await checkpoint()

                    y = draft.get("y", 0)
                    draft["x"] = y + amount
                    for _ in range(steps):
                        await checkpoint()

                    draft["y"] = x

                return x, y
            case "transform", (key, amount):
                return await store.transform(key, lambda value: value * 3 + amount, 0)
            case "update", (items,):
                return await store.update(dict(items))
            case "snapshot", ():
                return sorted((await store.snapshot()).items())
            case "wait_for", (key, at_least):
                # In a tuple, which is true even where the value is 0.
                return (
                    await store.wait_for(
                        lambda now: (now.get(key, 0),) if now.get(key, 0) >= at_least else None
                    )
                )[0]

        return await getattr(store, kind)(*arguments)


def run_seed(
    backend: str, seed: int, make_store: Callable[[dict[str, Any]], ContextStore] = ContextStore
) -> Trial:
    """Run one trial and check its history."""
    trial = Trial(seed, make_store)
    name, options = virtual_clock(backend, seed=seed)
    anyio.run(trial.main, backend=name, backend_options=options)
    assert is_linearizable(trial.history, trial.initial), (
        f"seed {seed} on {backend} from {trial.initial}:\n" + "\n".join(map(str, trial.history))
    )
    return trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--seeds", default="0:1000")
    arguments = parser.parse_args()
    trials: list[Trial] = []
    for seed in range(*map(int, arguments.seeds.split(":"))):
        try:
            trials.append(run_seed(arguments.backend, seed))
        except BaseException:
            print(f"seed {seed} on {arguments.backend} fails", flush=True)
            raise

    done, cancelled = sum(len(trial.history) for trial in trials), sum(trial.cancelled for trial in trials)
    print(f"{len(trials)} histories, {done} operations, {cancelled} cancelled: all linearizable")


if __name__ == "__main__":
    main()

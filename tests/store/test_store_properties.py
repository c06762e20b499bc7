"""ContextStore against a plain dict, against every interleaving we can afford, and cancelled everywhere."""

import os
import random
from collections.abc import Awaitable, Callable
from copy import deepcopy
from typing import Any

import anyio
import hypothesis.strategies as st
import linearizability
import pytest
from agents import backends, run_scheduled
from anyio.lowlevel import checkpoint
from audit import leak_audit
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from linearizability import Operation, is_linearizable
from test_copying import exact, values

from agentloop import ContextStore

pytestmark = pytest.mark.long

HISTORIES = int(os.environ.get("AGENTLOOP_FUZZ_PROGRAMS", "320")) // 2
BLOCKS = 4


# -- against a plain dict


keys = st.sampled_from("abc")
seeds = st.integers(0, 10**6)


def separate(mapping: Any) -> Any:
    """Copy values as a store does: what is one object in one of them stays one, but not between them."""
    return {key: deepcopy(value) for key, value in mapping.items()}


def scramble(value: Any, seed: int) -> None:
    """Change something somewhere in nested containers, the same in equal ones."""
    draw = random.Random(seed)
    for _ in range(draw.randrange(1, 4)):
        place = value
        while draw.random() < 0.8:
            if isinstance(place, (list, tuple)):
                inner = [item for item in place if isinstance(item, (dict, list, set, tuple))]
            elif isinstance(place, set):
                inner = []
            else:
                inner = [item for item in place.values() if isinstance(item, (dict, list, set, tuple))]

            if not inner:
                break

            place = draw.choice(inner)

        _scramble_one(place, draw)


def _scramble_one(place: Any, draw: random.Random) -> None:
    new: Any = draw.choice([0, "new", [1], {"k": {2}}, ([3],)])
    if isinstance(place, list):
        draw.choice(
            [
                lambda: place.pop() if place else None,
                lambda: place.reverse(),
                lambda: place.extend([*place[:2], new]),
                lambda: place.__setitem__(slice(0, 1), [new, new]),
            ]
        )()
    elif isinstance(place, set):
        draw.choice([lambda: place.add("new"), lambda: place.clear()])()
    elif not isinstance(place, tuple):
        names = sorted(map(str, place))
        name = draw.choice([*names, "a", "n"])
        draw.choice(
            [
                lambda: place.__setitem__(name, new),
                lambda: place.pop(name, None),
                lambda: place.update({name: new, "u": place.get(name)}),
                lambda: place.popitem() if place else None,
                lambda: place.clear() if draw.random() < 0.3 else None,
            ]
        )()


class Machine(RuleBasedStateMachine):
    """Each operation is a run of its own, now on this backend and now on that."""

    def __init__(self) -> None:
        super().__init__()
        self.store = ContextStore()
        self.model: dict[str, Any] = {}
        self.handed_out: list[tuple[Any, Any]] = []
        self.runs = 0

    def run(self, fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        self.runs += 1
        return anyio.run(fn, *args, backend=("asyncio", "trio")[self.runs % 2])

    def keep(self, got: Any, expected: Any) -> None:
        assert exact(got) == exact(expected)
        self.handed_out.append((got, deepcopy(expected)))

    @rule(key=keys, default=values)
    def get(self, key: str, default: Any) -> None:
        self.keep(self.run(self.store.get, key, default), self.model.get(key, default))

    @rule()
    def snapshot(self) -> None:
        self.keep(self.run(self.store.snapshot), self.model)

    @rule(key=keys, value=values, seed=seeds)
    def set(self, key: str, value: Any, seed: int) -> None:
        self.run(self.store.set, key, value)
        self.model[key] = deepcopy(value)
        scramble([value], seed)

    @rule(mapping=st.dictionaries(keys, values))
    def update(self, mapping: dict[str, Any]) -> None:
        self.run(self.store.update, mapping)
        self.model.update(separate(mapping))

    @rule(key=keys)
    def delete(self, key: str) -> None:
        assert self.run(self.store.delete, key) == (self.model.pop(key, self) is not self)

    @rule(key=keys, default=values, seed=seeds)
    def transform(self, key: str, default: Any, seed: int) -> None:
        def fn(value: Any) -> Any:
            box = {"value": value}
            scramble(box, seed)
            return box.get("value")

        expected = deepcopy(fn(deepcopy(self.model.get(key, default))))
        self.model[key] = expected
        self.keep(self.run(self.store.transform, key, fn, default), expected)

    @rule(key=keys, expected=values, new=values, should_match=st.booleans())
    def compare_and_set(self, key: str, expected: Any, new: Any, should_match: bool) -> None:
        if should_match:
            expected = deepcopy(self.model.get(key))

        is_set = self.model.get(key) == expected
        assert self.run(self.store.compare_and_set, key, expected, new) is is_set
        if is_set:
            self.model[key] = deepcopy(new)

    @rule(seed=seeds, fails=st.booleans())
    def edit(self, seed: int, fails: bool) -> None:
        async def edit() -> None:
            async with self.store.edit() as draft:
                scramble(draft, seed)
                assert exact(dict(draft)) == exact(expected)
                if fails:
                    raise ZeroDivisionError

        expected = separate(self.model)
        scramble(expected, seed)
        if fails:
            with pytest.raises(ZeroDivisionError):
                self.run(edit)
        else:
            self.run(edit)
            self.model = separate(expected)

    @rule(key=keys)
    def watch(self, key: str) -> None:
        async def watch() -> Any:
            async with self.store.watch(key) as values, self.store.watch() as states:
                return await anext(values), await anext(states)

        value, state = self.run(watch)
        self.keep(value, self.model.get(key))
        self.keep(state, self.model)

    @rule(key=keys)
    def wait_for(self, key: str) -> None:
        got = self.run(self.store.wait_for, lambda now: (now.get(key),))
        assert exact(got) == exact((self.model.get(key),))

    @rule(seed=seeds)
    def change_what_was_handed_out(self, seed: int) -> None:
        if self.handed_out:
            for value in random.Random(seed).choice(self.handed_out):
                scramble([value], seed)

    @invariant()
    def nothing_else_has_changed(self) -> None:
        assert exact(self.run(self.store.snapshot)) == exact(self.model)
        for got, expected in self.handed_out:
            assert exact(got) == exact(expected)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=80, stateful_step_count=15, deadline=None)


# -- against all orders of what happens at once


@backends
@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_concurrent_histories_are_linearizable(backend: str, block: int) -> None:
    done = cancelled = 0
    with leak_audit():
        for seed in range(block, HISTORIES, BLOCKS):
            trial = linearizability.run_seed(backend, seed)
            done += len(trial.history)
            cancelled += trial.cancelled

    # As many as there should be: 16 in each history and a last look, of which some are cancelled.
    assert cancelled > HISTORIES / BLOCKS
    assert done + cancelled == 17 * len(range(block, HISTORIES, BLOCKS))


def history(*operations: tuple[str, tuple[Any, ...], int, int, Any]) -> list[Operation]:
    return [Operation(*operation) for operation in operations]


def test_search_finds_an_order_where_there_is_one() -> None:
    # The second set was called before the first one returned, so either may have come last.
    sets = [("set", ("x", 1), 1, 4, None), ("set", ("x", 2), 2, 3, None)]
    for last in (1, 2):
        assert is_linearizable(history(*sets, ("get", ("x",), 5, 6, last)), {})

    assert is_linearizable(history(("edit", (1,), 1, 2, (1, 2)), ("get", ("x",), 3, 4, 3)), {"x": 1, "y": 2})


@pytest.mark.parametrize(
    "operations",
    [
        # a value that nobody set, an old one after the new one was set, two that saw what the other overwrote
        [("get", ("x",), 1, 2, 7)],
        [("set", ("x", 1), 1, 2, None), ("get", ("x",), 3, 4, 0)],
        [("transform", ("x", 1), 1, 3, 1), ("transform", ("x", 1), 2, 4, 1)],
        [("compare_and_set", ("x", 0, 1), 1, 3, True), ("compare_and_set", ("x", 0, 2), 2, 4, True)],
        [("edit", (1,), 1, 4, (0, 0)), ("snapshot", (), 2, 3, [("x", 1), ("y", 5)])],
        [("set", ("x", 1), 1, 6, None), ("get", ("x",), 2, 3, 1), ("get", ("x",), 4, 5, 0)],
        [("delete", ("x",), 1, 2, True), ("delete", ("x",), 3, 4, True)],
        [("wait_for", ("x", 2), 1, 2, 2)],
    ],
    ids=str,
)
def test_search_finds_no_order_where_there_is_none(operations: list[Any]) -> None:
    assert not is_linearizable(history(*operations), {"x": 0})


# -- cancelled at every suspension point


async def edit(store: ContextStore) -> None:
    async with store.edit(timeout_seconds=100) as draft:
        draft["n"]["x"] += 1
        await checkpoint()
        await anyio.sleep(0.1)
        draft["done"] = True


async def watch(store: ContextStore) -> None:
    async with store.watch("n") as values:
        async for value in values:
            if value["x"] >= 2:
                return


OPERATIONS: dict[str, tuple[Callable[[ContextStore], Awaitable[Any]], Any]] = {
    "get": (lambda store: store.get("n"), {}),
    "set": (lambda store: store.set("done", True), {"done": True}),
    "update": (lambda store: store.update({"done": True, "n": {"x": 9}}), {"done": True, "n": {"x": 9}}),
    "delete": (lambda store: store.delete("old"), {"old": None}),
    "snapshot": (lambda store: store.snapshot(), {}),
    "transform": (lambda store: store.transform("done", lambda _: True), {"done": True}),
    "compare_and_set": (lambda store: store.compare_and_set("done", None, True), {"done": True}),
    "edit": (edit, {"done": True, "n": {"x": 3}}),
    "wait_for": (lambda store: store.wait_for(lambda now: now["n"]["x"] >= 2), {}),
    "watch": (watch, {}),
    "to_json": (lambda store: store.to_json(), {}),
}


@backends
@pytest.mark.parametrize("contended", [False, True], ids=["alone", "contended"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_cancelled_anywhere_was_never_there(backend: str, name: str, contended: bool) -> None:
    operation, effect = OPERATIONS[name]

    async def main(step: int) -> bool:
        store = ContextStore({"n": {"x": 0 if contended else 2}, "old": 1})
        tasks = len(anyio.get_running_tasks())
        completed = False

        async def rival() -> None:
            for _ in range(2):
                async with store.edit() as draft:
                    await checkpoint()
                    draft["n"]["x"] += 1
                    await anyio.sleep(0.1)

        async def perform() -> None:
            nonlocal completed
            await operation(store)
            completed = True

        async with anyio.create_task_group() as group:
            if contended:
                group.start_soon(rival)
                # The first of its edits holds the lock.
                await anyio.wait_all_tasks_blocked()

            async with anyio.create_task_group() as inner:
                inner.start_soon(perform)
                for turn in range(step):
                    # One turn of the event loop per step; when all wait for a timer, time goes on.
                    await (anyio.sleep(0.04) if turn % 3 == 2 else checkpoint())

                inner.cancel_scope.cancel()

        with anyio.fail_after(1):
            async with store.edit() as draft:
                final = dict(draft)

        expected = {"n": {"x": 2}, "old": 1}
        if completed:
            expected.update(effect)
            if name == "update" and contended:
                # In its turn, which was before, between or after those of the rival.
                assert final.pop("n")["x"] in (9, 10, 11)
                del expected["n"]

        assert final == {key: value for key, value in expected.items() if value is not None}, step
        assert len(anyio.get_running_tasks()) == tasks, step
        audience = store._state.enter_run().audience
        assert not audience._waits, step
        assert not audience._watches, step
        return completed

    for step in range(1000):
        if run_scheduled(backend, None, main, step):
            assert step >= 1
            return

    raise AssertionError("it never completed")

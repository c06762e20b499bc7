"""ContextStore: each operation happens whole or not at all, and nobody can change what another one sees."""

import asyncio
import contextvars
import copy
import dataclasses
import enum
import heapq
import json
import math
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import attrs
import pytest
from agents import backends, into, launch, raised_by, run_scheduled
from anyio.lowlevel import checkpoint
from test_copying import nested

from agentloop import AgentLoop, ContextStore, Invocation, Limiter, LoopConfig
from agentloop.testing import VirtualClockDeadlock


def state() -> dict[str, Any]:
    return {"plan": {"steps": [{"when": "now"}], "by": {"ann"}}, "pair": (1, ["x"]), "n": 1}


async def all_of(store: ContextStore) -> dict[str, Any]:
    """Return the state, after a check that the lock is free."""
    with anyio.fail_after(1):
        async with store.edit() as draft:
            return dict(draft)


# -- one at a time


async def test_values_are_set_read_and_deleted() -> None:
    store = ContextStore({"a": 1})
    assert await store.get("a") == 1
    assert await store.get("b") is None
    assert await store.get("b", 2) == 2
    await store.set("b", None)
    assert await store.get("b", 2) is None
    await store.update({"c": [3], "a": 4})
    assert await store.snapshot() == {"a": 4, "b": None, "c": [3]}
    assert await store.delete("b") is True
    assert await store.delete("b") is False
    assert await store.snapshot() == {"a": 4, "c": [3]}


async def test_repr_shows_size_and_how_often_it_has_changed_and_no_value() -> None:
    store = ContextStore({"token": "secret"})
    await store.update({})
    await store.delete("b")
    await store.compare_and_set("token", 2, 3)
    async with store.edit() as draft:
        assert draft == {"token": "secret"}

    assert repr(store) == "<ContextStore 1 keys, version 0>"
    async with store.edit() as draft:
        draft["a"] = draft["b"] = 5

    assert repr(store) == "<ContextStore 3 keys, version 1>"


async def test_transform_replaces_a_value_by_what_a_function_makes_of_it() -> None:
    store = ContextStore({"n": 1, "steps": [["a"]]})
    assert await store.transform("n", lambda n: n + 1) == 2
    assert await store.transform("m", lambda n: n + 1, 10) == 11
    assert await store.transform("none", lambda value: value) is None

    def add(steps: list[Any]) -> list[Any]:
        steps[0].append("b")
        return steps

    got = await store.transform("steps", add)
    got[0].append("c")
    assert await store.snapshot() == {"n": 2, "steps": [["a", "b"]], "m": 11, "none": None}


async def test_default_of_a_transform_stays_as_it_is() -> None:
    store, default = ContextStore(), list[int]()
    for _ in range(2):
        await store.delete("log")
        assert await store.transform("log", lambda log: [log.append(1), log][1], default) == [1]

    assert default == []


async def test_compare_and_set_sets_only_what_is_as_expected() -> None:
    store = ContextStore({"a": {"x": [1]}})
    assert await store.compare_and_set("a", {"x": [2]}, 0) is False
    assert await store.compare_and_set("a", {"x": [1]}, {"x": [2]}) is True
    assert await store.compare_and_set("new", 0, 1) is False
    assert await store.compare_and_set("new", None, 1) is True
    await store.set("nan", math.nan)
    assert await store.compare_and_set("nan", math.nan, 1) is True
    assert await store.snapshot() == {"a": {"x": [2]}, "new": 1, "nan": 1}


async def test_edit_commits_everything_at_once_also_when_it_returns_early() -> None:
    store = ContextStore(state())

    async def edit() -> None:
        async with store.edit() as draft:
            draft["plan"]["steps"][0]["when"] = "later"
            draft["n"] += 1
            del draft["pair"]
            draft["new"] = {}
            return

    await edit()
    expected = {"plan": {"steps": [{"when": "later"}], "by": {"ann"}}, "n": 2, "new": {}}
    assert await store.snapshot() == expected
    assert list(await store.snapshot()) == list(expected)


@pytest.mark.parametrize("how", ["error", "cancellation", "deadline"])
async def test_edit_that_does_not_come_to_its_end_was_never_there(how: str) -> None:
    store = ContextStore(state())
    error = KeyError("mine")

    async def edit() -> None:
        async with store.edit() as draft:
            draft["plan"]["steps"].clear()
            draft.clear()
            if how == "error":
                raise error

            if how == "cancellation":
                scope.cancel()

            await anyio.sleep_forever()

    with anyio.move_on_after(1) as scope:
        assert await raised_by(edit) is error

    assert scope.cancelled_caught == (how != "error")
    assert await all_of(store) == state()


async def test_nobody_sees_an_edit_before_it_is_committed_and_readers_do_not_wait_for_it() -> None:
    store = ContextStore(state())
    seen = []

    async def read() -> None:
        seen.append(await store.snapshot())
        seen.append({**state(), "plan": await store.get("plan")})
        seen.append({**state(), **await store.wait_for(lambda now: {"n": now["n"]})})

    async with anyio.create_task_group() as group, store.edit() as draft:
        draft["plan"]["steps"].append(2)
        draft["n"] = 5
        group.start_soon(read)
        await anyio.sleep(1)
        assert len(seen) == 3

    assert seen == [state()] * 3
    assert (await store.get("plan"))["steps"] == [{"when": "now"}, 2]


async def test_writers_take_turns_first_come_first_served() -> None:
    store = ContextStore({"log": []})

    async def write(number: int) -> None:
        if number % 2:
            await store.transform("log", lambda log: [*log, number])
        else:
            async with store.edit() as draft:
                await anyio.sleep(1)
                draft["log"].append(number)

    async with anyio.create_task_group() as group:
        for number in range(6):
            await launch(group, write, number)

    assert await store.get("log") == [0, 1, 2, 3, 4, 5]


async def test_draft_is_of_no_use_after_its_block() -> None:
    store = ContextStore(state())
    async with store.edit() as draft:
        plan = draft["plan"]

    with pytest.raises(RuntimeError, match="the block of this draft has ended"):
        draft["n"] = 2

    plan["steps"] = []
    assert await all_of(store) == state()


# -- nobody can change what another one sees (E5)


HANDED_OUT: dict[str, Callable[[ContextStore], Awaitable[Any]]] = {
    "get": lambda store: store.get("plan"),
    "snapshot": lambda store: at(store.snapshot(), "plan"),
    "transform": lambda store: store.transform("plan", lambda plan: plan),
    "wait_for": lambda store: store.wait_for(lambda now: now["plan"]),
    "watch": lambda store: first(store.watch("plan")),
    "watch all": lambda store: at(first(store.watch()), "plan"),
}


async def at(mapping: Awaitable[Any], key: str) -> Any:
    return (await mapping)[key]


async def first(watch: Any) -> Any:
    async with watch as values:
        return await anext(values)


@pytest.mark.parametrize("way", HANDED_OUT)
async def test_changing_what_was_handed_out_changes_nothing_else(way: str) -> None:
    store = ContextStore(state())
    before, other = await store.snapshot(), await HANDED_OUT[way](store)
    plan = await HANDED_OUT[way](store)
    plan["steps"][0]["when"] = "never"
    plan["steps"].append(1)
    plan["by"].add("bob")
    assert plan == {"steps": [{"when": "never"}, 1], "by": {"ann", "bob"}}
    assert other == state()["plan"]
    assert await store.snapshot() == before == state()


async def test_changing_what_was_put_in_changes_nothing() -> None:
    mine = state()
    store = ContextStore(mine)
    await store.set("set", mine["plan"])
    await store.update({"update": mine["plan"]})
    await store.compare_and_set("cas", None, mine["plan"])
    await store.transform("transform", lambda _: mine["plan"])
    async with store.edit() as draft:
        draft["edit"] = mine["plan"]

    mine["plan"]["steps"][0]["when"] = "never"
    mine["plan"]["by"].clear()
    mine["pair"][1].clear()
    kept = await store.snapshot()
    assert kept == {
        **state(),
        **dict.fromkeys(("set", "update", "cas", "transform", "edit"), state()["plan"]),
    }


async def test_snapshot_stays_as_it_is_when_the_store_changes() -> None:
    store = ContextStore(state())
    snapshot = await store.snapshot()
    async with store.edit() as draft:
        draft["plan"]["steps"][0]["when"] = "never"
        draft["plan"]["by"].clear()
        draft["pair"][1].append("y")

    await store.delete("n")
    assert snapshot == state()
    assert json.loads(json.dumps(snapshot["plan"]["steps"])) == [{"when": "now"}]


async def test_child_task_writes_after_the_edit_that_started_it_what_was_there_as_its_call_began() -> None:
    store, value = ContextStore(), [1]
    async with anyio.create_task_group() as group:
        async with store.edit() as draft:
            draft["b"] = 2
            await launch(group, store.set, "a", value)
            value.append(2)

    assert await all_of(store) == {"a": [1], "b": 2}


async def test_what_is_handed_out_is_plain_all_the_way_down() -> None:
    store = ContextStore(state())
    for way in HANDED_OUT.values():
        plan = await way(store)
        made = [plan, plan["steps"], plan["steps"][0], plan["by"]]
        assert [*map(type, made)] == [dict, list, dict, set]

    async with store.edit() as draft:
        assert [*map(type, [draft["plan"], draft["pair"], draft["pair"][1]])] == [dict, tuple, list]


@dataclasses.dataclass
class Report:
    plan: Any


@attrs.define
class Record:
    plan: Any


USED_BY: dict[str, Callable[[Any], Any]] = {
    "dataclasses.asdict": lambda plan: dataclasses.asdict(Report(plan))["plan"],
    "attrs.asdict": lambda plan: attrs.asdict(Record(plan))["plan"],
    "its own type": lambda plan: type(plan)(plan.items()),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda plan: pickle.loads(pickle.dumps(plan)),
    "pydantic": lambda plan: in_pydantic(plan),
    "yaml": lambda plan: in_yaml(plan),
}


def in_pydantic(plan: Any) -> Any:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Model", items=(list[Any], ...))(items=[plan])
    model.items[0]["steps"].append(1)
    return {**model.items[0], "steps": model.items[0]["steps"][:-1]}


def in_yaml(plan: Any) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(yaml.safe_dump(plan))


@pytest.mark.parametrize("use", USED_BY)
async def test_what_is_handed_out_works_with_other_libraries(use: str) -> None:
    store = ContextStore(state())
    for way in HANDED_OUT.values():
        assert USED_BY[use](await way(store)) == state()["plan"]

    assert await store.snapshot() == state()


async def test_draft_works_with_a_heap_and_a_sort_by_key() -> None:
    store = ContextStore({"queue": [[2, {"task": "b"}], (1, {"task": "a"})], "log": [{"n": 2}, {"n": 1}]})
    async with store.edit() as draft:
        draft["queue"].sort(key=lambda item: item[0])
        _, task = heapq.heappop(draft["queue"])
        task["started"] = True
        draft["task"] = task
        draft["log"].sort(key=lambda entry: entry["n"])
        draft["log"][0]["n"] = 0

    assert await store.snapshot() == {
        "queue": [[2, {"task": "b"}]],
        "log": [{"n": 0}, {"n": 2}],
        "task": {"task": "a", "started": True},
    }


async def test_container_of_a_subclass_keeps_its_type_and_is_the_readers_own() -> None:
    store = ContextStore({"counts": Counter("a"), "by": defaultdict(list)})
    snapshot = await store.snapshot()
    async with store.edit() as draft:
        draft["counts"].update("ab")
        draft["by"]["ann"].append(1)

    assert await store.snapshot() == {"counts": Counter("aab"), "by": {"ann": [1]}}
    assert snapshot == {"counts": Counter("a"), "by": {}}
    assert type(await store.get("counts")) is Counter


async def test_value_that_contains_itself_is_kept_and_handed_out() -> None:
    loop: dict[str, Any] = {"n": 1}
    loop["pair"] = (loop, [])
    store = ContextStore({"loop": loop})
    async with store.edit() as draft:
        assert draft["loop"]["pair"][0] is draft["loop"]

    assert "version 0" in repr(store)
    async with store.edit() as draft:
        draft["loop"]["pair"][0]["n"] = 2

    got = await store.get("loop")
    assert got["pair"][0] is got
    assert (got["n"], loop["n"]) == (2, 1)
    with pytest.raises(ValueError, match="contains itself, or is nested too deeply"):
        await store.to_json()


@pytest.mark.long
async def test_value_too_deep_for_python_to_compare_changes_nothing() -> None:
    store = ContextStore({"a": nested(20_000)})
    with pytest.raises(RecursionError):
        await store.compare_and_set("a", nested(20_000), 1)

    async with store.edit() as draft:
        draft["a"][0][0].append("new")

    assert (await store.get("a"))[0][0][1] == "new"
    with pytest.raises(ValueError, match="contains itself, or is nested too deeply"):
        await store.to_json()


# -- lost updates (E1), dirty reads (E2), half a change (E3)


async def test_racing_edits_lose_nothing_whether_they_share_an_object_or_not() -> None:
    store = ContextStore({"n": {"total": 0}, "by": {}})
    shared = store.edit()

    async def add(number: int) -> None:
        for _ in range(10):
            async with shared if number % 2 else store.edit() as draft:
                total = draft["n"]["total"]
                await anyio.sleep(0.01)
                draft["n"]["total"] = total + 1
                await checkpoint()
                draft["by"][str(number)] = draft["by"].get(str(number), 0) + 1

    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(add, number)

    assert await store.snapshot() == {"n": {"total": 1000}, "by": {str(number): 10 for number in range(100)}}


async def test_transform_that_raises_halfway_changes_nothing() -> None:
    store = ContextStore({"a": {"x": [1]}})
    error = ZeroDivisionError()

    def fail(value: Any) -> None:
        value["x"].append(2)
        raise error

    assert await raised_by(store.transform, "a", fail) is error
    assert await all_of(store) == {"a": {"x": [1]}}


# -- use of the store from inside an operation (E4)


USES: dict[str, Callable[[ContextStore], Awaitable[Any]]] = {
    "get": lambda store: store.get("a"),
    "set": lambda store: store.set("a", 1),
    "update": lambda store: store.update({"a": 1}),
    "delete": lambda store: store.delete("a"),
    "snapshot": lambda store: store.snapshot(),
    "transform": lambda store: store.transform("a", lambda a: a),
    "compare_and_set": lambda store: store.compare_and_set("a", 0, 1),
    "edit": lambda store: enter(store.edit()),
    "wait_for": lambda store: store.wait_for(lambda _: True),
    "watch": lambda store: enter(store.watch("a")),
    "to_json": lambda store: store.to_json(),
    "agent": lambda store: run_agent(store.set, "a", 1),
}


async def run_agent(*args: Any) -> None:
    (await AgentLoop().run_single("nested", *args)).unwrap()


async def enter(block: Any) -> None:
    async with block:
        pass


@pytest.mark.parametrize("use", [*USES, "anext"])
async def test_task_inside_an_edit_cannot_use_the_store_otherwise(use: str) -> None:
    store = ContextStore({"a": 0})
    text = r"inside `async with store.edit\(\) .* use the draft, or leave"
    async with store.watch("a") as values, store.edit() as draft:
        draft["a"] = 2
        with pytest.raises(RuntimeError, match=text):
            await (anext(values) if use == "anext" else USES[use](store))

    assert await all_of(store) == {"a": 2}


@backends
def test_edit_that_waits_for_a_nested_writer_is_a_deadlock(backend: str) -> None:
    async def main() -> None:
        store = ContextStore()
        async with store.edit(), anyio.create_task_group() as group:
            group.start_soon(store.set, "a", 1)

    with pytest.raises(VirtualClockDeadlock):
        run_scheduled(backend, None, main)


async def test_time_out_of_an_edit_ends_such_a_deadlock_and_bounds_the_wait_and_not_the_block() -> None:
    store = ContextStore()
    start = anyio.current_time()
    errors: list[Any] = []
    async with store.edit(timeout_seconds=1) as draft, anyio.create_task_group() as group:
        draft["a"] = 1
        group.start_soon(into, errors, raised_by, enter, store.edit(timeout_seconds=5))

    assert isinstance(errors[0], TimeoutError)
    text = r"waited 5 s to edit the store, while task '.+' was writing: keep the block"
    assert re.match(text, str(errors[0]))
    assert anyio.current_time() - start == pytest.approx(5)
    assert await all_of(store) == {"a": 1}


async def test_lock_that_comes_in_the_moment_of_the_time_out_is_kept() -> None:
    class LateLock:
        """Comes when its time is up, and still comes."""

        def __init__(self, lock: anyio.Lock) -> None:
            self.lock = lock
            self.release = lock.release

        async def acquire(self) -> None:
            with anyio.CancelScope(shield=True):
                await self.lock.acquire()
                await anyio.sleep(10)

    store = ContextStore()
    run = store._state.enter_run()
    late = LateLock(run.lock)
    run.lock = late
    async with store.edit(timeout_seconds=5) as draft:
        draft["a"] = 1

    run.lock = late.lock
    assert await all_of(store) == {"a": 1}


async def test_time_out_of_the_callers_own_while_waiting_is_the_callers() -> None:
    store = ContextStore()
    async with store.edit():
        with anyio.move_on_after(1) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(enter, store.edit(timeout_seconds=5))

        assert scope.cancelled_caught

    assert await all_of(store) == {}


async def test_edit_that_another_task_leaves_is_refused_and_not_committed() -> None:
    store = ContextStore({"a": 1})
    edit, errors = store.edit(), list[Any]()
    draft = await edit.__aenter__()
    draft["a"] = 2
    async with anyio.create_task_group() as group:
        group.start_soon(into, errors, raised_by, edit.__aexit__, None, None, None)

    assert isinstance(errors[0], RuntimeError)
    assert "must be left by the task that entered it" in str(errors[0])
    with pytest.raises(RuntimeError, match="the block of this draft has ended"):
        draft["a"] = 3

    await edit.__aexit__(ValueError, ValueError(), None)
    assert await all_of(store) == {"a": 1}


# -- bad input


class Uncopyable(list[Any]):
    def __copy__(self) -> Any:
        raise ZeroDivisionError("no copy")


async def edit_key(store: ContextStore, key: Any, value: Any = 1) -> None:
    async with store.edit() as draft:
        draft["b"] = 1
        draft[key] = value


NO_KEY = "a key of a ContextStore must be a str, got 5"
REFUSED: dict[str, tuple[Callable[[ContextStore], Any], type[Exception], str]] = {
    "get": (lambda store: store.get(5), TypeError, NO_KEY),
    "set": (lambda store: store.set(5, 1), TypeError, NO_KEY),
    "update": (lambda store: store.update({"a": 2, 5: 1}), TypeError, NO_KEY),
    "delete": (lambda store: store.delete(5), TypeError, NO_KEY),
    "transform": (lambda store: store.transform(5, lambda _: 1), TypeError, NO_KEY),
    "compare_and_set": (lambda store: store.compare_and_set(5, None, 1), TypeError, NO_KEY),
    "edit": (lambda store: edit_key(store, 5), TypeError, NO_KEY),
    "watch": (lambda store: enter(store.watch(5)), TypeError, NO_KEY),
    "initial key": (lambda _: ContextStore({5: 1}), TypeError, NO_KEY),
    "initial": (lambda _: ContextStore([("a", 1)]), TypeError, "initial must be a mapping, got list"),
    "mapping": (lambda store: store.update([("a", 1)]), TypeError, "mapping must be a mapping, got list"),
    "fn": (lambda store: store.transform("a", 5), TypeError, "fn must be a function, got 5"),
    "predicate": (lambda store: store.wait_for("a"), TypeError, "predicate must be a function, got 'a'"),
    "value of set": (lambda store: store.set("a", [Uncopyable()]), ZeroDivisionError, "no copy"),
    "value of update": (
        lambda store: store.update({"b": 1, "a": Uncopyable()}),
        ZeroDivisionError,
        "no copy",
    ),
    "value of transform": (
        lambda store: store.transform("a", lambda _: Uncopyable()),
        ZeroDivisionError,
        "no copy",
    ),
    "value of cas": (lambda store: store.compare_and_set("a", 0, Uncopyable()), ZeroDivisionError, "no copy"),
    "value of edit": (lambda store: edit_key(store, "a", Uncopyable()), ZeroDivisionError, "no copy"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_cannot_be_taken_is_refused_and_changes_nothing(what: str) -> None:
    call, error, message = REFUSED[what]
    store = ContextStore({"a": 0})
    with pytest.raises(error, match=message):
        await call(store)

    assert await all_of(store) == {"a": 0}


async def asynchronous(_: Any) -> bool:
    return True


class Asynchronous:
    async def __call__(self, _: Any) -> bool:
        return True


class Awaiting:
    def __await__(self) -> Any:
        yield


@pytest.mark.parametrize(
    "fn",
    [asynchronous, Asynchronous(), lambda _: Awaiting(), lambda _: asynchronous(0)],
    ids=["def", "object", "other", "coroutine"],
)
async def test_async_function_is_refused(fn: Any) -> None:
    store = ContextStore({"a": 0})
    with pytest.raises(TypeError, match=r"fn must be a plain function, .*edit\(\) as draft"):
        await store.transform("a", fn)

    with pytest.raises(TypeError, match=r"predicate must be a plain function, .*look at the state only"):
        await store.wait_for(fn)

    assert await all_of(store) == {"a": 0}


@pytest.mark.parametrize(
    ("bad", "error"),
    [(0, ValueError), (-1, ValueError), (math.nan, ValueError), (True, TypeError), ("1", TypeError)],
)
def test_bad_time_out_is_refused_at_once(bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout_seconds must be"):
        ContextStore().edit(timeout_seconds=bad)


async def test_comparison_that_fails_changes_nothing() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

    store = ContextStore({"a": Odd()})
    with pytest.raises(ZeroDivisionError):
        await store.compare_and_set("a", Odd(), 1)

    assert isinstance((await all_of(store))["a"], Odd)


async def test_comparison_sees_a_copy() -> None:
    class Curious:
        def __eq__(self, other: object) -> bool:
            assert isinstance(other, list)
            other.append(2)
            return False

    store = ContextStore({"a": [1]})
    assert await store.compare_and_set("a", Curious(), 1) is False
    assert await all_of(store) == {"a": [1]}


# -- waiting for a condition


async def test_wait_for_returns_what_the_predicate_returns() -> None:
    store = ContextStore({"plan": []})
    assert await store.wait_for(lambda now: len(now)) == 1
    got: list[Any] = []
    async with anyio.create_task_group() as group:
        await launch(group, into, got, store.wait_for, lambda now: now["plan"])
        assert not got
        await store.set("plan", ["a"])

    assert got == [["a"]]
    everything = await store.wait_for(lambda now: now)
    await store.set("plan", [])
    everything["plan"].append("b")
    assert everything == {"plan": ["a", "b"]}


async def test_wait_for_sees_a_state_that_lasts_for_no_time() -> None:
    store = ContextStore({"n": 0})
    got: list[int] = []
    async with anyio.create_task_group() as group:
        for number in range(1, 51):
            group.start_soon(into, got, store.wait_for, lambda now, n=number: now["n"] == n and n)

        await anyio.wait_all_tasks_blocked()
        for _ in range(50):
            await store.transform("n", lambda n: n + 1)

    assert sorted(got) == list(range(1, 51))


async def test_wait_for_misses_no_change_that_comes_as_it_begins() -> None:
    for steps in range(10):
        store = ContextStore({"n": 0})
        with anyio.fail_after(1):
            async with anyio.create_task_group() as group:
                group.start_soon(store.wait_for, lambda now: now["n"])
                for _ in range(steps):
                    await checkpoint()

                async with store.edit() as draft:
                    draft["n"] = 1


async def test_wait_for_looks_at_a_state_that_cannot_be_changed() -> None:
    store = ContextStore(state())

    def change(now: Any) -> bool:
        with pytest.raises(TypeError, match="does not support item assignment"):
            now["a"] = 1

        now["plan"]["steps"].append(1)
        return len(now["plan"]["steps"]) == 2

    assert await store.wait_for(change) is True
    assert await all_of(store) == state()


async def test_state_that_a_predicate_looks_at_cannot_be_read_later() -> None:
    store = ContextStore(state())
    everything = await store.wait_for(lambda now: [now])
    items = await store.wait_for(lambda now: now.items())
    for read in (lambda: everything[0]["n"], lambda: list(items)):
        with pytest.raises(RuntimeError, match=r"has ended: take a snapshot\(\)"):
            read()


async def test_predicate_that_raises_fails_the_one_who_waits_and_not_the_one_who_writes() -> None:
    store = ContextStore({"n": 0})
    error = KeyError("mine")
    raised: list[Any] = []

    def look(now: Any) -> bool:
        if now["n"]:
            raise error

        return False

    async with anyio.create_task_group() as group:
        for _ in range(2):
            await launch(group, into, raised, raised_by, store.wait_for, look)

        await store.set("n", 1)

    assert raised == [error, error]
    assert await raised_by(store.wait_for, look) is error


async def test_predicate_sees_the_context_of_the_one_who_waits() -> None:
    var = contextvars.ContextVar("var", default="nobody")
    store = ContextStore()
    seen = []

    async def wait() -> None:
        var.set("waiter")
        await store.wait_for(lambda now: seen.append(var.get()) or "a" in now)

    async with anyio.create_task_group() as group:
        await launch(group, wait)
        var.set("writer")
        await store.set("a", 1)

    assert seen == ["waiter", "waiter"]


async def test_wait_that_is_cancelled_leaves_nothing() -> None:
    store = ContextStore()
    asked = []
    with anyio.move_on_after(1):
        await store.wait_for(lambda now: asked.append(now))

    await store.set("a", 1)
    assert len(asked) == 1


# -- watching


async def test_watch_gives_what_is_there_and_then_the_newest() -> None:
    store = ContextStore({"a": 0})
    async with store.watch("a") as values:
        assert await anext(values) == 0
        for number in range(5):
            await store.set("a", number)

        assert await anext(values) == 4
        with anyio.move_on_after(1) as scope:
            await anext(values)

        assert scope.cancelled_caught
        await store.delete("a")
        assert await anext(values) is None
        await store.set("a", 5)
        await store.delete("a")
        assert await anext(values) is None

    async with store.watch("a", "gone") as values:
        assert await anext(values) == "gone"


async def test_watch_of_everything_gives_snapshots() -> None:
    store = ContextStore()
    seen = []

    async def watch() -> None:
        async with store.watch() as values:
            async for value in values:
                seen.append(value)
                if "end" in value:
                    return

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        for change in ({"a": 1}, {"b": [2]}, {"end": 3}):
            await anyio.wait_all_tasks_blocked()
            await store.update(change)

    assert seen == [{}, {"a": 1}, {"a": 1, "b": [2]}, {"a": 1, "b": [2], "end": 3}]


async def test_each_change_wakes_only_those_who_watch_its_keys() -> None:
    store = ContextStore({"read": [], "same": 1})
    woken: dict[str, list[Any]] = {}

    async def watch(key: str) -> None:
        async with store.watch(key) as values:
            async for value in values:
                woken.setdefault(key, []).append(value)

    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(watch, f"k{number}")

        for key in ("read", "same"):
            group.start_soon(watch, key)

        await anyio.wait_all_tasks_blocked()
        woken.clear()
        await store.set("k7", 1)
        await anyio.wait_all_tasks_blocked()
        assert woken == {"k7": [1]}
        woken.clear()
        async with store.edit() as draft:
            assert draft["read"] == []
            draft["same"] = draft["same"]
            draft["k8"] = draft["k9"] = 2
            del draft["k7"]

        await anyio.wait_all_tasks_blocked()
        assert woken == {"k7": [None], "k8": [2], "k9": [2]}
        group.cancel_scope.cancel()


async def test_watcher_that_never_reads_costs_a_writer_nothing() -> None:
    store = ContextStore()
    start = anyio.current_time()
    async with store.watch("a"), store.watch() as values:
        for number in range(1000):
            await store.set("a", number)

        assert anyio.current_time() == start
        assert await anext(values) == {"a": 999}


async def test_leaving_the_block_ends_the_watch() -> None:
    store = ContextStore({"a": 1})
    seen = []

    async def read(values: Any) -> None:
        async for value in values:
            seen.append(value)

    async with anyio.create_task_group() as group:
        async with store.watch("a") as values, store.watch("a") as others:
            await launch(group, read, values)

        await store.set("a", 2)
        for ended in (values, others):
            with pytest.raises(StopAsyncIteration):
                await anext(ended)

    assert seen == [1]


async def test_two_readers_of_one_watch_share_its_values() -> None:
    store = ContextStore({"a": 0})
    seen: list[int] = []
    async with store.watch("a") as values:
        assert await anext(values) == 0
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(into, seen, values.__anext__)

            for number in (1, 2):
                await anyio.wait_all_tasks_blocked()
                await store.set("a", number)

    assert seen == [1, 2]


async def test_watch_without_a_block_says_so() -> None:
    with pytest.raises(TypeError, match="async for"):
        async for _ in ContextStore().watch("a"):
            pass


async def test_value_that_arrives_with_the_cancellation_of_its_reader_is_not_lost() -> None:
    for steps in range(8):
        store = ContextStore()
        async with store.watch("a") as values:
            assert await anext(values) is None
            seen: list[int] = []
            async with anyio.create_task_group() as group:
                await launch(group, into, seen, values.__anext__)
                await store.set("a", 1)
                for _ in range(steps):
                    await checkpoint()

                group.cancel_scope.cancel()

            if not seen:
                with anyio.fail_after(1):
                    seen.append(await anext(values))

            assert seen == [1]


def test_native_cancellation_of_a_reader_loses_no_value() -> None:
    async def main() -> None:
        store = ContextStore()
        seen = []
        async with store.watch("n") as values:

            async def write() -> None:
                for number in range(300):
                    await asyncio.sleep(0.01)
                    await store.set("n", number)

            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                while 299 not in seen:
                    try:
                        seen.append(await asyncio.wait_for(anext(values), 0.01))
                    except TimeoutError:
                        pass

        numbers = [number for number in seen if number is not None]
        # The reader is as fast as the writer, so it sees each of them, whatever was cancelled in between.
        assert numbers == sorted(set(numbers))
        assert len(numbers) > 250
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.wait_for(lambda now: now["n"] > 300), 1)

    run_scheduled("asyncio", 1, main)


def test_native_cancellation_of_writers_leaves_the_lock_free() -> None:
    async def main() -> None:
        store = ContextStore({"n": 0})
        done = 0

        async def add() -> None:
            nonlocal done
            async with store.edit() as draft:
                n = draft["n"]
                await asyncio.sleep(0.01)
                draft["n"] = n + 1

            done += 1

        async def impatient(number: int) -> None:
            try:
                await asyncio.wait_for(add(), 0.005 * number)
            except TimeoutError:
                pass

        async with asyncio.TaskGroup() as group:
            for number in range(200):
                group.create_task(impatient(number))

        assert 0 < done < 200
        assert await all_of(store) == {"n": done}

    for seed in range(5):
        run_scheduled("asyncio", seed, main)


# -- event loops


@backends
def test_one_store_serves_several_runs_on_either_backend(backend: str) -> None:
    store = ContextStore({"n": 0})
    watches = []

    async def main() -> None:
        async def add() -> None:
            async with store.edit() as draft:
                await anyio.sleep(1)
                draft["n"] += 1

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(add)

            await store.wait_for(lambda now: now["n"] % 5 == 0)
            async with store.watch("n") as values:
                watches.append(await anext(values))

    for name in (backend, "asyncio", "trio"):
        run_scheduled(name, None, main)

    assert len(watches) == 3
    assert repr(store) == "<ContextStore 1 keys, version 15>"


@backends
def test_run_that_died_inside_an_edit_leaves_a_store_that_works(backend: str) -> None:
    store = ContextStore({"n": 0})

    async def die() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(store.wait_for, lambda now: now["n"])
            async with store.edit() as draft:
                draft["n"] = 1
                await anyio.sleep(1)
                raise KeyboardInterrupt

    with pytest.raises(BaseExceptionGroup) as caught:
        run_scheduled(backend, None, die)

    assert caught.group_contains(KeyboardInterrupt)
    assert run_scheduled(backend, None, all_of, store) == {"n": 0}


@backends
@pytest.mark.parametrize("other", ["asyncio", "trio"])
def test_use_in_two_event_loops_at_once_is_refused(backend: str, other: str) -> None:
    store = ContextStore({"a": 1})

    async def main() -> None:
        await store.get("a")

        def elsewhere() -> None:
            text = "in use in another event loop, in thread 'MainThread': use one store per"
            for use in USES.values():
                with pytest.raises(RuntimeError, match=text):
                    anyio.run(use, store, backend=other)

        await anyio.to_thread.run_sync(elsewhere)
        # From another thread, this is the way.
        assert await anyio.to_thread.run_sync(anyio.from_thread.run, store.get, "a") == 1

    anyio.run(main, backend=backend)
    anyio.run(store.set, "a", 2, backend=other)


@pytest.mark.parametrize(
    "make",
    [copy.copy, copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))],
    ids=["copy", "deep", "pickle"],
)
async def test_copy_of_a_store_is_another_store(make: Callable[[ContextStore], ContextStore]) -> None:
    store = ContextStore(state())
    await store.get("n")
    other = make(store)
    for got in (await other.get("plan"), await other.snapshot()):
        got.clear()

    async with other.edit() as draft:
        draft["plan"]["steps"].clear()

    assert await store.snapshot() == state()
    assert await all_of(other) == {**state(), "plan": {"steps": [], "by": {"ann"}}}


def test_store_needs_an_event_loop_to_be_used_and_none_to_be_made() -> None:
    coroutine = ContextStore({"a": 1}).get("a")
    with pytest.raises(anyio.NoEventLoopError):
        coroutine.send(None)


# -- JSON


class Phase(enum.StrEnum):
    PLAN = "plan"


class Level(enum.IntEnum):
    LOW = 1


async def test_json_brings_back_what_it_was_made_of() -> None:
    store = ContextStore({"plan": {"steps": [{"when": None}, 1.5, "é\ud800"], "pair": (1, (2,))}, "n": True})
    text = await store.to_json()
    again = ContextStore.from_json(text)
    assert await again.snapshot() == {
        "plan": {"steps": [{"when": None}, 1.5, "é\ud800"], "pair": [1, [2]]},
        "n": True,
    }
    assert await again.to_json() == text
    assert await ContextStore.from_json(b"{}").snapshot() == {}


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([{"when": {1}}], TypeError, r"cannot encode plan\.steps\[0\]\.when as JSON, which has no set"),
        ([0, (1, b"x")], TypeError, r"cannot encode plan\.steps\[1\]\[1\] as JSON, which has no bytes"),
        (
            {"due date": object()},
            TypeError,
            r"cannot encode plan\.steps\['due date'\] as JSON, which has no object",
        ),
        (Phase.PLAN, TypeError, r"cannot encode plan\.steps as JSON, which has no Phase"),
        ([Level.LOW], TypeError, r"cannot encode plan\.steps\[0\] as JSON, which has no Level"),
        (Counter(), TypeError, r"cannot encode plan\.steps as JSON, which has no Counter"),
        ({Phase.PLAN: 1}, TypeError, r"cannot encode plan\.steps as JSON: its key .* must be a plain str"),
        ({True: 1}, TypeError, r"its key True must be a plain str"),
        ({None: 1}, TypeError, r"its key None must be a plain str"),
        ({1: 2}, TypeError, r"cannot encode plan\.steps as JSON: its key 1 must be a plain str"),
        ([math.nan], ValueError, r"cannot encode plan\.steps\[0\] as JSON, which has no nan"),
        ([-math.inf], ValueError, r"cannot encode plan\.steps\[0\] as JSON, which has no -inf"),
    ],
)
async def test_what_json_does_not_have_is_named(value: Any, error: type[Exception], message: str) -> None:
    store = ContextStore({"n": 1, "plan": {"steps": value}})
    with pytest.raises(error, match=message):
        await store.to_json()


async def test_key_that_would_come_back_as_a_plain_string_is_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot encode the store as JSON: its key .*PLAN"):
        await ContextStore({Phase.PLAN: 1}).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "must be a JSON object, got a list"), ("null", "got a NoneType"), ("{", "line 1")],
)
def test_text_that_is_no_json_object_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextStore.from_json(text)


# -- with agents


async def test_agents_share_a_store_and_lose_nothing_to_time_outs_and_retries() -> None:
    store = ContextStore({"done": [], "log": {}})

    async def agent(number: int) -> int:
        async with store.edit() as draft:
            attempts = draft["log"].get(str(number), 0)

        await store.transform("log", lambda log: {**log, str(number): attempts + 1})
        if number % 3 == 0 and attempts == 0:
            async with store.edit() as draft:
                draft["done"].append("never")
                await anyio.sleep_forever()

        async with store.edit() as draft:
            await anyio.sleep(0.1)
            draft["done"].append(number)

        return number

    # That the others time out while one keeps the lock says nothing about a provider.
    loop = AgentLoop(LoopConfig(timeout_seconds=60), limiter=Limiter(10, adaptive=False))
    results = await loop.run_all(Invocation.map(agent, range(12)))
    assert all(result.success for result in results)
    assert sorted(await store.get("done")) == list(range(12))
    assert (await store.get("log"))["3"] == 2

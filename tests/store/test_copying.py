"""Values that a store holds and hands out: copies of containers, and what an edit makes of them."""

from __future__ import annotations

import copy
import time
from collections import Counter, OrderedDict, defaultdict, deque
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import Mock

import hypothesis.strategies as st
import pytest
from hypothesis import given

from agentloop._store.copying import copied, same
from agentloop._store.draft import Draft


def plan() -> dict[str, Any]:
    return {
        "steps": [{"when": "now", "tags": {"a", "b"}}, {"when": "later", "tags": set()}],
        "by": ("ann", ["bob"]),
        "n": {"deep": {"deeper": {"x": 1}}},
        "queue": [2, 5],
        "text": "t",
    }


def nested(depth: int, kind: type = list) -> Any:
    value = kind()
    for _ in range(depth):
        value = kind([value])

    return value


class Point(NamedTuple):
    x: Any
    y: Any


class Stack(list[Any]):
    limit = 5


class Bag(set[Any]):
    pass


class Pair(tuple[Any, ...]):
    pass


class Fixed(dict[str, Any]):
    def __copy__(self) -> Fixed:
        return self


def inner(value: Any) -> list[Any]:
    """Return the lists in a container."""
    items = value.values() if isinstance(value, dict) else value
    return [item for item in items if isinstance(item, list)]


# -- copies


@pytest.mark.parametrize(
    "value",
    [
        Counter("aab"),
        OrderedDict(b=[1], a=[2]),
        defaultdict(list, a=[1]),
        Point(1, [2]),
        Stack([[1]]),
        Bag([1, (2,)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_copy_of_a_subclass_is_of_its_type(value: Any) -> None:
    made = copied({"a": [value]})["a"][0]
    assert type(made) is type(value)
    assert made == value
    assert made is not value
    assert not {*map(id, inner(made))} & {*map(id, inner(value))}


@pytest.mark.parametrize(
    "value",
    [
        *(object(), deque([[1]]), bytearray(b"x"), frozenset([1]), MappingProxyType({"a": [1]})),
        *(Mock(spec=dict), time.gmtime(0), Pair([[1]]), Fixed(a=[1]), Point(1, (2, "x"))),
        (1, "a", (2.5, None)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_object_of_another_type_is_shared_and_so_is_what_holds_nothing_to_copy(value: Any) -> None:
    assert copied(value) is value
    assert copied([value])[0] is value


def test_tuples_that_are_nested_too_deeply_are_refused() -> None:
    with pytest.raises(RecursionError):
        copied([nested(100_000, tuple), []])


@pytest.mark.parametrize("kind", [list, tuple])
def test_value_with_countless_paths_is_copied_at_once(kind: type) -> None:
    value: Any = kind([[]])
    for _ in range(60):
        value = kind([value, value])

    made = copied(value)
    assert made[0] is made[1]
    assert same(made, value)


def test_copies_of_what_exists_only_while_it_is_copied_are_not_mixed_up() -> None:
    class Inner(list[Any]):
        def __copy__(self) -> Inner:
            return Inner([["inner"]])

    class Outer(list[Any]):
        def __copy__(self) -> Outer:
            return Outer([["outer"], Inner()])

    assert copied(Outer()) == [["outer"], [["inner"]]]


# -- what has changed


@pytest.mark.parametrize(
    "change",
    [
        *("d['text'] = 1", "del d['text']", "d['n'] = d.pop('n')", "d['steps'][0]['when'] = 'then'"),
        *("d['steps'].append(1)", "d['steps'].reverse()", "d['steps'][0]['tags'].add('z')"),
        "d['steps'][0]['tags'] ^= {'a', 'z'}",
        "d['steps'][1]['tags'] = d['steps'][0]['tags']",
        "d['by'][1].append('eve')",
        "d['by'] = list(d['by'])",
        "d['n']['deep']['deeper']['x'] = True",
        "d['n']['deep']['deeper']['x'] = 1.0",
        "d['queue'][:] = 5, 2",
    ],
)
def test_change_of_a_copy_is_seen(change: str) -> None:
    made = copied(plan())
    exec(change, {"d": made})
    assert not same(made, plan())


def test_one_object_in_two_places_stays_one_and_to_make_it_two_is_a_change() -> None:
    item: list[int] = []
    assert not same([item, item], [[], []])
    assert not same([[], []], [item, item])
    made = copied([item, (item, 1)])
    assert made[0] is made[1][0]
    assert same([item, (item, 1)], made)


def test_comparison_calls_no_method_of_what_is_compared() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

        __hash__ = object.__hash__

    value = [Odd(), {Odd()}, {Odd(): Odd()}]
    assert same(copied(value), value)
    assert not same([Odd()], [Odd()])
    assert not same({Odd()}, {Odd()})


# -- the draft


@pytest.mark.parametrize(
    "look",
    [
        "d['a']['steps'][0]['tags']",
        "[*d['a'].items(), *d['a']['steps'], *d['a']['n']['deep'].values()]",
        "copy.deepcopy(dict(d))",
        "d['a']['steps'].sort(key=str, reverse=True)",
        "d == {'a': plan()}",
        "d['a'].pop('missing', None)",
        "d.update(a=d['a'])",
        "d['a']['text'] += ''",
    ],
)
def test_looking_is_no_change(look: str) -> None:
    draft = Draft({"a": plan()})
    exec(look, {"copy": copy, "plan": plan, "d": draft})
    assert draft.changes() == ({}, set())


def test_container_of_a_subclass_counts_as_changed_when_it_was_looked_at() -> None:
    stack = Stack([1])
    draft = Draft({"a": stack, "b": Stack()})
    draft["a"].limit = 9
    changes, _ = draft.changes()
    assert list(changes) == ["a"]
    assert changes["a"].limit == 9
    assert stack.limit == 5


@pytest.mark.parametrize(
    "put", ["draft['log'] = log", "draft['a']['log'] = log", "draft['a']['b'][:] = [(1, log)]"]
)
def test_value_put_into_a_draft_can_be_changed_until_the_commit_and_not_after(put: str) -> None:
    draft = Draft({"a": {"b": []}})
    log: list[Any] = []
    exec(put, {"draft": draft, "log": log})
    log.append({"n": 1})
    changes, _ = draft.changes()
    log[0]["n"] = 2
    assert "[{'n': 1}]" in repr(changes)


def test_draft_is_a_mutable_mapping_that_copies_only_what_is_touched() -> None:
    class Untouchable(dict[str, Any]):
        def __copy__(self) -> Any:
            raise AssertionError

    state = {"a": plan(), "b": [1], "c": Untouchable()}
    draft = Draft(state)
    assert repr(draft) == "<draft of 3 keys>"
    draft["a"]["n"] = 1
    assert draft.changes() == ({"a": {**plan(), "n": 1}}, set())
    draft["d"] = 4
    del draft["a"]
    draft["a"] = 5
    draft |= {"e": 6}
    assert list(draft) == ["b", "c", "d", "a", "e"]
    assert list(reversed(draft)) == ["e", "a", "d", "c", "b"]
    assert len(draft) == 5
    assert draft.popitem() == ("e", 6)
    assert draft.pop("d") == 4
    assert draft.pop("d", None) is None
    assert draft.setdefault("b", []) == [1]
    assert draft.get("zzz", 0) == 0
    assert ("a" in draft, "d" in draft) == (True, False)
    del draft["c"]
    assert draft == {"a": 5, "b": [1]}
    with pytest.raises(KeyError, match="c"):
        draft["c"]

    for key in ("c", "zzz"):
        with pytest.raises(KeyError, match=key):
            del draft[key]

    assert draft.changes() == ({"a": 5}, {"a", "c"})
    draft.clear()
    assert not draft
    assert len(draft) == 0
    with pytest.raises(KeyError, match="empty"):
        draft.popitem()

    assert draft.changes() == ({}, {"a", "b", "c"})
    assert state == {"a": plan(), "b": [1], "c": {}}


USES = "d['a'] | d['a'] = 1 | del d['a'] | 'a' in d | list(d) | list(reversed(d)) | len(d) | d.clear()"


@pytest.mark.parametrize("use", USES.split(" | "))
def test_draft_that_has_ended_refuses_any_use(use: str) -> None:
    draft = Draft({"a": 1})
    draft.end()
    with pytest.raises(RuntimeError, match=r"the block of this draft has ended: take a snapshot\(\)"):
        exec(use, {"d": draft})

    assert repr(draft) == "<draft that has ended>"


# -- anything


leaves = st.none() | st.booleans() | st.integers(0, 3) | st.text("ab", max_size=1)
hashables = st.recursive(leaves, lambda inner: st.tuples(inner, inner), max_leaves=3)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(hashables, inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(hashables, max_size=3)
    ),
    max_leaves=12,
)


def exact(value: Any) -> Any:
    """Return what tells 1 from True, a list from a tuple, and one order from another."""
    if isinstance(value, dict):
        return dict, [(exact(key), exact(item)) for key, item in value.items()]

    if isinstance(value, (list, tuple)):
        return tuple if isinstance(value, tuple) else list, [exact(item) for item in value]

    return (set, sorted(map(repr, value))) if isinstance(value, set) else (type(value), value)


@given(values)
def test_any_value_comes_back_as_it_was(value: Any) -> None:
    before = exact(value)
    made = copied(value)
    assert exact(made) == exact(value) == before
    draft = Draft({"value": made})
    assert exact(draft["value"]) == before
    assert draft.changes() == ({}, set())

"""Values that a store holds and hands out: real containers, shared until they are touched."""

from __future__ import annotations

import copy
import heapq
import json
import operator
import pickle
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given

from agentloop._store.draft import Draft
from agentloop._store.freezer import Freezer, path_of, same
from agentloop._store.frozen import thaw


def freeze(value: Any, owner: object = None) -> Any:
    return Freezer(owner).freeze(value, "value")


def live(value: Any) -> Any:
    return thaw(freeze(value), object())


def plan() -> dict[str, Any]:
    return {
        "steps": [{"when": "now", "tags": {"a", "b"}}, {"when": "later", "tags": set()}],
        "by": ("ann", ["bob"]),
        "n": {"deep": {"deeper": {"x": 1}}},
        "queue": [2, 5],
        "text": "t",
    }


NAMES = {"copy": copy, "heapq": heapq, "json": json, "plan": plan}


# -- reading


READERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda d: d,
    "dict()": dict,
    "two stars": lambda d: {**d},
    "or": lambda d: d | {},
    "or, from the left": lambda d: {} | d,
    "copy": lambda d: d.copy(),
    "items": lambda d: dict(list(d.items())),
    "values": lambda d: dict(zip(d, d.values(), strict=True)),
    "items, reversed": lambda d: dict(reversed(d.items())),
    "keys and brackets": lambda d: {key: d[key] for key in d.keys()},  # noqa: SIM118  # what is tested
    "get": lambda d: {key: d.get(key) for key in d},
    "setdefault": lambda d: {key: d.setdefault(key) for key in d},
    "itemgetter": lambda d: dict(zip(d, operator.itemgetter(*d)(d), strict=True)),
    "keyword arguments": lambda d: (lambda **kwargs: kwargs)(**d),
    "a match statement": lambda d: matched(d),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "pop": lambda d: {key: d.pop(key) for key in list(d)},
    "popitem": lambda d: dict(reversed([d.popitem() for _ in range(len(d))])),
}


def matched(value: Any) -> Any:
    match value:
        case {"steps": steps, "by": by, "n": n, **rest}:
            return {"steps": steps, "by": by, "n": n, **rest}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_way_of_reading_a_dict_gives_what_can_be_changed_and_leaves_the_origin_alone(
    read: Callable[[Any], Any],
) -> None:
    frozen = freeze(plan())
    first, second = thaw(frozen, object()), thaw(frozen, object())
    got = read(first)
    assert got == plan()
    got["n"]["deep"]["deeper"]["x"] = 2
    got["steps"][0]["tags"].add("c")
    got["steps"].append(3)
    got["by"][1].append("eve")
    assert got["n"]["deep"]["deeper"] == {"x": 2}
    assert got["by"] == ("ann", ["bob", "eve"])
    assert frozen == second == plan()


LIST_READERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda items: items,
    "list()": list,
    "a star": lambda items: [*items],
    "a tuple": lambda items: [*tuple(items)],
    "unpacking": lambda items: (lambda a, b, c: [a, b, c])(*items),
    "an assignment": lambda items: assigned(items),
    "a slice": lambda items: items[:],
    "an index": lambda items: [items[0], items[-2], items[2]],
    "sorted": lambda items: sorted(items, key=str),
    "reversed": lambda items: list(reversed(items))[::-1],
    "copy": lambda items: items.copy(),
    "plus": lambda items: items + [],  # noqa: RUF005  # what is tested
    "plus, from the left": lambda items: [] + items,  # noqa: RUF005  # what is tested
    "plus itself": lambda items: (items + items)[:3],
    "times": lambda items: items * 1,
    "times, from the left": lambda items: 1 * items,
    "extending another": lambda items: extended([], items),
    "adding to another": lambda items: operator.iadd([], items),
    "pop": lambda items: [items.pop(0) for _ in range(3)],
    "comprehension": lambda items: [item for item in items],  # noqa: C416  # what is tested
    "map": lambda items: list(map(lambda item: item, items)),  # noqa: C417  # what is tested
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda items: pickle.loads(pickle.dumps(items)),
}


def assigned(items: Any) -> Any:
    first, *rest = items
    return [first, *rest]


def extended(to: list[Any], items: Any) -> list[Any]:
    to.extend(items)
    return to


@pytest.mark.parametrize("read", LIST_READERS.values(), ids=LIST_READERS)
def test_every_way_of_reading_a_list_gives_what_can_be_changed_and_leaves_the_origin_alone(
    read: Callable[[Any], Any],
) -> None:
    value = [{"x": [1]}, {"y": {2}}, {"z": 3}]
    frozen = freeze(value)
    first, second = thaw(frozen, object()), thaw(frozen, object())
    got = read(first)
    assert got == value
    got[0]["x"].append(9)
    got[1]["y"].add(9)
    got[2]["z"] = 9
    assert got == [{"x": [1, 9]}, {"y": {2, 9}}, {"z": 9}]
    assert frozen == second == value


def test_what_was_read_is_the_same_object_when_it_is_read_again() -> None:
    value = live(plan())
    assert value["n"] is value["n"]
    assert value["by"] is value["by"]
    assert value["steps"][1] is value["steps"][-1] is [*value["steps"]][1]
    assert dict(value)["steps"] is value["steps"]


def test_live_values_are_real_containers() -> None:
    value = live(plan())
    assert isinstance(value, dict)
    assert isinstance(value["steps"], list)
    assert isinstance(value["steps"][0]["tags"], set)
    assert type(value["by"]) is tuple
    assert repr(live({"a": [{1}]})) == "{'a': [{1}]}"
    assert repr(freeze({"a": [{1}]})) == "{'a': [{1}]}"
    assert json.loads(json.dumps(live({"a": [{"b": None}], "t": (1, [2])}))) == {
        "a": [{"b": None}],
        "t": [1, [2]],
    }
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)

    with pytest.raises(KeyError):
        value["missing"]

    assert value.get("missing") is None
    assert value.get("missing", 1) == 1


@pytest.mark.parametrize("kind", [dict, list, set])
def test_live_value_has_no_attribute_that_a_template_could_take_for_a_key(kind: type) -> None:
    added = {name for name in dir(live(kind())) if name not in dir(kind)}
    assert added
    assert all(name.startswith("_") or name.endswith("_") for name in added)


def test_copies_of_any_kind_are_exact_containers() -> None:
    for value in (live(plan()), freeze(plan())):
        for made in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert made == plan()
            kinds = {type(made), type(made["steps"]), type(made["steps"][0]), type(made["steps"][0]["tags"])}
            kinds |= {type(made["by"]), type(made["by"][1])}
            assert kinds == {dict, list, set, tuple}


# -- what is frozen


@pytest.mark.parametrize(
    "change",
    [
        "d['a'] = 1",
        "del d['a']",
        "d.update(a=1)",
        "d.pop('a')",
        "d.popitem()",
        "d.clear()",
        "d.setdefault('b', 1)",
        "d |= {}",
        "d['a'].append(1)",
        "d['a'].extend([1])",
        "d['a'].insert(0, 1)",
        "d['a'].remove(1)",
        "d['a'].pop()",
        "d['a'].clear()",
        "d['a'].sort()",
        "d['a'].reverse()",
        "d['a'][0] = 1",
        "del d['a'][0]",
        "d['a'] += [1]",
        "d['a'] *= 2",
        "d['s'].add(1)",
        "d['s'].remove(1)",
        "d['s'].discard(1)",
        "d['s'].pop()",
        "d['s'].clear()",
        "d['s'].update({2})",
        "d['s'].difference_update({1})",
        "d['s'].intersection_update({1})",
        "d['s'].symmetric_difference_update({1})",
        "d['s'] |= {2}",
        "d['s'] &= {2}",
        "d['s'] -= {1}",
        "d['s'] ^= {1}",
        "d['t'][0].append(1)",
    ],
)
def test_frozen_value_cannot_be_changed(change: str) -> None:
    frozen = freeze({"a": [1], "s": {1}, "t": ([],)})
    with pytest.raises(TypeError, match="read-only"):
        exec(change, {"d": frozen})

    assert frozen == {"a": [1], "s": {1}, "t": ([],)}


READING = """
    __add__ __and__ __class__ __class_getitem__ __contains__ __doc__ __eq__ __ge__ __getattribute__
    __getitem__ __gt__ __hash__ __init__ __iter__ __le__ __len__ __lt__ __mul__ __ne__ __new__ __or__
    __rand__ __reduce__ __repr__ __reversed__ __rmul__ __ror__ __rsub__ __rxor__ __sizeof__ __sub__
    __xor__ copy count difference fromkeys get index intersection isdisjoint issubset issuperset items
    keys symmetric_difference union values
"""
# These neither hand out a value nor, in a dict, make a change to be noted.
HARMLESS = """
    __class_getitem__ __contains__ __doc__ __eq__ __ge__ __getattribute__ __gt__ __hash__ __le__ __len__
    __lt__ __ne__ __new__ __repr__ __reversed__ __ror__ __sizeof__ fromkeys keys
"""
CHANGING_A_LIST = """
    __delitem__ __iadd__ __imul__ __setitem__ append clear count extend index insert remove reverse sort
"""


@pytest.mark.parametrize("kind", [dict, list, set])
def test_no_method_that_changes_a_container_was_forgotten(kind: type) -> None:
    changing = set(vars(kind)) - set(READING.split())
    frozen = type(freeze(kind()))
    assert changing
    assert {name for name in changing if getattr(frozen, name) is getattr(kind, name)} == set()


def test_no_shared_value_is_read_by_a_method_of_its_base() -> None:
    harmless, changing_a_list = set(HARMLESS.split()), set(CHANGING_A_LIST.split())
    for kind, allowed in ((dict, harmless), (list, harmless - {"__reversed__"} | changing_a_list)):
        made = type(live(kind()))
        assert {name for name in vars(kind) if getattr(made, name) is getattr(kind, name)} <= allowed


def test_value_is_copied_when_it_is_frozen() -> None:
    value = plan()
    frozen = freeze(value)
    value["steps"][0]["tags"].clear()
    value["n"]["deep"].clear()
    value["by"][1].clear()
    assert frozen == plan()


def test_objects_of_other_types_are_shared_by_reference() -> None:
    class Thing:
        pass

    for value in (Thing(), b"x", 1.5, frozenset([1]), bytearray(b"x"), (1, "a"), None, True):
        assert freeze(value) is value
        assert freeze([value])[0] is value


class Point(NamedTuple):
    x: Any
    y: Any


def test_tuple_of_a_subclass_is_kept_if_nothing_in_it_can_be_changed() -> None:
    point = Point(1, (2, "x"))
    assert freeze({"p": point})["p"] is point
    with pytest.raises(TypeError, match=r"the value at value\.p is a Point, .* convert it to a plain tuple"):
        freeze({"p": Point(1, [2])})


@pytest.mark.parametrize(
    ("value", "name", "base"),
    [
        (Counter("a"), "Counter", "dict"),
        (OrderedDict(a=1), "OrderedDict", "dict"),
        (defaultdict(list), "defaultdict", "dict"),
        (type("Stack", (list,), {})(), "Stack", "list"),
        (type("Bag", (set,), {})(), "Bag", "set"),
    ],
)
def test_container_of_a_subclass_is_refused_with_its_path(value: Any, name: str, base: str) -> None:
    with pytest.raises(
        TypeError, match=rf"the value at value\.steps\[1\]\['due date'\] is a {name}, .* plain {base}$"
    ):
        freeze({"steps": [0, {"due date": value}]})


def test_cycle_is_refused_with_its_path() -> None:
    value: dict[str, Any] = {"a": [1, {}]}
    value["a"][1]["again"] = value["a"]
    with pytest.raises(ValueError, match=r"the value at value\.a\[1\]\.again contains itself"):
        freeze(value)


def test_value_nested_too_deeply_is_refused() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]

    with pytest.raises(ValueError, match="the value at value is nested too deeply"):
        freeze(value)


def test_what_occurs_often_is_frozen_once() -> None:
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]

    frozen = freeze(value)
    assert frozen[0] is frozen[1]


def test_path_is_written_as_in_python() -> None:
    assert path_of(["plan", "steps", 3, "when"]) == "plan.steps[3].when"
    assert path_of(["due date", "x", ("a", 1)]) == "['due date'].x[('a', 1)]"


# -- what an edit does


def test_only_what_lies_on_the_way_to_a_change_is_copied() -> None:
    state = {"a": freeze(plan()), "b": freeze(plan())}
    draft = Draft(state)
    draft["a"]["steps"][1]["tags"].add("new")
    changes, deleted = draft.changes()
    assert list(changes) == ["a"]
    assert not deleted
    new, old = changes["a"], state["a"]
    assert new["steps"][1]["tags"] == {"new"}
    assert new is not old
    assert new["steps"] is not old["steps"]
    assert new["steps"][0] is old["steps"][0]
    assert new["n"] is old["n"]
    assert new["by"] is old["by"]
    assert old == plan()


@pytest.mark.parametrize(
    "look",
    [
        "d['a']['steps'][0]['tags']",
        "[*d['a'].items(), *d['a']['steps'], *d['a']['n']['deep'].values()]",
        "d['a']['by'][1]",
        "copy.deepcopy(dict(d))",
        "d['a']['steps'].sort(key=str, reverse=True)",
        "d == {'a': plan()}",
        "d['a'].get('missing')",
        "d['a'].pop('missing', None)",
        "d.update(a=d['a'])",
        "json.dumps(d['a']['n'])",
    ],
)
def test_looking_is_no_change(look: str) -> None:
    draft = Draft({"a": freeze(plan())})
    exec(look, {**NAMES, "d": draft})
    assert draft.changes() == ({}, set())


CHANGES = [
    "d['text'] = 'u'",
    "del d['text']",
    "d.pop('steps')",
    "d.popitem()",
    "d.clear()",
    "d.update({'x': 1}, y=[2])",
    "d.update([('x', 1)])",
    "d |= {'x': {}}",
    "d.setdefault('new', []).append({})",
    "d['n']['deep'].setdefault('deeper', {}).update(x=5)",
    "d['steps'].append({'when': 'never'})",
    "d['steps'].extend([1, [2]])",
    "d['steps'].insert(1, {'a': []})",
    "d['steps'].remove({'when': 'later', 'tags': set()})",
    "d['steps'].pop()",
    "d['steps'].clear()",
    "d['steps'].reverse()",
    "d['steps'].sort(key=lambda step: step['when'])",
    "d['steps'][0:1] = [{}, {}]",
    "d['steps'][0] = d['steps'][1]",
    "del d['steps'][0:1]",
    "d['steps'] += [{'x': {1}}]",
    "d['steps'] *= 2",
    "heapq.heappush(d['queue'], 1)",
    "d['steps'][0]['tags'].add('z')",
    "d['steps'][0]['tags'].remove('a')",
    "d['steps'][0]['tags'].discard('a')",
    "d['steps'][0]['tags'].pop()",
    "d['steps'][0]['tags'].clear()",
    "d['steps'][0]['tags'].update('xy')",
    "d['steps'][0]['tags'] |= {'z'}",
    "d['steps'][0]['tags'] &= {'z'}",
    "d['steps'][0]['tags'] -= {'a'}",
    "d['steps'][0]['tags'] ^= {'a'}",
    "d['by'][1].append('eve')",
    "d['copy'] = d['steps']",
    "d['set'] = d['steps'][0]['tags'] | {'z'}",
    "d['n'] = {'was': d['n'], 'again': (d['n'], [d['by']])}",
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_draft_does_what_it_does_to_plain_containers(change: str) -> None:
    state = {"a": freeze(plan())}
    draft, expected = Draft(state), plan()
    for d in (draft["a"], expected):
        exec(change, {**NAMES, "d": d})

    assert draft["a"] == expected
    changes, _ = draft.changes()
    assert changes == {"a": expected}
    assert list(changes["a"]) == list(expected)
    assert state == {"a": plan()}


@pytest.mark.parametrize(
    "put",
    [
        "draft['log'] = log",
        "draft['a']['log'] = log",
        "draft['a'].update(log=log)",
        "draft['a'].setdefault('log', log)",
        "draft['a']['b'].append(log)",
        "draft['a']['b'][:] = [log]",
        "draft['a']['t'] = (1, log)",
    ],
)
def test_value_put_into_a_draft_can_be_changed_until_the_commit_and_not_after(put: str) -> None:
    draft = Draft({"a": freeze({"b": []})})
    log: list[Any] = []
    exec(put, {"draft": draft, "log": log})
    log.append({"n": 1})
    changes, _ = draft.changes()
    log[0]["n"] = 2
    assert "[{'n': 1}]" in repr(changes)


def test_alias_in_a_draft_is_one_object_until_the_commit() -> None:
    draft = Draft({"a": freeze({"x": []}), "b": 0})
    draft["b"] = draft["a"]
    draft["a"]["x"].append(1)
    assert draft["b"]["x"] is draft["a"]["x"]
    changes, _ = draft.changes()
    assert changes == {"a": {"x": [1]}, "b": {"x": [1]}}


@pytest.mark.parametrize(
    "double", ["items += items", "items *= 2", "items.extend(items)", "items[2:] = items"]
)
def test_list_that_is_doubled_holds_each_object_twice(double: str) -> None:
    draft = Draft({"a": freeze([[1], {2}])})
    exec(double, {"items": draft["a"]})
    draft["a"][0].append(3)
    assert draft["a"] == [[1, 3], {2}, [1, 3], {2}]
    assert draft["a"][0] is draft["a"][2]


def test_value_of_somebody_else_is_copied_when_it_is_committed() -> None:
    theirs = live({"x": [{}], "s": {1}})
    theirs["x"][0]["y"] = 1
    draft = Draft({})
    draft["a"] = theirs
    changes, _ = draft.changes()
    theirs["x"][0]["y"] = 2
    theirs["s"].add(2)
    theirs["x"].append(3)
    assert changes == {"a": {"x": [{"y": 1}], "s": {1}}}
    assert theirs == {"x": [{"y": 2}, 3], "s": {1, 2}}


def test_frozen_value_in_a_draft_is_copied_when_it_is_looked_at() -> None:
    state = {"a": freeze({"x": []})}
    draft = Draft(state)
    draft["b"] = state["a"]
    draft["b"]["x"].append(1)
    draft["c"] = {}
    draft["c"]["d"] = state["a"]
    draft["a"]["e"] = state["a"]
    draft["a"]["e"]["x"].append(2)
    changes, _ = draft.changes()
    assert state == {"a": {"x": []}}
    assert changes == {"a": {"x": [], "e": {"x": [2]}}, "b": {"x": [1]}, "c": {"d": {"x": []}}}


def test_cycle_made_in_a_draft_is_refused_with_its_path() -> None:
    draft = Draft({"a": freeze({"b": [{}]})})
    draft["a"]["b"][0]["top"] = draft["a"]
    with pytest.raises(ValueError, match=r"the value at a\.b\[0\]\.top contains itself"):
        draft.changes()


def test_nested_value_cannot_be_changed_after_the_commit() -> None:
    draft = Draft({"a": freeze(plan())})
    changed, looked_at, tags = draft["a"]["n"], draft["a"]["steps"], draft["a"]["steps"][0]["tags"]
    changed["deep"]["x"] = 1
    changes, _ = draft.changes()
    for change in (
        lambda: operator.setitem(changed, "y", 1),
        lambda: looked_at.append(1),
        lambda: tags.add(1),
    ):
        with pytest.raises(TypeError, match=r"read-only.*edit\(\)"):
            change()

    assert changed == changes["a"]["n"] == {"deep": {"deeper": {"x": 1}, "x": 1}}


def test_old_versions_are_not_kept_alive() -> None:
    import gc
    import weakref

    class Big:
        pass

    big = Big()
    gone = weakref.ref(big)
    state: dict[str, Any] = {"a": freeze({"big": big, "n": {"x": 0}, "l": [[]]})}
    del big
    for number in range(3):
        draft = Draft(state)
        draft["a"]["n"]["x"] = number
        draft["a"]["l"][0].append(number)
        draft["a"]["big"] = None
        changes, _ = draft.changes()
        state.update(changes)

    gc.collect()
    assert gone() is None


def test_tuples_that_hold_containers_are_compared_by_what_they_hold() -> None:
    inner = freeze([1])
    one, other = (freeze((0, inner)) for _ in range(2))
    assert one is not other
    assert same(one, other)
    assert not same(one, freeze((0, [1])))
    assert not same(one, freeze((0, inner, 1)))
    assert not same(1, 2)


# -- the draft itself


def test_draft_is_a_mutable_mapping() -> None:
    state = {"a": 1, "b": freeze([1]), "c": 3}
    draft = Draft(state)
    assert draft == {"a": 1, "b": [1], "c": 3}
    assert repr(draft) == "<draft of 3 keys>"
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
    assert "a" in draft
    assert "d" not in draft
    del draft["c"]
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
    assert state == {"a": 1, "b": [1], "c": 3}


def test_draft_takes_only_strings_as_keys() -> None:
    draft = Draft({})
    with pytest.raises(TypeError, match="a key of a ContextStore must be a str, got 5"):
        draft[5] = 1

    with pytest.raises(TypeError, match="must be a str, got None"):
        draft.setdefault(None, 1)

    with pytest.raises(KeyError):
        draft[5]


@pytest.mark.parametrize(
    "use",
    [
        "d['a']",
        "d['a'] = 1",
        "del d['a']",
        "'a' in d",
        "list(d)",
        "list(reversed(d))",
        "len(d)",
        "d.clear()",
        "d.update(a=1)",
        "d.get('a')",
    ],
)
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
    frozen = freeze(value)
    for _ in range(2):
        assert exact(live(frozen)) == exact(frozen) == before

    draft = Draft({"value": frozen})
    assert exact(draft["value"]) == before
    assert draft.changes() == ({}, set())

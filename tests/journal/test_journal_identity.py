"""What a journal knows an input by, and how outputs are written."""

import asyncio
import enum
import json
import logging
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from agents import make_loop
from asking import Asker, night, replayed, rows
from hypothesis import given
from hypothesis import strategies as st

from agentloop import AgentLoop, Invocation, in_thread
from agentloop.journal import Journal, JournalError
from agentloop.journal._identity import identify
from agentloop.journal._json import decode, encode


async def ask(x: Any, *, tone: str = "kind") -> Any:
    return x


async def tell(x: Any) -> Any:
    return x


def blocking(x: Any) -> Any:
    return x


class Model:
    async def __call__(self, x: Any) -> Any:
        return x

    async def ask(self, x: Any) -> Any:
        return x

    @classmethod
    async def of_class(cls, x: Any) -> Any:
        return x

    @staticmethod
    async def static(x: Any) -> Any:
        return x


class Smaller(Model):
    pass


class Tone(enum.StrEnum):
    KIND = "kind"


def of(fn: Any, *args: Any, key: Any = None, **kwargs: Any) -> Any:
    """Return the agent and the key of an invocation."""
    identity = identify(Invocation("a", fn, args, kwargs, key))
    return identity.agent, identity.key


# --- the agent


HERE = __name__


@pytest.mark.parametrize(
    ("fn", "agent"),
    [
        (ask, "ask"),
        (partial(ask, tone="rude"), "ask"),
        (in_thread(blocking), "blocking"),
        (partial(in_thread(partial(blocking)), 5), "blocking"),
        (Model.of_class, "Model.of_class"),
        (Smaller.of_class, "Smaller.of_class"),
        (Model.static, "Model.static"),
    ],
)
def test_agent_is_the_qualified_name_of_the_function_within(fn: Any, agent: str) -> None:
    assert of(fn)[0] == f"{HERE}.{agent}"


def test_agent_of_the_standard_library_has_its_module() -> None:
    assert of(asyncio.sleep, 1)[0] == "asyncio.tasks.sleep"
    assert of(json.loads, "1")[0] == "json.loads"
    assert of(print, "1")[0] == "builtins.print"


@pytest.mark.parametrize("fn", [Model(), Model().ask, partial(Model().ask, 1), in_thread([].append)])
def test_agent_that_is_bound_to_an_object_needs_a_key_and_is_named_after_its_class(fn: Any) -> None:
    with pytest.raises(TypeError, match=r"give this invocation a key, Invocation\('a', fn, args, key=\.\.\."):
        of(fn, 1)

    assert of(fn, 1, key="k")[1] == "k"
    assert of(Model(), key=1)[0] == f"{HERE}.Model"
    assert of(Smaller().ask, key=1)[0] == f"{HERE}.Smaller.ask"


SCRIPT = """
import sys
from agentloop import Invocation
from agentloop.journal._identity import identify

async def ask(x): ...

def main():
    print(identify(Invocation("a", ask)).agent)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("start", "agent"),
    [
        (["night.py"], "night.ask"),
        (["-m", "night"], "night.ask"),
        (["-c", "import night; night.main()"], "night.ask"),
        (["-m", "deep"], "deep.ask"),
        (["-c", SCRIPT], "__main__.ask"),
    ],
)
def test_agent_has_one_name_however_its_file_is_started(start: list[str], agent: str, tmp_path: Path) -> None:
    (tmp_path / "night.py").write_text(SCRIPT)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "__main__.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *start], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60
    )
    assert done.stdout == f"{agent}\n"


# --- the key


def test_equal_arguments_have_one_key_and_others_have_others() -> None:
    keys = [
        of(ask, {"a": 1, "b": [1.5, None, True]})[1],
        of(ask, 1)[1],
        of(ask, 1.0)[1],
        of(ask, True)[1],
        of(ask, "1")[1],
        of(ask, [1])[1],
        of(ask, 1, tone="rude")[1],
        of(ask, 1, "rude")[1],
        of(ask)[1],
    ]
    assert len({*keys}) == len(keys)
    assert of(ask, {"b": [1.5, None, True], "a": 1})[1] == keys[0]
    assert all(isinstance(key, bytes) and len(key) == 16 for key in keys)


def test_what_a_partial_binds_counts_as_arguments() -> None:
    assert of(partial(ask, 1, tone="rude"))[1] == of(ask, 1, tone="rude")[1]
    assert of(partial(ask, 1, tone="rude"), tone="kind")[1] == of(ask, 1, tone="kind")[1]


def test_argument_of_a_subclass_counts_as_its_base() -> None:
    assert of(ask, Tone.KIND)[1] == of(ask, "kind")[1]
    assert of(ask, (1, 2))[1] == of(ask, [1, 2])[1]


@pytest.mark.parametrize("argument", [{1: "a"}, {1, 2}, object(), float("nan"), b"x"], ids=type)
def test_argument_that_json_cannot_carry_needs_a_key(argument: Any) -> None:
    with pytest.raises(TypeError, match=r"^the arguments of 'a' cannot be hashed: JSON has no .*key=\.\.\."):
        of(ask, [argument])

    assert of(ask, argument, key=5)[1] == 5


def test_key_that_sqlite_cannot_hold_is_refused() -> None:
    assert of(ask, key=2**63 - 1)[1] == 2**63 - 1
    with pytest.raises(ValueError, match=r"^key must fit in 64 bits, got 9223372036854775808"):
        of(ask, key=2**63)

    with pytest.raises(ValueError, match=r"^key must be text that UTF-8 can encode"):
        of(ask, key="\ud83d")

    assert type(of(ask, key=Tone.KIND)[1]) is str


async def test_input_without_a_key_ends_the_batch_like_any_error_of_the_input(path: Path) -> None:
    loop = make_loop(max_concurrency=1)
    async with Journal(path) as journal:
        with pytest.raises(TypeError, match="give this invocation a key"):
            await loop.run_all(Invocation.map(ask, [1, {1, 2}, 3]), journal=journal)

        with pytest.raises(TypeError, match="give this invocation a key"):
            async with loop.as_completed(Invocation.map(ask, [1, {1, 2}]), journal=journal) as done:
                assert (await anext(done)).output == 1
                await anext(done)


async def test_two_functions_of_one_name_are_refused_without_keys(path: Path) -> None:
    def make(factor: int) -> Any:
        async def multiply(x: int) -> int:
            return factor * x

        return multiply

    loop = AgentLoop()
    async with Journal(path) as journal:
        await loop.run_all(Invocation.map(make(2), [1]), journal=journal)
        with pytest.raises(TypeError, match=r"^two functions are called .*make\.<locals>\.multiply"):
            await loop.run_all(Invocation.map(make(3), [1]), journal=journal)

        (result,) = await loop.run_all([Invocation("a", make(3), (1,), key=1)], journal=journal)
        assert result.output == 3
        # The same code without variables of its own is the same function.
        for x in range(2):
            await loop.run_all(Invocation.map(lambda x: ask(x), [x]), journal=journal)
        with pytest.raises(TypeError, match="two functions are called"):
            await loop.run_all(Invocation.map(lambda x: tell(x), [1]), journal=journal)


async def test_agent_that_may_be_renamed_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = AgentLoop()

    async def run(*agents: Any) -> list[str]:
        caplog.clear()
        async with Journal(path) as journal:
            for agent in agents:
                await loop.run_all(Invocation.map(agent, [1, 2]), journal=journal)

        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    assert await run(ask) == []
    assert await run(ask, tell) == []
    (message,) = await run(in_thread(blocking), partial(tell))
    assert message == (
        f"the journal has results of {HERE}.ask and none of {HERE}.blocking: if that is its new name, all of "
        "it runs again"
    )


# --- outputs


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
ANYTHING = st.recursive(
    JSON
    | st.floats()
    | st.binary(max_size=4)
    | st.text(st.characters(categories=["Cs", "L"]), max_size=4)
    | st.just(Tone.KIND)
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(st.integers(), max_size=3)
        | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, with all types in them."""
    if type(one) is not type(other):
        return False

    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)

    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))

    return bool(one == other)


@pytest.mark.long
@given(JSON)
def test_json_comes_back_the_same(value: Any) -> None:
    assert same(decode(encode(value)), value)


@pytest.mark.long
@given(ANYTHING)
def test_what_would_not_come_back_the_same_is_refused(value: Any) -> None:
    try:
        text = encode(value)
    except (TypeError, ValueError):
        return

    text.encode()
    assert same(decode(text), value)


def test_half_a_surrogate_pair_is_carried_and_two_halves_are_not() -> None:
    assert decode(encode("a\ud83d")) == "a\ud83d"
    with pytest.raises(ValueError, match=r"^JSON has no text of surrogate pairs$"):
        encode("\ud83d\ude00")


def test_text_is_written_so_that_people_can_read_it() -> None:
    assert encode({"größe": "日本"}) == '{"größe":"日本"}'


@attrs.frozen
class Answer:
    text: str


async def answer(x: Any) -> Any:
    return Answer(str(x)) if x != "odd" else {1, 2}


def make_text(output: Any) -> str:
    return str(output.text)


@pytest.mark.parametrize("as_bytes", [False, True])
async def test_outputs_can_be_objects_with_an_encoder_of_their_own(as_bytes: bool, path: Path) -> None:
    def make(output: Any) -> str | bytes:
        return output.text.encode() if as_bytes else output.text

    def read(data: Any) -> Answer:
        return Answer(data.decode() if as_bytes else data)

    answers = [Answer("a"), Answer("ü\0")]
    for places in ([], [0, 1]):
        async with Journal(path, encode=make, decode=read) as journal:
            results = await AgentLoop().run_all(Invocation.map(answer, ["a", "ü\0"]), journal=journal)
            assert [result.output for result in results] == answers
            assert replayed(results) == places
            assert [entry.output async for entry in journal.entries()] == answers


async def test_first_output_that_cannot_be_written_stops_the_batch_and_is_in_the_error(path: Path) -> None:
    with pytest.raises(JournalError) as caught:
        await night(path, Invocation.map(answer, "abc"), make_loop(max_concurrency=1))

    assert str(caught.value) == (
        "the output of 'answer-0' cannot be put into the journal: JSON has no Answer; pass "
        "Journal(encode=..., decode=...)"
    )
    assert [result.output for result in caught.value.unwritten] == [Answer("a")]
    assert rows(path) == []


async def test_later_output_that_cannot_be_written_is_an_error_of_its_input(path: Path) -> None:
    loop, inputs = make_loop(max_concurrency=1), Invocation.map(answer, ["a", "odd", "b"])
    results = await night(path, inputs, loop, encode=make_text, decode=Answer)
    assert [result.status for result in results] == ["success", "error", "success"]
    assert results[1].output is None
    assert "the output of 'answer-1' cannot be put into the journal: 'set' object has no" in str(
        results[1].error
    )
    assert loop.metrics.snapshot().failures == 1
    assert rows(path, "status") == ["success", "error", "success"]


@pytest.mark.parametrize("raised", [ValueError("boom"), asyncio.CancelledError()], ids=["error", "cancelled"])
async def test_decoder_that_does_not_fit_is_found_at_once(raised: BaseException, path: Path) -> None:
    def fail(data: Any) -> Any:
        raise raised

    with pytest.raises(JournalError, match="cannot be put into the journal"):
        await night(path, Invocation.map(answer, "a"), encode=make_text, decode=fail)


async def test_decoder_that_has_changed_is_an_error_that_names_the_result(path: Path) -> None:
    await night(path, Invocation.map(answer, "ab"), encode=make_text, decode=Answer)
    message = re.escape(f"night.db: result 1, of {HERE}.answer, cannot be decoded: JSONDecodeError")
    async with Journal(path) as journal:
        with pytest.raises(JournalError, match=message):
            await AgentLoop().run_all(Invocation.map(answer, "ab"), journal=journal)

        with pytest.raises(JournalError, match=message):
            await anext(aiter(journal.entries()))


async def test_encoder_that_is_async_after_all_is_refused(path: Path) -> None:
    with pytest.raises(JournalError, match="encode must return str or bytes, got <coroutine"):
        await night(path, Invocation.map(answer, "a"), encode=lambda output: ask(output), decode=str)


@pytest.mark.parametrize("where", ["encode", "decode", "replay"])
def test_keyboard_interrupt_in_an_encoder_propagates(where: str, path: Path) -> None:
    armed = where != "replay"

    def make(output: Any) -> str:
        if where == "encode":
            raise KeyboardInterrupt

        return "x"

    def read(data: Any) -> Any:
        if armed:
            raise KeyboardInterrupt

        return data

    def main() -> None:
        anyio.run(partial(night, path, Invocation.map(answer, "a"), encode=make, decode=read))

    if not armed:
        main()
        armed = True

    with pytest.raises(KeyboardInterrupt):
        main()


async def test_name_with_half_a_surrogate_pair_is_written(path: Path) -> None:
    (result,) = await night(path, [Invocation("a\ud83d", Asker().ask, (1,))])
    assert result.agent_id == "a\ud83d"
    assert rows(path, "agent_id") == ["a?"]

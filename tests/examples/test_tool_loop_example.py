"""The example of an agent with tools, run as a user runs it; and its parts on a clock that jumps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import anyio
import examples_run
import httpx2
import pytest
import tool_loop
from model_server import serve_model
from tool_loop_tools import PEOPLE, ROOMS, TOOLS, describe

from agentloop import AgentLoop, ContextStore, LoopConfig, StreamChunk, StreamEvent
from agentloop.testing import Chunks, FakeAgent, FakeHTTPError

pytestmark = pytest.mark.long

every_run = pytest.mark.parametrize(("backend", "concurrency"), [("asyncio", "1"), ("trio", "4")])


@cache
def output(backend: str, concurrency: str) -> str:
    return examples_run.output("tool_loop", "--backend", backend, "--concurrency", concurrency)


@every_run
def test_case_is_solved_and_told_line_by_line(backend: str, concurrency: str) -> None:
    out = output(backend, concurrency)
    told = re.findall(r"^  +\d+\.\d s  (\S+) +(.*)$", out, re.MULTILINE)
    said = [text for event, text in told if event in ("thinking", "text")]
    assert said == [
        "I need to know more about kitchen.",
        "I need to know more about library and garden and cellar.",
        "I need to know more about Pia and Otto.",
        f"I have no more questions. {PEOPLE['Otto']}",
    ]
    calls = [text for event, text in told if event == "tool_call"]
    assert calls == [*(f"search({room})" for room in ROOMS), "question(Pia)", "question(Otto)"]
    found = [text for event, text in told if event == "tool_result"]
    clues = [*filter(None, ROOMS.values()), *PEOPLE.values()]
    assert sorted(found) == sorted([*clues, "failed: PermissionError: the cellar is locked"])
    assert told[-1] == ("complete", "in 4 turns")


@every_run
def test_every_clue_is_on_the_board_and_nothing_is_left(backend: str, concurrency: str) -> None:
    out = output(backend, concurrency)
    board = out.partition("On the board\n")[2].partition("\n\n")[0].splitlines()
    clues = {**ROOMS, **PEOPLE}
    assert {tuple(line.split(maxsplit=1)) for line in board} == {pair for pair in clues.items() if pair[1]}
    retries = out.count("  (retry)  ")
    assert retries > 1
    assert out.endswith(
        f"\n11 invocations, {retries} retries, <AgentLoop 0 running, 0 waiting, limit {concurrency}>\n"
    )
    assert out.isascii()
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "curio"], "argument --backend: invalid choice: 'curio'"),
        (["--concurrency", "0"], "argument --concurrency: must be a whole number above 0, got '0'"),
    ],
)
def test_wrong_argument_is_refused(arguments: list[str], message: str) -> None:
    done = examples_run.run("tool_loop", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err


# --- the agent itself, with a model that follows a script


def call(name: str, argument: str) -> StreamChunk:
    key = TOOLS[name][1]
    data = {"id": f"call_{argument}", "name": name, "arguments": f'{{"{key}": "{argument}"}}'}
    return StreamChunk(StreamEvent.TOOL_CALL, data)


@pytest.mark.parametrize(("concurrency", "seconds"), [(4, 0.2), (1, 0.6)])
async def test_tools_of_a_turn_run_at_once_as_far_as_there_are_slots(
    concurrency: int, seconds: float
) -> None:
    searches = [call("search", room) for room in ("kitchen", "library", "garden")]
    model = FakeAgent(Chunks(searches), Chunks([StreamChunk(StreamEvent.TEXT, "Otto.")]))
    board = ContextStore({"clues": {}, "rings": 0})
    start = anyio.current_time()
    async with (
        AgentLoop(LoopConfig(max_concurrency=concurrency)) as loop,
        loop.run_streaming("agent", tool_loop.detective, loop, model, board, "Who?") as stream,
    ):
        events = [chunk.event.value async for chunk in stream]

    assert anyio.current_time() - start == pytest.approx(seconds)
    turn = ["step_start", *["tool_call"] * 3, *["tool_result"] * 3]
    assert events == [*turn, "step_start", "text", "complete"]
    assert {*await board.get("clues")} == {"kitchen", "library", "garden"}
    messages: list[Mapping[str, Any]] = model.calls[1].args[0]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "tool"]
    asked = [call["id"] for call in messages[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in messages[2:]] == asked


async def test_model_that_never_comes_to_an_end_is_stopped() -> None:
    model = FakeAgent(FakeHTTPError(500), Chunks([call("search", "kitchen")]))
    loop = AgentLoop()
    with pytest.raises(RuntimeError, match="the case was not solved in 10 turns"):
        async with (
            loop,
            loop.run_streaming(
                "agent", tool_loop.detective, loop, model, ContextStore({"clues": {}}), "Who?"
            ) as stream,
        ):
            async for _ in stream:
                pass

    assert len(model.calls) == 11


# --- the model server's part in it


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_server_asks_for_tools_in_whatever_order_a_client_writes_their_fields(backend: str) -> None:
    async def main() -> None:
        async with (
            serve_model() as server,
            httpx2.AsyncClient(base_url=server.base_url, timeout=5, trust_env=False, verify=False) as client,
        ):
            tools = [describe("search")]
            messages: list[dict[str, Any]] = [{"role": "user", "content": "Look into the KITCHEN, please"}]

            async def complete(**fields: Any) -> httpx2.Response:
                body = {"model": "demo", "messages": messages, **fields}
                return await client.post("chat/completions", json=body)

            (choice,) = (await complete(tools=tools)).json()["choices"]
            message = choice["message"]
            assert (choice["finish_reason"], message["content"]) == ("tool_calls", None)
            (asked,) = message["tool_calls"]
            assert asked["function"] == {"name": "search", "arguments": '{"room": "kitchen"}'}
            asked["function"] = dict(sorted(asked["function"].items()))
            messages += [message, {"role": "tool", "tool_call_id": asked["id"], "content": "It is clean."}]
            (choice,) = (await complete(tools=tools)).json()["choices"]
            assert choice["finish_reason"] == "stop"
            assert choice["message"]["content"] == "I have no more questions. It is clean."

            # Where nothing that a tool takes was mentioned, and without tools, it answers as ever.
            messages[:] = [{"role": "user", "content": "What is 17 * 23?"}]
            for fields in {"tools": tools}, {"tools": []}, {"tools": None}, {}:
                (choice,) = (await complete(**fields)).json()["choices"]
                assert choice["message"]["content"] == "17 * 23 is 391."

            for wrong in 3, "tools", [3], [{}], [{"function": {"parameters": 3, "name": ""}}]:
                assert (await complete(tools=wrong)).status_code == 400

    anyio.run(main, backend=backend)

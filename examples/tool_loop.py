"""
A detective: an agent that thinks, calls tools, reads what they found, and thinks again, until it knows.

``python examples/tool_loop.py`` needs nothing else: it starts a model server of its own, which refuses some
requests. The detective is an async generator function, and streams what it does. Each turn of its model is a
stream inside that stream; the tools that a turn asks for run at the same time, and pin what they find to a
board that all share. One loop runs all three and retries each by itself: whoever waits for others lends them
its slot, so that even ``--concurrency 1`` is enough.
"""

import json
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import httpx2
from model_server import Faults, serve_model
from telling import Parser, status_of, whole
from tool_loop_screen import Screen
from tool_loop_tools import TOOLS, describe

from agentloop import (
    AgentLoop,
    Backoff,
    ContextStore,
    Invocation,
    LoopConfig,
    StreamChunk,
    StreamEvent,
    Verdict,
    VerdictKind,
    classify,
)

QUESTION = "Who ate the last piece of cake? Start in the kitchen."
MAX_TURNS = 10
FAULTS = Faults(rate_limited=0.2, server_error=0.2, retry_after_seconds=0.1, gap_seconds=0.03)
SEED = 3

Messages = list[dict[str, object]]
Think = Callable[[Messages], AsyncIterator[StreamChunk]]


async def ask(model: httpx2.AsyncClient, messages: Messages) -> AsyncIterator[StreamChunk]:
    """One turn of the model: its thoughts and words as they come, and in the end the tools that it wants."""
    body = {
        "model": "demo",
        "messages": messages,
        "tools": [describe(name) for name in TOOLS],
        "stream": True,
    }
    calls: dict[int, dict[str, str]] = {}
    async with model.sse("chat/completions", method="POST", json=body) as events:
        events.response.raise_for_status()
        async for event in events:
            if event.data == "[DONE]":  # nothing comes after it
                continue

            completion: Any = event.json()
            delta = completion["choices"][0]["delta"]
            if thought := delta.get("reasoning_content"):
                yield StreamChunk(StreamEvent.THINKING, thought)

            if text := delta.get("content"):
                yield StreamChunk(StreamEvent.TEXT, text)

            for part in delta.get("tool_calls") or ():  # a call may come in pieces
                call = calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
                call["id"] += part.get("id") or ""
                call["name"] += part["function"].get("name") or ""
                call["arguments"] += part["function"].get("arguments") or ""

    for call in calls.values():
        yield StreamChunk(StreamEvent.TOOL_CALL, call)


async def use(board: ContextStore, call: dict[str, str]) -> str:
    """Call a tool as the model asked for it."""
    tool, parameter, _ = TOOLS[call["name"]]
    return await tool(board, json.loads(call["arguments"])[parameter])


async def detective(
    loop: AgentLoop, think: Think, board: ContextStore, case: str
) -> AsyncIterator[StreamChunk]:
    """The agent: let the model think and the tools work, in turns, until the model asks for no more tools."""
    messages: Messages = [{"role": "user", "content": case}]
    for turn in range(1, MAX_TURNS + 1):
        yield StreamChunk(StreamEvent.STEP_START, turn)
        calls: list[dict[str, str]] = []
        async with loop.run_streaming("model", think, messages) as thoughts:
            async for chunk in thoughts:
                yield chunk
                if chunk.event is StreamEvent.TOOL_CALL:
                    calls.append(chunk.data)

        if not calls:
            yield StreamChunk(StreamEvent.COMPLETE, turn)
            return

        asked = [
            {
                "id": call["id"],
                "type": "function",
                "function": {name: call[name] for name in ("name", "arguments")},
            }
            for call in calls
        ]
        messages.append({"role": "assistant", "content": None, "tool_calls": asked})
        found = [""] * len(calls)
        work = [Invocation(call["name"], use, (board, call)) for call in calls]
        async with loop.as_completed(work) as results:
            async for result in results:
                # A tool that failed for good is no end of the story: the model is told, and goes on.
                text = str(result.output) if result.success else f"failed: {result.error}"
                found[result.index] = text
                data = {"id": calls[result.index]["id"], "found": text}
                yield StreamChunk(StreamEvent.TOOL_RESULT, data)

        for call, text in zip(calls, found, strict=True):
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})

    raise RuntimeError(f"the case was not solved in {MAX_TURNS} turns")


def judge(exc: Exception) -> Verdict:
    """To knock at a locked door again is of no use; all else is judged as usual."""
    return Verdict(VerdictKind.PERMANENT) if isinstance(exc, PermissionError) else classify(exc)


async def main(concurrency: int) -> bool:
    screen = Screen()
    board = ContextStore({"clues": {}, "rings": 0})
    loop = AgentLoop(
        LoopConfig(
            max_concurrency=concurrency,
            timeout_seconds=30,
            backoff=Backoff(initial_seconds=0.1),
            classify=judge,
        ),
        on_event=screen.retry,
    )
    async with (
        serve_model(FAULTS, seed=SEED) as server,
        httpx2.AsyncClient(base_url=server.base_url, timeout=None, trust_env=False) as model,
        loop,
        loop.run_streaming("detective", detective, loop, partial(ask, model), board, QUESTION) as stream,
    ):
        print(QUESTION)
        async for chunk in stream:
            screen.chunk(chunk)

    print("\nOn the board")
    for source, clue in (await board.get("clues")).items():
        print(f"  {source:12} {clue}")

    metrics = loop.metrics.snapshot()
    print(f"\n{sum(metrics.counts.values())} invocations, {metrics.retries} retries, {loop}")
    return stream.result.success


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--concurrency", type=whole, default=4, help="how many at once (default: 4)")
    options = parser.read()
    sys.exit(status_of(main, options.concurrency, backend=options.backend))

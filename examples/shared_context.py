"""
A team of agents plans, writes and reviews a handbook over one ContextStore, with a watcher.

``python examples/shared_context.py`` needs nothing else: it starts a model server of its own, which is slow,
refuses some requests and fails others. The agents never talk to each other. Each waits until the store says
that there is something for it to do, claims it in one step, so that nobody else does it too, and asks the
model with no lock held.
"""

import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
import httpx2
from model_server import Faults, serve_model
from telling import Parser, status_of

from agentloop import AgentLoop, Backoff, ContextStore, Invocation, InvocationResult, LoopConfig

FAULTS = Faults(rate_limited=0.1, server_error=0.1, delay_seconds=0.05, retry_after_seconds=0.02)
CONFIG = LoopConfig(
    max_concurrency=10, timeout_seconds=30, max_retries=8, backoff=Backoff(initial_seconds=0.02)
)
TOPICS = ("openings", "patience", "losing well", "endgames", "clocks", "castling", "snacks", "rematches")
MARKS = {"todo": ".", "writing": "w", "written": "?", "reviewing": "r", "done": "#"}

Ask = Callable[[str], Awaitable[str]]


async def plan(store: ContextStore, ask: Ask) -> None:
    """Decide on the chapters, all at once: nobody sees half a plan."""
    advice = await ask("Plan a handbook on chess for otters")
    chapters: dict[str, dict[str, Any]] = {
        topic: {"state": "todo", "drafts": 0, "hands": []} for topic in TOPICS
    }
    await store.update({"advice": advice, "chapters": chapters})


async def write(store: ContextStore, ask: Ask, me: str) -> None:
    while topic := await claim(store, me, "todo", "writing"):
        text = await ask(f"Write about otters and {topic}")
        async with store.edit() as draft:
            chapter = draft["chapters"][topic]
            chapter.update(state="written", text=text, drafts=chapter["drafts"] + 1)


async def review(store: ContextStore, ask: Ask, me: str) -> None:
    while topic := await claim(store, me, "written", "reviewing"):
        await ask(f"Review the chapter on {topic}")
        async with store.edit() as draft:
            chapter = draft["chapters"][topic]
            # This reviewer likes short titles, and gives in at the second draft.
            is_good = len(topic) < 9 or chapter["drafts"] > 1
            chapter["state"] = "done" if is_good else "todo"


async def claim(store: ContextStore, me: str, state: str, doing: str) -> str | None:
    """Wait for a chapter in this state and take it; return ``None`` when all are done."""

    def is_my_turn(now: Mapping[str, Any]) -> bool:
        states = {chapter["state"] for chapter in now["chapters"].values()}
        return state in states or states == {"done"}

    while True:
        await store.wait_for(is_my_turn)
        async with store.edit() as draft:
            # Between the wait and the lock somebody else may have been faster.
            for topic, chapter in draft["chapters"].items():
                if chapter["state"] == state:
                    chapter["state"] = doing
                    chapter["hands"].append(me)
                    return str(topic)

            if is_my_turn(draft):
                return None


async def show_progress(store: ContextStore) -> None:
    """Print how far they are, a few times a second: what came in between is skipped, and the end is not."""
    shown = ""
    async with store.watch("chapters") as values:
        async for chapters in values:
            marks = "".join(MARKS[chapter["state"]] for chapter in chapters.values())
            if marks != shown:
                shown = marks
                print(f"  {marks}  {marks.count('#')} of {len(TOPICS)} done", flush=True)

            if marks == "#" * len(TOPICS):
                return

            await anyio.sleep(0.1)


async def main() -> bool:
    store = ContextStore({"chapters": {}})
    loop = AgentLoop(CONFIG)
    results: list[InvocationResult[None]] = []
    async with (
        serve_model(FAULTS, seed=7) as server,
        httpx2.AsyncClient(base_url=server.base_url, timeout=None, trust_env=False) as client,
        anyio.create_task_group() as group,
    ):

        async def call(prompt: str) -> str:
            body = {"model": "demo", "messages": [{"role": "user", "content": prompt}]}
            response = await client.post("chat/completions", json=body)
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"])

        async def ask(prompt: str) -> str:
            # An invocation inside an invocation: it is lent the agent's slot, and retried by itself.
            return (await loop.run_single("model", call, prompt)).unwrap()

        legend = ", ".join(f"{mark} {state}" for state, mark in MARKS.items())
        print(f"Eight chapters, three writers, two reviewers\n  {legend}", flush=True)
        group.start_soon(show_progress, store)
        team = [
            Invocation("planner", plan, (store, ask)),
            *(Invocation(name, write, (store, ask, name)) for name in ("Ann", "Bob", "Cho")),
            *(Invocation(name, review, (store, ask, name)) for name in ("Rae", "Sam")),
        ]
        results = await loop.run_all(team)

    state = await store.snapshot()
    print("\nWho did what")
    for topic, chapter in state["chapters"].items():
        print(f"  {topic:12} {' > '.join(chapter['hands'])}")

    drafts = Counter(chapter["drafts"] for chapter in state["chapters"].values())
    text = await store.to_json()
    again = ContextStore.from_json(text)
    failed = sum(count for status, count in server.statuses.items() if status != 200)
    print(f"\n{drafts[1]} chapters took one draft, {drafts[2]} took two")
    print(f"{server.requests} requests, of which {failed} failed and were sent again")
    print(f"{store}, saved in {len(text)} bytes and restored")
    return all(result.success for result in results) and await again.snapshot() == state


if __name__ == "__main__":
    sys.exit(status_of(main, backend=Parser(__doc__).read().backend))

"""
Pydantic AI agents that run other agents on the same loop, which neither deadlocks nor exceeds the limit.

Install ``agentloop-anyio[clients,examples]``; in a checkout, ``pip install -e ".[clients,examples]"``. Then::

    python examples/pydantic_ai_agents.py

runs three editors on a loop with a limit of two. An editor is an agent whose model calls a tool, and the tool
runs three writers on the loop that the editor runs on. By then the editors hold every slot: they lend them to
their writers while they wait. The editors' model is a script; that of the writers is asked over HTTP, at a
server of its own or, if ``OPENAI_MODEL`` is set, as in ``openai_batch.py``. Pydantic AI needs asyncio.
"""

import sys

import attrs
import pydantic_ai
from openai_batch import MODEL, connect
from pydantic_ai import Agent, ModelMessage, ModelResponse, RunContext, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from telling import Parser, status_of, tell_result, tell_retry

from agentloop import AgentLoop, Backoff, Invocation, LoopConfig

LIMIT = 2
SUBJECTS = ("boats", "tides", "gulls")
CONFIG = LoopConfig(
    max_concurrency=LIMIT, timeout_seconds=60 if MODEL else 2, backoff=Backoff(initial_seconds=0.05)
)


@attrs.define
class Office:
    """What the agents share: the loop that runs all of them, and who writes."""

    loop: AgentLoop
    writer: Agent[None, str]
    writing: int = 0
    most_writing: int = 0

    async def write(self, prompt: str) -> str:
        self.writing += 1
        self.most_writing = max(self.most_writing, self.writing)
        try:
            return (await self.writer.run(prompt)).output
        finally:
            self.writing -= 1

    async def edit(self, subject: str) -> str:
        return (await editor.run(subject, deps=self)).output


async def play_editor(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """The editors' model, as a script: call the tool, then sum up what it returned."""
    del info
    part = messages[-1].parts[-1]
    if isinstance(part, ToolReturnPart):
        return ModelResponse([TextPart(part.model_response_str())])

    return ModelResponse([ToolCallPart("assign", {"subject": str(getattr(part, "content", ""))})])


editor = Agent(FunctionModel(play_editor), deps_type=Office)


@editor.tool
async def assign(context: RunContext[Office], subject: str) -> str:
    """Have three writers write about a subject at the same time."""
    office = context.deps
    prompts = [f"{task} about {subject}" for task in ("A fact", "A joke", "A rumour")]
    results = await office.loop.run_all(Invocation.map(office.write, prompts, subject))
    texts = [result.output for result in results if result.output]
    return f"{len(texts)} of {len(results)} parts, {sum(len(text.split()) for text in texts)} words"


async def run() -> bool:
    pydantic_ai.BANNER_ENABLED = False  # which a terminal would show in the middle
    loop = AgentLoop(CONFIG, on_event=tell_retry)
    async with connect() as client:
        model = OpenAIChatModel(MODEL or "demo", provider=OpenAIProvider(openai_client=client))
        office = Office(loop, Agent(model))
        print(
            f"{len(SUBJECTS)} editors with 3 writers each, who ask {model.model_name} at {client.base_url}\n"
        )
        editors = loop.with_config(timeout_seconds=None)  # the writers' time-outs and retries are enough
        results = await editors.run_all(Invocation.map(office.edit, SUBJECTS, str))

    print("\nOne result for each editor")
    for result in results:
        tell_result(result, result.output or "")

    count = loop.metrics.snapshot().latency.count
    print(
        f"\n{count} invocations with a limit of {LIMIT}; at most {office.most_writing} wrote at the same time"
    )
    return any(result.success for result in results)


def main() -> int:
    parser = Parser(__doc__, "OPENAI_MODEL, OPENAI_API_KEY and OPENAI_BASE_URL, to ask a real model")
    found = parser.read()
    if found.backend != "asyncio":
        parser.error("Pydantic AI needs asyncio")

    return status_of(run)


if __name__ == "__main__":
    sys.exit(main())

"""
Ask a model every question of a file, and go on where it was when something stops it.

Install ``agentloop-anyio[examples]``; in a checkout, ``pip install -e ".[examples]"``. Then::

    python examples/evaluate.py [QUESTIONS.jsonl] [--out answers.jsonl] [--fresh] [--backend trio]

reads lines such as ``{"question": "What is 17 * 23?"}``, or makes some up, and writes the answers in
the same order. Stop it by Ctrl-C or ``kill -9``, and start it again: what was answered is in a journal beside
the answers, and only the rest is asked, what failed included. Change a question, and it is asked; change the
model or the instruction, and the journal is refused, until ``--fresh`` begins anew.

It talks to a server of its own that limits rates, fails and hangs. If ``OPENAI_MODEL`` is set, it talks to a
real one: to OpenAI, with ``OPENAI_API_KEY``, or to any that speaks alike at ``OPENAI_BASE_URL``.
"""

import argparse
import json
import os
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from model_server import Faults, serve_model
from telling import Parser, status_of

from agentloop import (
    AgentLoop,
    Backoff,
    Invocation,
    InvocationResult,
    LoopConfig,
    Status,
    current_attempt,
    drain_on_signals,
)
from agentloop.contrib.progress import progress
from agentloop.journal import Journal, JournalError

MODEL = os.environ.get("OPENAI_MODEL")
INSTRUCTION = "Answer in one sentence."
FAULTS = Faults(rate_limited=0.05, server_error=0.05, hang=0.02, delay_seconds=0.1)
CONFIG = LoopConfig(
    max_concurrency=10, timeout_seconds=60 if MODEL else 2, backoff=Backoff(initial_seconds=0.05)
)
Answer = dict[str, Any]  # what JSON can carry needs no encoder


async def evaluate(client: httpx2.AsyncClient, questions: Sequence[str], path: Path) -> bool:
    """Ask what the journal does not have, write all answers, and return whether none is missing."""

    async def ask(question: str) -> Answer:
        """The agent. The journal knows its calls by its name and the question."""
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]
        response = await client.post(
            "chat/completions",
            json={"model": MODEL or "demo", "messages": messages},
            # The same after a kill, so that a provider that knows such keys does not do it twice.
            headers={"Idempotency-Key": current_attempt().idempotency_key},
        )
        response.raise_for_status()
        reply = response.json()
        return {"text": reply["choices"][0]["message"]["content"], "tokens": reply["usage"]["total_tokens"]}

    loop = AgentLoop(CONFIG)
    version = {"model": MODEL or "demo", "instruction": INSTRUCTION}
    # The first Ctrl-C lets what runs finish, and a second one cancels it. The journal has what has finished.
    async with drain_on_signals(loop):
        print(f"questions for {MODEL or 'demo'}: {len(questions)}", flush=True)
        async with Journal(journal_of(path), version=version) as journal, progress(loop, len(questions)):
            results = await loop.run_all(Invocation.map(ask, questions, "q"), journal=journal)

        write(path, questions, results)
        return tell(path, results)


def write(path: Path, questions: Sequence[str], results: Sequence[InvocationResult[Answer]]) -> None:
    """Write a line for each question that was answered or has failed, in their order, all at once."""
    lines = [
        {"question": question, **(result.output or {"error": result.error})}
        for question, result in zip(questions, results, strict=True)
        if result.status is not Status.SKIPPED
    ]
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    new.replace(path)


def tell(path: Path, results: Sequence[InvocationResult[Answer]]) -> bool:
    """Print how many questions were answered, before and now, and what that cost."""
    tokens = {True: 0, False: 0}
    counts = {True: 0, False: 0}
    for result in results:
        if result.output:
            counts[result.replayed] += 1
            tokens[result.replayed] += result.output["tokens"]

    missing = len(results) - sum(counts.values())
    print(f"{len(results) - missing} of {len(results)} questions are answered in {path}")
    print(f"  {counts[True]:>5,} before, for {tokens[True]:,} tokens, and not asked again")
    print(f"  {counts[False]:>5,} now, for {tokens[False]:,} tokens")
    if missing:
        print(f"  {missing:>5,} missing: start again to ask them")

    return not missing


def journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")


def read(path: str | None) -> list[str]:
    """Return the questions of a file, or made-up ones."""
    if path is None:
        return [f"What is {left} * {right}?" for left in range(11, 23) for right in range(11, 21)]

    try:
        with open(path, encoding="utf-8-sig") as file:
            return [str(json.loads(line)["question"]) for line in file if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        sys.exit(f'error: {path} must have lines like {{"question": "..."}}: {type(exc).__name__}: {exc}')


@asynccontextmanager
async def connect() -> AsyncGenerator[httpx2.AsyncClient]:
    """Give a client of a real server or of one of our own, without time-outs: the loop has those."""
    if MODEL:
        url = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
        headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY')}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=None) as client:
            yield client
    else:
        async with (
            serve_model(FAULTS, seed=7) as server,
            httpx2.AsyncClient(base_url=server.base_url, timeout=None, trust_env=False) as client,
        ):
            yield client


async def run(found: argparse.Namespace) -> bool:
    out = Path(found.out)
    if found.fresh:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{journal_of(out)}{suffix}").unlink(missing_ok=True)

    questions = read(found.questions)
    try:
        async with connect() as client:
            return await evaluate(client, questions, out)
    except JournalError as exc:
        sys.exit(f"error: {exc}")


def main() -> int:
    parser = Parser(__doc__, "OPENAI_MODEL, OPENAI_API_KEY and OPENAI_BASE_URL, to ask a real model")
    parser.add_argument("questions", nargs="?", help='a file of lines like {"question": "..."}')
    parser.add_argument("--out", default="answers.jsonl", help="where the answers go (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget what was answered before")
    found = parser.read()
    return status_of(run, found, backend=found.backend)


if __name__ == "__main__":
    sys.exit(main())

"""
How many of the package's own frames an invocation passes through.

``python tests/tools/frames.py`` prints them function by function, for each backend.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import anyio
import attrs
from anyio.lowlevel import checkpoint

import agentloop
from agentloop import AgentLoop, Invocation, LoopConfig

PACKAGE = str(Path(agentloop.__file__).parent)
CONCURRENCY = 100
# Large enough that all workers have been hired in both runs, so that the difference is only invocations.
FEW, MANY = 500, 1000
# What is called less often, in a tenth of the invocations say, is no part of the usual way.
OFTEN = 0.5


@attrs.frozen
class Frames:
    """Calls and resumptions of functions for each invocation, by where the functions stand."""

    each: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.each.values())

    @property
    def modules(self) -> set[str]:
        return {name.partition("::")[0] for name, count in self.each.items() if count > OFTEN}

    def __str__(self) -> str:
        lines = [f"{count:6.2f}  {name}" for name, count in self.each.items() if count >= 0.01]
        return "\n".join([*lines, f"{self.total:6.2f}  in all, in {len(self.modules)} modules"])


def is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE)


def where(code: CodeType) -> str:
    return f"{code.co_filename.removeprefix(PACKAGE).lstrip('/')}::{code.co_qualname}"


def count(run: Callable[[], object]) -> Counter[str]:
    """
    Count calls and resumptions of our functions.

    The interpreter reports both as a call, on 3.11 as on later versions.
    """
    counts: Counter[CodeType] = Counter()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and is_ours(frame.f_code):
            counts[frame.f_code] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)

    named: Counter[str] = Counter()
    for code, number in counts.items():
        named[where(code)] += number

    return named


def frames_each(main: Callable[[int], Any], backend: str) -> Frames:
    """
    Return the frames of one invocation: what one more of them adds to a run.

    :param main: an async function that runs as many invocations as it is told
    """

    def run(number: int) -> Counter[str]:
        return count(lambda: anyio.run(main, number, backend=backend))

    run(FEW)  # what is looked up once is known from here on
    few, many = run(FEW), run(MANY)
    return Frames({name: (many[name] - few[name]) / (MANY - FEW) for name in many if many[name] != few[name]})


async def agent(_: object = None) -> None:
    await checkpoint()


async def run_batch(number: int) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=CONCURRENCY))
    await loop.run_all(Invocation.map(agent, range(number)))


async def run_singles(number: int) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=CONCURRENCY))
    for _ in range(number):
        await loop.run_single("agent", agent)


def under_a_chunk(backend: str) -> list[str]:
    """Return our frames below an agent that is about to yield a chunk, the innermost one first."""
    found: list[str] = []

    async def write() -> AsyncIterator[int]:
        for number in range(3):
            # Not in the step that has called the agent, but in one that resumes it.
            await checkpoint()
            frame: FrameType | None = sys._getframe()
            found.clear()
            while frame is not None:
                if is_ours(frame.f_code):
                    found.append(where(frame.f_code))

                frame = frame.f_back

            yield number

    async def main() -> None:
        async with AgentLoop().run_streaming("writer", write) as stream:
            async for _ in stream:
                pass

    anyio.run(main, backend=backend)
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for backend in ("asyncio", "trio"):
        print(f"== run_all, {backend}\n{frames_each(run_batch, backend)}")
        print(f"== run_single, {backend}\n{frames_each(run_singles, backend)}")
        print(f"== under a chunk, {backend}", *under_a_chunk(backend), sep="\n        ")


if __name__ == "__main__":
    main()

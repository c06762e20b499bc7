"""Agents that worker processes import."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any, NoReturn

import anyio
from opentelemetry import trace

from agentloop import current_attempt


async def square(x: int) -> list[int]:
    await anyio.sleep(0.001)
    return [x * x, os.getpid()]


def process() -> int:
    return os.getpid()


async def nap(seconds: float = 0) -> None:
    await anyio.sleep(seconds)


async def hold(path: str) -> None:
    """Never end, and write to a file when this is cancelled."""
    Path(path).write_text("begun")
    try:
        await anyio.sleep_forever()
    finally:
        Path(path).write_text("cancelled")


class BrokenActor:
    def __init__(self, *_: object) -> None:
        raise LookupError("No such backend: curio")


async def fail(error: Exception) -> NoReturn:
    raise error


class Rude(Exception):
    """Cannot be unpickled, as the errors of many an SDK."""

    def __init__(self, text: str, *, status: int, headers: dict[str, str]) -> None:
        super().__init__(text)
        self.status_code = status
        self.headers = headers


async def fail_rudely() -> NoReturn:
    raise Rude("slow down", status=429, headers={"retry-after": "7"})


async def quit_with(status: int) -> NoReturn:
    raise SystemExit(status)


async def cancel_itself() -> NoReturn:
    raise asyncio.CancelledError


async def return_lock() -> Any:
    return threading.Lock()


async def leave_scope_open() -> None:
    anyio.CancelScope().__enter__()


async def tell_attempt() -> tuple[str, int, list[str], str]:
    attempt = current_attempt()
    if attempt.number == 1:
        raise Rude("once more", status=500, headers={})

    return (
        attempt.agent_id,
        attempt.number,
        [type(one).__name__ for one in attempt.failures],
        attempt.idempotency_key,
    )


async def tell_span() -> int:
    return trace.get_current_span().get_span_context().span_id


async def note_and_die(path: str, name: str, fatal: str) -> str:
    """Note the call, and end the process if the name is the fatal one."""
    with open(path, "a") as file:
        file.write(f"{name}\n")

    await anyio.sleep(0.05)
    if name == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

    return name

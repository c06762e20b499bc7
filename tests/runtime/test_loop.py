"""The twins for asyncio and trio."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import anyio
import anyio.lowlevel
import pytest

from agentloop._eventloop.loop import describe, kind_of_loop


async def test_native_cancellations_are_forgotten_and_cancel_nothing_afterwards(
    anyio_backend_name: str,
) -> None:
    kind = kind_of_loop()
    pending = kind.count_cancellations()
    if anyio_backend_name == "asyncio":
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        task.cancel()
        assert pending() == 2

    await kind.forget_cancellations()
    await anyio.sleep(0)
    assert pending() == 0


async def test_use_of_the_insides_of_anyio_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe() == "by the insides of AnyIO and trio"
    backend = anyio.lowlevel.current_token().backend_class
    monkeypatch.setattr(backend, "create_cancel_scope", lambda **_: nullcontext())
    assert describe() == "by public calls alone, which is slower"

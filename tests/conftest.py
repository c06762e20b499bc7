"""Both backends on virtual clocks, and nothing left behind after any test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from agentloop import _limiter
from agentloop.testing import virtual_clock


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return virtual_clock(request.param)


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_limiter.Pool]]:
    """Every pool of slots that the test made, each of which has to be idle when it ends."""
    made: list[_limiter.Pool] = []
    init = _limiter.Pool.__init__

    def remember(pool: _limiter.Pool, *args: Any, **kwargs: Any) -> None:
        init(pool, *args, **kwargs)
        made.append(pool)

    monkeypatch.setattr(_limiter.Pool, "__init__", remember)
    yield made
    for pool in made:
        assert pool.running == 0, "a slot was not given back"
        assert pool.waiting == 0, "somebody still waits for a slot or a retry"
        assert not pool.on_raise, "a batch still listens to its limiter"

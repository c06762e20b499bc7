"""What is known of AnyIO's insides means the same as what AnyIO tells."""

from __future__ import annotations

import math
from collections.abc import Coroutine, Generator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel

from agentloop import AgentLoop
from agentloop._eventloop.backend import make_is_cancelled, make_is_left_open


def tell() -> bool:
    return anyio.current_effective_deadline() == -math.inf


async def test_cancellation_is_seen_through_all_scopes_up_to_a_shield() -> None:
    is_cancelled_around = make_is_cancelled(anyio.lowlevel.current_token().backend_class)
    with anyio.CancelScope() as outer, anyio.CancelScope() as middle, anyio.CancelScope() as inner:
        with anyio.CancelScope() as own:
            assert not is_cancelled_around(own)
            outer.cancel()
            assert is_cancelled_around(own) is tell() is True
            middle.shield = True
            assert is_cancelled_around(own) is tell() is False
            own.cancel()
            assert tell()
            assert not is_cancelled_around(own)
            inner.cancel()
            assert is_cancelled_around(own)


async def test_anyio_is_asked_each_time_where_its_insides_tell_something_else() -> None:
    class Backend:
        """Says that a task is cancelled which is not."""

        deadline = -math.inf
        create_cancel_scope = anyio.CancelScope

        @classmethod
        def current_effective_deadline(cls) -> float:
            return cls.deadline

    is_cancelled_around = make_is_cancelled(Backend)
    with anyio.CancelScope() as scope:
        assert is_cancelled_around(scope)
        Backend.deadline = math.inf
        assert not is_cancelled_around(scope)


async def test_anyio_is_asked_each_time_where_its_insides_have_other_names() -> None:
    class Backend:
        """Has scopes that show nothing."""

        deadline = -math.inf
        create_cancel_scope = nullcontext

        @classmethod
        def current_effective_deadline(cls) -> float:
            return cls.deadline

    with anyio.CancelScope() as outer:
        outer.cancel()
        is_cancelled_around = make_is_cancelled(Backend)
        Backend.deadline = math.inf
        assert not is_cancelled_around(None)


async def test_agent_may_return_a_coroutine_of_another_kind() -> None:
    class Compiled(Coroutine[Any, Any, int]):
        """A coroutine as compilers of Python make them."""

        def __init__(self) -> None:
            self._inner = self._run()

        async def _run(self) -> int:
            await anyio.sleep(1)
            return 42

        def __await__(self) -> Generator[Any, Any, int]:
            return self._inner.__await__()

        def send(self, value: Any) -> Any:
            return self._inner.send(value)

        def throw(self, *exc: Any) -> Any:
            return self._inner.throw(*exc)

        def close(self) -> None:
            self._inner.close()

    assert (await AgentLoop().run_single("a", Compiled)).output == 42


async def test_scope_that_was_left_open_is_seen_until_it_is_left() -> None:
    is_left_open = make_is_left_open(anyio.lowlevel.current_token().backend_class)
    with anyio.CancelScope() as own:
        assert not is_left_open(own)
        with anyio.CancelScope():
            assert is_left_open(own)

        assert not is_left_open(own)
        async with anyio.create_task_group():
            assert is_left_open(own)

        assert not is_left_open(own)


async def test_nothing_is_left_open_where_the_insides_of_anyio_have_other_names() -> None:
    class Hidden:
        create_cancel_scope = nullcontext

    class Other:
        """Its scopes never have another one in them."""

        @staticmethod
        def create_cancel_scope() -> Any:
            return nullcontext(
                SimpleNamespace(
                    _child_scopes=(),
                    _CancelScope__original=SimpleNamespace(_cancel_status=SimpleNamespace(_children=())),
                )
            )

    for backend in (Hidden, Other):
        assert not make_is_left_open(backend)(None)

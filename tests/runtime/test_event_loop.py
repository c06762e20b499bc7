"""What the library asks of an event loop, and what it knows of the insides of AnyIO and trio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Generator
from contextlib import nullcontext
from typing import Any, TypeAlias

import anyio
import pytest
from anyio.lowlevel import EventLoopToken, current_token

from agentloop import AgentLoop
from agentloop._eventloop.deadlines import DeadlineQueue
from agentloop._eventloop.insides import works_here
from agentloop._eventloop.loop import EventLoop, describe, kind_of_loop
from agentloop._eventloop.public import PublicScope


def make_loop(public: bool = False) -> EventLoop:
    return kind_of_loop()(current_token(), public)


def is_cancelled() -> bool:
    return anyio.current_effective_deadline() == -math.inf


# --- what a scope sees


inside_or_public = pytest.mark.parametrize("public", [False, True], ids=["insides", "public"])


@inside_or_public
async def test_scope_sees_cancellation_through_all_scopes_around_it_up_to_a_shield(public: bool) -> None:
    attempt = make_loop(public).attempt_scope()
    with anyio.CancelScope() as outer, anyio.CancelScope() as middle, anyio.CancelScope() as inner:
        assert attempt.begin(math.inf)
        outer.cancel()
        assert is_cancelled()
        assert not attempt.begin(math.inf)
        middle.shield = True
        assert attempt.begin(math.inf)
        assert not is_cancelled()
        attempt.cancel("its own is no reason not to begin the next one")
        assert is_cancelled()
        assert attempt.begin(math.inf)
        inner.cancel()
        assert not attempt.begin(math.inf)
        attempt.leave()

    assert not is_cancelled()


@inside_or_public
async def test_scope_sees_a_cancellation_from_outside_its_task_group(public: bool) -> None:
    async def child() -> None:
        attempt = make_loop(public).attempt_scope()
        assert attempt.begin(math.inf)
        outer.cancel()
        assert not attempt.begin(math.inf)
        attempt.leave()
        shielded = make_loop(public).attempt_scope()
        with anyio.CancelScope(shield=True):
            assert shielded.begin(math.inf)
            shielded.leave()

    with anyio.CancelScope() as outer:
        async with anyio.create_task_group() as group:
            group.start_soon(child)


async def test_scope_sees_what_is_open_in_it_until_that_is_left() -> None:
    attempt = make_loop().attempt_scope()
    attempt.begin(math.inf)
    assert not attempt.children
    with anyio.CancelScope():
        assert attempt.children
        with anyio.CancelScope():
            assert attempt.children

        assert attempt.children

    assert not attempt.children
    async with anyio.create_task_group():
        assert attempt.children

    assert not attempt.children
    anyio.CancelScope().__enter__().__exit__(None, None, None)
    assert not attempt.children
    attempt.leave()
    assert not attempt.children


@pytest.mark.parametrize("by", [None, "the agent", "others", "its time"])
async def test_public_scope_sees_what_is_open_in_it_when_it_cannot_be_left(by: str | None) -> None:
    seen: list[bool] = []

    async def task() -> None:
        attempt = make_loop(public=True).attempt_scope()
        attempt.begin(math.inf)
        own = attempt.scope
        left = anyio.CancelScope().__enter__()
        assert not attempt.children
        for scope, name in ((left, "the agent"), (group.cancel_scope, "others"), (own, "its time")):
            if name == by:
                scope.cancel()

        attempt.leave()
        attempt.leave()
        assert attempt.scope is own
        assert attempt.children
        seen.append(attempt.begin(math.inf))
        attempt.abandon(True)

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(task)
    except* RuntimeError:
        # AnyIO complains when the task ends.
        pass

    assert seen == [by != "others"]


async def test_queue_never_looks_at_a_public_scope() -> None:
    with pytest.raises(NotImplementedError):
        make_loop(public=True).attempt_scope().due(0)


# --- whether the insides of AnyIO are as expected


def scope_kind() -> Any:
    """Return the kind of scopes that AnyIO makes in the current event loop."""
    return type(anyio.CancelScope())


def nameless() -> Callable[..., Any]:
    """Make what has none of the names that scopes have."""
    return lambda **_: nullcontext()


def raising() -> Callable[..., Any]:
    def refuse(**_: Any) -> Any:
        raise NotImplementedError

    return refuse


def without_own_deadline() -> Callable[..., Any]:
    class Hiding(scope_kind()):
        """Does not show its deadline."""

        deadline = math.inf

    return Hiding


def without_cancellation() -> Callable[..., Any]:
    class Deaf(scope_kind()):
        """Is never cancelled."""

        def cancel(self, reason: str | None = None) -> None:
            pass

    return Deaf


@pytest.mark.parametrize("make", [nameless, raising, without_own_deadline, without_cancellation])
async def test_scopes_that_are_not_as_expected_are_used_by_public_calls(
    make: Callable[[], Callable[..., Any]],
) -> None:
    class Backend:
        create_cancel_scope = staticmethod(make())

    kind: Any = kind_of_loop()
    loop = kind(EventLoopToken(Backend, current_token().native_token))
    assert not works_here(kind.inside_scope, Backend.create_cancel_scope)
    assert not loop.looks_inside
    assert type(loop.attempt_scope()) is PublicScope
    assert loop.batch_deadlines() is None


# Ways for a scope to see something else than is the case.
Begin: TypeAlias = Callable[[float], bool]


def may_always_begin(begin: Begin, scope: Any, deadline: float) -> bool:
    begin(deadline)
    return True


def may_never_begin(begin: Begin, scope: Any, deadline: float) -> bool:
    begin(deadline)
    return False


def ignores_that_a_deadline_moves(begin: Begin, scope: Any, deadline: float) -> bool:
    return begin(deadline if scope.scope is None else scope.scope.deadline)


def sees_no_open_scopes(begin: Begin, scope: Any, deadline: float) -> bool:
    may_begin = begin(deadline)
    scope.children = ()
    return may_begin


def takes_itself_for_an_open_scope(begin: Begin, scope: Any, deadline: float) -> bool:
    may_begin = begin(deadline)
    scope.children = (scope.scope,)
    return may_begin


@pytest.mark.parametrize(
    "sees",
    [
        may_always_begin,
        may_never_begin,
        ignores_that_a_deadline_moves,
        sees_no_open_scopes,
        takes_itself_for_an_open_scope,
    ],
)
async def test_kind_of_scope_that_sees_something_else_does_not_work_here(sees: Any) -> None:
    kind, new_scope = kind_of_loop().inside_scope, current_token().backend_class.create_cancel_scope

    class Spoilt(kind):
        def begin(self, deadline: float) -> bool:
            return sees(super().begin, self, deadline)

    assert works_here(kind, new_scope)
    assert not works_here(Spoilt, new_scope)
    assert not is_cancelled()


async def test_kind_of_scope_works_also_where_the_task_is_cancelled() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        assert make_loop().looks_inside


@inside_or_public
async def test_asyncio_has_timers_and_trio_needs_a_task_for_each_batch(
    public: bool, anyio_backend_name: str
) -> None:
    loop = make_loop(public)
    on_trio = anyio_backend_name == "trio"
    assert isinstance(loop.loop_deadlines(), DeadlineQueue) is not on_trio
    assert (loop.batch_deadlines() is not None) is (on_trio and not public)


async def test_use_of_the_insides_of_anyio_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe() == "by the insides of AnyIO and trio"
    backend = current_token().backend_class
    monkeypatch.setattr(backend, "create_cancel_scope", lambda **_: nullcontext())
    assert describe() == "by public calls alone, which is slower"


# --- the event loop


async def test_task_that_could_be_lost_has_begun_once_tasks_were_let_begin() -> None:
    kind, begun = kind_of_loop(), anyio.Event()

    async def begin() -> None:
        begun.set()

    async with anyio.create_task_group() as group:
        group.start_soon(begin)
        assert await kind.let_tasks_begin() is None
        assert begun.is_set() is kind.loses_tasks


async def test_native_cancellation_that_comes_while_tasks_begin_is_left_to_the_caller(
    anyio_backend_name: str,
) -> None:
    kind = kind_of_loop()
    if anyio_backend_name == "asyncio":
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        assert isinstance(await kind.let_tasks_begin(), asyncio.CancelledError)
        task.uncancel()


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

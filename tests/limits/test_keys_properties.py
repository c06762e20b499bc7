"""Random programs under a keyed limiter, held against an account of who works under which key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import attrs
import pytest
from agents import backends, run_scheduled
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentloop import AgentLoop, DeadlockError, Invocation, KeyedLimiter, Limiter, LoopConfig, Rate, Status

KEYS = "abcd"


@attrs.frozen
class Node:
    """An invocation, and those that its agent runs."""

    key: str
    seconds: float
    children: tuple[Node, ...]
    together: bool
    gives_up_after: float | None


def instant(key: str, *children: Node) -> Node:
    """Return an invocation that takes no time, and runs others together."""
    return Node(key, 0.0, children, True, None)


def nodes(depth: int) -> st.SearchStrategy[Node]:
    children = st.tuples() if depth == 0 else st.lists(nodes(depth - 1), max_size=2).map(tuple)
    return st.builds(
        Node,
        st.sampled_from(KEYS),
        st.sampled_from([0.0, 1.0, 2.5]),
        children,
        st.booleans(),
        st.sampled_from([None, None, None, 0.7, 3.0]),
    )


class Account:
    def __init__(self, limits: dict[str, int], total: int | None) -> None:
        self.limits, self.total = limits, total
        self.working: Counter[str] = Counter()
        self.called: Counter[str] = Counter()

    @contextmanager
    def works(self, key: str) -> Iterator[None]:
        self.working[key] += 1
        try:
            assert self.working[key] <= self.limits[key], f"{self.working[key]} work under {key!r}"
            assert self.total is None or self.working.total() <= self.total, "more work than all keys may"
            yield
        finally:
            self.working[key] -= 1


async def run(
    roots: list[Node],
    limits: dict[str, int],
    total: int | None,
    rates: list[Rate],
    lazy: bool,
    cancel_at: float | None,
) -> None:
    account = Account(limits, total)
    limiter = KeyedLimiter(
        lambda invocation: invocation.args[0].key,
        lambda key: Limiter(limits[key], rates=rates),
        max_concurrency=total,
    )
    loop = AgentLoop(LoopConfig(timeout_seconds=None, max_retries=0), limiter=limiter)

    async def agent(node: Node) -> None:
        with account.works(node.key):
            await anyio.sleep(node.seconds)

        with anyio.move_on_after(node.gives_up_after):
            jobs = [Invocation(f"{node.key}/child", agent, (child,)) for child in node.children]
            if node.together:
                results = await loop.run_all(jobs)
            else:
                results = [await loop.run_single(job.agent_id, job.fn, *job.args) for job in jobs]

            for result in results:
                check(result)

        with account.works(node.key):
            await anyio.sleep(node.seconds)

    def check(result: Any) -> None:
        error = result.exception
        if isinstance(error, AssertionError):
            raise error

        assert result.success or isinstance(error, DeadlockError) or result.status is Status.CANCELLED

    jobs = [Invocation(f"root {number}", agent, (node,)) for number, node in enumerate(roots)]
    with anyio.move_on_after(cancel_at) as scope:
        # Far longer than all of them take one after the other.
        with anyio.fail_after(1000):
            results = await loop.run_all(iter(jobs) if lazy else jobs)

    if not scope.cancelled_caught:
        assert [result.agent_id for result in results] == [job.agent_id for job in jobs]
        for result in results:
            check(result)

    now = limiter.statistics()
    assert (now.running, now.waiting) == (0, 0), "something was not given back"
    assert not account.working.total()


@pytest.mark.long
@backends
@settings(max_examples=150)
@given(
    st.lists(nodes(2), min_size=1, max_size=12),
    st.fixed_dictionaries({key: st.integers(1, 3) for key in KEYS}),
    st.one_of(st.none(), st.integers(1, 5)),
    st.sampled_from([[], [Rate(1, per_seconds=1)]]),
    st.booleans(),
    st.sampled_from([None, None, 0.5, 2.0, 6.0]),
    st.integers(0, 5),
)
# The place of the outermost is lent when the innermost needs its slot.
@example(
    [instant("b", instant("a", instant("b")), instant("a"))],
    dict.fromkeys(KEYS, 1) | {"a": 2},
    1,
    [],
    False,
    None,
    0,
)
def test_no_key_and_not_all_of_them_exceed_their_limits_and_nothing_hangs(
    backend: str,
    roots: list[Node],
    limits: dict[str, int],
    total: int | None,
    rates: list[Rate],
    lazy: bool,
    cancel_at: float | None,
    seed: int,
) -> None:
    run_scheduled(backend, seed, run, roots, limits, total, rates, lazy, cancel_at)

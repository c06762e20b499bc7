"""Outages: signs of them in a row are an overload, and patience with it has an end."""

import math
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import attrs
import pytest
from agents import agent_for, into, nothing, run_stream
from trouble import ONCE, Starts, fail, overload, passed, refuse, watched

from agentloop import (
    AgentLoop,
    Backoff,
    BatchStopped,
    Event,
    Invocation,
    InvocationResult,
    Limiter,
    LoopConfig,
    RetryBudget,
    RetryEvent,
    Status,
    Verdict,
    VerdictKind,
)
from agentloop._provider.outage import Outage
from agentloop._provider.overload import AdaptiveLimit
from agentloop._provider.provider import Provider
from agentloop.testing import Chunks, Fail, FakeAgent, FakeHTTPError, Reply

AT_ONCE = Backoff(initial_seconds=0, jitter="none")
PATIENCE = 100.0
TRANSIENT = Verdict(VerdictKind.TRANSIENT)
PATIENT = LoopConfig(overload_timeout_seconds=PATIENCE)


# -- the rule, without an event loop


@pytest.mark.parametrize(("limit", "row"), [(1, 8), (8, 8), (9, 9), (50, 50)])
def test_as_many_failures_in_a_row_as_the_limit_or_eight_are_an_outage(limit: int, row: int) -> None:
    outage = Outage()
    outcomes = [outage.fail(limit, 100.0 + number) for number in range(row + 1)]
    assert outcomes == [False] * (row - 1) + [True] * 2
    assert outage.since == 100.0, "since the first of them"


def test_outage_lasts_until_the_first_success_whatever_becomes_of_the_limit() -> None:
    outage = Outage()
    for _ in range(8):
        outage.fail(8, 0.0)

    assert outage.fail(50, 1.0)
    outage.succeed()
    assert (outage.since, outage.listens) == (None, False)
    assert [outage.fail(8, 2.0) for _ in range(8)] == [False] * 7 + [True]


def test_success_begins_the_row_anew() -> None:
    outage = Outage()
    for _ in range(3):
        assert not any(outage.fail(8, 0.0) for _ in range(7))
        assert outage.listens
        outage.succeed()


def test_patience_is_measured_from_the_first_overload_since_a_success() -> None:
    outage = Outage()
    assert not outage.lasts(10.0, 1e9)
    outage.overload(100.0, False)
    outage.overload(105.0, False)
    assert [outage.lasts(10.0, now) for now in (109.9, 110.0)] == [False, True]
    assert not outage.lasts(None, 1e9)
    outage.succeed()
    assert not outage.lasts(10.0, 1e9)


def test_only_time_outs_are_known_as_such() -> None:
    outage = Outage()
    outage.overload(0.0, True)
    outage.overload(1.0, True)
    assert outage.timed_out
    outage.overload(2.0, False)
    outage.overload(3.0, True)
    assert not outage.timed_out
    outage.succeed()
    outage.overload(4.0, True)
    assert outage.timed_out


@pytest.mark.parametrize(("seconds", "lasts"), [(59.9, True), (60.0, False)])
def test_break_of_a_minute_begins_patience_anew(seconds: float, lasts: bool) -> None:
    outage = Outage()
    outage.overload(0.0, False)
    outage.use(50.0)
    outage.begin(50.0 + seconds)
    assert outage.lasts(100.0, 200.0) == lasts


# -- when it is one


async def time_out() -> None:
    await anyio.sleep(100)


async def wrap() -> None:
    try:
        await refuse()
    except OSError as exc:
        raise RuntimeError("the client failed") from exc


async def own_time_out() -> None:
    with anyio.fail_after(1):
        await anyio.sleep(2)


async def nested_time_out() -> None:
    loop = AgentLoop(LoopConfig(max_retries=0, timeout_seconds=1))
    (await loop.run_single("inner", time_out)).unwrap()


async def outage_after(loop: AgentLoop, agent: Callable[..., Any]) -> int | None:
    """Return after how many calls there is an outage, if there is one after some more than a dozen."""
    for count in range(1, 16):
        await loop.run_single("a", agent)
        if loop.limiter.statistics().outage_since is not None:
            return count

    return None


LOOK_UP_FAILS = socket.gaierror(-3, "Temporary failure in name resolution")


@pytest.mark.parametrize(
    "agent",
    [
        *(time_out, refuse, wrap, own_time_out, FakeAgent(LOOK_UP_FAILS)),
        *(FakeAgent(FakeHTTPError(status)) for status in (408, 500, 502)),
    ],
)
async def test_failures_that_speak_of_the_provider_are_an_outage(agent: Callable[..., Any]) -> None:
    loop, starts = watched(Limiter(12), LoopConfig(max_retries=0, timeout_seconds=5))
    assert await outage_after(loop, agent) == 12
    since = starts.began + {time_out: 5, own_time_out: 1}.get(agent, 0)
    assert loop.limiter.statistics().outage_since == since, "when the first of them failed"
    assert starts.told[-1].outage_since == since


@pytest.mark.parametrize(
    "agent",
    [fail, nothing, FakeAgent(FileExistsError), overload, FakeAgent(FakeHTTPError(400)), nested_time_out],
)
async def test_other_ends_are_none(agent: Callable[..., Any]) -> None:
    assert await outage_after(AgentLoop(ONCE, limiter=Limiter(1)), agent) is None


def test_call_that_began_before_the_failures_says_nothing_about_the_provider_since() -> None:
    provider = Provider(AdaptiveLimit(2))
    before = provider.limit.epoch
    kinds = []
    for second in range(9):
        kinds.append(provider.revise(TRANSIENT, ConnectionError(), False, float(second)).kind)
        # What had begun before the network was gone comes to its end meanwhile.
        provider.answered(before, float(second))

    assert kinds == [VerdictKind.TRANSIENT] * 7 + [VerdictKind.OVERLOAD] * 2
    provider.answered(provider.limit.epoch, 9.0)
    assert provider.revise(TRANSIENT, ConnectionError(), False, 10.0).kind is VerdictKind.TRANSIENT


async def test_other_failures_neither_count_nor_end_a_row() -> None:
    loop = AgentLoop(ONCE, limiter=Limiter(1))
    for agent in [refuse] * 7 + [fail, overload] * 5:
        await loop.run_single("a", agent)

    with anyio.move_on_after(1):
        await loop.run_single("a", anyio.sleep, 100)

    assert loop.limiter.statistics().outage_since is None
    await loop.run_single("a", refuse)
    assert loop.limiter.statistics().outage_since is not None


async def test_all_loops_and_batches_that_share_the_limiter_make_one_row() -> None:
    limiter = Limiter(4)
    loops = [AgentLoop(ONCE, limiter=limiter) for _ in range(2)]
    await loops[0].run_all([Invocation("a", refuse)] * 4)
    await loops[1].run_single("b", refuse)
    await loops[1].run_all([Invocation("a", refuse)] * 2)
    assert limiter.statistics().outage_since is None
    await loops[0].run_single("b", refuse)
    assert limiter.statistics().outage_since is not None


@pytest.mark.parametrize("chunks", [[], [1]])
async def test_stream_counts_unless_it_has_yielded(chunks: list[int]) -> None:
    loop = AgentLoop(ONCE, limiter=Limiter(1))
    for _ in range(8):
        await run_stream(loop, FakeAgent(Chunks(chunks, then=ConnectionResetError())))

    assert (loop.limiter.statistics().outage_since is None) == bool(chunks)


@pytest.mark.parametrize("how", ["success", "first chunk"])
async def test_first_success_ends_it_and_is_told(how: str) -> None:
    starts = Starts()
    kinds: list[VerdictKind] = []

    def note(event: Event) -> None:
        if isinstance(event, RetryEvent):
            kinds.append(event.verdict.kind)

    config = LoopConfig(max_retries=1, backoff=AT_ONCE)
    loop = AgentLoop(config, limiter=Limiter(4), on_event=[starts, note])
    with anyio.move_on_after(5):
        await loop.run_all([Invocation("a", refuse)] * 4)

    assert kinds[:4] == [VerdictKind.TRANSIENT] * 4
    assert {*kinds[4:]} == {VerdictKind.OVERLOAD}
    assert starts.told[-1].outage_since == starts.began
    if how == "success":
        await loop.run_single("a", nothing)
    else:
        await run_stream(loop, FakeAgent(Chunks([1], then=ConnectionResetError())))

    assert loop.limiter.statistics().outage_since is None
    assert starts.told[-1].outage_since is None
    kinds.clear()
    assert (await loop.run_single("a", refuse)).retries == 1
    assert kinds == [VerdictKind.TRANSIENT]


async def test_what_the_server_asked_for_in_an_outage_holds_the_others_too() -> None:
    loop, starts = watched(Limiter(4))
    assert await outage_after(loop, refuse) == 8
    await anyio.sleep(10)
    await loop.run_single("told", FakeAgent(FakeHTTPError(500, 100)))
    began = passed(starts.began)
    await loop.run_single("a", fail)
    assert starts.by_name["a"][8:] == [began + 5]


async def test_without_adaptation_there_is_no_outage() -> None:
    loop = AgentLoop(LoopConfig(max_retries=1, backoff=AT_ONCE), limiter=Limiter(1, adaptive=False))
    results = await loop.run_all([Invocation("a", refuse)] * 50)
    assert [result.retries for result in results] == [1] * 50
    now = loop.limiter.statistics()
    assert (now.limit, now.outage_since, now.probing) == (1, None, False)


# -- what becomes of retries


async def in_outage(config: LoopConfig, limiter: Limiter) -> AgentLoop:
    loop = AgentLoop(config, limiter=limiter)
    await AgentLoop(ONCE, limiter=limiter).run_all([Invocation("before", refuse)] * 8)
    assert limiter.statistics().outage_since is not None
    return loop


async def test_retries_of_an_outage_count_neither_as_retries_nor_for_a_retry_budget() -> None:
    budget = RetryBudget(ratio=0, min_per_second=0.1, window_seconds=20)
    loop = await in_outage(LoopConfig(max_retries=1, backoff=AT_ONCE), Limiter(4, retry_budget=budget))
    agent = FakeAgent(*[Fail(ConnectionRefusedError)] * 5, Fail(LookupError), Reply())
    result = await loop.run_single("a", agent)
    assert (result.success, result.retries) == (True, 6)
    assert [(await loop.run_single("a", fail)).retries for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "agent", "status"),
    [
        ({"max_retries": 0}, refuse, Status.ERROR),
        ({"retry_on_timeout": False, "timeout_seconds": 5.0}, time_out, Status.TIMEOUT),
        ({"classify": lambda _: Verdict(VerdictKind.PERMANENT)}, refuse, Status.ERROR),
    ],
    ids=["no retries", "no retries of time-outs", "permanent"],
)
async def test_final_failures_stay_final_in_an_outage_and_those_not_worth_a_retry_are_none(
    changes: dict[str, Any], agent: Callable[[], Any], status: Status
) -> None:
    config = LoopConfig(**changes)
    if "max_retries" not in changes:
        assert await outage_after(AgentLoop(config, limiter=Limiter(4)), agent) is None

    loop = await in_outage(config, Limiter(4))
    results = [await loop.run_single("a", agent), *await loop.run_all([Invocation("a", agent)] * 3)]
    assert [(result.status, result.retries) for result in results] == [(status, 0)] * 4


# -- patience


def patient(limit: int, **changes: Any) -> AgentLoop:
    """Make a loop with patience whose agents may take as long as they like."""
    return AgentLoop(attrs.evolve(PATIENT, timeout_seconds=None, **changes), limiter=Limiter(limit))


def notes(result: InvocationResult[Any]) -> str:
    return " ".join(getattr(result.exception, "__notes__", ()))


async def run_batch(
    loop: AgentLoop, agent: Callable[..., Any], count: int = 30, *args: object
) -> tuple[float, list[Any]]:
    """Return in how many seconds a batch has ended, and its results."""
    begin = anyio.current_time()
    results = await loop.run_all([Invocation("a", agent, args)] * count)
    return passed(begin), results


HINT = "LoopConfig(overload_timeout_seconds=...) sets how long to wait for a provider"


@pytest.mark.parametrize(
    ("agent", "failed", "hint"),
    [
        (refuse, "ConnectionRefusedError: [Errno 111] Connection refused", HINT),
        (overload, "FakeHTTPError: HTTP 429", HINT),
        (time_out, "InvocationTimeout: Timeout after 5s", "is timeout_seconds=5 too short?"),
    ],
)
async def test_batch_stops_after_its_patience_and_says_why(
    agent: Callable[..., Any], failed: str, hint: str
) -> None:
    config = attrs.evolve(PATIENT, timeout_seconds=5)
    seconds, results = await run_batch(AgentLoop(config, limiter=Limiter(8)), agent)
    assert PATIENCE <= seconds <= 2 * PATIENCE
    status = Status.TIMEOUT if agent is time_out else Status.ERROR
    assert {result.status for result in results} == {status, Status.SKIPPED}
    stopped = results[-1].exception
    assert isinstance(stopped, BatchStopped)
    assert type(stopped.__cause__).__name__ == failed.partition(":")[0]
    assert stopped.reason == f"nothing has succeeded for 100s: 'a' failed with {failed}"
    assert (stopped.hint, str(stopped)) == (hint, f"the batch was stopped: {stopped.reason} ({hint})")


async def test_generators_and_readers_learn_of_the_stop_too() -> None:
    loop = AgentLoop(PATIENT, limiter=Limiter(8))
    with pytest.raises(BatchStopped, match="nothing has succeeded for 100s"):
        async with loop.as_completed(Invocation.map(refuse, iter(range(10_000)))) as results:
            async for result in results:
                assert not result.success


@pytest.mark.parametrize("agent", [refuse, overload])
async def test_single_invocation_gets_one_attempt_from_then_on(agent: Callable[..., Any]) -> None:
    loop = AgentLoop(PATIENT, limiter=Limiter(8))
    await run_batch(loop, agent)
    for _ in range(3):
        begin = anyio.current_time()
        result = await loop.run_single("b", agent)
        assert result.retries == 0
        assert notes(result) == (
            "not retried: the provider has let nothing succeed for longer than overload_timeout_seconds=100"
        )
        assert passed(begin) <= 30


async def test_single_invocation_that_meets_an_outage_first_is_retried_for_its_patience() -> None:
    loop = await in_outage(PATIENT, Limiter(4))
    begin = anyio.current_time()
    result = await loop.run_single("a", refuse)
    assert result.retries > 5
    assert PATIENCE / 2 <= passed(begin) <= 1.5 * PATIENCE


async def test_new_batch_gets_one_attempt_from_then_on() -> None:
    loop = AgentLoop(PATIENT, limiter=Limiter(8))
    await run_batch(loop, refuse)
    agent = FakeAgent(Fail(ConnectionRefusedError))
    seconds, results = await run_batch(loop, agent)
    assert len(agent.calls) == 1
    assert seconds <= 30
    assert [result.status for result in results].count(Status.SKIPPED) == 29


@pytest.mark.parametrize("how", ["single", "first input"])
async def test_success_ends_it(how: str) -> None:
    loop = AgentLoop(PATIENT, limiter=Limiter(8))
    await run_batch(loop, refuse)
    if how == "single":
        assert (await loop.run_single("b", nothing)).success

    agent = FakeAgent(*[Reply()] * (how != "single"), *[Fail(ConnectionRefusedError)] * 20, Reply())
    _, results = await run_batch(loop, agent)
    assert all(result.success for result in results)


async def test_two_batches_are_each_as_patient_as_their_configuration() -> None:
    limiter, outcomes = Limiter(8), list[Any]()
    async with anyio.create_task_group() as group:
        for patience in (100, 1000):
            loop = AgentLoop(LoopConfig(overload_timeout_seconds=patience), limiter=limiter)
            group.start_soon(into, outcomes, run_batch, loop, refuse)

    for patience, (seconds, results) in zip((100, 1000), outcomes, strict=True):
        assert patience <= seconds <= 2 * patience
        assert isinstance(results[-1].exception, BatchStopped)


@pytest.mark.long
async def test_patience_without_end_waits_for_ever() -> None:
    async def comes_back() -> None:
        if passed(begin) < 3e4:
            await refuse()

    begin = anyio.current_time()
    loop = AgentLoop(LoopConfig(overload_timeout_seconds=None), limiter=Limiter(8))
    seconds, results = await run_batch(loop, comes_back)
    assert all(result.success for result in results)
    assert 3e4 <= seconds <= 3e4 + 75


async def test_limiter_without_adaptation_has_no_patience_of_its_own() -> None:
    loop = AgentLoop(PATIENT, limiter=Limiter(8, adaptive=False))
    _, results = await run_batch(loop, overload)
    assert {result.status for result in results} == {Status.ERROR}
    assert all("overload_timeout_seconds=100.0 would pass" in notes(result) for result in results)


@pytest.mark.parametrize("how", ["batch ends", "batch is cancelled", "single", "slow input"])
@pytest.mark.parametrize("gap", [59, 61])
async def test_patience_begins_anew_after_a_break_of_a_minute(how: str, gap: float) -> None:
    limiter = Limiter(8)
    loop = AgentLoop(PATIENT, limiter=limiter)
    agent = FakeAgent(FakeHTTPError(429))
    if how == "slow input":

        async def slowly() -> AsyncIterator[Invocation[None]]:
            for seconds in (25, 25, gap):
                yield Invocation("a", overload)
                await anyio.sleep(seconds)

            while True:
                yield Invocation("a", agent)

        with pytest.raises(BatchStopped):
            await AgentLoop(attrs.evolve(PATIENT, max_retries=0), limiter=limiter).run_all(slowly())
    else:
        with anyio.move_on_after(math.inf if how == "batch ends" else 50):
            if how == "single":
                await loop.run_single("a", overload)
            else:
                patience = 50 if how == "batch ends" else PATIENCE
                await run_batch(
                    AgentLoop(LoopConfig(overload_timeout_seconds=patience), limiter=limiter), overload
                )

        await anyio.sleep(gap)
        await run_batch(loop, agent)

    first, last = agent.calls[0].started_at, agent.calls[-1].started_at
    assert (last - first >= PATIENCE / 2) == (gap > 60)


async def test_twenty_agents_that_take_longer_than_the_patience_are_not_stopped_by_one_rejection() -> None:
    slow = Reply(after_seconds=9 * PATIENCE)
    seconds, results = await run_batch(patient(20), FakeAgent(*[slow] * 4, FakeHTTPError(429), slow), 20)
    assert all(result.success for result in results)
    assert seconds <= 2 * 9 * PATIENCE


@pytest.mark.parametrize("slow", [Reply(after_seconds=500), Fail(LookupError, after_seconds=500)])
async def test_call_that_may_still_succeed_puts_the_stop_off(slow: Reply | Fail) -> None:
    loop, begin = patient(8, max_retries=1), anyio.current_time()

    async def comes_back() -> None:
        if passed(begin) <= 5.5 * PATIENCE:
            await overload()

    jobs = [Invocation("slow", FakeAgent(slow)), *[Invocation("a", comes_back)] * 300]
    results = await loop.run_all(jobs)
    skipped = [result.status for result in results].count(Status.SKIPPED)
    assert (skipped == 0) == isinstance(slow, Reply)
    if skipped:
        assert 5 * PATIENCE <= passed(begin) <= 6 * PATIENCE


# -- nested work


async def call_single(loop: AgentLoop, agent: Callable[..., Any]) -> None:
    (await loop.run_single("inner", agent)).unwrap()


async def call_all(loop: AgentLoop, agent: Callable[..., Any]) -> None:
    for result in await loop.run_all([Invocation("inner", agent)] * 3):
        result.unwrap()


async def call_stream(loop: AgentLoop, agent: Callable[..., Any]) -> None:
    _, error, _ = await run_stream(loop, agent_for("run_streaming", agent))
    if error is not None:
        raise error


async def call_and_hide(loop: AgentLoop, agent: Callable[..., Any]) -> None:
    result = await loop.run_single("inner", agent)
    if not result.success:
        raise LookupError("no answer")


@pytest.mark.parametrize("limit", [1, 2, 10])
@pytest.mark.parametrize("call", [call_single, call_all, call_stream, call_and_hide])
async def test_outer_agents_that_wait_do_not_put_the_stop_off(call: Callable[..., Any], limit: int) -> None:
    loop = patient(limit)
    seconds, results = await run_batch(loop, call, 30, loop, refuse)
    assert PATIENCE <= seconds <= 2 * PATIENCE
    assert isinstance(results[-1].exception, BatchStopped)


@pytest.mark.parametrize("limit", [1, 2, 10])
@pytest.mark.parametrize("call", [call_single, call_all, call_stream])
async def test_outer_agents_of_another_limiter_stop_later(call: Callable[..., Any], limit: int) -> None:
    outer = patient(limit)
    inner = AgentLoop(PATIENT, limiter=Limiter(limit))
    seconds, results = await run_batch(outer, call, 100, inner, refuse)
    # From when the inner one has none, each call is one attempt, half a minute after the one before.
    assert seconds <= 3 * PATIENCE + 30 * max(8, 2 * limit)
    assert isinstance(results[-1].exception, BatchStopped)


async def test_background_calls_of_agents_that_have_ended_do_not_put_the_stop_off() -> None:
    loop = AgentLoop(PATIENT, limiter=Limiter(10))

    async def agent() -> None:
        group.start_soon(loop.run_single, "inner", refuse)
        await anyio.sleep(1)
        await refuse()

    async with anyio.create_task_group() as group:
        seconds, results = await run_batch(loop, agent)
        assert isinstance(results[-1].exception, BatchStopped)
        assert PATIENCE <= seconds <= 2 * PATIENCE


@pytest.mark.parametrize("shared", [True, False], ids=["same limiter", "another limiter"])
async def test_nested_work_that_may_still_succeed_puts_the_stop_off(shared: bool) -> None:
    loop = patient(20)
    inner = loop if shared else AgentLoop(loop.config, limiter=Limiter(20))
    slow = FakeAgent(Reply(after_seconds=5 * PATIENCE))
    jobs = [
        *[Invocation("outer", call_single, (inner, slow))] * 9,
        Invocation("a", FakeAgent(FakeHTTPError(429), TypeError)),
        # When this one fails, nothing has succeeded for longer than the patience.
        Invocation("b", FakeAgent(Fail(FakeHTTPError(429), after_seconds=2 * PATIENCE), Reply())),
    ]
    results = await loop.run_all(jobs)
    assert [result.success for result in results] == [True] * 9 + [False, True]


@pytest.mark.parametrize("before", ["nested work", "background calls"])
async def test_agent_at_work_puts_the_stop_off_whatever_was_nested_before(before: str) -> None:
    loop = patient(20)
    seldom = Backoff(initial_seconds=3 * PATIENCE, max_seconds=3 * PATIENCE, jitter="none")
    background = AgentLoop(LoopConfig(backoff=seldom, overload_timeout_seconds=None), limiter=loop.limiter)

    async def nest() -> None:
        if before == "nested work":
            await loop.run_single("inner", nothing)
            await anyio.sleep(5 * PATIENCE)
        else:
            group.start_soon(background.run_single, "inner", FakeAgent(FakeHTTPError(429), Reply()))
            await anyio.sleep(0.5)

    jobs = [
        Invocation("slow", anyio.sleep, (5 * PATIENCE * (before != "nested work"),)),
        *[Invocation("outer", nest)] * 3,
        Invocation("a", FakeAgent(Fail(FakeHTTPError(429), after_seconds=1), TypeError)),
        Invocation("b", FakeAgent(Fail(FakeHTTPError(429), after_seconds=2 * PATIENCE), Reply())),
    ]
    async with anyio.create_task_group() as group:
        results = await loop.run_all(jobs)

    assert [result.success for result in results] == [True] * 4 + [False, True]

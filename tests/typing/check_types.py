# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""
What type checkers know about the public names. Nothing in here runs: mypy and pyright read it.

A line with an ``ignore`` is an error that both have to find: where one of them finds none, it reports the
comment as unused.
"""

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Mapping,
    MutableMapping,
)
from functools import partial
from typing import Any, assert_never, assert_type

from agentloop import (
    AgentLoop,
    AgentStream,
    Attempt,
    Backoff,
    ChunkEvent,
    ContextStore,
    Distribution,
    Event,
    Invocation,
    InvocationResult,
    Limiter,
    LoopConfig,
    LoopStatistics,
    MetricsRecorder,
    MetricsSnapshot,
    ResultEvent,
    Status,
    StreamChunk,
    StreamEvent,
    Verdict,
    VerdictKind,
    classify,
    collect_text,
    current_attempt,
    in_thread,
)
from agentloop.journal import Entry, Journal, JournalStatistics
from agentloop.testing import Chunks, Fail, FakeAgent, FakeHTTPError, Reply, Stall


class Animal: ...


class Cat(Animal): ...


async def count(text: str, *, upto: int = 10) -> int:
    raise NotImplementedError


async def spell(number: int) -> str:
    raise NotImplementedError


async def nothing() -> None: ...
async def adopt() -> Cat:
    raise NotImplementedError


def returns_awaitable(text: str) -> Awaitable[int]:
    raise NotImplementedError


def blocking(text: str) -> int:
    raise NotImplementedError


async def streaming(text: str) -> AsyncIterator[str]:
    yield text


class Agent:
    async def __call__(self, text: str) -> int:
        raise NotImplementedError

    async def ask(self, text: str) -> float:
        raise NotImplementedError


loop = AgentLoop()
agent = Agent()


# --- run_single


async def run_single_gives_a_result_of_what_the_agent_returns() -> None:
    assert_type(await loop.run_single("a", count, "text"), InvocationResult[int])
    assert_type(await loop.run_single("a", count, "text", upto=3), InvocationResult[int])
    assert_type(await loop.run_single("a", spell, 1), InvocationResult[str])
    assert_type(await loop.run_single("a", nothing), InvocationResult[None])
    assert_type(await loop.run_single("a", returns_awaitable, "text"), InvocationResult[int])
    assert_type(await loop.run_single("a", partial(count, upto=3), "text"), InvocationResult[int])
    assert_type(await loop.run_single("a", agent, "text"), InvocationResult[int])
    assert_type(await loop.run_single("a", agent.ask, "text"), InvocationResult[float])
    assert_type(await loop.run_single("a", lambda: count("text")), InvocationResult[int])
    assert_type(await loop.run_single("a", in_thread(blocking), "text"), InvocationResult[int])


async def run_single_wants_an_async_callable_and_its_arguments() -> None:
    await loop.run_single("a", count, 5)  # type: ignore[arg-type]  # has to be refused
    await loop.run_single("a", count)  # type: ignore[call-arg]  # has to be refused
    await loop.run_single("a", count, "text", 5)  # type: ignore[call-arg]  # has to be refused
    await loop.run_single("a", count, "text", up=5)  # type: ignore[call-arg]  # has to be refused
    await loop.run_single("a", agent, 5)  # type: ignore[arg-type]  # has to be refused
    await loop.run_single("a", in_thread(blocking), 5)  # type: ignore[arg-type]  # has to be refused
    await loop.run_single("a", in_thread(blocking))  # type: ignore[call-arg]  # has to be refused
    await loop.run_single(5, count, "text")  # type: ignore[arg-type]  # has to be refused
    await loop.run_single("a", blocking, "text")  # type: ignore[arg-type]  # has to be refused
    await loop.run_single("a", streaming, "text")  # type: ignore[arg-type]  # has to be refused
    await loop.run_single("a", 5)  # type: ignore[arg-type]  # has to be refused
    coroutine = count("text")
    await loop.run_single("a", coroutine)  # type: ignore[arg-type]  # has to be refused


async def journal_is_for_batches_of_any_output() -> None:
    async with Journal("night.db", version={"model": 1}, keep=(Status.SUCCESS,)) as journal:
        jobs = Invocation.map(count, "ab")
        assert_type(await loop.run_all(jobs, journal=journal), list[InvocationResult[int]])
        async with loop.as_completed(jobs, journal=journal) as results:
            async for result in results:
                assert_type(result, InvocationResult[int])
                assert_type(result.replayed, bool)

        assert_type(journal.statistics(), JournalStatistics)
        assert_type(await journal.metrics(), MetricsRecorder)
        async for entry in journal.entries(Status.ERROR):
            assert_type(entry, Entry)
            assert_type(entry.key, str | int)

    await loop.run_all(jobs, journal="night.db")  # type: ignore[arg-type]  # has to be refused
    await loop.run_single("a", count, "text", journal=journal)  # type: ignore[call-arg]  # has to be refused
    Journal("night.db", changed="ignore")  # type: ignore[arg-type]  # has to be refused
    Journal("night.db", encode=str)  # refused at run time, without decode=


async def blocking_function_in_a_thread_is_an_async_function() -> None:
    assert_type(await in_thread(blocking)("text"), int)
    assert_type(Invocation("a", in_thread(blocking), ("text",)), Invocation[int])
    assert_type(Invocation.map(in_thread(blocking), ["text"]), Iterator[Invocation[int]])
    assert_type(await loop.run_all(Invocation.map(in_thread(blocking), "ab")), list[InvocationResult[int]])
    await in_thread(blocking)(text=5)  # type: ignore[arg-type]  # has to be refused
    in_thread(5)  # type: ignore[arg-type]  # has to be refused
    loop.run_streaming("a", in_thread(blocking), "text")  # type: ignore[arg-type]  # has to be refused


def attempt_is_a_value() -> None:
    attempt = current_attempt()
    assert_type(attempt, Attempt)
    assert_type((attempt.agent_id, attempt.number), tuple[str, int])
    assert_type(attempt.failures, tuple[Exception, ...])
    assert_type(attempt.idempotency_key, str)
    attempt.number = 2  # type: ignore[misc]  # has to be refused


# --- invocations


def invocation_of_checks_the_arguments_of_its_agent() -> None:
    assert_type(Invocation.of("a", count, "text", upto=3), Invocation[int])
    assert_type(Invocation.of("a", agent, "text"), Invocation[int])
    assert_type(Invocation.of("a", in_thread(blocking), "text"), Invocation[int])
    assert_type(Invocation.of("a", streaming, "text"), Invocation[str])
    Invocation.of("a", count, 5)  # type: ignore[arg-type]  # has to be refused
    Invocation.of("a", count)  # type: ignore[call-arg]  # has to be refused
    Invocation.of("a", count, "text", up=5)  # type: ignore[call-arg]  # has to be refused
    Invocation.of("a", blocking, "text")  # type: ignore[arg-type]  # has to be refused
    Invocation.of(5, count, "text")  # type: ignore[arg-type]  # has to be refused


def invocation_carries_what_its_async_callable_returns(invocation: Invocation[int]) -> None:
    assert_type(Invocation("a", count), Invocation[int])
    assert_type(Invocation("a", count, ("text",), {"upto": 3}), Invocation[int])
    assert_type(Invocation("a", agent, ("text",)), Invocation[int])
    assert_type(Invocation("a", partial(count, "text")), Invocation[int])
    assert_type(Invocation("a", returns_awaitable), Invocation[int])
    assert_type(Invocation("a", count).fn, Callable[..., Awaitable[int] | AsyncIterable[int]])
    assert_type(Invocation("a", count).args, tuple[Any, ...])
    assert_type(Invocation("a", count, key=7).key, str | int | None)
    Invocation("a", blocking)  # type: ignore[arg-type]  # has to be refused
    Invocation(5, count)  # type: ignore[arg-type]  # has to be refused
    Invocation("a", count, 5)  # type: ignore[arg-type]  # has to be refused
    Invocation("a", count, key=1.5)  # type: ignore[arg-type]  # has to be refused
    invocation.agent_id = "b"  # type: ignore[misc]  # has to be refused


def invocation_is_covariant(cats: Invocation[Cat]) -> Invocation[Animal]:
    return cats


def invocation_is_not_contravariant(animals: Invocation[Animal]) -> Invocation[Cat]:
    return animals  # type: ignore[return-value]  # has to be refused


def numbers() -> Generator[int]:
    yield 1


async def slow_numbers() -> AsyncGenerator[int]:
    yield 1


def map_is_as_sync_as_its_items_which_the_agent_takes() -> None:
    assert_type(Invocation.map(spell, [1, 2]), Iterator[Invocation[str]])
    assert_type(Invocation.map(spell, numbers()), Iterator[Invocation[str]])
    assert_type(Invocation.map(count, "abc"), Iterator[Invocation[int]])
    assert_type(Invocation.map(count, ["a"], "q"), Iterator[Invocation[int]])
    assert_type(Invocation.map(spell, [1], agent_id="item {}".format), Iterator[Invocation[str]])
    assert_type(Invocation.map(agent, ["a"]), Iterator[Invocation[int]])
    assert_type(Invocation.map(count, ["a"], key=len), Iterator[Invocation[int]])
    assert_type(Invocation.map(spell, slow_numbers(), key=str), AsyncIterator[Invocation[str]])
    assert_type(Invocation.map(spell, slow_numbers()), AsyncIterator[Invocation[str]])
    assert_type(Invocation.map(spell, slow_numbers(), "q"), AsyncIterator[Invocation[str]])
    Invocation.map(spell, ["a"])  # type: ignore[arg-type]  # has to be refused
    Invocation.map(blocking, ["a"])  # type: ignore[arg-type]  # has to be refused
    Invocation.map(spell, 5)  # type: ignore[call-overload]  # has to be refused
    Invocation.map(count, ["a"], key="id")  # type: ignore[call-overload]  # has to be refused


# --- batches


async def run_all_gives_a_list_of_results_of_invocations_and_plain_tuples() -> None:
    jobs = [Invocation("a", count, ("text",))]
    assert_type(await loop.run_all(jobs), list[InvocationResult[int]])
    assert_type(await loop.run_all(tuple(jobs)), list[InvocationResult[int]])
    assert_type(await loop.run_all(iter(jobs)), list[InvocationResult[int]])
    assert_type(await loop.run_all(job for job in jobs), list[InvocationResult[int]])
    assert_type(await loop.run_all(Invocation.map(spell, [1])), list[InvocationResult[str]])
    assert_type(await loop.run_all(Invocation.map(spell, slow_numbers())), list[InvocationResult[str]])
    assert_type(await loop.run_all([("a", count, ("text",), {"upto": 3})]), list[InvocationResult[int]])
    assert_type(await loop.run_all([("a", count, ["text"], {})]), list[InvocationResult[int]])
    await loop.run_all(5)  # type: ignore[arg-type]  # has to be refused
    await loop.run_all(Invocation("a", count))  # type: ignore[arg-type]  # has to be refused
    await loop.run_all([count("text")])  # type: ignore[arg-type]  # has to be refused
    await loop.run_all([("a", count)])  # type: ignore[arg-type]  # has to be refused


async def run_all_of_different_agents_gives_results_of_either(
    one: Invocation[int], other: Invocation[str], mixed: list[Invocation[int] | Invocation[str]]
) -> None:
    wide: list[Invocation[int | str]] = [one, other]
    assert_type(await loop.run_all(wide), list[InvocationResult[int | str]])
    results: list[InvocationResult[int | str]] = await loop.run_all(mixed)
    assert_type(results[0].unwrap(), int | str)


async def as_completed_gives_results_one_by_one_in_async_with() -> None:
    jobs = [Invocation("a", count, ("text",))]
    async with loop.as_completed(jobs) as results:
        assert_type(results, AsyncIterator[InvocationResult[int]])
        async for result in results:
            assert_type(result, InvocationResult[int])
            assert_type(result.unwrap(), int)

    async with loop.as_completed(Invocation.map(spell, slow_numbers())) as spelled:
        assert_type([result.output async for result in spelled], list[str | None])

    async with loop.as_completed([("a", count, ("text",), {})]) as counted:
        assert_type(await anext(counted), InvocationResult[int])
    async for _ in loop.as_completed([Invocation("a", count)]):  # type: ignore[attr-defined]  # has to be refused
        pass


# --- streams


async def streaming_cats() -> AsyncGenerator[Cat]:
    yield Cat()


def returns_stream(number: int, *, upto: int = 1) -> AsyncIterator[float]:
    raise NotImplementedError


class Streamer:
    async def __call__(self, text: str) -> AsyncGenerator[int]:
        yield 1

    async def tell(self, text: str) -> AsyncIterator[bytes]:
        yield b""


streamer = Streamer()


async def run_streaming_gives_what_the_agent_yields() -> None:
    assert_type(loop.run_streaming("a", streaming, "text"), AgentStream[str])
    assert_type(loop.run_streaming("a", slow_numbers), AgentStream[int])
    assert_type(loop.run_streaming("a", returns_stream, 1, upto=2), AgentStream[float])
    assert_type(loop.run_streaming("a", partial(streaming, "text")), AgentStream[str])
    assert_type(loop.run_streaming("a", streamer, "text"), AgentStream[int])
    assert_type(loop.run_streaming("a", streamer.tell, "text"), AgentStream[bytes])
    assert_type(loop.run_streaming("a", lambda: streaming("text")), AgentStream[str])
    async with loop.run_streaming("a", streaming, "text") as stream:
        assert_type(stream, AgentStream[str])
        assert_type(await anext(stream), str)
        async for chunk in stream:
            assert_type(chunk, str)

    assert_type(stream.result, InvocationResult[None])
    assert_type(stream.result.chunks, int)
    assert_type(stream.result.first_chunk_ms, float | None)


async def run_streaming_wants_an_async_generator_function_and_its_arguments() -> None:
    loop.run_streaming("a", streaming, 5)  # type: ignore[arg-type]  # has to be refused
    loop.run_streaming("a", streaming)  # type: ignore[call-arg]  # has to be refused
    loop.run_streaming("a", streaming, "text", 5)  # type: ignore[call-arg]  # has to be refused
    loop.run_streaming("a", returns_stream, 1, up=5)  # type: ignore[call-arg]  # has to be refused
    loop.run_streaming(5, streaming, "text")  # type: ignore[arg-type]  # has to be refused
    loop.run_streaming("a", count, "text")  # type: ignore[arg-type]  # has to be refused
    loop.run_streaming("a", numbers)  # type: ignore[arg-type]  # has to be refused
    loop.run_streaming("a", blocking, "text")  # type: ignore[arg-type]  # has to be refused
    loop.run_streaming("a", streaming("text"))  # type: ignore[arg-type]  # has to be refused
    loop.run_streaming("a", 5)  # type: ignore[arg-type]  # has to be refused


async def stream_is_no_coroutine_and_its_result_cannot_be_set(stream: AgentStream[int]) -> None:
    await loop.run_streaming("a", slow_numbers)  # type: ignore[misc]  # has to be refused
    stream.result = stream.result  # type: ignore[misc]  # has to be refused


async def agent_stream_is_an_async_iterable(stream: AgentStream[Cat]) -> AsyncIterable[Animal]:
    return stream


async def stream_all_gives_events_of_two_kinds() -> None:
    async with loop.stream_all([("a", streaming, ("text",), {})]) as events:
        assert_type(events, AsyncIterator[ChunkEvent[str] | ResultEvent])
        async for event in events:
            match event:
                case ChunkEvent(invocation, chunk, index):
                    assert_type(invocation, Invocation[Any])
                    assert_type(chunk, str)
                    assert_type(index, int)
                case ResultEvent(invocation, result):
                    assert_type(invocation, Invocation[Any])
                    assert_type(result, InvocationResult[Any])
                case _:
                    assert_never(event)

    async with loop.stream_all(Invocation.map(streaming, ["a"])) as mapped:
        assert_type(mapped, AsyncIterator[ChunkEvent[str] | ResultEvent])

    async with loop.stream_all([Invocation("a", slow_numbers)]) as counted:
        assert_type(await anext(counted), ChunkEvent[int] | ResultEvent)


async def match_without_one_of_the_events_is_not_exhaustive(event: ChunkEvent[int] | ResultEvent) -> None:
    match event:
        case ChunkEvent():
            pass
        case _:
            assert_never(event)  # type: ignore[arg-type]  # has to be refused


async def stream_all_wants_an_iterable_of_invocations_and_async_with() -> None:
    loop.stream_all(5)  # type: ignore[arg-type]  # has to be refused
    loop.stream_all(Invocation("a", slow_numbers))  # type: ignore[arg-type]  # has to be refused
    loop.stream_all([streaming("text")])  # type: ignore[arg-type]  # has to be refused
    loop.stream_all([("a", count, ("text",), {})])  # type: ignore[arg-type]  # has to be refused
    async for _ in loop.stream_all([Invocation("a", slow_numbers)]):  # type: ignore[attr-defined]  # has to be refused
        pass


def events_are_values(chunk: ChunkEvent[Cat], result: ResultEvent) -> ChunkEvent[Animal]:
    chunk.index = 5  # type: ignore[misc]  # has to be refused
    result.result = result.result  # type: ignore[misc]  # has to be refused
    return chunk


# --- results


async def fake_agent_goes_wherever_an_agent_goes(loop: AgentLoop) -> None:
    agent = FakeAgent(
        Reply("a"), Fail(OSError, after_seconds=1), FakeHTTPError(429, "soon"), OSError, Stall()
    )
    assert_type(await loop.run_single("agent", agent, 1, two=2), InvocationResult[Any])
    assert_type(await loop.run_all(Invocation.map(agent, range(3))), list[InvocationResult[Any]])
    stream = FakeAgent(Chunks([1, 2], then=OSError()), Chunks(range(3), then=Stall()))
    assert_type(loop.run_streaming("agent", stream, 1), AgentStream[Any])
    FakeAgent("a")  # type: ignore[arg-type]  # has to be refused


def result_knows_its_type(result: InvocationResult[int]) -> None:
    assert_type(result.unwrap(), int)
    assert_type(result.output, int | None)
    assert_type(result.exception, BaseException | None)
    assert_type(result.error, str | None)
    assert_type(result.status, Status)
    assert_type(result.success, bool)
    assert_type(result.failures, tuple[Exception, ...])
    assert_type((result.latency_ms, result.queue_ms), tuple[float, float])
    assert_type((result.retries, result.index), tuple[int, int])


def only_unwrap_gives_an_output_that_cannot_be_none(result: InvocationResult[int]) -> None:
    if result.success:
        assert_type(result.output, int | None)  # a property narrows none of its siblings
        assert_type(result.unwrap(), int)

    if result.error is not None:
        assert_type(result.error, str)

    if result.exception is not None:
        assert_type(result.exception, BaseException)


def result_is_covariant(cats: InvocationResult[Cat]) -> InvocationResult[Animal]:
    return cats


def result_is_not_contravariant(animals: InvocationResult[Animal]) -> InvocationResult[Cat]:
    return animals  # type: ignore[return-value]  # has to be refused


async def result_of_a_subclass_serves_as_one_of_its_base() -> InvocationResult[Animal]:
    return await loop.run_single("a", adopt)


# --- chunks


def chunk_has_typed_parts_that_are_checked(chunk: StreamChunk) -> None:
    assert_type(chunk.event, StreamEvent)
    assert_type(chunk.data, Any)
    assert_type(chunk.timestamp, float)
    assert_type(chunk.is_terminal, bool)
    assert_type(chunk.to_sse(), str)
    StreamChunk(StreamEvent.TEXT, "a", timestamp=5)
    StreamChunk("text")  # type: ignore[arg-type]  # has to be refused
    StreamChunk(StreamEvent.TEXT, "a", "now")  # type: ignore[arg-type]  # has to be refused
    StreamChunk()  # type: ignore[call-arg]  # has to be refused
    chunk.data = "b"  # type: ignore[misc]  # has to be refused


async def chunked() -> AsyncIterator[StreamChunk]:
    yield StreamChunk(StreamEvent.START)


async def text_is_collected_from_chunks_and_from_text() -> None:
    assert_type(await collect_text(chunked()), str)
    assert_type(await collect_text(streaming("text")), str)
    async with loop.run_streaming("a", chunked) as stream:
        assert_type(await collect_text(stream), str)

    await collect_text(slow_numbers())  # type: ignore[arg-type]  # has to be refused
    await collect_text(["text"])  # type: ignore[arg-type]  # has to be refused


# --- settings and figures


def settings_are_checked(config: LoopConfig) -> None:
    LoopConfig(timeout_seconds=None, max_retries=0, backoff=Backoff(jitter="equal"), classify=classify)
    LoopConfig(classify=lambda exc: Verdict(VerdictKind.FATAL))
    LoopConfig(10)  # type: ignore[call-arg]  # has to be refused
    LoopConfig(timeout=10)  # type: ignore[call-arg]  # has to be refused
    LoopConfig(timeout_seconds="10")  # type: ignore[arg-type]  # has to be refused
    LoopConfig(classify=blocking)  # type: ignore[arg-type]  # has to be refused
    Backoff(jitter="some")  # type: ignore[arg-type]  # has to be refused
    config.max_retries = 5  # type: ignore[misc]  # has to be refused


def watch(event: Event) -> None:
    assert_type(event.at, float)


async def loop_has_typed_parts() -> None:
    assert_type(AgentLoop(LoopConfig(), limiter=Limiter(5), metrics=MetricsRecorder()), AgentLoop)
    assert_type(loop.with_config(timeout_seconds=None, backoff=Backoff(), classify=classify), AgentLoop)
    loop.with_config(timeout=3)  # type: ignore[call-arg]  # has to be refused
    loop.with_config(max_retries="3")  # type: ignore[arg-type]  # has to be refused
    loop.with_config(classify=blocking)  # type: ignore[arg-type]  # has to be refused
    AgentLoop(on_event=watch)
    AgentLoop(on_event=[watch, lambda event: print(event.at)])
    AgentLoop(on_event=["watch"])  # type: ignore[list-item]  # has to be refused
    AgentLoop(on_event=5)  # type: ignore[arg-type]  # has to be refused
    assert_type(loop.config, LoopConfig)
    assert_type(loop.limiter, Limiter)
    assert_type(loop.metrics, MetricsRecorder)
    assert_type(loop.statistics(), LoopStatistics)
    assert_type(loop.get_latency_stats(), dict[str, float])
    async with loop as same:
        assert_type(same, AgentLoop)


def figures_are_typed(snapshot: MetricsSnapshot) -> None:
    assert_type(snapshot.latency, Distribution)
    assert_type(snapshot.latency.percentile(99.9), float)
    assert_type(snapshot.counts[Status.SUCCESS], int)
    assert_type(classify(ValueError()), Verdict)


# --- the store


async def store_knows_what_it_can(store: ContextStore) -> None:
    assert_type(ContextStore({"a": 1}), ContextStore)
    assert_type(await store.get("a"), Any)
    assert_type(await store.delete("a"), bool)
    assert_type(await store.snapshot(), dict[str, Any])
    assert_type(await store.compare_and_set("a", 1, 2), bool)
    assert_type(await store.transform("a", lambda value: int(value)), int)
    assert_type(await store.transform("a", blocking, ""), int)
    assert_type(await store.to_json(), str)
    assert_type(ContextStore.from_json("{}"), ContextStore)
    await store.set("a", object())
    await store.update({"a": 1})


async def edit_gives_a_draft(store: ContextStore) -> int:
    async with store.edit() as draft:
        assert_type(draft, MutableMapping[str, Any])

    # What the block returns is returned: leaving it never swallows an exception.
    async with store.edit(timeout_seconds=5) as draft:
        return len(draft)


async def wait_for_gives_what_its_predicate_does_and_watch_values(store: ContextStore) -> None:
    def length(now: Mapping[str, Any]) -> int:
        return len(now)

    assert_type(await store.wait_for(length), int)
    assert_type(await store.wait_for(lambda now: "a" in now), bool)
    async with store.watch("a") as values, store.watch("a", "gone") as others:
        assert_type(values, AsyncIterator[Any])
        assert_type(others, AsyncIterator[Any])

    async with store.watch() as states:
        async for state in states:
            assert_type(state, dict[str, Any])


async def store_checks_its_arguments_and_needs_async_with(store: ContextStore) -> None:
    await store.get(5)  # type: ignore[arg-type]  # has to be refused
    await store.set(5, 1)  # type: ignore[arg-type]  # has to be refused
    await store.update([("a", 1)])  # type: ignore[arg-type]  # has to be refused
    await store.transform("a", 5)  # type: ignore[arg-type]  # has to be refused
    await store.wait_for("a")  # type: ignore[arg-type]  # has to be refused
    store.edit(5)  # type: ignore[call-arg]  # has to be refused
    store.edit(timeout_seconds="5")  # type: ignore[arg-type]  # has to be refused
    store.watch(5)  # type: ignore[call-overload]  # has to be refused
    ContextStore([1])  # type: ignore[arg-type]  # has to be refused
    await store.edit()  # type: ignore[misc]  # has to be refused
    async for _ in store.watch("a"):  # type: ignore[attr-defined]  # has to be refused
        pass

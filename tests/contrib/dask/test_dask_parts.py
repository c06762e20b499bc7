"""What travels, and which call goes where: the parts that need no other process."""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import pytest
import remote_agents as there

from agentloop import InvocationCancelled, LoopClosed, Verdict, VerdictKind, classify
from agentloop._signs import is_sign_of_outage
from agentloop.contrib.dask import RemoteError, WorkerLost, _actor, _functions
from agentloop.contrib.dask._actor import AgentActor
from agentloop.contrib.dask._dispatcher import Call, Dispatcher, Worker
from agentloop.contrib.dask._engine import Engine, Settings, replace_failed
from agentloop.contrib.dask._errors import pack_error, unpack_error
from agentloop.contrib.dask._functions import Function, load_function
from agentloop.contrib.dask._mailbox import Mailbox
from agentloop.contrib.dask._pickles import dumps, loads
from agentloop.contrib.dask._tracing import enter_trace, trace_here

# --- which call goes where


class Caller:
    """The caller's side of some calls."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        # Delivers at once, in this thread.
        self.mailbox = Mailbox(SimpleNamespace(call_soon_threadsafe=lambda fn: fn()))

    def call(self, name: str) -> Call:
        call = self.calls[name] = Call(Function(there.nap), (name,), self.mailbox)
        return call

    @property
    def results(self) -> dict[str, object]:
        """The return values and errors of the calls that have ended."""
        ended = {name: call for name, call in self.calls.items() if call.ended.is_set()}
        return {
            name: unpack_error(call.data) if call.is_error and call.data else call.data
            for name, call in ended.items()
        }


class Process(Worker):
    """A process that sends at once what it is given."""

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda: None)
        self.cancelled: list[int] = []

    def send(self) -> set[str]:
        _, calls, cancelled = loads(self.pack() or dumps(({}, [], [])))
        self.cancelled += cancelled
        return {name for _, _, name in calls}


@pytest.fixture
def caller() -> Caller:
    return Caller()


def test_call_goes_to_the_process_with_the_fewest(caller: Caller) -> None:
    dispatcher, one, two = Dispatcher(3), Process("one"), Process("two")
    dispatcher.submit(caller.call("a"))
    assert len(dispatcher.waiting) == 1
    dispatcher.add(one)
    dispatcher.add(two)
    calls = [caller.call(name) for name in "bcd"]
    for call in calls:
        dispatcher.submit(call)

    assert (one.send(), two.send()) == ({"a", "c"}, {"b", "d"})
    dispatcher.ended(two, calls[0].number, False, b"done")
    assert caller.results == {"b": b"done"}
    dispatcher.submit(caller.call("e"))
    assert two.send() == {"e"}


def test_definition_of_a_function_is_sent_once_to_each_process(caller: Caller) -> None:
    worker, function = Process("one"), Function(there.nap)
    for _ in range(2):
        worker.assign(Call(function, (), caller.mailbox))

    assert [*loads(worker.pack())[0]] == [function.number]
    worker.assign(Call(function, (), caller.mailbox))
    assert not loads(worker.pack())[0]
    assert not worker.pack()


def test_calls_of_a_lost_process_go_to_others_and_are_given_up_after_max_deaths(caller: Caller) -> None:
    dispatcher = Dispatcher(2)
    for number in range(2):
        worker = Process(str(number))
        dispatcher.add(worker)
        if not number:
            dispatcher.submit(caller.call("a"))

        assert worker.send() == {"a"}
        dispatcher.lose(worker)

    error = caller.results["a"]
    assert isinstance(error, WorkerLost)
    assert (error.deaths, str(error)) == (2, "the worker process died 2 times while it ran this call")
    assert classify(error).kind is VerdictKind.PERMANENT
    assert not is_sign_of_outage(error)


def test_death_before_a_call_was_sent_does_not_count(caller: Caller) -> None:
    dispatcher, worker, call = Dispatcher(1), Process("one"), caller.call("a")
    dispatcher.add(worker)
    dispatcher.submit(call)
    dispatcher.lose(worker)
    assert (call.deaths, [*dispatcher.waiting]) == (0, [call])


def test_call_that_saw_two_deaths_runs_alone(caller: Caller) -> None:
    dispatcher, workers = Dispatcher(3), [Process(str(number)) for number in range(5)]
    for name in "ab":
        dispatcher.submit(caller.call(name))

    for worker in workers[:2]:
        dispatcher.add(worker)
        assert worker.send() == {"a", "b"}
        dispatcher.lose(worker)

    assert len(dispatcher.suspects) == 2
    alone, other = workers[2:4]
    dispatcher.add(alone)
    dispatcher.submit(caller.call("c"))
    # There is nothing else for it to run in, and it waits.
    assert (alone.send(), len(dispatcher.waiting)) == ({"a"}, 1)
    dispatcher.add(other)
    assert other.send() == {"c"}
    # The next one follows as soon as the process is empty.
    dispatcher.ended(alone, next(iter(alone.open)), False, b"")
    assert (alone.send(), other.send()) == ({"b"}, set())
    dispatcher.ended(alone, next(iter(alone.open)), False, b"")
    dispatcher.submit(caller.call("d"))
    assert alone.send() == {"d"}


def test_process_of_a_suspect_that_dies_is_replaced_by_another(caller: Caller) -> None:
    dispatcher, workers = Dispatcher(3), [Process(str(number)) for number in range(4)]
    dispatcher.submit(caller.call("a"))
    for worker in workers[:3]:
        dispatcher.add(worker)
        assert worker.send() == {"a"}
        dispatcher.lose(worker)

    assert isinstance(caller.results["a"], WorkerLost)
    dispatcher.submit(caller.call("b"))
    dispatcher.add(workers[3])
    assert workers[3].send() == {"b"}


@pytest.mark.parametrize("state", ["waiting", "sent", "ended", "lost"])
def test_cancelled_call_is_not_run_again(caller: Caller, state: str) -> None:
    dispatcher, worker, call = Dispatcher(3), Process("one"), caller.call("a")
    dispatcher.submit(caller.call("before"))
    dispatcher.submit(call)
    if state != "waiting":
        dispatcher.add(worker)
        worker.send()

    if state == "ended":
        dispatcher.ended(worker, call.number, False, b"done")

    dispatcher.cancel(call)
    worker.send()
    assert worker.cancelled == ([call.number] if state in ("sent", "lost") else [])
    if state == "lost":
        dispatcher.lose(worker)

    expected = {"waiting": {"a": b""}, "sent": {}, "ended": {"a": b"done"}, "lost": {"a": b""}}
    assert caller.results == expected[state]


def refuse(fn: object) -> None:
    raise RuntimeError("Event loop is closed")


def test_caller_whose_event_loop_has_ended_is_not_told() -> None:
    mailbox = Mailbox(SimpleNamespace(call_soon_threadsafe=refuse))
    call = Call(Function(there.nap), (), mailbox)
    call.fail(LoopClosed("left"))
    with pytest.raises(RuntimeError, match="closed"):
        mailbox.send(print)


def test_closed_dispatcher_gives_up_what_is_open_and_what_still_comes(caller: Caller) -> None:
    dispatcher, worker = Dispatcher(3), Process("one")
    dispatcher.add(worker)
    dispatcher.submit(caller.call("a"))
    dispatcher.close(LoopClosed("left"))
    dispatcher.submit(caller.call("b"))
    assert {name: type(error) for name, error in caller.results.items()} == {"a": LoopClosed, "b": LoopClosed}


def test_engine_whose_event_loop_has_ended_takes_no_call(caller: Caller) -> None:
    engine = Engine(Settings(1, None, None, "asyncio", 0, 3, 60))
    engine._mailbox = Mailbox(SimpleNamespace(call_soon_threadsafe=refuse))
    with pytest.raises(LoopClosed):
        engine.submit(caller.call("a"))


# --- errors


def travel(exc: BaseException) -> Any:
    return unpack_error(pack_error(exc, "there"))


class Rude(OSError):
    """Cannot be unpickled."""

    def __init__(self, text: str, *, errno: int | None) -> None:
        super().__init__(text)
        self.errno = errno


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


class Forgetful(Exception):
    """Comes back without its status."""

    status_code: int | None = None

    def __reduce__(self) -> Any:
        return Forgetful, ()


def test_causes_travel_since_they_are_judged() -> None:
    inner = there.Rude("slow down", status=429, headers={"retry-after": "7"})
    outer = ValueError("wrapped")
    outer.__cause__, outer.__context__ = inner, inner
    outer.__cause__.__context__ = KeyError("before")
    got = travel(outer)
    assert (type(got), type(got.__cause__), got.__suppress_context__) == (ValueError, RemoteError, True)
    assert repr(got.__cause__.__context__) == "KeyError('before')"
    assert classify(got) == classify(outer) == Verdict(VerdictKind.OVERLOAD, 7)


def test_groups_travel_by_their_members() -> None:
    got = travel(ExceptionGroup("two", [ValueError("a"), there.Rude("b", status=401, headers={})]))
    assert isinstance(got, ExceptionGroup)
    assert [type(one) for one in got.exceptions] == [ValueError, RemoteError]
    assert classify(got).kind is VerdictKind.FATAL


def test_error_with_a_thousand_causes_is_cut() -> None:
    error: Exception = ValueError("0")
    for number in range(1000):
        outer = ValueError(number)
        outer.__cause__, error = error, outer

    depth, got = 0, travel(error)
    while got is not None:
        depth, got = depth + 1, got.__cause__

    assert depth == 50


@pytest.mark.parametrize("errno", [None, 28, 111])
def test_error_of_the_network_that_does_not_unpickle_speaks_of_the_provider(errno: int | None) -> None:
    error = Rude("gone", errno=errno)
    assert type(got := travel(error)) is RemoteError
    assert (classify(got), is_sign_of_outage(got)) == (classify(error), is_sign_of_outage(error))


def test_error_that_comes_back_as_another_is_a_remote_error() -> None:
    error = Forgetful()
    error.status_code = 429
    assert (type(travel(error)), travel(error).status_code) == (RemoteError, 429)


def test_error_whose_text_cannot_be_had_travels() -> None:
    assert type(travel(Mute())) is Mute


def test_error_that_does_not_pickle_is_a_remote_error() -> None:
    error = ValueError("boom", Lock())
    assert type(travel(error)) is RemoteError


def test_error_of_a_module_that_is_missing_here_is_a_remote_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elsewhere_only", module := ModuleType("elsewhere_only"))
    module.Odd = type("Odd", (Exception,), {"__module__": "elsewhere_only"})  # type: ignore[attr-defined]  # set on purpose
    packed = pack_error(module.Odd("so"), "there")
    monkeypatch.delitem(sys.modules, "elsewhere_only")
    got = unpack_error(packed)
    assert (type(got), str(got)) == (RemoteError, "elsewhere_only.Odd: so")


def test_status_of_grpc_is_kept() -> None:
    error = RemoteError("grpc.aio.AioRpcError", "", "UNAVAILABLE", Verdict(VerdictKind.TRANSIENT))
    assert is_sign_of_outage(error)
    assert str(error) == "grpc.aio.AioRpcError"


# --- functions


def module(path: Path, text: str) -> Any:
    path.write_text(text)
    sys.modules.pop(path.stem, None)
    return __import__(path.stem)


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "changing_agents.py"
    sys.modules.pop("changing_agents", None)


def test_other_version_of_the_agents_module_is_refused(agents: Path) -> None:
    data = Function(module(agents, "async def ask(): return 1").ask).define()
    assert load_function(data).__name__ == "ask"
    module(agents, "async def ask(): return 2")
    with pytest.raises(ImportError, match="changing_agents is another version in this worker process"):
        load_function(data)


def test_function_that_is_missing_there_is_refused(agents: Path) -> None:
    data = Function(module(agents, "async def ask(): return 1").ask).define()
    agents.write_text("")
    sys.modules.pop("changing_agents")
    with pytest.raises(ImportError, match="must be able to import the agent's module"):
        load_function(data)


def test_module_whose_source_cannot_be_read_is_not_compared(agents: Path) -> None:
    ask = module(agents, "async def ask(): return 1").ask
    agents.unlink()
    assert load_function(Function(ask).define()) is ask


@pytest.mark.parametrize("name", ["__main__", "sys", "not.imported"])
def test_module_without_a_source_to_compare_has_no_hash(name: str) -> None:
    assert _functions._source(name) == ""


def test_reducers_of_the_application_are_used_and_those_of_dask_are_not() -> None:
    class Own(Exception):
        pass

    copyreg.pickle(Own, lambda _: (str, ("reduced",)))
    try:
        assert loads(dumps(Own())) == "reduced"
    finally:
        del copyreg.dispatch_table[Own]

    assert loads(dumps(SystemExit(3))).code == 3
    assert pickle.loads(dumps({1: "__main__"})) == {1: "__main__"}


def test_trace_context_is_dropped_where_opentelemetry_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    enter_trace({"traceparent": "00-1-1-01"})
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert trace_here() == {}


def test_process_that_dask_has_given_up_is_started_again_under_another_name() -> None:
    asked: list[int] = []
    states = {"a": "running", "b": "failed", "c": "closed", "d": "starting"}
    nannies = {name: SimpleNamespace(status=SimpleNamespace(name=state)) for name, state in states.items()}
    # A failed process may be gone by now.
    cluster = SimpleNamespace(workers=nannies, worker_spec=dict.fromkeys("abd"), scale=asked.append)
    replace_failed(cluster, 4)
    assert (list(cluster.worker_spec), asked) == (["a", "d"], [4])


# --- the event loop in a worker process


class Question:
    """Asks an actor to call agents."""

    def __init__(self, backend: str) -> None:
        self.actor = AgentActor(backend, 0)

    async def call(self, number: int, fn: Any, *args: Any, attempt: tuple[Any, ...] = ()) -> None:
        function = Function(fn)
        trace = {"traceparent": f"00-{1:032x}-{number:016x}-01"}
        call = number, function.number, function.pack(args, {}), attempt, trace
        await self.actor.send(dumps(({function.number: function.define()}, [call], [])))

    async def replies(self, message: bytes = b"") -> Any:
        with anyio.fail_after(5):
            while not (found := loads(await self.actor.receive(message))):
                message = b""

        return found


async def test_reply_that_comes_before_it_is_asked_for_is_kept(anyio_backend: str) -> None:
    question = Question(anyio_backend)
    await question.call(1, there.nap)
    with anyio.fail_after(5):
        while not question.actor._replies:
            await anyio.sleep(0.01)

    assert await question.replies() == [(1, False, dumps(None))]
    await question.actor.close()


async def test_event_loop_that_crashes_ends_the_actor(anyio_backend: str) -> None:
    question = Question(anyio_backend)
    question.actor._mailbox.send(question.actor._scopes.__setitem__, 1, None)
    await question.actor.send(dumps(({}, [], [1])))
    with anyio.fail_after(5), pytest.raises(RuntimeError):
        while True:
            await question.actor.close()
            await anyio.sleep(0.01)


async def test_actor_answers_and_cancels(anyio_backend: str) -> None:
    question = Question(anyio_backend)
    await question.call(1, there.fail, ValueError("boom"))
    [(number, is_error, data)] = await question.replies()
    assert (number, is_error, repr(unpack_error(data))) == (1, True, "ValueError('boom')")
    await question.call(4, there.tell_span)
    assert await question.replies() == [(4, False, dumps(4))]
    if anyio_backend == "asyncio":
        await question.call(5, there.cancel_itself)
        [(_, _, data)] = await question.replies()
        assert isinstance(unpack_error(data), InvocationCancelled)

    await question.call(2, there.nap, 60)
    # The second of these comes too late.
    assert await question.replies(dumps(({}, [], [2, 1]))) == [(2, False, b"")]
    assert "Python" in await question.actor.versions()
    await question.call(3, there.nap, 60)
    await question.actor.close()


async def test_agent_knows_its_attempt_there(anyio_backend: str) -> None:
    question = Question(anyio_backend)
    await question.call(1, there.tell_attempt, attempt=("a", 2, (pack_error(ValueError("boom"), ""),), "key"))
    [(_, _, data)] = await question.replies()
    agent_id, number, _, key = loads(data)
    assert (agent_id, number, key) == ("a", 2, "key")
    await question.actor.close()


async def test_agent_that_leaves_a_scope_open_ends_no_actor(anyio_backend: str) -> None:
    question = Question(anyio_backend)
    await question.call(1, there.leave_scope_open)
    [(_, is_error, data)] = await question.replies()
    assert is_error
    assert str(unpack_error(data)).startswith("'the agent' has left a cancel scope or a task group open")
    await question.call(2, there.nap)
    assert await question.replies() == [(2, False, dumps(None))]
    await question.actor.close()


async def test_actor_answers_nothing_after_a_while(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_actor, "POLL_SECONDS", 0.01)
    question = Question(anyio_backend)
    assert loads(await question.actor.receive(b"")) == []
    await question.actor.close()


async def test_actor_that_is_asked_nothing_ends(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_actor, "LEASE_SECONDS", 0.3)
    question, path = Question(anyio_backend), tmp_path / "held"
    await question.call(1, there.hold, str(path))
    with anyio.fail_after(5):
        while not path.exists() or path.read_text() != "cancelled":
            await anyio.sleep(0.01)

        with pytest.raises(RuntimeError):
            while True:
                await question.actor.receive(b"")
                await anyio.sleep(0.01)


def test_actor_whose_event_loop_cannot_start_says_why() -> None:
    with pytest.raises(LookupError, match="curio"):
        AgentActor("curio", 0)

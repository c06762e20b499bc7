"""The examples with the clients that people use, each run as a user runs it."""

import re
import sys

import pytest
from examples_run import Done, environment, every_backend, model_server, run, start

pytestmark = pytest.mark.long

# A proxy in the environment must not come between an example and its own server.
PROXY = {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}


def check(done: Done) -> str:
    """Return the output of a run that has succeeded and complains about nothing."""
    assert (done.status, done.err) == (0, "")
    assert len(done.out.splitlines()) <= 24
    assert done.out.isascii()
    return done.out


def output(name: str, *arguments: str) -> str:
    return check(run(name, *arguments, **PROXY))


def output_of_a_process(name: str, *arguments: str, flags: tuple[str, ...] = ("-W", "error")) -> str:
    """Run an example in a process of its own, since its client starts threads or leaves objects behind."""
    process = start(name, *arguments, flags=flags, env=environment(**PROXY))
    out, err = process.communicate(timeout=60)
    return check(Done(process.returncode, out, err))


def retries(out: str) -> dict[str, list[str]]:
    """Return, by the name of an error, what is said of each retry after it."""
    found: dict[str, list[str]] = {}
    for name, text in re.findall(r"^  \S+ +(\w+) \((.+) ms$", out, re.MULTILINE):
        found.setdefault(name, []).append(text)

    return found


def results(out: str) -> dict[str, tuple[str, str]]:
    """Return the status and the text of each result, by its id."""
    rows = re.findall(
        r"^  (\S+) +(success|error|timeout|skipped) +\d retr(?:y|ies) +(.+)$", out, re.MULTILINE
    )
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (status, text) for name, status, text in rows}


def check_overload(said: list[str]) -> None:
    """A Retry-After is a floor, and what is added to it is at most a quarter."""
    for text in said:
        verdict, _, delay = text.partition("): again in ")
        assert verdict == "overload, to wait 200 ms"
        assert 200 <= int(delay) <= 250


# openai


def test_openai_questions_are_all_answered_through_every_fault() -> None:
    out = output("openai_batch")
    assert re.match(r"6 questions for demo at http://127\.0\.0\.1:\d+/v1/, on asyncio\n", out)
    told = results(out)
    assert list(told) == [f"q-{number}" for number in range(6)]
    assert {status for status, _ in told.values()} == {"success"}
    assert told["q-0"][1] == "17 * 23 is 391."
    seen = retries(out)
    assert seen.keys() == {"RateLimitError", "InternalServerError", "APIConnectionError", "InvocationTimeout"}
    check_overload(seen["RateLimitError"])
    assert seen["InternalServerError"][0].startswith("transient): ")


@pytest.mark.by_hand
@every_backend
def test_openai_stream_that_breaks_off_is_not_repeated_and_a_late_one_is(backend: str) -> None:
    # On trio, the SDK leaves generators of its own to the garbage collector, which says so when asked.
    flags = ("-W", "error" if backend == "asyncio" else "ignore::ResourceWarning")
    out = output_of_a_process("openai_batch", "--stream", "--backend", backend, flags=flags)
    told = results(out)
    assert sorted(told) == [f"q-{number}" for number in range(6)]
    broken = [text for status, text in told.values() if status == "error"]
    assert len(broken) == 1
    assert re.fullmatch(r"APIConnectionError: Connection error\., after: On.*", broken[0])
    assert told["q-4"] == ("success", "19 * 23 is 437.")
    seen = retries(out)
    assert seen.keys() == {"RateLimitError", "InternalServerError", "FirstChunkTimeout"}
    check_overload(seen["RateLimitError"])
    assert re.search(r"first words came after \d+ ms \(median\), 1\d{3} ms \(slowest\)$", out)


@pytest.mark.by_hand
def test_openai_model_in_the_environment_is_asked_at_its_own_address() -> None:
    with model_server("--api-key", "secret") as url:
        variables = {"OPENAI_MODEL": "mine", "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "secret"}
        status, out, err = run("openai_batch", "--backend", "trio", **variables)

    assert (status, err) == (0, "")
    assert out.startswith(f"6 questions for mine at {url}/, on trio\n")
    assert {status for status, _ in results(out).values()} == {"success"}
    assert not retries(out)


def test_openai_model_without_a_key_is_one_line() -> None:
    status, out, err = run("openai_batch", "--backend", "trio", OPENAI_MODEL="mine")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: .*OPENAI_API_KEY.*\n", err)


# anthropic


def test_anthropic_questions_are_all_answered_through_every_fault() -> None:
    out = output("anthropic_batch")
    assert re.match(r"6 questions for demo at http://127\.0\.0\.1:\d+, on asyncio\n", out)
    told = results(out)
    assert sorted(told) == [f"q-{number}" for number in range(6)]
    assert {status for status, _ in told.values()} == {"success"}
    assert told["q-0"][1] == "17 * 23 is 391."
    seen = retries(out)
    assert seen.keys() == {
        "OverloadedError",
        "RateLimitError",
        "InternalServerError",
        "APIConnectionError",
        "InvocationTimeout",
    }
    assert all(text.startswith("overload): ") for text in seen["OverloadedError"])
    check_overload(seen["RateLimitError"])
    assert out.endswith("after overload\n")
    assert "\n6 of 6 answered; " in out


@pytest.mark.by_hand
@every_backend
def test_anthropic_stream_comes_word_by_word_up_to_where_it_breaks_off(backend: str) -> None:
    out = output("anthropic_batch", "--stream", "--backend", backend)
    assert re.search(r"^  > What is 17 \* 23\?\n(  q-0 .+\n)*    17 \* 23 is 391\.$", out, re.MULTILINE)
    assert re.search(r"^    On \"How .+\n    \[RemoteProtocolError\]$", out, re.MULTILINE)
    assert out.count("\n  > ") == 6
    assert retries(out).keys() >= {"OverloadedError", "RateLimitError", "FirstChunkTimeout"}
    assert "\n5 of 6 answered; " in out


@pytest.mark.by_hand
def test_anthropic_key_that_is_wrong_stops_the_batch() -> None:
    with model_server("--api-key", "secret") as url:
        origin = url.removesuffix("/v1")
        variables = {"ANTHROPIC_MODEL": "mine", "ANTHROPIC_BASE_URL": origin, "ANTHROPIC_API_KEY": "wrong"}
        status, out, err = run("anthropic_batch", "--backend", "trio", **variables)

    assert (status, err) == (1, "")
    assert "\n0 of 6 answered; 0 retries" in out
    told = results(out)
    assert 1 <= len(told) <= 4, "no more than ran at the same time"
    assert all(text.startswith("AuthenticationError: ") for _, text in told.values())


# a pipe


@pytest.mark.by_hand
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pipe")
@pytest.mark.parametrize("script", ["openai_batch", "anthropic_batch", "shared_context", "streaming"])
def test_reader_that_has_had_enough_gets_no_traceback(script: str) -> None:
    with start(script, flags=("-u",)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


# mcp


@every_backend
def test_mcp_server_sees_the_time_outs_of_its_callers_as_cancellations(backend: str) -> None:
    out = output_of_a_process("mcp_tools", "--backend", backend)
    assert out.startswith("6 agents, at most 3 at once, on " + backend)
    told = results(out)
    assert told["oslo"] == ("success", "4 degrees in Oslo: wear a coat")
    assert told["quito"] == ("timeout", "Timeout after 1s")
    assert [status for status, _ in told.values()].count("success") == 5
    seen = retries(out)
    assert (len(seen["InvocationTimeout"]), len(seen["RuntimeError"])) == (2, 1)
    assert out.endswith("\n  5 answered, 1 failed, 3 cancelled\n")


# pydantic_ai


@pytest.mark.by_hand
def test_pydantic_ai_agents_that_wait_for_others_neither_deadlock_nor_exceed_the_limit() -> None:
    out = output("pydantic_ai_agents")
    assert results(out).keys() == {"boats", "tides", "gulls"}
    assert all(re.fullmatch(r"3 of 3 parts, \d+ words", text) for _, text in results(out).values())
    assert retries(out).keys() == {
        "ModelServerError",
        "ModelConnectionError",
        "ModelRateLimitError",
        "InvocationTimeout",
    }
    assert out.endswith("\n12 invocations with a limit of 2; at most 2 wrote at the same time\n")

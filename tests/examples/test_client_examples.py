"""The examples with the clients that people use, each run as a user runs it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
every_backend = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def environment(**variables: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    # A proxy in the environment must not come between an example and its own server.
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    return {**kept, **proxy, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **variables}


def run(script: str, *arguments: str, warnings: str = "error", **variables: str) -> tuple[int, str, str]:
    """Return the exit status, the output and the error output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", warnings, str(EXAMPLES / script), *arguments],
        env=environment(**variables),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def output(script: str, *arguments: str, warnings: str = "error") -> str:
    """Return the output of a run that succeeds and complains about nothing."""
    status, out, err = run(script, *arguments, warnings=warnings)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) <= 24
    assert out.isascii()
    return out


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


@contextmanager
def real_server(*arguments: str) -> Iterator[str]:
    """Run the model server in a process of its own, as a real one would, and give its URL."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "model_server.py"), "--port", "0", "--api-key", "secret", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


# openai


def test_openai_questions_are_all_answered_through_every_fault() -> None:
    out = output("openai_batch.py")
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
    warnings = "error" if backend == "asyncio" else "ignore::ResourceWarning"
    out = output("openai_batch.py", "--stream", "--backend", backend, warnings=warnings)
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
    with real_server() as url:
        variables = {"OPENAI_MODEL": "mine", "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "secret"}
        status, out, err = run("openai_batch.py", "--backend", "trio", NO_PROXY="*", **variables)

    assert (status, err) == (0, "")
    assert out.startswith(f"6 questions for mine at {url}/, on trio\n")
    assert {status for status, _ in results(out).values()} == {"success"}
    assert not retries(out)


def test_openai_model_without_a_key_is_one_line() -> None:
    status, out, err = run("openai_batch.py", "--backend", "trio", OPENAI_MODEL="mine")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: .*OPENAI_API_KEY.*\n", err)


# anthropic


def test_anthropic_questions_are_all_answered_through_every_fault() -> None:
    out = output("anthropic_batch.py")
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
    out = output("anthropic_batch.py", "--stream", "--backend", backend)
    assert re.search(r"^  > What is 17 \* 23\?\n(  q-0 .+\n)*    17 \* 23 is 391\.$", out, re.MULTILINE)
    assert re.search(r"^    On \"How .+ \[RemoteProtocolError\]$", out, re.MULTILINE)
    assert out.count("\n  > ") == 6
    assert retries(out).keys() >= {"OverloadedError", "RateLimitError", "FirstChunkTimeout"}
    assert "\n5 of 6 answered; " in out


@pytest.mark.by_hand
def test_anthropic_key_that_is_wrong_stops_the_batch() -> None:
    with real_server() as url:
        origin = url.removesuffix("/v1")
        variables = {"ANTHROPIC_MODEL": "mine", "ANTHROPIC_BASE_URL": origin, "ANTHROPIC_API_KEY": "wrong"}
        status, out, err = run("anthropic_batch.py", "--backend", "trio", NO_PROXY="*", **variables)

    assert (status, err) == (1, "")
    assert "\n0 of 6 answered; 0 retries" in out
    told = results(out)
    assert 1 <= len(told) <= 4, "no more than ran at the same time"
    assert all(text.startswith("AuthenticationError: ") for _, text in told.values())


# a pipe


@pytest.mark.by_hand
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pipe")
@pytest.mark.parametrize(
    "script", ["openai_batch.py", "anthropic_batch.py", "shared_context.py", "streaming.py"]
)
def test_reader_that_has_had_enough_gets_no_traceback(script: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / script)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


# mcp


@every_backend
def test_mcp_server_sees_the_time_outs_of_its_callers_as_cancellations(backend: str) -> None:
    out = output("mcp_tools.py", "--backend", backend)
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
    out = output("pydantic_ai_agents.py")
    assert results(out).keys() == {"boats", "tides", "gulls"}
    assert all(re.fullmatch(r"3 of 3 parts, \d+ words", text) for _, text in results(out).values())
    assert retries(out).keys() == {
        "ModelServerError",
        "ModelConnectionError",
        "ModelRateLimitError",
        "InvocationTimeout",
    }
    assert out.endswith("\n12 invocations with a limit of 2; at most 2 wrote at the same time\n")

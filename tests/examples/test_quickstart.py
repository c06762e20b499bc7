"""The first thing that a newcomer runs: what it prints, how it fails, that its story repeats itself."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import anyio
import examples_run
import pytest
import quickstart
import quickstart_story
from examples_run import BACKENDS, EXAMPLES, environment, every_backend, model_server, run, start

pytestmark = pytest.mark.long

# Of these prompts none hangs, which would take its time, but many are retried, and one fails in the end.
SHORT = ("--count", "50", "--seed", "1628")


@cache
def output(*arguments: str) -> str:
    """Return the output of a run in which nothing unexpected happens."""
    return examples_run.output("quickstart", *arguments)


def story(out: str) -> str:
    """Return what has to be the same in each run: all but the timing, and what hangs on it."""
    before, title, _ = out.partition("\nTiming\n")
    assert title
    return before


def number(label: str, out: str) -> int:
    found = re.search(rf"^  {label} +(\d+)$", out, re.MULTILINE)
    assert found, label
    return int(found[1])


def map_of(out: str) -> str:
    """Return a character for each prompt."""
    _, _, rest = out.partition(quickstart_story.MAP)
    return "".join(re.findall(r"^  prompt-\d+ +([.\dA-Z?]+)$", rest.partition("\n\n")[0], re.MULTILINE))


def one_line(text: str) -> str:
    assert text.startswith("quickstart.py: error: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


@pytest.fixture
def children_hear_sigint() -> Iterator[None]:
    """Where tests run in the background of a shell, SIGINT is ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def server_that_refuses_completions() -> Iterator[str]:
    """Serve a list of models to anyone, and completions to nobody: 401."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, b'{"data": [{"id": "first"}, {"id": "second"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(401, b"{}")

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


@every_backend
def test_two_hundred_prompts_get_one_result_each(backend: str) -> None:
    out = output("--backend", backend)
    assert "\nEvery prompt has exactly one result\n" in out
    counts = [number(status, out) for status in ("success", "error", "timeout")]
    assert sum(counts) == 200
    assert min(counts) > 0, "the reader should see each of them"
    assert 2 <= counts[1] + counts[2] <= 4
    marks = map_of(out)
    assert len(marks) == 200
    assert (marks.count("E"), marks.count("T")) == (counts[1], counts[2])
    assert f"on {backend}, " in out


def test_the_failed_prompts_are_listed_with_their_reasons() -> None:
    out = output("--backend", "asyncio")
    marks = map_of(out)
    _, _, rest = out.partition(" failed in the end\n")
    listed = re.findall(r"^  prompt-(\d+) +(\w+)", rest, re.MULTILINE)
    assert [int(index) for index, _ in listed] == [index for index, mark in enumerate(marks) if mark in "ET"]
    assert [word for _, word in listed] == ["HTTPStatusError", "Timeout", "RemoteProtocolError"]
    assert "Timeout after 2s" in rest


def test_the_loop_saw_exactly_what_the_server_dealt_out() -> None:
    pairs = re.findall(r"(\d+) seen by the loop, (\d+) dealt out", output("--backend", "asyncio"))
    assert len(pairs) == 4
    for seen, dealt in pairs:
        assert int(seen) == int(dealt) > 0


@every_backend
def test_the_limiter_finds_out_how_many_the_server_takes(backend: str) -> None:
    out = output("--backend", backend)
    _, _, learned = out.partition("\nWhat the limiter learned about a server that takes 10 at once\n")
    found = re.fullmatch(
        r"  HTTP 429 +(\d+) seen by the loop, \1 dealt out by the server, not counted above\n"
        r"  limit +20 at once, cut (\d+)x, (\d+) at the end\n",
        learned,
    )
    assert found
    rejected, cuts, limit = map(int, found.groups())
    assert rejected >= cuts > 1
    # Each cut takes a fifth; between two of them it may have grown.
    assert 5 < limit < 20


def test_the_story_is_the_same_on_both_backends() -> None:
    assert story(output("--backend", "asyncio")) == story(output("--backend", "trio"))


@pytest.mark.by_hand
def test_the_same_seed_tells_the_same_story_again() -> None:
    _, again, _ = run("quickstart", *SHORT)
    assert story(again) == story(output(*SHORT))
    assert number("error", again) == 1
    assert number("retries made", again) > 20


def test_another_seed_tells_another_story() -> None:
    assert map_of(output("--backend", "asyncio"))[:50] != map_of(output(*SHORT))


def test_piped_output_is_plain_text_of_eighty_columns() -> None:
    out = output("--backend", "asyncio")
    assert out.isascii()
    assert all(line.isprintable() and len(line) <= 80 for line in out.split("\n"))


def test_a_file_of_prompts_may_have_blank_lines_and_repeat_itself(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffWhat is 6 * 7?\n\n   \nWie groß ist [bold]\x1b[31mλ?\n" + "Why?\n" * 14, "utf-8")
    runs = [output("--prompts", str(file), "--seed", "7", "--backend", backend) for backend in BACKENDS]
    assert "  What is 6 * 7? " in runs[0]
    assert "6 * 7 is 42." in runs[0]
    assert "Wie groß ist [bold] [31mλ?" in runs[0]
    assert len(map_of(runs[0])) == 16
    assert story(runs[0]) == story(runs[1])
    assert number("retries made", runs[0]) > 0


def test_a_real_server_is_asked_for_its_first_model_with_the_key_from_the_environment() -> None:
    faults = ("--api-key", "secret", "--rate-limited", "0.3", "--retry-after-seconds", "0.05")
    with model_server(*faults) as base_url:
        arguments = ("--base-url", f"{base_url}/", "--count", "10")
        status, out, err = run("quickstart", *arguments, OPENAI_API_KEY="secret")
        assert (status, err) == (0, "")
        assert f"10 prompts for demo at {base_url}\n" in out
        assert "Every prompt has exactly one result" in out
        assert number("success", out) == 10
        assert re.search(r"HTTP 429 +\d+ seen by the loop, not counted above\n", out)
        assert "dealt out" not in out

        status, out, err = run("quickstart", *arguments)
        assert (status, out) == (1, "")
        assert f"{base_url}/models" in one_line(err)
        assert "401" in err
        assert "OPENAI_API_KEY" in err


def test_a_fatal_error_stops_the_run_and_is_said() -> None:
    with server_that_refuses_completions() as base_url:
        status, out, err = run("quickstart", "--base-url", base_url, "--count", "20", "--concurrency", "2")

    assert (status, err) == (1, "")
    assert "20 prompts for first at " in out
    assert re.search(r"^[12] of 20 prompts have a result$", out, re.MULTILINE)
    assert "HTTPStatusError: Client error '401 Unauthorized'" in out


def test_an_unreachable_server_is_one_line_that_names_the_url() -> None:
    status, out, err = run("quickstart", "--base-url", "http://127.0.0.1:9/v1", "--model", "demo")
    assert (status, out) == (1, "")
    assert "http://127.0.0.1:9/v1/models" in one_line(err)
    assert "--base-url" in err


def test_a_bad_argument_ends_the_program_with_status_two() -> None:
    status, out, err = run("quickstart", "--count", "0")
    assert (status, out) == (2, "")
    assert (
        one_line(err) == "quickstart.py: error: argument --count: must be a whole number above 0, got '0'\n"
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--count", value) for value in ("-1", "1.5", "many", "")],
        *[("--concurrency", value) for value in ("0", "-1", "2e1", "²")],
        *[("--timeout", value) for value in ("0", "-1", "nan", "inf", "soon")],
        *[
            ("--base-url", value)
            for value in ("localhost:8000", "ftp://host/v1", "http://", "http://[::1", "")
        ],
        *[("--base-url", f"http://host:{port}/v1") for port in ("0x", "65536")],
        ("--seed", "x"),
        ("--backend", "curio"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", f"{option}={value}"])
    with pytest.raises(SystemExit) as caught:
        quickstart.main()

    assert caught.value.code == 2
    assert f"argument {option}: " in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "No such file"), (b"", "no prompt"), (b"\n \n\t\n", "no prompt"), (b"caf\xe9\n", "decode")],
)
def test_a_file_without_prompts_is_refused_in_one_line(
    content: bytes | None,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)

    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--prompts", str(file)])
    with pytest.raises(SystemExit) as caught:
        quickstart.main()

    assert caught.value.code == 2
    assert problem in one_line(capsys.readouterr().err)


def test_a_missing_trio_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(anyio, "get_available_backends", lambda: ("asyncio",))
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--backend", "trio"])
    with pytest.raises(SystemExit) as caught:
        quickstart.main()

    assert caught.value.code == 2
    assert "pip install trio" in one_line(capsys.readouterr().err)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.usefixtures("children_hear_sigint")
@every_backend
def test_ctrl_c_shows_what_has_been_finished(backend: str) -> None:
    with start("quickstart", "--count", "300", "--concurrency", "8", "--backend", backend) as process:
        assert process.stdout is not None
        before = ""
        while not before.endswith("done: 30"):
            char = process.stdout.read(1)
            assert char, before
            before += char

        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)

    assert (process.returncode, err) == (130, "Interrupted.\n")
    found = re.search(r"^(\d+) of 300 prompts have a result$", out, re.MULTILINE)
    assert found
    finished = int(found[1])
    assert 30 <= finished < 300
    # Those that were running were let finish, and those that were pulled already have not begun.
    statuses = ("success", "error", "timeout", *(["skipped"] if "\n  skipped " in out else []))
    assert "\n  cancelled " not in out
    assert re.search(r"^  because +received SIGINT$", out, re.MULTILINE)
    assert sum(number(status, out) for status in statuses) == finished
    assert len(map_of(out).replace("?", "")) == finished
    assert "\nTiming\n" in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pipe")
def test_a_reader_that_has_had_enough_gets_no_traceback() -> None:
    with start("quickstart", "--count", "5") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
def test_a_terminal_gets_frames_and_colours() -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "quickstart.py", "--count", "5"],
        env=environment(TERM="xterm-256color", COLUMNS="100"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # how Linux reports the end of a terminal
        pass
    finally:
        os.close(ours)

    assert process.wait(30) == 0
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.decode())
    assert b"\x1b[" in shown
    assert "╭─ Every prompt has exactly one result ─" in text
    assert "│ prompt-0  1..11 " in text

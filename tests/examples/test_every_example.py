"""What all examples have in common: their help, their length, and that they end as a person expects."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from examples_run import BACKENDS, EXAMPLES, model_server, run, start

SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text("utf-8"))
NEEDS = {
    "anthropic_batch": "anthropic",
    "mcp_tools": "mcp",
    "openai_batch": "openai",
    "pydantic_ai_agents": "pydantic_ai",
    "serve": "hypercorn",
}
# With what they take a while, and end by themselves without.
ARGUMENTS = {"model_server": ["--port", "0"]}
ASYNCIO_ALONE = {"pydantic_ai_agents"}


def by_hand(*values: str, unless: bool = False) -> Any:
    """Return parameters of a test that is run by hand for most examples: the others end in the same way."""
    return pytest.param(*values, marks=() if unless or values[0] == "serve" else pytest.mark.by_hand)


every_example = pytest.mark.parametrize("name", SCRIPTS)
every_end = pytest.mark.parametrize("name", [by_hand(name) for name in SCRIPTS])
# Each in turn on one backend, and by hand on the other; clients take long to be imported.
every_end_on_every_backend = pytest.mark.parametrize(
    ("name", "backend"),
    [
        by_hand(name, backend, unless=name not in NEEDS and number % 2 == which)
        for number, name in enumerate(SCRIPTS)
        for which, backend in enumerate(BACKENDS)
        if backend == "asyncio" or name not in ASYNCIO_ALONE
    ],
)


def needed_by(name: str) -> str:
    """Return the name of an example whose client is installed."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])

    return name


@pytest.fixture
def children_hear_sigint() -> Iterator[None]:
    """Where tests run in the background of a shell, SIGINT is ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@every_example
def test_help_says_what_it_shows_and_what_it_reads(name: str) -> None:
    done = run(needed_by(name), "--help")
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert text.split('"""')[1].strip().splitlines()[0].replace("``", "") in " ".join(done.out.split())
    assert "environment: " in done.out
    assert "--backend {asyncio,trio}" in done.out
    for variable in "OPENAI_MODEL", "OPENAI_API_KEY", "ANTHROPIC_MODEL":
        assert (f'"{variable}"' not in text) or variable in done.out.partition("environment: ")[2]

    assert (done.status, done.err) == (0, "")


def test_page_of_examples_names_each_module() -> None:
    page = (EXAMPLES.parent / "docs" / "how-to" / "examples.md").read_text("utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f"`{path.name}`" not in page] == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_none_is_longer_than_a_person_reads_at_once(path: Path) -> None:
    count = len(path.read_text("utf-8").splitlines())
    assert count <= (600 if path.stem == "model_server" else 200)


@pytest.mark.long
@pytest.mark.usefixtures("children_hear_sigint")
@every_end_on_every_backend
def test_ctrl_c_ends_it_with_130_and_no_traceback(name: str, backend: str, tmp_path: Path) -> None:
    # Trio raises it where it comes, so also after the call of an async function, before its task is started.
    unawaited = ("-W", "ignore:coroutine:RuntimeWarning") if backend == "trio" else ()
    arguments = ["--backend", backend, *ARGUMENTS.get(name, [])]
    process = start(needed_by(name), *arguments, flags=("-W", "error", *unawaited), cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    assert process.returncode == 130
    if name == "observability":
        assert "report.html" in out


@pytest.mark.long
@every_end
def test_reader_that_has_enough_ends_it_quietly(name: str, tmp_path: Path) -> None:
    process = start(needed_by(name), *ARGUMENTS.get(name, []), cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    if name == "model_server":  # which has nothing more to say until it ends
        process.send_signal(signal.SIGTERM)

    with process:
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()

    assert process.wait(60) == (-signal.SIGTERM if name == "model_server" else 0)


@pytest.mark.long
@every_end
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line(name: str, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(needed_by(name), *ARGUMENTS.get(name, []), flags=(), cwd=tmp_path, stdout=full)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 1
    assert "error: [Errno 28] No space left on device" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["serve", "model_server"])
@pytest.mark.parametrize("port", ["-1", "65536", "http", "9" * 5000])
def test_bad_port_is_one_line(name: str, port: str) -> None:
    status, out, err = run(needed_by(name), f"--port={port}")
    assert (status, out) == (2, "")
    assert err.startswith(f"{name}.py: error: argument --port: must be a port, a whole number from ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("observability", ["/proc/no"]), ("evaluate", ["/proc/no"]), ("quickstart", ["--prompts", "/proc/no"])],
)
@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs a folder in which nothing can be made")
def test_bad_file_is_one_line(name: str, arguments: list[str], tmp_path: Path) -> None:
    status, _, err = run(name, *arguments, directory=tmp_path)
    assert status in (1, 2)
    assert "/proc/no" in err
    assert err.count("\n") == 1


def test_port_that_is_taken_is_one_line() -> None:
    with model_server() as url:
        taken = url.split(":")[2].split("/")[0]
        status, _, err = run("model_server", "--port", taken)

    assert status == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1

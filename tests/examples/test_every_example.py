"""What all examples have in common: their help, their length, and that they end as a person expects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
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

# Those whose ends have something of their own. The others end by what all of them share.
ALWAYS = {"serve"}


def by_hand(*values: str) -> Any:
    """Return parameters of a test that is run by hand for most examples."""
    return pytest.param(*values, marks=() if values[0] in ALWAYS else pytest.mark.by_hand)


every_example = pytest.mark.parametrize("name", SCRIPTS)
every_end = pytest.mark.parametrize("name", [by_hand(name) for name in SCRIPTS])
every_end_on_every_backend = pytest.mark.parametrize(
    ("name", "backend"),
    [by_hand(name, "asyncio") for name in SCRIPTS]
    + [by_hand(name, "trio") for name in SCRIPTS if name not in ASYNCIO_ALONE],
)


def start(
    name: str, *arguments: str, warnings: tuple[str, ...] = (), **options: object
) -> subprocess.Popen[str]:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])

    return subprocess.Popen(  # type: ignore[call-overload, no-any-return] # of its many options
        [sys.executable, "-W", "error", *warnings, str(EXAMPLES / f"{name}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def children_hear_sigint() -> Iterator[None]:
    """Where tests run in the background of a shell, SIGINT is ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@every_example
def test_help_says_what_it_shows_and_what_it_reads(name: str) -> None:
    out, err = start(name, "--help").communicate(timeout=60)
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert text.split('"""')[1].strip().splitlines()[0].replace("``", "") in " ".join(out.split())
    assert "environment: " in out
    assert "--backend {asyncio,trio}" in out
    for variable in "OPENAI_MODEL", "OPENAI_API_KEY", "ANTHROPIC_MODEL":
        assert (f'"{variable}"' not in text) or variable in out.partition("environment: ")[2]

    assert err == ""


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
    # An interrupt may come between the call of an async function and the await.
    unawaited = ("-W", "ignore:coroutine:RuntimeWarning")
    arguments = ["--backend", backend, *ARGUMENTS.get(name, [])]
    process = start(name, *arguments, warnings=unawaited, cwd=tmp_path)
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
    process = start(name, *ARGUMENTS.get(name, []), cwd=tmp_path)
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
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])

    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / f"{name}.py"), *ARGUMENTS.get(name, [])],
            env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )

    assert done.returncode == 1
    assert "error: [Errno 28] No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["serve", "model_server"])
@pytest.mark.parametrize("port", ["-1", "65536", "http", "9" * 5000])
def test_bad_port_is_one_line(name: str, port: str) -> None:
    process = start(name, f"--port={port}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"{name}.py: error: argument --port: must be a port, a whole number from ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("observability", ["/proc/no"]), ("evaluate", ["/proc/no"]), ("quickstart", ["--prompts", "/proc/no"])],
)
@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs a folder in which nothing can be made")
def test_bad_file_is_one_line(name: str, arguments: list[str], tmp_path: Path) -> None:
    process = start(name, *arguments, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (1, 2)
    assert "/proc/no" in err
    assert err.count("\n") == 1


def test_port_that_is_taken_is_one_line() -> None:
    first = start("model_server", "--port", "0")
    assert first.stdout is not None
    taken = first.stdout.readline().split(":")[2].split("/")[0]
    process = start("model_server", "--port", taken)
    _, err = process.communicate(timeout=60)
    first.terminate()
    first.communicate()
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1

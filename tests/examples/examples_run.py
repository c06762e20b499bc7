"""Runs an example as a user does: in a process of its own, or faster in this one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BACKENDS = ["asyncio", "trio"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Done(NamedTuple):
    status: int
    out: str
    err: str


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of an example, which asks no model but its own and those of the test."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHROPIC_"))
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "NO_PROXY": "*", **variables}


def start(
    name: str, *arguments: str, flags: tuple[str, ...] = ("-W", "error"), **options: Any
) -> subprocess.Popen[str]:
    """Start an example in a process of its own."""
    options = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, *flags, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.Popen(command, encoding="utf-8", **options)


def run(name: str, *arguments: str, directory: Path = ROOT, **variables: str) -> Done:
    """
    Run an example in this process, where its imports are done once.

    :param directory: the working directory
    :param variables: environment variables to set
    """
    path = str(EXAMPLES / f"{name}.py")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+") as err:
        with (
            patch.object(sys, "argv", [path, *arguments]),
            patch.dict(os.environ, environment(**variables), clear=True),
            chdir(directory),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as exc:
                status = exc.code
                if isinstance(status, str):
                    print(status, file=err)

        out.seek(0)
        err.seek(0)
        return Done(status if isinstance(status, int) else 1, out.read(), err.read())


def output(name: str, *arguments: str, **options: Any) -> str:
    """Return the output of a run that succeeds and complains about nothing."""
    status, out, err = run(name, *arguments, **options)
    assert (status, err) == (0, "")
    return out


@contextmanager
def model_server(*arguments: str) -> Iterator[str]:
    """Run the model server in a process of its own, as a real one would, and give its URL."""
    with start("model_server", "--port", "0", *arguments) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()

"""Every Python snippet of the README runs, in order, in one namespace, and prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import anyio
import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_snippets_run_and_print_what_the_readme_says(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = anyio.run
    monkeypatch.setattr(anyio, "run", lambda main, **options: run(main, **{"backend": backend, **options}))
    namespace: dict[str, Any] = {"__name__": "readme"}
    ran, printed = 0, ""
    for language, text in BLOCKS:
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, str(README), "exec"), namespace)
                if "async def main" in text and "anyio.run(" not in text:
                    anyio.run(namespace["main"])

            ran, printed = ran + 1, output.getvalue()
        elif not language:
            assert printed == text

    assert ran == sum(language == "python" for language, _ in BLOCKS) >= 7


def test_commands_of_the_readme_are_the_two_that_a_newcomer_needs() -> None:
    commands = [text for language, text in BLOCKS if language == "sh"]
    assert len(commands) == 1
    lines = [line.split("  #")[0].strip() for line in commands[0].splitlines()]
    assert lines == [
        'python -m pip install -e ".[examples]" && python examples/quickstart.py',
        'python -m pip install -e ".[test]" && python -m pytest',
    ]

"""
The Python blocks of the README and of the pages under docs/ run, and print what the pages say.

The blocks of a page share one namespace and run in order, on both backends and on a virtual clock. A block
that defines ``main`` is run by ``anyio.run(main)``, unless it calls ``anyio.run`` itself. A block without a
language that follows is what it prints.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentloop.testing import virtual_clock

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
README_COMMANDS = [
    'python -m pip install -e ".[examples]" && python examples/quickstart.py',
    'python -m pip install -e ".[test]" && python -m pytest',
]


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Return the language, the text and the first line of each block of a page."""
    text = page.read_text("utf-8")
    return [(match[1], match[2], text.count("\n", 0, match.start(2))) for match in BLOCK.finditer(text)]


def python_blocks(page: Path) -> list[str]:
    return [text for language, text, _ in blocks(page) if language == "python"]


def missing_packages(page: Path) -> list[str]:
    """Return which packages the blocks import that are not installed here."""
    names: set[str] = set()
    for node in (node for text in python_blocks(page) for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))

    tops = {name.partition(".")[0] for name in names}
    return sorted(name for name in tops if name not in sys.modules and not importlib.util.find_spec(name))


WITH_PYTHON = [
    pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES if python_blocks(page)
]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_blocks_run_and_print_what_the_page_says(
    page: Path, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if missing := missing_packages(page):
        pytest.skip(f"needs {', '.join(missing)}")

    run = anyio.run

    def run_on_virtual_clock(main: Any, *args: Any, **options: Any) -> Any:
        name, backend_options = virtual_clock(options.pop("backend", backend))
        return run(main, *args, **{"backend": name, "backend_options": backend_options, **options})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(anyio, "run", run_on_virtual_clock)
    # Pickles and journals look the names of a page up in its module.
    module = types.ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = ""
    for language, text, line in blocks(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                # Line numbers in a traceback are those of the page.
                exec(compile("\n" * line + text, str(page), "exec"), vars(module))
                if "async def main" in text and "anyio.run(" not in text:
                    anyio.run(vars(module)["main"])

            printed = output.getvalue()
        elif not language:
            assert printed == text


def links(page: Path) -> Iterator[str]:
    """Give where the links of a page to other files lead."""
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text("utf-8"))):
        if not target.startswith(("http", "#")):
            yield target.partition("#")[0]


def test_links_to_files_lead_somewhere() -> None:
    found = [(page, target) for page in PAGES for target in links(page)]
    assert len(found) > 100
    assert [(page, target) for page, target in found if not (page.parent / target).exists()] == []


def test_commands_of_the_readme_are_the_two_that_a_newcomer_needs() -> None:
    (commands,) = (text for language, text, _ in blocks(ROOT / "README.md") if language == "sh")
    assert [line.split("  #")[0].strip() for line in commands.splitlines()] == README_COMMANDS


def test_readme_is_short() -> None:
    assert 600 <= len((ROOT / "README.md").read_text("utf-8").split()) <= 900

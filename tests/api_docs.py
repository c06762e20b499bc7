"""
Make the pages of the API from the docstrings: ``python tests/api_docs.py DIRECTORY``.

Needs the extra ``docs``. A warning is an error: a field that does not parse, or a name that leads nowhere.
"""

import argparse
import importlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from sphinx.application import Sphinx

MODULES = (
    "agentloop",
    "agentloop.journal",
    "agentloop.testing",
    "agentloop.contrib.opentelemetry",
    "agentloop.contrib.progress",
    "agentloop.contrib.prometheus",
    "agentloop.contrib.report",
    "agentloop.contrib.timeline",
)
SETTINGS = {
    "project": "agentloop",
    "extensions": ["sphinx.ext.autodoc"],
    "html_theme": "furo",
    "html_title": "agentloop",
    "html_copy_source": False,
    "html_show_copyright": False,
    "add_module_names": False,
    "autodoc_member_order": "bysource",
    "autodoc_typehints_format": "short",
    "maximum_signature_line_length": 80,
    "nitpicky": True,
    # Types in signatures that are others', private or variables have no page to lead to.
    "nitpick_ignore_regex": [
        ("py:class", r"(?!agentloop\.)\w+\..*|agentloop\.(journal\.|testing\.)?_.*|P|T")
    ],
}
# What a loop hands out and nobody makes.
MADE_BY_LOOPS = {"agentloop.AgentStream"}


def page(name: str) -> Iterator[str]:
    """Give the lines of one module's page."""
    yield from (name, "=" * len(name), "", f".. automodule:: {name}", "   :members:", "")
    module = importlib.import_module(name)
    for public in module.__all__:
        # Sphinx cannot see what an alias of types has for a docstring where it is defined.
        if members := get_args(getattr(module, public)):
            names = ", ".join(f":class:`{member.__name__}`" for member in members)
            yield from (f".. py:data:: {public}", f"   :module: {name}", "", f"   One of {names}.", "")


def write_sources(directory: Path) -> None:
    index = ["agentloop", "=========", "", ".. toctree::", "", *(f"   {name}" for name in MODULES)]
    (directory / "index.rst").write_text("\n".join(index))
    for name in MODULES:
        (directory / f"{name}.rst").write_text("\n".join(page(name)))


def tidy(
    _: Sphinx, what: str, name: str, obj: object, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Leave out of a signature what does not help to call it."""
    del what, obj, options
    if name in MADE_BY_LOOPS:
        return "", None

    # The tilde of a parameter specification keeps Sphinx from reading those that stand for short names.
    if signature and "~P" in signature:
        return re.sub(r"~(\w+\.)*", "", signature), returned

    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the pages of the API from the docstrings.")
    parser.add_argument("directory", type=Path, help="where to write them")
    directory: Path = parser.parse_args().directory
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "source")
        source.mkdir()
        write_sources(source)
        app = Sphinx(
            source,
            None,
            directory,
            Path(temporary, "trees"),
            "html",
            SETTINGS,
            status=None,
            warningiserror=True,
        )
        app.connect("autodoc-process-signature", tidy)
        app.build()

    print(directory / "index.html")
    return app.statuscode


if __name__ == "__main__":
    sys.exit(main())

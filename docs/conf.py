"""How Sphinx builds these pages: ``python -m sphinx -W docs build/docs``."""

import re
from typing import Any

project = "agentloop"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "agentloop"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
highlight_language = "text"

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Long unions are shown by their names.
autodoc_type_aliases = {name: name for name in ("Event", "Inputs", "StreamInputs")}
maximum_signature_line_length = 80

nitpicky = True
# Types in signatures that belong to others, are private or are type variables have no page.
nitpick_ignore_regex = [
    ("py:class", r"(?!agentloop\.)\w+\..*|agentloop\.(contrib\.dask\.|journal\.|testing\.)?_.*|P|T"),
    ("py:class", r"(Stream)?Inputs|Event|AbstractAsyncContextManager"),
]

# Loops make these; their constructors are private.
MADE_BY_LOOPS = {"agentloop.AgentStream"}


def tidy(
    app: object, what: str, name: str, obj: object, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Leave out of a signature what does not help to call it."""
    del app, what, obj, options
    if name in MADE_BY_LOOPS:
        return "", None

    # The tilde of a parameter specification keeps Sphinx from reading those that stand for short names.
    if signature and "~P" in signature:
        signature = re.sub(r"~(\w+\.)*", "", signature)

    return shown(signature), shown(returned)


def shown(types: str | None) -> str | None:
    """Name the aliases that Sphinx marks by an object, and the class for which there is a private base."""
    if types is None:
        return None

    types = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", types)
    return re.sub(r"\bAnyJournal\b", "~agentloop.journal.Journal", types)


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", tidy)

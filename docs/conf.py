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
maximum_signature_line_length = 80

nitpicky = True
# Types in signatures that belong to others, are private or are type variables have no page.
nitpick_ignore_regex = [("py:class", r"(?!agentloop\.)\w+\..*|agentloop\.(journal\.|testing\.)?_.*|P|T")]

# Loops make these; their constructors are private.
MADE_BY_LOOPS = {"agentloop.AgentStream"}


def tidy(
    app: object, what: str, name: str, obj: object, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Leave out of a signature what does not help to call it."""
    del app, what, obj, options
    if name in MADE_BY_LOOPS:
        return "", None

    # The tilde of a parameter specification keeps Sphinx from reading those that stand for short names.
    if signature and "~P" in signature:
        return re.sub(r"~(\w+\.)*", "", signature), returned

    return None


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", tidy)

"""
A report of a run: one HTML file that needs no network, no script and nothing else.

What it shows of durations comes from a snapshot; what happened when, and why, comes from the file of a
:class:`agentloop.contrib.timeline.Timeline`. Its size depends on neither.
"""

from __future__ import annotations

__all__ = ["render_report", "write_report"]

import os
from importlib.resources import files
from typing import TypeAlias

from agentloop import MetricsSnapshot

from ._sections import concurrency, durations, failures, headline, latency_section, throughput
from ._story import Story
from ._text import safe

_Path: TypeAlias = str | os.PathLike[str]


def write_report(
    path: _Path, snapshot: MetricsSnapshot, timeline: _Path | None = None, *, title: str = "A run of agents"
) -> None:
    """
    Write a report.

    :param path: the file, which is overwritten
    :param snapshot: what a recorder has recorded
    :param timeline: the file of a timeline, which may lack its end
    :param title: what it is called
    :raises OSError: if a file cannot be read or written
    """
    page = render_report(snapshot, timeline, title=title)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def render_report(
    snapshot: MetricsSnapshot, timeline: _Path | None = None, *, title: str = "A run of agents"
) -> str:
    """
    Return a report as HTML.

    :param snapshot: what a recorder has recorded
    :param timeline: the file of a timeline, which may lack its end
    :param title: what it is called
    :raises OSError: if the timeline cannot be read
    """
    story = Story()
    if timeline is not None:
        with open(timeline, encoding="utf-8", errors="replace") as file:
            story.read(file)

    style = files(__name__).joinpath("style.css").read_text("utf-8")
    sections = [headline(snapshot, story), latency_section(snapshot.latency)]
    if story.bins.end:
        sections += [concurrency(story), throughput(story)]

    sections += [failures(snapshot, story, timeline is not None), durations(snapshot)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Should any text get past the escaping, it can still do nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{safe(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{safe(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )

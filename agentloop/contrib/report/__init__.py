"""
A report of a run: one HTML file that needs no network and no script.

Counts and durations come from a snapshot. Times and reasons come from the file of a
:class:`agentloop.contrib.timeline.Timeline`. The size of the report is bounded, however long the run was.
"""

from __future__ import annotations

__all__ = ["render_report", "write_report"]

import os
from importlib.resources import files
from typing import TypeAlias

from agentloop import MetricsSnapshot

from ._history import RunHistory
from ._sections import concurrency, durations, failures, headline, latency_section, throughput
from ._text import safe

_Path: TypeAlias = str | os.PathLike[str]


def write_report(
    path: _Path, snapshot: MetricsSnapshot, timeline: _Path | None = None, *, title: str = "A run of agents"
) -> None:
    """
    Write a report.

    :param path: the file to write; it is overwritten
    :param snapshot: the snapshot of a recorder
    :param timeline: the file of a timeline; it may lack its end
    :param title: the title of the page
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

    :param snapshot: the snapshot of a recorder
    :param timeline: the file of a timeline; it may lack its end
    :param title: the title of the page
    :raises OSError: if the timeline cannot be read
    """
    history = RunHistory()
    if timeline is not None:
        with open(timeline, encoding="utf-8", errors="replace") as file:
            history.read(file)

    style = files(__name__).joinpath("style.css").read_text("utf-8")
    sections = [headline(snapshot, history), latency_section(snapshot.latency)]
    if history.bins.end:
        sections += [concurrency(history), throughput(history)]

    sections += [failures(snapshot, history, timeline is not None), durations(snapshot)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # A second defence: a text that got past the escaping could load and run nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{safe(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{safe(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )

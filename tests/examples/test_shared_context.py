"""The example of a team over one store, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@cache
def output(backend: str) -> str:
    """Return what a run prints in which nothing unexpected happens."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "shared_context.py"), "--backend", backend],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@backends
def test_the_watcher_shows_the_beginning_and_the_end(backend: str) -> None:
    shown = re.findall(r"^  ([.w?r#]{8})  (\d) of 8 done$", output(backend), re.MULTILINE)
    assert len(shown) > 3
    assert shown[-1] == ("########", "8")
    done = [int(number) for _, number in shown]
    assert done == sorted(done)
    assert all(int(number) == marks.count("#") for marks, number in shown)
    assert not {"w", "r"}.isdisjoint("".join(marks for marks, _ in shown))


@backends
def test_every_chapter_goes_from_one_hand_to_the_next(backend: str) -> None:
    chapters = re.findall(r"^  ([a-z ]+?)  +((?:\w+ > )*\w+)$", output(backend), re.MULTILINE)
    assert len(chapters) == 8
    for topic, hands in chapters:
        names = hands.split(" > ")
        assert len(names) == (2 if len(topic) < 9 else 4)
        assert {*names[::2]} <= {"Ann", "Bob", "Cho"}
        assert {*names[1::2]} <= {"Rae", "Sam"}


@backends
def test_the_figures_are_those_of_the_story(backend: str) -> None:
    out = output(backend)
    assert "\n6 chapters took one draft, 2 took two\n" in out
    # A plan, ten drafts, ten reviews.
    found = re.search(r"^(\d+) requests, of which (\d+) failed and were sent again$", out, re.MULTILINE)
    assert found
    assert int(found[1]) - int(found[2]) == 21
    assert int(found[2]) > 0
    # The plan, ten drafts and ten reviews, each of the twenty claimed in a step of its own.
    assert re.search(
        r"^<ContextStore 2 keys, version 41>, saved in \d+ bytes and restored$", out, re.MULTILINE
    )
    assert out.isascii()
    assert all(len(line) <= 80 for line in out.splitlines())

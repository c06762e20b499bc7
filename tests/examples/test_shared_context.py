"""The example of a team over one store, run as a user runs it."""

from __future__ import annotations

import re
from functools import cache

import examples_run
import pytest
from examples_run import every_backend

pytestmark = pytest.mark.long


@cache
def output(backend: str) -> str:
    return examples_run.output("shared_context", "--backend", backend)


@every_backend
def test_the_watcher_shows_the_beginning_and_the_end(backend: str) -> None:
    shown = re.findall(r"^  ([.w?r#]{8})  (\d) of 8 done$", output(backend), re.MULTILINE)
    assert len(shown) > 3
    assert shown[-1] == ("########", "8")
    done = [int(number) for _, number in shown]
    assert done == sorted(done)
    assert all(int(number) == marks.count("#") for marks, number in shown)
    assert not {"w", "r"}.isdisjoint("".join(marks for marks, _ in shown))


@every_backend
def test_every_chapter_goes_from_one_hand_to_the_next(backend: str) -> None:
    chapters = re.findall(r"^  ([a-z ]+?)  +((?:\w+ > )*\w+)$", output(backend), re.MULTILINE)
    assert len(chapters) == 8
    for topic, hands in chapters:
        names = hands.split(" > ")
        assert len(names) == (2 if len(topic) < 9 else 4)
        assert {*names[::2]} <= {"Ann", "Bob", "Cho"}
        assert {*names[1::2]} <= {"Rae", "Sam"}


@every_backend
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

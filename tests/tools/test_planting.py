"""A defect is planted wherever its function stands and however that is written, or its place is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from planting import plant

MODULE = '''
class Line:
    def leave(self):
        """Leave the line."""
        # Who stood behind it may go on.
        if (
            self.first
            and not self.paused
        ):
            self.wake()
            self.count(1)

        self.count(2)

    @property
    def first(self):
        return self._first

    @first.setter
    def first(self, value):
        self._first = value
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "line.py").write_text(MODULE)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "other.py").write_text("def other():\n    pass\n")
    return tmp_path


def leave(*lines: str) -> str:
    return "\n".join(["        " + line for line in lines])


@pytest.mark.parametrize(
    ("old", "new", "body"),
    [
        ("not self.paused", "True", ["if self.first and True:", "    self.wake()", "    self.count(1)"]),
        ("self.wake()", "", ["if self.first and (not self.paused):", "    self.count(1)"]),
        ("if self.first and not self.paused:\n    ...", "", []),
        (
            "\n    if self.first and not self.paused:\n        self.wake()\n        ...\n",
            "\n    self.wake()\n    while self.first:\n        ...\n",
            ["self.wake()", "while self.first:", "    self.count(1)"],
        ),
    ],
    ids=["an expression", "a statement", "a block", "the head of a block"],
)
def test_place_is_found_in_the_syntax_tree(package: Path, old: str, new: str, body: list[str]) -> None:
    module, text = plant("Line.leave", old, new, package)
    assert module == "line.py"
    assert leave('"""Leave the line."""', *body, "self.count(2)") + "\n" in text


def test_block_that_loses_all_keeps_its_form(package: Path) -> None:
    _, text = plant("line.py::Line.first", "self._first = value", "", package)
    assert text.endswith("def first(self, value):\n        pass")


@pytest.mark.parametrize(
    ("where", "old", "message"),
    [
        ("Line.enter", "self.wake()", r"^Line\.enter is gone"),
        ("other.py::Line.leave", "self.wake()", r"^other\.py::Line\.leave is gone"),
        (
            "Line.leave",
            "self.sleep()",
            r"^Line\.leave in line\.py has it 0 times, expected once:\nself\.sleep",
        ),
        ("Line.leave", "self.count", r"has it 2 times"),
    ],
    ids=["no function", "in another file", "not there", "twice"],
)
def test_place_that_is_not_the_only_one_is_named(package: Path, where: str, old: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        plant(where, old, "None", package)


def test_function_of_two_modules_needs_its_file(package: Path) -> None:
    (package / "other.py").write_text("def other():\n    return 1\n")
    with pytest.raises(LookupError, match=r"^other stands in \['inner/other\.py', 'other\.py'\]: name one"):
        plant("other", "1", "2", package)

    assert plant("other.py::other", "1", "2", package) == ("other.py", "def other():\n    return 2")

"""Draws displays at the lower end of a terminal, below all that is printed meanwhile."""

from __future__ import annotations

__all__ = ["Terminal", "is_terminal"]

import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import IO, Any, ClassVar

from rich.cells import cell_len
from rich.console import Console

_STYLES = re.compile(r"\x1b\[[\d;]*m")


class Terminal:
    """
    Draws the lines of displays below each other, and moves them down when something is printed.

    While a display is shown, each stream that writes to the terminal has its ``write()`` replaced. The stream
    stays the same object, so log handlers and consoles that refer to it use the new ``write()`` too. A line
    that is printed in pieces continues above the displays.

    Any thread may print, and threads with event loops of their own may have displays.

    :param console: the console of the first display: its file, and its size
    """

    _all: ClassVar[dict[object, Terminal]] = {}
    _lock = threading.RLock()

    def __init__(self, console: Console) -> None:
        self._console = console
        self._file = console.file
        self._write: Callable[[str], object] = self._file.write
        # The lines of each display.
        self._shown: dict[object, list[str]] = {}
        self._streams: list[tuple[dict[str, Any], Any]] = []
        self._drawn = 0
        # The text that was printed since the last newline.
        self._line = ""

    @classmethod
    def of(cls, console: Console) -> Terminal:
        """Return the terminal of a console. Consoles that write to the same terminal share one object."""
        with cls._lock:
            return cls._all.setdefault(_key(console.file), cls(console))

    def show(self, display: object, lines: list[str]) -> None:
        """
        Draw the lines of a display, in the place of its earlier ones.

        :raises OSError: if the terminal cannot be written
        """
        with self._lock:
            if not self._shown:
                self._take_streams()

            self._shown[display] = lines
            self._write(self._erasure() + self._drawing())
            self._file.flush()

    def print_last(self, display: object, lines: list[str]) -> None:
        """
        Print the last lines of a display above the other displays. They stay visible.

        :raises OSError: if the terminal cannot be written
        """
        with self._lock:
            self._shown.pop(display, None)
            text = self._erasure() + ("\n" if self._line else "") + "\n".join([*lines, ""])
            self._line = ""
            self._write(text + self._drawing())
            self._file.flush()

    def remove(self, display: object) -> None:
        """Remove a display, and restore the streams after the last one."""
        with self._lock:
            self._shown.pop(display, None)
            if not self._shown:
                self._give_streams_back()
                self._all.pop(_key(self._file), None)

    def _take_streams(self) -> None:
        streams = [self._file]
        if is_terminal(self._file):
            streams += [s for s in (sys.stdout, sys.stderr) if s is not self._file and is_terminal(s)]

        for stream in streams:
            attributes = getattr(stream, "__dict__", None)
            if attributes is not None:
                self._streams.append((attributes, attributes.get("write")))
                attributes["write"] = partial(self._print, stream, stream.write)

    def _give_streams_back(self) -> None:
        for attributes, before in self._streams:
            if before is None:
                attributes.pop("write", None)
            else:
                attributes["write"] = before

        self._streams.clear()

    def _print(self, stream: IO[str], write: Callable[[str], int], text: str) -> int:
        """Print a text above the displays. It replaces ``write()`` of a stream."""
        with self._lock:
            if not self._shown or not text:
                return write(text)

            self._draw(self._erasure())
            written = write(text)
            self._line = (self._line + text).rpartition("\n")[2]
            stream.flush()
            self._draw(self._drawing())
            return written

    def _draw(self, text: str) -> None:
        try:
            self._write(text)
            self._file.flush()
        except Exception:
            # The caller of print() gets no error of ours: show() will raise and report it.
            self._drawn = 0

    def _drawing(self) -> str:
        """Return the text that draws the displays below the cursor, and leaves the cursor at their end."""
        lines = [line for lines in self._shown.values() for line in lines]
        lines = lines[: max(1, self._console.height - 2)]
        column = self._column()
        if not lines or column is None:
            return ""

        self._drawn = len(lines)
        return ("\n" if column else "") + "\n".join(lines)

    def _erasure(self) -> str:
        """Return the text that erases the displays, and moves the cursor to the end of the printed text."""
        if not self._drawn:
            return ""

        column = self._column()
        up = self._drawn - 1 + bool(column)
        self._drawn = 0
        return "\r" + (f"\x1b[{up}A" if up else "") + (f"\x1b[{column}C" if column else "") + "\x1b[J"

    def _column(self) -> int | None:
        """Return the column where an unfinished line ends; ``None`` if the cursor cannot return there."""
        text = _STYLES.sub("", self._line)
        if not text.isprintable():
            return None

        width, column = self._console.width, 0
        for char in text:
            cells = cell_len(char)
            # A wide character that does not fit at the end of a row goes to the next one.
            column = cells if column + cells > width else column + cells

        return None if column == width else column


def is_terminal(file: IO[str]) -> bool:
    """Return whether a file is a terminal and open."""
    try:
        return file.isatty()
    except (AttributeError, ValueError):
        return False


def _key(file: IO[str]) -> object:
    # All standard streams write to the same terminal.
    return None if is_terminal(file) else id(file)

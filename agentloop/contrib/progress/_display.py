"""Displays of a meter: lines of a log, an output of a notebook, lines at the lower end of a terminal."""

from __future__ import annotations

__all__ = ["make_display"]

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import COLOR_SYSTEMS, Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ._meter import Meter, State
from ._terminal import Terminal, is_terminal

_logger = logging.getLogger("agentloop")


class Display(ABC):
    """
    Shows the progress of a loop. After an error it shows nothing more; the error is logged, not raised.

    The console only renders, and the display writes: a console exits the process at a broken pipe.
    """

    interval_seconds: float

    def __init__(self, console: Console, meter: Meter) -> None:
        self._console = console
        self._meter = meter
        self._has_failed = False

    def draw(self) -> None:
        """Show the state."""
        self._try(self._show)

    def _try(self, show: Callable[[], None]) -> None:
        if not self._has_failed:
            try:
                show()
            except Exception:
                self._has_failed = True
                _logger.exception("progress cannot be shown any more")

    def open(self) -> None:
        """Show the first state."""
        self.draw()

    def close(self) -> None:
        """Show the last state. It stays visible."""
        self.draw()

    @abstractmethod
    def _show(self) -> None:
        """Write the state."""

    def _render(self) -> list[str]:
        """Return the state as lines, with escape codes for their styles."""
        console = self._console
        system = COLOR_SYSTEMS.get(console.color_system or "")
        lines: Iterable[Iterable[Segment]] = console.render_lines(_Frame(self._meter.read()), pad=False)
        if console.no_color:
            lines = map(Segment.remove_color, lines)

        return [
            "".join(style.render(text, color_system=system) if style else text for text, style, _ in line)
            for line in lines
        ]


class _Lines(Display):
    """A line at each update."""

    interval_seconds = 5.0

    def open(self) -> None:
        """Show nothing yet: this line would stay."""

    def _show(self) -> None:
        state = self._meter.read()
        figures = [state.counts(), *(text for text, _ in state.items()), state.times()]
        file = self._console.file
        file.write(", ".join(figures) + "\n")
        file.flush()


class _Notebook(Display):
    """An output of a notebook's cell, updated in place."""

    interval_seconds = 1.0

    def __init__(self, console: Console, meter: Meter) -> None:
        super().__init__(console, meter)
        self._output: Any = None

    def _show(self) -> None:
        data = {"text/plain": "\n".join(self._render())}
        if self._output is None:
            show = importlib.import_module("IPython.display").display
            self._output = show(data, raw=True, display_id=True)
        else:
            self._output.update(data, raw=True)


class _Frames(Display):
    """A few lines at the lower end of a terminal, drawn again at each update."""

    interval_seconds = 0.2

    def __init__(self, console: Console, meter: Meter) -> None:
        super().__init__(console, meter)
        self._terminal = Terminal.of(console)

    def close(self) -> None:
        try:
            self._try(lambda: self._terminal.print_last(self, self._render()))
        finally:
            # In any case: remove() restores the standard streams.
            self._terminal.remove(self)

    def _show(self) -> None:
        self._terminal.show(self, self._render())


class _Frame:
    """Renders the state as a bar and a few lines, in the width of the console."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state, width = self._state, options.max_width
        heading = Text(f"{state.counts()}  {state.times()}", "bold", no_wrap=True, overflow="ellipsis")
        room = width - heading.cell_len - 2
        grid = Table.grid(padding=(0, 2))
        if state.total and room >= 10:
            grid.add_row(ProgressBar(state.total, state.done, width=min(room, 40)), heading)
        else:
            if state.total:
                grid.add_row(ProgressBar(state.total, state.done, width=min(width, 40)))

            grid.add_row(heading)

        yield grid
        yield from _packed([Text(text, style) for text, style in state.items()], width)


def _packed(items: Sequence[Text], width: int) -> Iterator[Text]:
    """Yield the items in lines of at most ``width`` cells, without breaking an item."""
    line = Text()
    for item in items:
        if line and line.cell_len + 2 + item.cell_len > width:
            yield line
            line = Text()

        line = Text("  ").join([line, item]) if line else item

    yield line


def make_display(console: Console | None, meter: Meter) -> Display:
    """
    Return the display that suits a console.

    :param console: the console to write to; standard error if absent
    """
    if console is None:
        console = Console(stderr=True)
        # Some CI services force colours; rich then takes a file for a terminal.
        can_draw = is_terminal(console.file)
    else:
        can_draw = True

    if console.is_jupyter:
        return _Notebook(console, meter)

    # An old console of Windows understands no escape codes.
    if can_draw and console.is_interactive and console.is_terminal and not console.legacy_windows:
        return _Frames(console, meter)

    return _Lines(console, meter)

"""What a person sees of what was written to a terminal."""

import re

from rich.cells import cell_len

_PART = re.compile(r"\x1b\[([\d;?]*)([a-zA-Z])|(.)", re.DOTALL)


def on_screen(text: str, width: int) -> list[str]:
    """Return the rows of a terminal that text was written to, with the few commands that we use."""
    rows: list[list[str]] = [[]]
    row = column = 0
    for number, command, char in _PART.findall(text):
        count = int(number) if number.isdigit() else 1
        if command == "A":
            row = max(0, row - count)
        elif command == "C":
            column = min(width - 1, column + count)
        elif command == "J":
            del rows[row][column:], rows[row + 1 :]
        elif char == "\n":
            # As terminals are set: the line discipline adds the carriage return.
            row, column = row + 1, 0
        elif char == "\r":
            column = 0
        elif char:
            if column + cell_len(char) > width:
                row, column = row + 1, 0

            rows += [[] for _ in range(row + 1 - len(rows))]
            rows[row] += " " * (column - len(rows[row]))
            # A wide character takes two places.
            cells = [char, ""][: cell_len(char)]
            rows[row][column : column + len(cells)] = cells
            column += len(cells)
        else:
            assert command in ("m", "")

        rows += [[] for _ in range(row + 1 - len(rows))]

    return ["".join(chars).rstrip() for chars in rows]

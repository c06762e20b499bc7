"""Makes texts safe for HTML, and numbers short."""

from __future__ import annotations

__all__ = ["class_of", "duration", "percent", "safe"]

import math
import unicodedata
from html import escape

from agentloop import Status


def safe(text: str) -> str:
    """Return a text that is safe in HTML. It neither reorders nor hides the text around it."""
    return escape("".join(char if _is_harmless(char) else "\ufffd" for char in text[:500]))


def _is_harmless(char: str) -> bool:
    # Scripts and emojis need joiners, wide spaces and tags: those have the bidirectional class BN. The other
    # characters of category Cf are marks of direction, which reorder the text around them.
    category = unicodedata.category(char)
    return (
        char.isprintable()
        or category == "Zs"
        or (category == "Cf" and unicodedata.bidirectional(char) == "BN")
    )


def class_of(status: str) -> str:
    return status if status in list(Status) else "cancelled"


def percent(part: int, whole: int) -> str:
    # Rounded down: 99.99 % must not read 100 %.
    percent = math.floor(1000 * part / whole) / 10
    return f"{percent:g} %"


def duration(value: float) -> str:
    """Return a duration in the unit that suits it."""
    if not value:
        return "0"

    if value < 1000:
        return f"{value:.3g} ms" if value < 999.5 else "1 s"

    seconds = value / 1000
    if seconds < 99.95:
        return f"{seconds:.3g} s"

    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"

    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"

"""
A file that holds the results of batches, so that an interrupted batch goes on where it stopped.

It is an SQLite database. ``python -m agentloop.journal show FILE`` prints a summary of it.
"""

from .._errors import JournaledError, JournalError, JournalInUse, JournalMismatch
from ._entries import Entry
from ._journal import Journal, JournalStatistics

__all__ = [
    "Entry",
    "Journal",
    "JournalError",
    "JournalInUse",
    "JournalMismatch",
    "JournalStatistics",
    "JournaledError",
]


def _name_their_place() -> None:
    # Tracebacks, pickles and documentation name the place where users find a thing.
    for name in __all__:
        globals()[name].__module__ = __name__


_name_their_place()

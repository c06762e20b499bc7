"""Distinguishes errors of users' functions from interruptions."""

from __future__ import annotations

__all__ = ["is_error"]

import asyncio
import sys
from typing import cast


def is_error(exc: BaseException) -> bool:
    """
    Return whether an exception of a user's plain function is an error, rather than an interruption.

    A cancellation counts as an error: a plain function cannot be cancelled, since it never waits.
    """
    # Trio's, if it has been imported.
    cancelled = getattr(sys.modules.get("trio"), "Cancelled", asyncio.CancelledError)
    kinds = (Exception, asyncio.CancelledError, cancelled)
    # type() rather than isinstance(): `__class__` may be a property that raises.
    if issubclass(type(exc), BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", exc).split(kinds)[1] is None

    return issubclass(type(exc), kinds)

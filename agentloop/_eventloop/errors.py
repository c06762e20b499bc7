"""What an exception of a user's function is."""

from __future__ import annotations

__all__ = ["is_error"]

import asyncio
import sys
from typing import cast


def is_error(exc: BaseException) -> bool:
    """
    Tell whether a plain function of a user's has failed with an exception, rather than been interrupted.

    A cancellation that it raises is an error of its own, since nothing can be cancelled where nothing waits.
    """
    # Trio's, if it has been imported.
    cancelled = getattr(sys.modules.get("trio"), "Cancelled", asyncio.CancelledError)
    kinds = (Exception, asyncio.CancelledError, cancelled)
    # Only the type is asked: `__class__` may be a property that raises.
    if issubclass(type(exc), BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", exc).split(kinds)[1] is None

    return issubclass(type(exc), kinds)

"""Safe access to objects of foreign classes, whose code may raise anything."""

__all__ = ["foreign_code", "name_of", "read_attribute"]

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any


class _ForeignCode:
    """
    A block that drops all errors raised in it, and cancellations too, since none can arrive in code that does
    not wait. ``KeyboardInterrupt`` and ``SystemExit`` propagate.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        return exc_type is not None and not issubclass(exc_type, (KeyboardInterrupt, SystemExit))


foreign_code = _ForeignCode()


def read_attribute(source: object, name: str) -> Any:
    """Return an attribute; ``None`` if it is missing, or a property that raises."""
    try:
        return getattr(source, name, None)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return None


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name of a function."""
    while isinstance(fn, partial):
        fn = fn.func

    return getattr(fn, "__name__", type(fn).__name__)

"""Pickles for other processes."""

from __future__ import annotations

__all__ = ["dumps", "loads"]

import copyreg
import io
import pickle
from collections import ChainMap, UserDict
from typing import Any, ClassVar

# It has no types, for either checker.
import cloudpickle as untyped  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]

loads = pickle.loads
_cloudpickle: Any = untyped


class _Reducers(UserDict[type, Any]):
    """
    All that is registered with ``copyreg``, but what Dask has there for exceptions.

    That calls no ``__init__``, so that of an error, of ``SystemExit`` too, something may be missing, and
    Python's own error for this would not be raised.
    """

    def __missing__(self, kind: type) -> Any:
        reducer = copyreg.dispatch_table[kind]
        if reducer.__module__.partition(".")[0] == "tblib":
            raise KeyError(kind)

        return reducer


_reducers = _Reducers()


class _ByName(pickle.Pickler):
    dispatch_table = _reducers


class _ByValue(_cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    dispatch_table: ClassVar[Any] = ChainMap(_cloudpickle.Pickler.dispatch_table.maps[0], _reducers)


def dumps(value: Any) -> bytes:
    """Pickle a value; if need be by value, as what is defined in ``__main__`` or in a function must be."""
    try:
        # Faster than by value, most of all for errors.
        data = _pickle(_ByName, value)
        if b"__main__" not in data:
            return data

    except Exception:
        pass

    return _pickle(_ByValue, value)


def _pickle(kind: Any, value: Any) -> bytes:
    file = io.BytesIO()
    kind(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()

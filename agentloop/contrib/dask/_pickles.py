"""Pickles for other processes."""

from __future__ import annotations

__all__ = ["dumps", "loads"]

import copyreg
import io
import pickle
from collections import ChainMap, UserDict
from typing import Any, ClassVar

# The package has no types, for either checker.
import cloudpickle as untyped  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]

loads = pickle.loads
_cloudpickle: Any = untyped


class _Reducers(UserDict[type, Any]):
    """
    The reducers that are registered with ``copyreg``, without those of ``tblib`` for exceptions.

    Dask registers these. They restore an exception without calling its ``__init__``, so attributes may be
    missing without an error (the ``code`` of ``SystemExit``, for example). Python's own reducer raises one.
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
    """Pickle by name where possible, and by value what ``__main__`` or a function body defines."""
    try:
        # By name is faster, most of all for errors.
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

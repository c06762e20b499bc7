"""The encoding of outputs."""

from __future__ import annotations

__all__ = ["Codec"]

from collections.abc import Callable
from typing import Any

from .. import _validators as must
from .._errors import JournalError
from .._eventloop.errors import is_error


class Codec:
    """
    Encodes and decodes outputs.

    :param encode: returns the data for the file
    :param decode: returns the output for the data
    """

    def __init__(self, encode: Callable[[Any], str | bytes], decode: Callable[[Any], Any]) -> None:
        self._decode = decode
        self._encode = encode
        # The agents whose first output could be encoded and decoded.
        self._proven: set[str] = set()

    def encode(self, agent: str, output: Any) -> str | bytes:
        """
        Encode an output.

        :raises Exception: the exception of ``encode``
        """
        data: object = self._encode(output)
        if isinstance(data, str):
            data.encode()
        elif not isinstance(data, bytes):
            must.close_coroutine(data)
            raise TypeError(f"encode must return str or bytes, got {data!r}")

        if agent not in self._proven:
            self._decode(data)
            self._proven.add(agent)

        return data

    def is_proven(self, agent: str) -> bool:
        """Return whether an output of an agent was encoded and decoded before."""
        return agent in self._proven

    def decode(self, path: str, row: int, agent: str, data: Any) -> Any:
        """
        Return an output that a file holds.

        :raises JournalError: if it cannot be decoded
        """
        try:
            return self._decode(data)
        except BaseException as exc:
            if not is_error(exc):
                raise

            raise JournalError(
                f"{path}: result {row}, of {agent}, cannot be decoded: {type(exc).__name__}: {exc}; "
                "open it with the decode= that it was written for"
            ) from exc

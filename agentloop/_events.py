"""What is told about invocations while they run."""

__all__ = ["ChunkEvent", "ResultEvent"]

from typing import Any, Generic, TypeVar

import attrs

from ._invocation import Invocation
from ._result import InvocationResult

T_co = TypeVar("T_co", covariant=True)


@attrs.frozen
class ChunkEvent(Generic[T_co]):
    """
    One of several streams has yielded a chunk.

    :param invocation: whose stream it is
    :param chunk: what it yielded
    :param index: the place of the invocation in the input
    """

    invocation: Invocation[Any]
    chunk: T_co
    index: int = 0


@attrs.frozen
class ResultEvent:
    """
    One of several streams has ended; no event of it comes after this one.

    :param invocation: whose stream it is
    :param result: what became of it
    """

    invocation: Invocation[Any]
    result: InvocationResult[None]

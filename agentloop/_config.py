"""The settings of a loop."""

__all__ = ["ConfigChanges", "LoopConfig"]

import math
from collections.abc import Callable
from typing import Any, TypedDict

import attrs

from . import _validators as must
from ._backoff import Backoff
from ._misuse import name_parameters
from ._stop_rule import StopRule
from ._verdict import Verdict, classify

_TIMEOUT = 300.0


def _check_total(config: "LoopConfig", attribute: "attrs.Attribute[Any]", value: float | None) -> None:
    each = config.timeout_seconds
    # A default of timeout_seconds may be above the total, and neither None nor infinity would be ignored.
    if value is not None and each is not None and each not in (_TIMEOUT, math.inf) and value < each:
        raise ValueError(
            f"{attribute.name} must be at least timeout_seconds={each!r}, got {value!r}: "
            "no attempt could take that long"
        )


@name_parameters()
@attrs.frozen(kw_only=True)
class LoopConfig:
    """
    The settings of a loop. Durations are in seconds; ``None`` means no limit.

    :param max_concurrency: how many invocations may run at once, if the loop is given no limiter
    :param timeout_seconds: how long each attempt may take
    :param total_timeout_seconds: how long an invocation may take from its first start, with all its
        attempts and the waits between them; at least ``timeout_seconds``, if both are given
    :param retry_on_timeout: whether an attempt that ran into ``timeout_seconds`` is retried
    :param max_retries: how many retries an invocation may have; 0 for none of any kind
    :param backoff: how long to wait before a retry
    :param classify: a plain function that judges the exception of an attempt
    :param first_chunk_timeout_seconds: how long a stream may take to its first chunk
    :param idle_timeout_seconds: how long a stream may take from one chunk to the next
    :param overload_timeout_seconds: how long an invocation is retried through overload; such retries do not
        count towards ``max_retries``. A batch stops when nothing has succeeded through its limiter for as
        long: see :class:`Limiter`
    :param queue_timeout_seconds: how long a single invocation or a stream may wait for its first slot: then
        its result is ``TIMEOUT``, with a :exc:`QueueTimeout`. It does not apply to batches, nor to nested
        invocations that can borrow a slot
    :param stop: when a batch stops by itself; single invocations and streams are no batches
    :param collect_metrics: whether results are recorded
    :raises TypeError: if a value is of the wrong type; ``bool`` is no number
    :raises ValueError: if a value is out of its range, or would be ignored because of another one
    """

    max_concurrency: int = attrs.field(default=10, validator=must.whole(1))
    timeout_seconds: float | None = attrs.field(
        default=_TIMEOUT, validator=must.number(above=0, optional=True)
    )
    total_timeout_seconds: float | None = attrs.field(
        default=None, validator=[must.number(above=0, optional=True), _check_total]
    )
    retry_on_timeout: bool = attrs.field(default=True, validator=must.instance(bool))
    max_retries: int = attrs.field(default=3, validator=must.whole(0))
    backoff: Backoff = attrs.field(factory=Backoff, validator=must.instance(Backoff))
    classify: Callable[[Exception], Verdict] = attrs.field(default=classify, validator=must.plain_function)
    first_chunk_timeout_seconds: float | None = attrs.field(
        default=None, validator=must.number(above=0, optional=True)
    )
    idle_timeout_seconds: float | None = attrs.field(
        default=None, validator=must.number(above=0, optional=True)
    )
    overload_timeout_seconds: float | None = attrs.field(
        default=600.0, validator=must.number(above=0, optional=True)
    )
    queue_timeout_seconds: float | None = attrs.field(
        default=None, validator=must.number(above=0, optional=True)
    )
    stop: StopRule | None = attrs.field(
        default=None, validator=attrs.validators.optional(must.instance(StopRule))
    )
    collect_metrics: bool = attrs.field(default=True, validator=must.instance(bool))


class ConfigChanges(TypedDict, total=False):
    """The fields of :class:`LoopConfig`, for what type checkers know of :meth:`AgentLoop.with_config`."""

    max_concurrency: int
    timeout_seconds: float | None
    total_timeout_seconds: float | None
    retry_on_timeout: bool
    max_retries: int
    backoff: Backoff
    classify: Callable[[Exception], Verdict]
    first_chunk_timeout_seconds: float | None
    idle_timeout_seconds: float | None
    overload_timeout_seconds: float | None
    queue_timeout_seconds: float | None
    stop: StopRule | None
    collect_metrics: bool

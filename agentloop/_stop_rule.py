"""The rule by which a batch stops itself."""

__all__ = ["StopRule"]

from typing import Any

import attrs

from . import _validators as must
from ._misuse import name_parameters

_AT_LEAST = 50


def _check_at_least(rule: "StopRule", attribute: "attrs.Attribute[Any]", value: int) -> None:
    # A default value is no mistake.
    if rule.share is None and value != _AT_LEAST:
        raise ValueError(f"{attribute.name} is about share, which is not given, got {value!r}")


def _check_share(_: object, attribute: "attrs.Attribute[Any]", value: float | None) -> None:
    if value is not None and value >= 1:
        raise ValueError(
            f"{attribute.name} must be less than 1, since no more than all can fail, got {value!r}"
        )


@name_parameters()
@attrs.frozen
class StopRule:
    """
    The conditions under which a batch stops: nothing new is started or retried, and running invocations may
    finish.

    The rule applies to each batch, over all the keys of a :class:`KeyedLimiter`. It judges final results that
    are ``ERROR`` or ``TIMEOUT``, in the order in which they end; cancelled and skipped ones do not count. The
    first condition that holds stops the batch. As many invocations as run at that time may end after it.

    :param failures: how many may fail: with the last of them the batch stops
    :param in_a_row: how many may fail with no success between
    :param share: the share of ended invocations that may fail: with more the batch stops
    :param at_least: how many invocations must have ended before ``share`` applies
    :param seconds: how long after its call the batch stops, in seconds
    :param grace_seconds: how many seconds after the stop running invocations are cancelled, with
        ``CANCELLED`` results; ``None`` for never, 0 for at once
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if a value is out of its range or would be ignored, or no condition is given
    """

    failures: int | None = attrs.field(default=None, validator=attrs.validators.optional(must.whole(1)))
    in_a_row: int | None = attrs.field(default=None, validator=attrs.validators.optional(must.whole(1)))
    share: float | None = attrs.field(
        default=None, validator=[must.number(minimum=0, optional=True), _check_share]
    )
    at_least: int = attrs.field(default=_AT_LEAST, validator=[must.whole(1), _check_at_least])
    seconds: float | None = attrs.field(
        default=None, validator=must.number(above=0, optional=True, finite=True)
    )
    grace_seconds: float | None = attrs.field(
        default=None, validator=must.number(minimum=0, optional=True, finite=True)
    )

    def __attrs_post_init__(self) -> None:
        if self.failures is self.in_a_row is self.share is self.seconds is None:
            raise ValueError(
                "a StopRule needs one of failures, in_a_row, share and seconds, or it never stops"
            )

"""The waits before retries."""

__all__ = ["Backoff", "RandomSource"]

from typing import Any, Literal, Protocol

import attrs

from . import _validators as must
from ._misuse import name_parameters


class RandomSource(Protocol):
    """A source of random numbers: a ``random.Random``, or the ``random`` module itself."""

    def random(self) -> float:
        """Return a number from 0, inclusive, to 1, exclusive."""
        ...


_INITIAL = 0.1


def _check_longest(backoff: "Backoff", attribute: "attrs.Attribute[Any]", value: float) -> None:
    initial = backoff.initial_seconds
    # A default of initial_seconds gives way to a smaller max_seconds.
    if initial > value and initial != _INITIAL:
        raise ValueError(f"initial_seconds must be at most {attribute.name}={value!r}, got {initial!r}")


@name_parameters()
@attrs.frozen
class Backoff:
    """
    Exponential backoff with jitter.

    The jitters are those of Marc Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog,
    2015): ``"full"`` draws from ``[0, d)``, ``"equal"`` from ``[d/2, d)``, ``"none"`` waits ``d``,
    where ``d = min(max_seconds, initial_seconds * multiplier ** retry)``.

    :param initial_seconds: the wait before the first retry, in seconds; 0 retries at once. If given, it is at
        most ``max_seconds``
    :param multiplier: the factor of the wait from one retry to the next, at least 1
    :param max_seconds: the longest wait, in seconds
    :param jitter: ``"full"``, ``"equal"`` or ``"none"``
    :param max_retry_after_seconds: the longest Retry-After to wait for, in seconds; an invocation with a
        longer one fails at once
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if a value is out of its range, or there is no such jitter
    """

    initial_seconds: float = attrs.field(default=_INITIAL, validator=must.number(minimum=0, finite=True))
    multiplier: float = attrs.field(default=2.0, validator=must.number(minimum=1, finite=True))
    max_seconds: float = attrs.field(
        default=30.0, validator=[must.number(minimum=0, finite=True), _check_longest]
    )
    jitter: Literal["full", "equal", "none"] = attrs.field(
        default="full", validator=must.one_of(("full", "equal", "none"))
    )
    max_retry_after_seconds: float = attrs.field(default=300.0, validator=must.number(minimum=0))

    def delay(self, retry: int, rng: RandomSource) -> float:
        """
        Return how many seconds to wait before a retry.

        :param retry: how many retries there have been, 0 before the first
        :param rng: the source of the jitter
        :return: seconds, between 0 and ``max_seconds``
        :raises ValueError: if ``retry`` is negative
        """
        if retry < 0:
            raise ValueError(f"retry must be at least 0, got {retry!r}")

        retry = min(retry, 10_000)  # far beyond any limit, and small enough for a float
        try:
            ceiling = min(self.max_seconds, self.initial_seconds * float(self.multiplier) ** retry)
        except OverflowError:
            ceiling = self.max_seconds if self.initial_seconds else 0.0

        if self.jitter == "none":
            return ceiling

        if self.jitter == "equal":
            return ceiling / 2 + ceiling / 2 * rng.random()

        return ceiling * rng.random()

    def wait(self, retry: int, retry_after: float | None, rng: RandomSource) -> float:
        """
        Return how many seconds to wait before a retry, with a server's Retry-After as a floor.

        The floor is raised by up to a quarter at random, so that callers with the same Retry-After do not all
        return at once.

        :param retry: how many retries there have been, 0 before the first
        :param retry_after: the server's Retry-After, in seconds, or ``None``
        :param rng: the source of the jitter
        :return: seconds, never less than ``retry_after``
        :raises ValueError: if ``retry`` is negative
        """
        delay = self.delay(retry, rng)
        if retry_after is None:
            return delay

        if self.jitter != "none":
            retry_after *= 1 + rng.random() / 4

        return max(delay, retry_after)

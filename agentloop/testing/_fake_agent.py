"""An agent for tests, which plays a script."""

__all__ = ["Chunks", "Fail", "FakeAgent", "FakeCall", "FakeHTTPError", "Reply", "Stall"]

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any, TypeAlias, cast

import anyio
import attrs
from anyio.lowlevel import checkpoint

from agentloop import _validators as must

Raisable: TypeAlias = BaseException | type[BaseException]


def _is_raisable(value: object) -> bool:
    return isinstance(value, BaseException) or (isinstance(value, type) and issubclass(value, BaseException))


def _raisable(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not _is_raisable(value):
        raise TypeError(f"{attribute.name} must be an exception or a class of one, got {value!r}")


@attrs.frozen
class FakeResponse:
    """The part of an HTTP response by which errors of HTTP clients are judged."""

    status_code: int
    headers: Mapping[str, str]


# No slots, since other code may set attributes on an exception, such as notes.
@attrs.define(slots=False, eq=False)
class FakeHTTPError(Exception):
    """
    An error like those that HTTP clients raise for a bad status. :func:`agentloop.classify` reads both alike.

    :param status_code: the status, from 100 to 599
    :param retry_after: the header Retry-After: a number of seconds, or any text, such as a date or garbage;
        no header if ``None``
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if a number is out of its range
    """

    status_code: int = attrs.field(validator=must.whole(100))
    retry_after: float | str | None = None

    def __attrs_post_init__(self) -> None:
        if self.status_code > 599:
            raise ValueError(f"status_code must be at most 599, got {self.status_code!r}")

        if not isinstance(self.retry_after, str):
            must.check_number("retry_after", self.retry_after, minimum=0, optional=True, finite=True)

    def __str__(self) -> str:
        return f"HTTP {self.status_code}"

    @property
    def response(self) -> FakeResponse:
        """The response, with its ``status_code`` and ``headers``."""
        after = self.retry_after
        text = after if isinstance(after, str) or after is None else f"{after:.15g}"
        return FakeResponse(self.status_code, {} if text is None else {"retry-after": text})


def _seconds() -> Any:
    return attrs.field(default=0.0, kw_only=True, validator=must.number(minimum=0, finite=True))


@attrs.frozen
class Reply:
    """
    Return a value.

    :param value: the return value
    :param after_seconds: how long that takes
    :raises TypeError: if ``after_seconds`` is no number
    :raises ValueError: if it is negative or not finite
    """

    value: Any = None
    after_seconds: float = _seconds()


@attrs.frozen
class Fail:
    """
    Raise an exception.

    :param exception: the exception: always the same object, or a new one if it is a class
    :param after_seconds: how long that takes
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if ``after_seconds`` is negative or not finite
    """

    exception: Raisable = attrs.field(validator=_raisable)
    after_seconds: float = _seconds()


@attrs.frozen
class Stall:
    """
    Wait until cancelled.

    On a virtual clock, a time-out must cancel it: otherwise the clock reports a deadlock.
    """


def _chunks(value: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"chunks must be an iterable of chunks, got {value!r}: write Chunks([...])")

    return tuple(value)


def _ending(value: Fail | Stall | Raisable | None) -> Fail | Stall | None:
    # Other types are refused below.
    return Fail(cast("Raisable", value)) if _is_raisable(value) else cast("Fail | Stall | None", value)


def _check_ending(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, (Fail, Stall, type(None))):
        raise TypeError(f"{attribute.name} must be an exception, Fail(...), Stall() or None, got {value!r}")


@attrs.frozen
class Chunks:
    """
    Yield chunks, and end.

    :param chunks: the chunks
    :param after_seconds: how long it takes to the first chunk
    :param gap_seconds: how long it takes from each chunk to the next
    :param then: the outcome after the last chunk: an exception, :class:`Fail` or :class:`Stall`; the stream
        ends if ``None``
    :raises TypeError: if a value is of the wrong type
    :raises ValueError: if a number of seconds is negative or not finite
    """

    chunks: tuple[Any, ...] = attrs.field(default=(), converter=_chunks)
    after_seconds: float = _seconds()
    gap_seconds: float = _seconds()
    then: Fail | Stall | None = attrs.field(
        default=None, kw_only=True, converter=_ending, validator=_check_ending
    )


Outcome: TypeAlias = Reply | Fail | Stall | Chunks


@attrs.define(eq=False)
class FakeCall:
    """
    One call of a :class:`FakeAgent`: its arguments and its progress.

    :param args: its positional arguments
    :param kwargs: its keyword arguments
    :param started_at: when it began, in seconds by ``anyio.current_time()``
    :param ended_at: when it ended, in any way; ``None`` as long as it runs
    :param cancelled: whether it was cancelled, or its stream closed, before its end
    :param chunks: how many chunks it has yielded
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    started_at: float
    ended_at: float | None = None
    cancelled: bool = False
    chunks: int = 0


class FakeAgent:
    """
    An agent for tests: each call plays the next outcome of a script, and is recorded::

        agent = FakeAgent(FakeHTTPError(429, retry_after=2), Reply("Forty-two", after_seconds=0.5))
        result = await AgentLoop().run_single("oracle", agent, "Why?")

        assert (result.output, result.retries) == ("Forty-two", 1)
        assert [call.args for call in agent.calls] == [("Why?",), ("Why?",)]

    It is an async function, which any code can call, not only a loop. With :class:`Chunks` in its script, it
    is an async generator function, for :meth:`agentloop.AgentLoop.run_streaming`.

    The last outcome is played again for every further call. To refuse further calls, end the script with
    ``AssertionError("one call too many")``, which is not retried.

    :param script: the outcomes, in the order of the calls: :class:`Reply`, :class:`Fail`, :class:`Stall`,
        :class:`Chunks`, or an exception, which is raised at once
    :raises TypeError: if an outcome is none of these
    :raises ValueError: if there is none, or there is a reply among the outcomes of a stream
    """

    def __init__(self, *script: Outcome | Raisable) -> None:
        self._script = [_as_outcome(index, outcome) for index, outcome in enumerate(script)]
        self._yields = any(isinstance(outcome, Chunks) for outcome in self._script)
        if not script:
            raise ValueError('script must have at least one outcome, such as Reply("Forty-two")')

        if self._yields and any(isinstance(outcome, Reply) for outcome in self._script):
            raise ValueError("script must not have both Reply and Chunks: an agent either returns or yields")

        self._calls: list[FakeCall] = []
        self._running = 0
        self._peak = 0

    def __repr__(self) -> str:
        return f"<FakeAgent {len(self._calls)} calls, {self._running} running, peak {self._peak}>"

    @property
    def calls(self) -> list[FakeCall]:
        """The calls so far, in the order in which they began to run."""
        return self._calls.copy()

    @property
    def running(self) -> int:
        """How many calls run now."""
        return self._running

    @property
    def peak(self) -> int:
        """The largest number of calls that ran at once."""
        return self._peak

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """
        Play the next outcome, as soon as this is awaited or iterated over.

        :return: a coroutine; an async generator if there are :class:`Chunks` in the script
        """
        return self._stream(args, kwargs) if self._yields else self._run(args, kwargs)

    async def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, outcome = self._begin(args, kwargs)
        try:
            return await _play(outcome)
        except BaseException as exc:
            _note_cancellation(call, exc)
            raise
        finally:
            self._end(call)

    async def _stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncGenerator[Any, None]:
        call, outcome = self._begin(args, kwargs)
        ending: Outcome | None = outcome
        try:
            if isinstance(outcome, Chunks):
                seconds = outcome.after_seconds
                for chunk in outcome.chunks:
                    await anyio.sleep(seconds)
                    seconds = outcome.gap_seconds
                    call.chunks += 1
                    yield chunk

                ending = outcome.then

            await _play(ending)
        except BaseException as exc:
            _note_cancellation(call, exc)
            raise
        finally:
            self._end(call)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[FakeCall, Outcome]:
        outcome = self._script[min(len(self._calls), len(self._script) - 1)]
        call = FakeCall(args, kwargs, anyio.current_time())
        self._calls.append(call)
        self._running += 1
        self._peak = max(self._peak, self._running)
        return call, outcome

    def _end(self, call: FakeCall) -> None:
        self._running -= 1
        call.ended_at = anyio.current_time()


def _note_cancellation(call: FakeCall, exc: BaseException) -> None:
    call.cancelled = isinstance(exc, (anyio.get_cancelled_exc_class(), GeneratorExit))


def _as_outcome(index: int, value: object) -> Outcome:
    if isinstance(value, Outcome):
        return value

    if _is_raisable(value):
        return Fail(cast("Raisable", value))

    raise TypeError(
        f"script[{index}] must be Reply(...), Fail(...), Stall(), Chunks(...) or an exception, got {value!r}"
    )


async def _play(outcome: Outcome | None) -> Any:
    match outcome:
        case Reply():
            await anyio.sleep(outcome.after_seconds)
            return outcome.value
        case Fail():
            await anyio.sleep(outcome.after_seconds)
            error = outcome.exception
            # The same object may be raised many times: each time without the frames of earlier raises.
            raise error.with_traceback(None) if isinstance(error, BaseException) else error
        case Stall():
            await anyio.sleep_forever()
        case _:
            # An empty stream, or the end of one.
            await checkpoint()

    return None

"""Invocations, and the inputs of batches."""

__all__ = [
    "Input",
    "Inputs",
    "Invocation",
    "Mapped",
    "Referable",
    "StreamInputs",
    "as_invocation",
    "check_fn",
    "check_inputs",
    "draft_of",
    "make_invocation",
]

import inspect
import itertools
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from operator import length_hint
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, cast, overload

import attrs

from . import _validators as must
from ._foreign import name_of

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
ItemT = TypeVar("ItemT")


def _check_agent_id(_: object, attribute: "attrs.Attribute[str]", value: object) -> None:
    if not isinstance(value, str):
        hint = ": a name comes first, and then the function" if callable(value) else ""
        raise TypeError(f"{attribute.name} must be a str, got {value!r}{hint}")


def check_fn(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    """Raise ``TypeError`` if a value cannot be called, with a hint at the right code."""
    if callable(value):
        return

    is_stream = inspect.isasyncgen(value)
    if not must.close_coroutine(value) and not is_stream:
        raise TypeError(f"{attribute.name} must be an async function, got {value!r}")

    kind, got = ("async generator function", "generator") if is_stream else ("async function", "coroutine")
    raise TypeError(
        f"{attribute.name} must be an {kind}, got the {got} {value!r}; pass the function "
        "and its arguments apart: not fn(x) but fn, x"
    )


def _args(value: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        # Refused after fn, whose error is more helpful.
        return cast("tuple[Any, ...]", value)

    return tuple(value)


def _check_args(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"{attribute.name} must be a tuple of positional arguments, got {value!r}")


def _check_kwargs(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if value == {}:
        return

    if not isinstance(value, Mapping) or not all(
        isinstance(key, str) for key in cast("Mapping[object, object]", value)
    ):
        raise TypeError(f"{attribute.name} must be a mapping of argument names to values, got {value!r}")


def _check_key(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None and (not isinstance(value, (str, int)) or isinstance(value, bool)):
        raise TypeError(f"{attribute.name} must be a str, an int or None, got {value!r}")


class Referable:
    """A base class that allows weak references."""

    __slots__ = ("__weakref__",)


@attrs.frozen
class Invocation(Referable, Generic[T_co]):
    """
    One call of an agent.

    :param agent_id: a name for it, which its result carries
    :param fn: an async function, or any callable that returns an awaitable; for a stream an async generator
        function, or any callable that returns an async iterable; each attempt calls it again, with the same
        arguments
    :param args: its positional arguments
    :param kwargs: its keyword arguments
    :param key: its identity in a journal; ``None`` for a hash of its arguments
    :raises TypeError: if a value is of the wrong type
    """

    agent_id: str = attrs.field(validator=_check_agent_id)
    fn: Callable[..., Awaitable[T_co] | AsyncIterable[T_co]] = attrs.field(validator=check_fn)
    args: tuple[Any, ...] = attrs.field(default=(), converter=_args, validator=_check_args)
    kwargs: Mapping[str, Any] = attrs.field(factory=dict[str, Any], validator=_check_kwargs)
    key: str | int | None = attrs.field(default=None, validator=_check_key)

    @staticmethod
    def of(
        agent_id: str, fn: Callable[P, Awaitable[T] | AsyncIterable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> "Invocation[T]":
        """
        Make an invocation from the arguments of a call, so that type checkers hold them against ``fn``.

        :param agent_id: a name for it, which its result carries
        :param fn: an async function, or an async generator function
        :param args: its positional arguments
        :param kwargs: its keyword arguments
        :raises TypeError: if ``fn`` cannot be called
        """
        return make_invocation(agent_id, fn, args, kwargs)

    @overload
    @staticmethod
    def map(
        fn: Callable[[ItemT], Awaitable[T] | AsyncIterable[T]],
        items: Iterable[ItemT],
        agent_id: str | Callable[[ItemT], str] | None = None,
        key: Callable[[ItemT], str | int | None] | None = None,
    ) -> "Iterator[Invocation[T]]": ...
    @overload
    @staticmethod
    def map(
        fn: Callable[[ItemT], Awaitable[T] | AsyncIterable[T]],
        items: AsyncIterable[ItemT],
        agent_id: str | Callable[[ItemT], str] | None = None,
        key: Callable[[ItemT], str | int | None] | None = None,
    ) -> "AsyncIterator[Invocation[T]]": ...
    @staticmethod
    def map(
        fn: Callable[[ItemT], Awaitable[T] | AsyncIterable[T]],
        items: Iterable[ItemT] | AsyncIterable[ItemT],
        agent_id: str | Callable[[ItemT], str] | None = None,
        key: Callable[[ItemT], str | int | None] | None = None,
    ) -> "Iterator[Invocation[T]] | AsyncIterator[Invocation[T]]":
        """
        Make one invocation of ``fn`` for each item, lazily.

        :param fn: an async function, or an async generator function, of one item
        :param items: a sync or async iterable
        :param agent_id: a function that names an item, or a prefix to number the items by
            (``"q"`` gives ``"q-0"``, ``"q-1"``); the name of ``fn`` if absent
        :param key: a function that returns an item's key in a journal
        :return: an iterator, or an async iterator if ``items`` is async
        :raises TypeError: if ``fn`` cannot be called or ``items`` cannot be iterated
        """
        check_fn(None, attrs.fields(Invocation).fn, fn)
        prefix = name_of(fn) if agent_id is None else agent_id
        if not isinstance(prefix, str):
            if not callable(prefix):
                raise TypeError(f"agent_id must be a str, a function of an item or None, got {agent_id!r}")

            must.check_plain_function("agent_id", prefix)

        if key is not None:
            must.check_plain_function("key", key)

        def make(index: int, item: ItemT) -> Invocation[T]:
            name = prefix(item) if callable(prefix) else f"{prefix}-{index}"
            return Invocation(name, fn, (item,), {}, None if key is None else key(item))

        if isinstance(items, AsyncIterable):
            return _amap(make, items)

        if not isinstance(items, Iterable):
            raise TypeError(f"items must be a sync or async iterable, got {items!r}")

        iterator = iter(items)
        if isinstance(prefix, str) and key is None:
            return Mapped(_numbered(prefix, fn, iterator), iterator)

        return Mapped(_named(make, iterator), iterator)


def draft_of(frozen: type) -> Any:
    """
    Return a mutable subclass with the same layout, since making a frozen object takes twice as long. Once all
    values are set, the object gets the frozen class as its ``__class__``.
    """
    writable = {name: getattr(object, name) for name in ("__init__", "__setattr__", "__delattr__")}
    return type(frozen.__name__, (frozen,), {"__slots__": ()} | writable)


_Draft = draft_of(Invocation)


Input: TypeAlias = Invocation[T] | tuple[str, Callable[..., Awaitable[T]], Sequence[Any], Mapping[str, Any]]
"""An invocation, or the plain 4-tuple of its fields."""

Inputs: TypeAlias = Iterable[Input[T]] | AsyncIterable[Input[T]]
"""The input of a batch."""

StreamInput: TypeAlias = (
    Invocation[T] | tuple[str, Callable[..., AsyncIterable[T]], Sequence[Any], Mapping[str, Any]]
)
"""An invocation of a stream, or the plain 4-tuple of its fields."""

StreamInputs: TypeAlias = Iterable[StreamInput[T]] | AsyncIterable[StreamInput[T]]
"""The input of a batch of streams."""


def as_invocation(value: Input[T]) -> Invocation[T]:
    """
    Return the invocation that ``value`` is or describes.

    :raises TypeError: if it is neither an :class:`Invocation` nor a 4-tuple
    """
    if isinstance(value, Invocation):
        return value

    if isinstance(value, tuple) and len(value) == 4:
        return Invocation(*value)

    is_coroutine = must.close_coroutine(value)
    hint = ": write Invocation(agent_id, fn, args)" if is_coroutine or callable(value) else ""
    raise TypeError(
        f"expected an Invocation or a tuple (agent_id, fn, args, kwargs) as an input, got {value!r}{hint}"
    )


def check_inputs(value: object) -> None:
    """Raise ``TypeError`` if a value cannot be the input of a batch, with a hint at the right code."""
    if (
        must.close_coroutine(value)
        or isinstance(value, (str, bytes, Mapping))
        or not isinstance(value, (Iterable, AsyncIterable))
    ):
        raise TypeError(
            "expected a sync or async iterable of invocations, such as [Invocation(agent_id, fn, args)] or "
            f"Invocation.map(fn, items), got {value!r}"
        )


def make_invocation(
    agent_id: str,
    fn: Callable[..., Awaitable[T] | AsyncIterable[T]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Invocation[T]:
    """Make an invocation from a call's arguments; raise ``TypeError`` if one of the first two is wrong."""
    if type(agent_id) is not str or not callable(fn):
        return Invocation(agent_id, fn, args, kwargs)

    draft = _Draft()
    draft.agent_id = agent_id
    draft.fn = fn
    draft.args = args
    draft.kwargs = kwargs
    draft.key = None
    draft.__class__ = Invocation
    invocation: Invocation[T] = draft
    return invocation


class Mapped(Iterator["Invocation[T]"]):
    """
    The invocations of :meth:`Invocation.map`, with the length hint of their items.

    :param invocations: pulls the items and makes the invocations
    :param items: the items
    """

    def __init__(self, invocations: Generator[Invocation[T]], items: Iterator[Any]) -> None:
        self._invocations = invocations
        self._items = items

    def __iter__(self) -> Generator[Invocation[T]]:
        # Pulling from it directly saves a call for each.
        return self._invocations

    def __next__(self) -> Invocation[T]:
        return next(self._invocations)

    def __length_hint__(self) -> int:
        return length_hint(self._items, 1)


def _numbered(
    prefix: str, fn: Callable[[ItemT], Awaitable[T] | AsyncIterable[T]], items: Iterator[ItemT]
) -> Generator[Invocation[T]]:
    with _closing(items):
        for index, item in enumerate(items):
            # Made without checks and without a call, for speed: all values are known to be valid.
            draft = _Draft()
            draft.agent_id = f"{prefix}-{index}"
            draft.fn = fn
            draft.args = (item,)
            draft.kwargs = {}
            draft.key = None
            draft.__class__ = Invocation
            yield draft


def _named(make: Callable[[int, ItemT], Invocation[T]], items: Iterator[ItemT]) -> Generator[Invocation[T]]:
    with _closing(items):
        for index, item in enumerate(items):
            yield make(index, item)


@contextmanager
def _closing(items: Iterator[Any]) -> Generator[None]:
    """Close a generator of items when the generator of invocations is closed."""
    try:
        yield
    finally:
        if isinstance(items, Generator):
            items.close()


async def _amap(
    make: Callable[[int, ItemT], Invocation[T]], items: AsyncIterable[ItemT]
) -> AsyncIterator[Invocation[T]]:
    index = itertools.count()
    iterator = aiter(items)
    try:
        async for item in iterator:
            yield make(next(index), item)
    finally:
        # Closing this generator closes the generator of items at once.
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()

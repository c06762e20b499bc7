"""What the examples have in common: their options, how they end, and how they tell what happened."""

import argparse
import math
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Awaitable, Callable
from typing import NoReturn

import anyio

from agentloop import Event, InvocationResult, RetryEvent

WIDTH = 80
QUESTIONS = (
    "What is 17 * 23?",
    "How do I learn to juggle?",
    "What is 18 * 23?",
    "How do I name a boat?",
    "What is 19 * 23?",
    "How do I wake a teenager?",
)


def status_of(main: Callable[..., Awaitable[bool | None]], *args: object, backend: str = "asyncio") -> int:
    """
    Run an example, and return its exit status: 0, or 1 if it returns ``False`` or cannot read or write
    something, or 130 after Ctrl-C, as shells have it. None of them prints a traceback.
    """
    status = 0
    try:
        status = int(anyio.run(main, *args, backend=backend) is False)
        sys.stdout.flush()
    except* KeyboardInterrupt:  # in an exception group, on trio
        status = 128 + signal.SIGINT
    except* BrokenPipeError:
        pass
    except* OSError as group:
        status = 1
        print(f"error: {first_of(group)}", file=sys.stderr)

    try:
        sys.stdout.flush()
    except OSError:  # also for what is flushed at the end of the process
        print_no_more()

    return status


def first_of(group: BaseExceptionGroup[OSError]) -> OSError:
    """Return the first error of a group of groups."""
    error = group.exceptions[0]
    return first_of(error) if isinstance(error, BaseExceptionGroup) else error


def print_no_more() -> None:
    """Stop, since whoever reads what we print has had enough, as "head" has after ten lines."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """
    Reads ``--backend``, and what else is added. An error is one line.

    :param about: the docstring of the example, which ``--help`` shows
    :param environment: which variables it reads
    """

    def __init__(self, about: str | None, environment: str = "no variable is read") -> None:
        plain = (about or "").strip().replace("``", "").replace("::", ":")
        super().__init__(
            description="\n\n".join(map(wrapped, plain.split("\n\n"))),
            epilog=f"environment: {environment}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def read(self) -> argparse.Namespace:
        """Return the options, of which the backend is installed."""
        found = self.parse_args()
        if found.backend not in anyio.get_available_backends():
            self.error(f"--backend {found.backend} needs a package: pip install {found.backend}")

        return found


def wrapped(paragraph: str) -> str:
    """Wrap a paragraph for the terminal, but no command."""
    width = shutil.get_terminal_size().columns - 2  # as argparse has it
    return paragraph if paragraph.startswith(" ") else textwrap.fill(" ".join(paragraph.split()), width)


def whole(value: str) -> int:
    """Read a whole number above 0."""
    if value.isdecimal() and len(value) < 10 and int(value):
        return int(value)

    raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {value!r}")


def seconds(value: str) -> float:
    """Read a number of seconds."""
    try:
        if 0 < (number := float(value)) < math.inf:
            return number
    except ValueError:
        pass

    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {value!r}")


def port(value: str) -> int:
    """Read the number of a port."""
    if value.isdecimal() and len(value) < 6 and int(value) < 65536:
        return int(value)

    raise argparse.ArgumentTypeError(f"must be a port, a whole number from 0 to 65535, got {value!r}")


def tell_retry(event: Event) -> None:
    """Print a line for each attempt that failed and will be made again: what a loop takes as ``on_event``."""
    if isinstance(event, RetryEvent):
        name, verdict = type(event.error).__name__, event.verdict
        asked = f", to wait {verdict.retry_after * 1000:.0f} ms" if verdict.retry_after else ""
        again = f"again in {event.delay_seconds * 1000:.0f} ms"
        try:
            print(f"  {event.invocation.agent_id:7}  {name} ({verdict.kind}{asked}): {again}", flush=True)
        except BrokenPipeError:  # from here it would not end the run, but be logged
            print_no_more()


def tell_result(result: InvocationResult[object], text: str = "") -> None:
    """Print a line that says what became of an invocation: its text, and before it what went wrong."""
    retries = "1 retry" if result.retries == 1 else f"{result.retries} retries"
    left = f"  {result.agent_id:7}  {result.status:8} {retries:10} "
    outcome = ", after: ".join(filter(None, [result.error, text])) or "nothing"
    print(left + textwrap.shorten(outcome, WIDTH - len(left), placeholder=" ..."), flush=True)

"""What the examples with clients have in common: their options, and how they tell what happened."""

import argparse
import os
import sys
import textwrap
from collections.abc import Awaitable, Callable

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


def status_of(main: Callable[..., Awaitable[bool]], *args: object, backend: str = "asyncio") -> int:
    """Run an example, and return its exit status: 0 if it has come to something."""
    try:
        return 0 if anyio.run(main, *args, backend=backend) else 1
    except* BrokenPipeError:
        print_no_more()

    return 0


def print_no_more() -> None:
    """Stop, since whoever reads what we print has had enough, as "head" has after ten lines."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def options(description: str, *flags: tuple[str, str]) -> argparse.Namespace:
    """Read ``--backend``, and what else is a flag and its help, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    for flag, text in flags:
        parser.add_argument(flag, action="store_true", help=text)

    found = parser.parse_args()
    if found.backend not in anyio.get_available_backends():
        parser.error(f"--backend {found.backend} needs a package: pip install {found.backend}")

    return found


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

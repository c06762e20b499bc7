"""How far a loop is: what is shown, where, and that showing it changes nothing about the run."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from emulator import on_screen
from rich.console import Console

from agentloop import AgentLoop, Backoff, Invocation, KeyedLimiter, Limiter, LoopConfig
from agentloop.contrib.progress import progress
from agentloop.journal import Journal
from agentloop.testing import FakeAgent, FakeHTTPError, Reply

ROOT = Path(__file__).parents[2]


class Screen:
    """A console, and what was written to it."""

    def __init__(self, width: int = 200, terminal: bool = False, file: io.StringIO | None = None) -> None:
        self.file = file or io.StringIO()
        self.console = Console(
            file=self.file, width=width, force_terminal=terminal, _environ={"TERM": "xterm"}
        )

    @property
    def lines(self) -> list[str]:
        """What was written, without colours and commands."""
        return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self.file.getvalue()).splitlines()


async def agent(seconds: float = 1.0) -> None:
    await anyio.sleep(seconds)


async def flaky(fails: list[Exception]) -> None:
    await checkpoint()
    if fails:
        raise fails.pop()


def jobs(count: int) -> list[Invocation[None]]:
    return [Invocation(f"a{i}", agent) for i in range(count)]


# --- what is shown


async def test_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=2))
    async with progress(loop, 20, console=screen.console):
        await loop.run_all([Invocation("a", agent, (0.75,)) for _ in range(20)])

    latency = "p50 750 ms, p95 750 ms"
    assert screen.lines == [
        f"12/20 (60%), 2 running, 6 waiting, 0 retries, 0 failures, 2.4/s, {latency}, 0:05, ETA 0:04",
        f"20/20 (100%), 0 running, 0 waiting, 0 retries, 0 failures, 2.7/s, {latency}, 0:07",
    ]


async def test_results_of_a_journal_count_as_done_and_do_not_speed_up_the_rest(tmp_path: Path) -> None:
    loop = AgentLoop(LoopConfig(max_concurrency=2))
    async with Journal(tmp_path / "night.db") as journal:
        await loop.run_all(Invocation.map(agent, [0.5 + i / 100 for i in range(20)]), journal=journal)

    screen = Screen()
    async with progress(loop, 40, console=screen.console), Journal(tmp_path / "night.db") as journal:
        await loop.run_all(Invocation.map(agent, [0.5 + i / 100 for i in range(40)]), journal=journal)

    assert re.match(r"32/40 \(80%\), 2 running, 0 waiting, 20 replayed, .*, 2\.4/s, p50 ", screen.lines[0])
    assert screen.lines[0].endswith("0:05, ETA 0:04")
    assert screen.lines[1].startswith("40/40 (100%), 0 running, 0 waiting, 20 replayed, 0 retries, ")


async def test_line_of_nothing_but_replayed_results_has_no_latency(tmp_path: Path) -> None:
    for _ in range(2):
        screen, loop = Screen(), AgentLoop()
        async with progress(loop, 2, console=screen.console), Journal(tmp_path / "night.db") as journal:
            await loop.run_all(Invocation.map(agent, [1, 2]), journal=journal)

    assert screen.lines == ["2/2 (100%), 0 running, 0 waiting, 2 replayed, 0 retries, 0 failures, 0:00"]


async def test_retries_and_failures_are_counted_from_the_beginning_of_the_block() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_retries=1))
    await loop.run_single("before", flaky, [OSError(), OSError()])
    async with progress(loop, console=screen.console):
        await loop.run_single("retried", flaky, [OSError()])
        await loop.run_single("failed", flaky, [OSError(), OSError()])
        await loop.run_single("wrong", flaky, [TypeError()])

    assert screen.lines[-1].startswith("3 done, 0 running, 0 waiting, 2 retries, 2 failures, ")


async def test_one_of_a_thing_is_said_in_the_singular() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_retries=1))
    async with progress(loop, console=screen.console):
        await loop.run_single("failed", flaky, [OSError(), OSError()])

    assert ", 1 retry, 1 failure, " in screen.lines[-1]


async def test_loop_that_drains_says_so_and_has_no_time_to_go() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=2))
    async with progress(loop, 20, console=screen.console), anyio.create_task_group() as group:
        group.start_soon(loop.run_all, [Invocation("a", agent, (4,)) for _ in range(20)])
        await anyio.sleep(4.5)
        loop.drain()

    assert [line.partition(", 24.0/min")[0].partition(", 30.0/min")[0] for line in screen.lines] == [
        "2/20 (10%), draining, 2 running, 16 waiting, 0 retries, 0 failures",
        "4/20 (20%), drained, 0 waiting, 0 retries, 0 failures, 16 skipped",
    ]
    assert "ETA" not in screen.lines[0]


async def test_cool_off_and_its_probe_are_shown_while_they_last_and_have_no_time_to_go() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=1, max_retries=0))
    provider = FakeAgent(Reply(1), FakeHTTPError(429, retry_after=100), Reply(2, after_seconds=9), Reply(3))
    async with progress(loop, 9, interval_seconds=3, console=screen.console):
        await anyio.sleep(2)
        await loop.run_all([Invocation("a", provider) for _ in range(5)])
        await anyio.sleep(3)

    assert [line.partition(", 0 retries")[0] for line in screen.lines[:2]] == [
        "2/9 (22%), held for 1 min 39 s more, 0 running, 3 waiting",
        "2/9 (22%), held for 1 min 36 s more, 0 running, 3 waiting",
    ]
    assert "2/9 (22%), held for 1 min 30 s more, probing, 1 running, 2 waiting, " in screen.lines[3]
    assert "ETA" not in "".join(screen.lines[:4])
    assert screen.lines[-1].startswith("5/9 (55%), 0 running, ")
    assert "ETA" in screen.lines[-1]


async def test_outage_is_shown_for_as_long_as_it_lasts_and_has_no_time_to_go() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=8, backoff=Backoff(jitter="none")))
    began = anyio.current_time()

    async def provider() -> None:
        await anyio.sleep(0.5)
        if 1.25 < anyio.current_time() - began < 6:
            raise ConnectionError

    async with progress(loop, 99, interval_seconds=1, console=screen.console):
        await loop.run_all([Invocation("a", provider) for _ in range(40)])

    assert screen.lines[3].startswith("16/99 (16%), outage for 2 s, ")
    assert screen.lines[4].startswith("16/99 (16%), outage for 3 s, ")
    assert "ETA" not in screen.lines[4]
    assert screen.lines[-1].startswith("40/99 (40%), 0 running, ")
    assert "ETA" in screen.lines[-1]


async def test_pause_is_shown_where_something_waits() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=2))
    loop.limiter.pause()
    async with (
        progress(loop, 4, interval_seconds=1, console=screen.console),
        anyio.create_task_group() as group,
    ):
        await anyio.sleep(1.5)
        group.start_soon(loop.run_all, jobs(4))
        await anyio.sleep(1)
        loop.limiter.resume()

    assert screen.lines[0].startswith("0/4 (0%), 0 running, ")
    assert screen.lines[1].startswith("0/4 (0%), paused, 0 running, 4 waiting, ")
    assert screen.lines[2].startswith("0/4 (0%), 2 running, ")


@pytest.mark.parametrize(
    ("asked", "shown"), [(0.5, "1 s"), (60, "1 min"), (7500, "2 h 5 min"), (9000, "2 h 30 min")]
)
async def test_time_for_which_a_server_is_left_alone_is_short_to_read(asked: float, shown: str) -> None:
    backoff = Backoff(max_retry_after_seconds=9000)
    screen, loop = Screen(), AgentLoop(LoopConfig(max_retries=0, backoff=backoff))
    await loop.run_single("told", FakeAgent(FakeHTTPError(429, retry_after=asked)))
    with anyio.move_on_after(0.15):
        async with progress(loop, interval_seconds=0.1, console=screen.console):
            await loop.run_all(jobs(1))

    assert screen.lines[0].startswith(f"0 done, held for {shown} more, 0 running, 1 waiting, ")


async def test_what_was_cancelled_or_skipped_is_not_done() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=2))
    async with progress(loop, 10, console=screen.console):
        with anyio.move_on_after(1.5):
            await loop.run_all([*jobs(3), Invocation("late", agent, (9.0,))])

    assert screen.lines[-1].startswith(
        "2/10 (20%), 0 running, 0 waiting, 0 retries, 0 failures, 2 cancelled, "
    )

    class Unauthorized(Exception):
        status_code = 401

    async with progress(loop, 9, console=screen.console):
        fatal = Invocation("fatal", flaky, ([Unauthorized()],))
        await AgentLoop(LoopConfig(max_concurrency=1), metrics=loop.metrics).run_all([fatal, *jobs(8)])

    assert re.match(r"1/9 \(11%\), .*, 1 failure, 8 skipped, [^E]*$", screen.lines[-1])


@pytest.mark.parametrize(
    ("total", "shown"),
    [
        (None, "2 done, "),
        (8, "2/8 (25%), "),
        (1, "2/1 (200%), "),
        (0, "2/0, "),
        (["a", "b", "c"], "2/3 (66%), "),
        (range(4), "2/4 (50%), "),
    ],
)
async def test_total_is_a_number_or_as_long_as_something(total: Any, shown: str) -> None:
    screen, loop = Screen(), AgentLoop()
    async with progress(loop, total, console=screen.console):
        await loop.run_all(jobs(2))

    assert screen.lines[-1].startswith(shown)


async def test_slow_runs_have_a_rate_per_minute_and_hours_to_go() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=1))
    async with progress(loop, 100, interval_seconds=600, console=screen.console):
        await loop.run_all([Invocation("slow", agent, (119.0,)) for _ in range(6)])

    assert screen.lines[0].endswith(", 0.5/min, p50 119.0 s, p95 119.0 s, 10:00, ETA 3:10:00")


async def test_rate_is_that_of_late() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=1))
    async with progress(loop, interval_seconds=1, console=screen.console):
        await loop.run_all([Invocation("quick", agent, (0.01,)) for _ in range(1000)])
        await loop.run_all([Invocation("slow", agent, (0.5,)) for _ in range(80)])

    rates = [float(re.findall(r"([\d.]+)/s", line)[0]) for line in screen.lines]
    assert rates[5] == pytest.approx(100, rel=0.03)
    assert rates[-1] == pytest.approx(2, rel=0.1)


async def test_metrics_may_be_reset_meanwhile() -> None:
    screen, loop = Screen(), AgentLoop()
    await loop.run_all(jobs(2))
    async with progress(loop, 2, console=screen.console):
        await loop.run_all(jobs(1))
        loop.reset_metrics()

    assert screen.lines == ["0/2 (0%), 0 running, 0 waiting, 0 retries, 0 failures, 0:01"]


# --- on a terminal


async def test_terminal_is_drawn_in_place() -> None:
    screen, loop = Screen(100, True), AgentLoop(LoopConfig(max_concurrency=2))
    async with progress(loop, 4, console=screen.console):
        await loop.run_all(jobs(4))

    text = screen.file.getvalue()
    # The first frame, one every fifth of a second, and the last.
    assert 11 <= text.count("waiting") <= 13
    assert text.count("\x1b[1A") >= 10
    # The cursor is never hidden, so that a killed process leaves the terminal usable.
    assert "\x1b[?25l" not in text
    assert on_screen(text, 100) == [
        "━" * 40 + "  4/4 (100%)  0:02",
        "0 running  0 waiting  0 retries  0 failures  2.0/s  p50 1000 ms  p95 1000 ms",
        "",
    ]


async def test_terminal_that_wants_no_colour_gets_none() -> None:
    screen, loop = Screen(100, True), AgentLoop()
    screen.console.no_color = True
    async with progress(loop, 1, console=screen.console):
        await loop.run_all(jobs(1))

    assert "1 running" in screen.file.getvalue()
    assert not re.search(r"\x1b\[(?:\d+;)*[39]\d", screen.file.getvalue())
    assert "\x1b[1m0/1" in screen.file.getvalue()


async def test_narrow_terminal_gets_more_lines_and_no_broken_words() -> None:
    screen, loop = Screen(40, True), AgentLoop(LoopConfig(max_concurrency=2))
    async with progress(loop, 4, console=screen.console):
        await loop.run_all(jobs(4))

    assert [line.rstrip() for line in screen.lines[-4:]] == [
        "━━━━━━━━━━━━━━━━━━━━━━  4/4 (100%)  0:02",
        "0 running  0 waiting  0 retries",
        "0 failures  2.0/s  p50 1000 ms",
        "p95 1000 ms",
    ]


async def test_cool_off_and_outage_fit_on_a_terminal_of_60_columns() -> None:
    screen, loop = Screen(60, True), AgentLoop(LoopConfig(max_concurrency=8, backoff=Backoff(jitter="none")))
    provider = FakeAgent(*[ConnectionError()] * 8, *[FakeHTTPError(503, retry_after=200)] * 8)
    with anyio.move_on_after(9.9):
        async with progress(loop, 8, console=screen.console):
            await loop.run_all([Invocation("a", provider) for _ in range(8)])

    lines = [line.rstrip() for line in screen.lines]
    assert max(map(len, lines)) <= 60
    assert "outage for 9 s  held for 3 min 11 s more  0 running" in lines


async def test_bar_has_a_line_of_its_own_where_there_is_no_room_beside_it() -> None:
    screen, loop = Screen(20, True), AgentLoop()
    async with progress(loop, 3, console=screen.console):
        await loop.run_all(jobs(3))

    lines = [line.rstrip() for line in screen.lines]
    assert lines[lines.index("3/3 (100%)  0:01") - 1] == "━" * 20


async def test_without_a_total_there_is_no_bar() -> None:
    screen, loop = Screen(80, True), AgentLoop()
    async with progress(loop, console=screen.console):
        await loop.run_all(jobs(3))

    assert "━" not in screen.file.getvalue()
    assert "3 done  0:01" in [line.rstrip() for line in screen.lines]


def standard_error(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(file, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    return file


@pytest.mark.parametrize("terminal", [False, True])
async def test_standard_error_is_drawn_on_only_if_it_is_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, loop = standard_error(monkeypatch, terminal), AgentLoop()
    async with progress(loop, 1):
        await loop.run_all(jobs(1))

    assert ("\x1b[J" in file.getvalue()) is terminal
    assert "1/1 (100%)" in file.getvalue()


# --- what else is printed on the terminal


class Tty(io.StringIO):
    """A standard stream on a terminal that others write to as well."""

    def __init__(self, shown: list[str]) -> None:
        super().__init__()
        self.shown = shown
        self.fails = False

    def isatty(self) -> bool:
        return not self.closed or super().isatty()

    def write(self, text: str) -> int:
        if self.fails:
            raise OSError(28, "disk full")

        self.shown.append(text)
        return len(text)


class StandardStreams:
    """A terminal 60 wide, standard output and standard error on it, and what a person sees there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[str] = []
        self.out, self.err = Tty(self.shown), Tty(self.shown)
        monkeypatch.setattr(sys, "stdout", self.out)
        monkeypatch.setattr(sys, "stderr", self.err)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setenv("LINES", "24")

    @property
    def rows(self) -> list[str]:
        return on_screen("".join(self.shown), 60)

    @property
    def is_given_back(self) -> bool:
        return not ({"write"} & {*vars(self.out), *vars(self.err)})


BAR = "━" * 40


async def test_print_and_handlers_from_before_go_above_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = StandardStreams(monkeypatch)
    handler = logging.StreamHandler()
    logger = logging.Logger("of the program")
    logger.addHandler(handler)
    loop = AgentLoop()
    async with progress(loop, 2):
        print("one", "two")
        logger.warning("three")
        await anyio.sleep(1)
        assert tty.rows == [
            "one two",
            "three",
            f"{BAR}  0/2 (0%)  0:00",
            "0 running  0 waiting  0 retries  0 failures",
        ]
        await loop.run_all(jobs(2))

    assert tty.rows[:3] == ["one two", "three", f"{BAR}  2/2 (100%)  0:02"]
    assert tty.is_given_back


@pytest.mark.parametrize(
    "words", [["to ", "be ", "or ", "not ", "to ", "be"], ["東京 ", "支店 "], ["\x1b[1mbold\x1b[0m ", "x"]]
)
async def test_line_printed_in_pieces_goes_on_where_it_was(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tty = StandardStreams(monkeypatch)
    async with progress(AgentLoop()):
        for word in words:
            print(word, end="")
            await anyio.sleep(0.3)
            assert len(tty.rows) == 3  # with the display below it

    printed = re.sub(r"\x1b\[\dm", "", "".join(words)).rstrip()
    assert tty.rows[:2] == [
        printed,
        "0 done  0:00" if len(words) < 4 else f"0 done  0:0{int(len(words) * 0.3)}",
    ]


async def test_long_line_printed_in_pieces_wraps_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = StandardStreams(monkeypatch)
    text = "".join(chr(97 + i % 26) for i in range(150))
    async with progress(AgentLoop()):
        for char in text:
            print(char, end="")
            await anyio.sleep(0.1)

    assert "".join(tty.rows[:3]) == text


async def test_bar_of_another_library_hides_the_display_until_its_line_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tty = StandardStreams(monkeypatch)
    async with progress(AgentLoop()):
        print("\r10 %", end="")
        print("\r20 %", end="")
        await anyio.sleep(0.5)
        assert tty.rows == ["20 %"]
        print()
        assert tty.rows[1].startswith("0 done")


async def test_threads_print_above_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = StandardStreams(monkeypatch)
    async with progress(AgentLoop()), anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(anyio.to_thread.run_sync, print, f"thread {number}\n", "", " ")

    assert {row.strip() for row in tty.rows} >= {f"thread {number}" for number in range(20)}
    assert tty.rows[-3].startswith("0 done")


async def test_displays_stand_below_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = StandardStreams(monkeypatch)
    chat, embed = AgentLoop(LoopConfig(max_concurrency=1)), AgentLoop(LoopConfig(max_concurrency=1))
    async with progress(chat, 4), anyio.create_task_group() as group:
        group.start_soon(chat.run_all, jobs(4))
        async with progress(embed, 2):
            group.start_soon(embed.run_all, jobs(2))
            await anyio.sleep(2.5)
            counted = re.findall(r"\d/\d", " ".join(tty.rows))
            assert counted == ["2/4", "2/2"]

        print("the second has ended")
        await anyio.sleep(1)

    counted = re.findall(r"\d/\d", " ".join(tty.rows))
    assert counted == ["2/2", "4/4"]
    assert tty.rows.index("the second has ended") == 3
    assert tty.is_given_back


async def test_write_of_somebody_else_is_given_back_to_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = StandardStreams(monkeypatch)

    def theirs(text: str) -> int:
        tty.shown.append(text.upper())
        return len(text)

    vars(tty.out)["write"] = theirs
    async with progress(AgentLoop()):
        print("loud")

    assert tty.rows[0] == "LOUD"
    assert vars(tty.out)["write"] is theirs


async def test_stream_that_takes_no_write_of_ours_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = StandardStreams(monkeypatch)

    class Slotted:
        __slots__ = ()

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Slotted())
    async with progress(AgentLoop()):
        await checkpoint()

    assert tty.rows[0] == "0 done  0:00"


async def test_displays_that_are_taller_than_the_terminal_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = StandardStreams(monkeypatch)
    monkeypatch.setenv("LINES", "6")
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(progress(AgentLoop()))

        await anyio.sleep(0.5)
        assert len(tty.rows) == 4


async def test_printing_goes_on_where_the_display_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tty = StandardStreams(monkeypatch)
    async with progress(AgentLoop()):
        tty.err.fails = True
        print("printed")

    assert "".join(tty.shown).endswith("printed\n")
    assert [record.message for record in caplog.records] == ["progress cannot be shown any more"]


async def test_closed_standard_error_harms_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tty, loop = StandardStreams(monkeypatch), AgentLoop()
    tty.err.close()
    async with progress(loop, 1):
        [result] = await loop.run_all(jobs(1))

    assert result.success


async def test_notebook_updates_one_output_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[list[str]] = []

    class Output:
        def __init__(self, data: dict[str, str]) -> None:
            self.seen = [data["text/plain"]]
            outputs.append(self.seen)

        def update(self, data: dict[str, str], *, raw: bool) -> None:
            assert raw
            self.seen.append(data["text/plain"])

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Output:
        assert raw
        assert display_id
        return Output(data)

    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    loop = AgentLoop(LoopConfig(max_concurrency=1))
    async with progress(loop, 3, console=Console(force_jupyter=True, width=60)):
        await loop.run_all(jobs(3))

    [seen] = outputs
    assert len(seen) == 5
    assert f"{BAR}  0/3 (0%)" in on_screen(seen[0], 60)[0]
    assert f"{BAR}  3/3 (100%)" in on_screen(seen[-1], 60)[0]


# --- nested work


async def team(loop: AgentLoop, fails: bool = False) -> None:
    await loop.run_all(
        [Invocation("part", agent, (0.1,)), Invocation("part", flaky, ([TypeError()] * fails,))]
    )
    await loop.run_single("single", agent, 0.1)


async def test_work_of_agents_is_counted_apart() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=2))
    async with progress(loop, 4, console=screen.console):
        await loop.run_all(Invocation.map(partial(team, loop), [False, True, False, True]))

    assert screen.lines[-1].startswith("4/4 (100%), 0 running, 0 waiting, 12 nested, 0 retries, 0 failures, ")
    assert loop.metrics.snapshot().failures == 2


async def test_work_of_agents_under_keys_is_counted_apart() -> None:
    screen = Screen()
    keyed = KeyedLimiter(lambda invocation: invocation.agent_id, lambda _: Limiter(2))
    loop = AgentLoop(limiter=keyed)
    async with progress(loop, 1, console=screen.console):
        await loop.run_single("team", team, loop)

    assert screen.lines[-1].startswith("1/1 (100%), 0 running, 0 waiting, 3 nested, ")


async def test_work_that_agents_of_another_loop_start_is_not_nested() -> None:
    screen, teams, model = Screen(), AgentLoop(), AgentLoop()
    async with progress(model, 6, console=screen.console):
        await teams.run_all(Invocation.map(team, [model, model]))

    assert screen.lines[-1].startswith("6/6 (100%), 0 running, 0 waiting, 0 retries, ")


async def test_display_in_an_agent_counts_what_this_agent_starts() -> None:
    screen, loop = Screen(), AgentLoop()

    async def planner() -> None:
        async with progress(loop, 3, console=screen.console):
            await team(loop)

    await loop.run_single("planner", planner)
    assert screen.lines[-1].startswith("3/3 (100%), 1 running, 0 waiting, 0 retries, ")


# --- nothing about the run changes


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    "error", [ValueError("of the body"), StopAsyncIteration(), Odd(), ExceptionGroup("", [OSError()])]
)
async def test_error_of_the_body_comes_out_as_the_object_that_it_is(error: BaseException) -> None:
    screen = Screen()
    with pytest.raises(type(error)) as caught:
        async with progress(AgentLoop(), console=screen.console):
            await checkpoint()
            raise error

    assert caught.value is error
    assert (error.__context__, len(screen.lines)) == (None, 1)


async def test_error_is_not_lost_to_a_cancellation_that_comes_with_it() -> None:
    error = ValueError()
    with anyio.CancelScope() as scope, pytest.raises(ValueError) as caught:
        async with progress(AgentLoop(), console=Screen().console):
            scope.cancel()
            raise error

    assert caught.value is error


async def test_cancellation_goes_through_and_leaves_the_last_state() -> None:
    screen, loop = Screen(), AgentLoop(LoopConfig(max_concurrency=2))
    with anyio.move_on_after(2.5) as scope:
        async with progress(loop, 9, console=screen.console):
            await loop.run_all(jobs(9))

    assert scope.cancelled_caught
    assert screen.lines[-1].startswith("4/9 (44%), 0 running, 0 waiting, ")


class Broken(io.StringIO):
    """A file that raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error", [BrokenPipeError("read by nobody"), OSError(28, "disk full"), ValueError("closed file")]
)
async def test_console_that_fails_harms_no_run_and_is_logged_once(
    error: Exception, terminal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file, loop = Broken(error), AgentLoop(LoopConfig(max_concurrency=1))
    async with progress(loop, interval_seconds=1, console=Screen(terminal=terminal, file=file).console):
        results = await loop.run_all(jobs(5))

    assert all(result.success for result in results)
    assert file.writes == 1
    assert [record.message for record in caplog.records] == ["progress cannot be shown any more"]
    assert caplog.records[0].levelno == logging.ERROR


async def test_ctrl_c_in_the_middle_of_drawing_ends_the_run_as_it_is() -> None:
    interrupt = KeyboardInterrupt()
    file = Broken(interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        async with progress(AgentLoop(), interval_seconds=1, console=Screen(file=file).console):
            await interrupted_once(file)

    assert caught.value is interrupt


async def interrupted_once(file: Broken) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        file.error = OSError("for the last line")


async def test_ctrl_c_in_the_middle_of_drawing_is_not_replaced_by_what_the_body_makes_of_it() -> None:
    interrupt = KeyboardInterrupt()
    file = Broken(interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        async with progress(AgentLoop(), interval_seconds=1, console=Screen(file=file).console):
            try:
                await interrupted_once(file)
            finally:
                raise ValueError("cleaning up failed")

    assert caught.value is interrupt


@pytest.mark.parametrize(
    ("total", "options", "error", "message"),
    [
        (-1, {}, ValueError, "total must be at least 0, got -1"),
        (True, {}, TypeError, "total must be a whole number, something with a length, or None, got True"),
        (1.5, {}, TypeError, "total must be a whole number, something with a length, or None, got 1.5"),
        (iter(()), {}, TypeError, "total must be a whole number, something with a length, or None, got <"),
        (
            1,
            {"interval_seconds": 0.05},
            ValueError,
            "interval_seconds must be finite and at least 0.1, got 0.05",
        ),
        (
            1,
            {"interval_seconds": float("inf")},
            ValueError,
            "interval_seconds must be finite and at least 0.1",
        ),
        (
            1,
            {"interval_seconds": float("nan")},
            ValueError,
            "interval_seconds must be finite and at least 0.1",
        ),
    ],
)
async def test_bad_value_is_refused(
    total: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        async with progress(AgentLoop(), total, **options):
            raise AssertionError("not reached")


async def test_loop_that_measures_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="collect_metrics=False"):
        async with progress(AgentLoop(LoopConfig(collect_metrics=False))):
            raise AssertionError("not reached")


# --- a real terminal

PROGRAM = """
import sys, anyio
from agentloop import AgentLoop, Backoff, Invocation, LoopConfig
from agentloop.contrib.progress import progress
from agentloop.testing import FakeAgent, FakeHTTPError, Reply

async def main():
    loop = AgentLoop(LoopConfig(max_concurrency=5))
    async with progress(loop, 10):
        print("printed by the body")
        await loop.run_all([Invocation("a", anyio.sleep, (float(sys.argv[2]) * i,)) for i in range(10)])

try:
    anyio.run(main, backend=sys.argv[1])
except* KeyboardInterrupt:
    sys.exit(130)
"""


def on_a_terminal(
    *arguments: str, once_seen: Callable[[bytes, Any], object] = lambda shown, process: None
) -> tuple[int, str]:
    """Run the program on a terminal, and return its status and what it wrote."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "PYTHONIOENCODING": "utf-8"},
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
            once_seen(shown, process)
    except OSError:  # how Linux reports the end of a terminal
        pass
    finally:
        os.close(ours)

    return process.wait(30), shown.decode()


@pytest.fixture
def children_hear_sigint() -> Any:
    """Where tests run in the background of a shell, SIGINT is ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_real_terminal_shows_the_body_s_prints_and_the_last_state(backend: str) -> None:
    status, shown = on_a_terminal(backend, "0.05")
    assert status == 0
    assert on_screen(shown, 60)[:2] == ["printed by the body", "━" * 40 + "  10/10 (100%)  0:00"]


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.usefixtures("children_hear_sigint")
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ctrl_c_on_a_real_terminal_leaves_the_last_state(backend: str) -> None:
    sent = []

    def interrupt(shown: bytes, process: Any) -> None:
        if b"5 running" in shown and not sent:
            sent.append(True)
            process.send_signal(signal.SIGINT)

    status, shown = on_a_terminal(backend, "10", once_seen=interrupt)
    assert status == 130
    rows = on_screen(shown, 60)
    assert "1/10 (10%)" in rows[1]
    assert "5 cancelled" in rows[2]
    assert len(rows) == 5

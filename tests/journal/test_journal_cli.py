"""``python -m agentloop.journal``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from agents import make_loop
from asking import Asker, execute, night

from agentloop import Invocation
from agentloop.journal import Journal
from agentloop.journal.__main__ import main


async def fill(path: Path, **settings: Any) -> None:
    asker = Asker(1, fails=lambda x: ValueError(f"boom {x}") if x > 1 else None)
    inputs = [*asker.inputs(range(4)), Invocation("keyed", asker.ask, (0,), key="k")]
    await night(path, inputs, make_loop(), **settings)


async def test_show_prints_runs_counts_latencies_and_errors(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(path, version={"model": "x"})
    async with Journal(path, version=2, changed="rerun"):
        assert main(["show", str(path)]) == 0

    runs, first, second, results, *counts, latency, queue, errors, one, two = (
        capsys.readouterr().out.splitlines()
    )
    assert (runs, results, errors) == ("2 runs", "5 results", "the last errors")
    assert "ended after 0s" in first
    assert first.endswith('version {"model": "x"}')
    assert "running, or killed" in second
    assert counts == [
        "          2 error of another version  asking.Asker.__init__.<locals>.ask",
        "          3 success of another version  asking.Asker.__init__.<locals>.ask",
    ]
    assert latency == "latency: mean 1,000.0 ms, p50 1,000.0, p95 1,000.0, p99 1,000.0, longest 1,000.0"
    assert queue.startswith("queue: mean 0.0 ms")
    assert sorted([one[23:], two[23:]]) == ["ask-2  ValueError: boom 2", "ask-3  ValueError: boom 3"]


async def test_show_of_an_empty_journal_says_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await night(path, [])
    assert main(["show", str(path)]) == 0
    runs, _, results = capsys.readouterr().out.splitlines()
    assert (runs, results) == ("1 run", "0 results")


async def test_export_writes_a_line_of_json_each(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(path)
    assert main(["export", str(path), str(tmp_path / "out.jsonl")]) == 0
    assert main(["export", str(path)]) == 0
    text = (tmp_path / "out.jsonl").read_text("utf-8")
    assert capsys.readouterr().out == text
    lines = {line["custom_id"]: line for line in map(json.loads, text.splitlines())}
    assert len(lines) == len(text.splitlines()) == 5
    agent = "asking.Asker.__init__.<locals>.ask"
    keyed = {"custom_id": "k", "index": 4, "agent": agent, "status": "success"}
    assert lines["k"] == {**keyed, "response": {"answer": 0}, "error": None}
    (failed,) = (line for line in lines.values() if line["index"] == 2)
    assert (failed["status"], failed["response"], failed["error"]) == ("error", None, "ValueError: boom 2")


async def test_export_of_what_is_no_json_is_its_text(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await fill(path, encode=lambda output: b"\xff%d" % output["answer"], decode=bytes)
    assert main(["export", str(path)]) == 0
    responses = [json.loads(line)["response"] for line in capsys.readouterr().out.splitlines()]
    assert {*responses} == {None, "\\xff0", "\\xff1"}


async def test_check_finds_damage(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await fill(path)
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path} is good: 5 results\n"
    execute(
        path,
        """
        PRAGMA writable_schema = 1;
        UPDATE sqlite_master SET sql = replace(sql, 'status TEXT NOT', 'status INT NOT');
        UPDATE sqlite_master SET sql = replace(sql, 'error TEXT', 'error TEXT NOT NULL');
        """,
    )
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr().out.endswith(f"save what can be read by `sqlite3 {path} .recover`\n")


@pytest.mark.parametrize("command", ["show", "export", "check"])
def test_missing_or_foreign_file_is_one_line(
    command: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line() -> str:
        assert main([command, str(path)]) == 1
        return capsys.readouterr().err

    assert line() == f"{path}: there is no journal\n"
    path.write_text("a line\n" * 100)
    assert line() == f"{path}: file is not a database: this is not a journal\n"
    path.unlink()
    execute(path, "CREATE TABLE results (id)")
    assert line() == f"{path} is not a journal, but another database\n"
    assert sorted(name.name for name in path.parent.iterdir()) == ["night.db"]


async def test_damage_that_ends_a_command_is_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await fill(path)
    execute(path, "DROP TABLE runs")
    assert main(["show", str(path)]) == 1
    assert capsys.readouterr().err == f"{path}: no such table: runs\n"


def test_reader_that_has_seen_enough_gets_no_traceback(path: Path) -> None:
    anyio.run(night, path, Asker().inputs(["x" * 1000 + str(i) for i in range(500)]))
    command = [sys.executable, "-m", "agentloop.journal", "export", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""

    assert child.returncode == 1

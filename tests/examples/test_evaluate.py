"""The example of an evaluation with a journal, run as a user runs it."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from examples_run import every_backend, model_server, run, start

pytestmark = pytest.mark.long


def figures(out: str) -> dict[str, tuple[int, int]]:
    """Return how many questions were answered before and now, each with its tokens."""
    return {
        when: (int(count), int(tokens.replace(",", "")))
        for count, when, tokens in re.findall(
            r"^ +(\d+) (before|now), for ([\d,]+) tokens", out, re.MULTILINE
        )
    }


def ask(path: Path, questions: list[str]) -> Path:
    path.write_text("".join(f"{json.dumps({'question': question})}\n" for question in questions), "utf-8")
    return path


def answers(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text("utf-8").splitlines()]


def recorded(journal: Path) -> int:
    """Return how many results a journal holds, if there is one yet."""
    try:
        with closing(sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM results").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


@every_backend
def test_second_run_asks_only_what_is_new_or_has_changed(backend: str, tmp_path: Path) -> None:
    evaluate = partial(run, "evaluate", directory=tmp_path)
    questions = ask(tmp_path / "questions.jsonl", ["What is 2 * 3?", "What is 4 * 5?", "What is 2 * 3?"])
    status, out, err = evaluate(str(questions), "--backend", backend)
    assert status == 0, err
    assert figures(out) == {"before": (0, 0), "now": (3, 42)}
    assert [answer["text"] for answer in answers(tmp_path)] == ["2 * 3 is 6.", "4 * 5 is 20.", "2 * 3 is 6."]
    ask(questions, ["What is 6 * 7?", "What is 4 * 5?", "What is 2 * 3?"])
    status, out, err = evaluate(str(questions), "--backend", backend)
    assert out.startswith("questions for demo: 3\n3 of 3 questions are answered in answers.jsonl\n")
    assert figures(out) == {"before": (2, 28), "now": (1, 14)}
    assert "2 replayed" in err
    assert [answer["text"] for answer in answers(tmp_path)] == ["6 * 7 is 42.", "4 * 5 is 20.", "2 * 3 is 6."]
    status, out, _ = evaluate(str(questions), "--backend", backend, "--fresh")
    assert figures(out) == {"before": (0, 0), "now": (3, 42)}


@pytest.mark.parametrize(
    ("name", "backend"), [("SIGKILL", "asyncio"), ("SIGINT", "trio"), ("SIGTERM", "asyncio")]
)
def test_evaluation_goes_on_after_a_signal(name: str, backend: str, tmp_path: Path) -> None:
    number = signal.Signals[name]
    questions = str(ask(tmp_path / "questions.jsonl", [f"What is 2 * {number}?" for number in range(40)]))
    with start("evaluate", questions, "--backend", backend, cwd=tmp_path) as process:
        until = time.monotonic() + 30
        while not recorded(tmp_path / "answers.jsonl.journal"):
            assert time.monotonic() < until
            time.sleep(0.02)

        process.send_signal(number)
        out, err = process.communicate(timeout=60)

    if name == "SIGKILL":
        assert process.returncode == -number
        assert not (tmp_path / "answers.jsonl").exists()
    else:
        assert process.returncode in (-number, 128 + number)
        assert "Traceback" not in err
        found = figures(out)
        assert found["now"][0] == len([one for one in answers(tmp_path) if "text" in one]) > 0
        assert "missing: start again to ask them" in out

    status, out, err = run("evaluate", questions, "--backend", backend, directory=tmp_path)
    assert status == 0, err
    found = figures(out)
    assert found["before"][0] > 0
    assert found["before"][0] + found["now"][0] == len(answers(tmp_path)) == 40


def test_real_model_is_asked_and_another_model_is_refused(tmp_path: Path) -> None:
    evaluate = partial(run, "evaluate", directory=tmp_path)
    questions = str(ask(tmp_path / "questions.jsonl", ["What is 2 * 3?"]))
    with model_server("--api-key", "secret") as url:
        variables = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "secret"}
        status, out, err = evaluate(questions, OPENAI_MODEL="mine", **variables)
        assert status == 0, err
        assert figures(out)["now"] == (1, 14)
        status, out, err = evaluate(questions, OPENAI_MODEL="other", **variables)
        assert (status, out) == (1, "questions for other: 1\n")
        assert re.match(r'error: .*"model": "mine".*"model": "other"', err)
        # A key that is refused stops it, and what failed is asked again.
        status, out, err = evaluate(
            questions, "--fresh", OPENAI_MODEL="mine", **{**variables, "OPENAI_API_KEY": "wrong"}
        )
        assert status == 1
        assert answers(tmp_path)[0]["error"].startswith("HTTPStatusError: ")
        status, out, err = evaluate(questions, OPENAI_MODEL="mine", **variables)
        assert figures(out) == {"before": (0, 0), "now": (1, 14)}


def test_file_without_questions_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("hello\n")
    status, out, err = run("evaluate", "bad.jsonl", directory=tmp_path)
    assert (status, out) == (1, "")
    assert err.startswith('error: bad.jsonl must have lines like {"question": "..."}: JSONDecodeError')
    assert len(err.splitlines()) == 1

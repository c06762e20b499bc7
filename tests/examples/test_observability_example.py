"""The example that shows every adapter, run as a user runs it."""

import json
from pathlib import Path

import pytest
from examples_run import every_backend, run

pytestmark = pytest.mark.long


@every_backend
def test_example_leaves_files_behind_and_says_where(backend: str, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    done = run("observability", str(directory), "--backend", backend, "--count", "80")
    assert done.status == 0, done.err
    assert "Traceback" not in done.err
    for name in "report.html", "timeline.json", "metrics.json":
        assert str(directory / name) in done.out

    counts = json.loads((directory / "metrics.json").read_text("utf-8"))["counts"]
    assert sum(counts.values()) == 80
    events = json.loads((directory / "timeline.json").read_text("ascii"))
    assert sum(event["ph"] == "B" for event in events) == sum(event["ph"] == "E" for event in events) >= 80
    assert any(event.get("name") == "first chunk" for event in events)
    report = (directory / "report.html").read_text("utf-8")
    assert f"{counts['success']} success" in report
    assert "HTTPStatusError 500" in report

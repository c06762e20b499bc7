"""The example that shows every adapter, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_example_leaves_files_behind_and_says_where(backend: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    directory = tmp_path / "out"
    script = ROOT / "examples" / "observability.py"
    done = subprocess.run(
        [sys.executable, script, directory, "--backend", backend, "--count", "80"],
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name in "report.html", "timeline.json", "metrics.json":
        assert str(directory / name) in done.stdout

    counts = json.loads((directory / "metrics.json").read_text("utf-8"))["counts"]
    assert sum(counts.values()) == 80
    events = json.loads((directory / "timeline.json").read_text("ascii"))
    assert sum(event["ph"] == "B" for event in events) == sum(event["ph"] == "E" for event in events) >= 80
    assert any(event.get("name") == "first chunk" for event in events)
    report = (directory / "report.html").read_text("utf-8")
    assert f"{counts['success']} success" in report
    assert "HTTPStatusError 500" in report

"""
A batch that is killed at random moments, again and again, until it comes to its end.

``AGENTLOOP_KILLS`` says how many kills there are in all, at least.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from asking import integrity, rows

KILLS = int(os.environ.get("AGENTLOOP_KILLS", "12"))
COUNT = 400
# A process that is killed at once has no say; one that is interrupted or told to end cleans up.
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM]


def read(path: Path) -> list[int]:
    # A line that was being written is not there yet.
    return [int(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Victim:
    """Runs a batch in processes that are killed."""

    def __init__(self, path: Path, backend: str, verb: str, seed: int) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.arguments = [backend, verb]
        self.final: Counter[int] = Counter()
        """The calls of what must not be called again, up to then."""

    def run(self, kill: bool) -> bool:
        """Run the batch, and return whether it has come to its end."""
        drains = self.random.choice(["drain", "plain"])
        command = [sys.executable, Path(__file__).with_name("killed.py"), self.path, *self.arguments]
        with subprocess.Popen(
            [*command, drains, str(COUNT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            if kill:
                time.sleep(self.random.uniform(0.0, 0.35))
                child.send_signal(self.random.choice(SIGNALS))

            rest, errors = child.communicate(timeout=60)

        if not kill:
            assert (child.returncode, rest, errors) == (0, "done\n", "")

        return rest == "done\n"

    def check(self) -> None:
        """What is in the file was not called again, and what was delivered is in the file."""
        calls = Counter(read(Path(f"{self.path}.calls")))
        again = {item: count for item, count in self.final.items() if calls[item] != count}
        assert not again
        recorded = {index for index, status in rows(self.path, "idx, status") if status == "success"}
        delivered = {*read(Path(f"{self.path}.delivered"))}
        assert delivered <= recorded
        assert integrity(self.path) == "ok"
        self.final = Counter({item: calls[item] for item in recorded})


@pytest.mark.long
@pytest.mark.parametrize("verb", ["run_all", "as_completed"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_killed_batch_loses_nothing_and_calls_nothing_again(backend: str, verb: str, tmp_path: Path) -> None:
    kills, seed = 0, 0
    while kills * 4 < KILLS:
        seed += 1
        victim = Victim(tmp_path / f"{seed}.db", backend, verb, seed)
        while kills * 4 < KILLS and not victim.run(kill=True):
            kills += 1
            victim.check()

        victim.run(kill=False)
        victim.check()
        assert len(victim.final) == COUNT
        assert {*read(Path(f"{victim.path}.delivered"))} == {*range(COUNT)}

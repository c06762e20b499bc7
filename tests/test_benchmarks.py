"""The benchmarks: that each of them runs, on both backends, and that none is won by leaving work undone."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
BACKENDS = ["asyncio", "trio"]
PEERS = {
    "aiometer": "aiometer",
    "streamable": "streamable",
    "tenacity": "... and tenacity",
    "stamina": "... and stamina",
}
MODULES = ("overhead", "limiter", "scale", "streaming", "store", "observability")
TINY = ("--invocations", "30", "--rounds", "1")
LOSSY = """
import sys
import overhead, ways

def losing_one(way):
    async def lossy(agent, count, limit):
        return (await way(agent, count, limit))[1:]

    return lossy

for found in (ways.TOGETHER, *ways.OTHERWISE.values()):
    found.update({name: losing_one(way) for name, way in found.items()})

for agent in sys.argv[1:]:
    sys.argv = ["overhead", "--agent", agent, "--limit", "10", "--invocations", "30", "--rounds", "1"]
    try:
        overhead.main()
    except AssertionError as error:
        print(f"{agent}: {error}", file=sys.stderr)
"""
WITHOUT_PEERS = """
import sys
sys.modules.update(dict.fromkeys(["aiometer", "streamable", "tenacity", "stamina", "uvloop"]))
import overhead
overhead.main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def output(*arguments: str) -> str:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_overhead_compares_every_way_that_is_installed(backend: str) -> None:
    agents = ["at-once", "checkpoint", "1-ms", "retried", "nested", "streamed"]
    chosen = [word for agent in agents for word in ("--agent", agent)]
    out = output(str(BENCHMARKS / "overhead.py"), "--backend", backend, "--limit", "10", *chosen, *TINY)
    installed = {name for name in PEERS if find_spec(name) is not None}
    said, *tables = out.split("\n\n")
    # Of the versions of AnyIO and trio that the tests run with, nothing is slower than it could be.
    assert f"deadlines and cancellations on {backend}: by the insides of AnyIO and trio" in said
    assert [name for name in PEERS if f"{name} is not installed, and left out" not in said] == [
        name for name in PEERS if name in installed
    ]
    for agent, table in zip(agents, tables, strict=False):
        title, *lines = table.splitlines()
        assert title.startswith(f"{agent}, limit 10, 30 invocations ")
        ways = [line[2:44].strip() for line in lines]
        assert ways == expected_ways(agent, backend, installed)
        assert all(float(line[44:].split()[0]) > 0 for line in lines)


def expected_ways(agent: str, backend: str, installed: set[str]) -> list[str]:
    floor, asyncio_only = "bare workers, the floor", backend == "asyncio"
    if agent == "nested":
        peers = ["gather in gather"] * asyncio_only
        return [floor, "run_all in run_all", "run_single, in turn, in run_all", *peers]

    if agent == "streamed":
        peers = ["anyio, a task each, one memory stream"]
        return [floor, "stream_all", "run_streaming, by workers", *peers]

    expected = [floor, "run_all", "as_completed", "run_single, by workers", "run_single, all in line at once"]
    if asyncio_only:
        expected += ["original: gather, wait_for", "gather, semaphore, timeout", "asyncio.TaskGroup, timeout"]

    if "aiometer" in installed and agent != "retried":
        expected.append("aiometer")

    if "streamable" in installed and agent != "retried" and asyncio_only:
        expected.append("streamable")

    expected.append("anyio, a task each")
    return expected + [PEERS[name] for name in ("tenacity", "stamina") if name in installed]


@pytest.mark.parametrize(
    ("script", "backend", "arguments", "names"),
    [
        ("limiter", "trio", "--calls 50 --rounds 1", ["anyio.CapacityLimiter", "Limiter with room"]),
        ("scale", "asyncio", "--inputs 1000 --waiting 50", ["1000", "run_all", "gather, semaphore, timeout"]),
        ("streaming", "trio", "--chunks 50 --rounds 1", ["direct", "agentloop", "stream_all of 10"]),
        ("store", "asyncio", "--repeats 1", ["20", "2000", "20000"]),
        (
            "journal",
            "trio",
            "--rate 500 --seconds 0.1 --rounds 1 --entries 200",
            ["with a journal", "without", "written", "replayed", "file"],
        ),
        (
            "workers",
            "trio",
            "--calls 50 --kills 1 --rounds 1",
            ["computing, one process", "computing, 2 processes", "waiting, 1 kills", "started and ended"],
        ),
        ("observability", "trio", "--inputs 50 --rounds 1", ["metrics off", "... and a timeline"]),
    ],
)
def test_each_benchmark_prints_figures(script: str, backend: str, arguments: str, names: list[str]) -> None:
    out = output(str(BENCHMARKS / f"{script}.py"), "--backend", backend, *arguments.split())
    for name in names:
        rows = re.findall(rf"^ *{re.escape(name)}  +(\d.*)$", out, re.MULTILINE)
        assert rows, name
        assert all(float(row.split()[0]) > 0 for row in rows)


def simulated(backend: str, scenario: str, *policies: str) -> dict[str, list[str]]:
    """Return the figures of each policy in a scenario."""
    chosen = ["--policies", *policies] if policies else []
    out = output(str(BENCHMARKS / "overload.py"), "--backend", backend, "--scenarios", scenario, *chosen)
    return {line[:24].strip(): line[24:].split() for line in out.splitlines()[3:]}


@pytest.mark.by_hand
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_simulated_policy_gets_through_windows(backend: str) -> None:
    rows = simulated(backend, "window-short-told")
    assert len(rows) == 6
    assert {lost for _, _, lost, _ in rows.values()} == {"0"}


@pytest.mark.by_hand
def test_simulated_policies_do_without_what_their_names_say() -> None:
    rows = simulated("asyncio", "refused-60", "ours", "ours, no outages")
    assert int(rows["ours"][2]) < int(rows["ours, no outages"][2])
    rows = simulated("asyncio", "told-60", "ours", "ours, no probes")
    assert float(rows["ours"][0].rstrip("%")) > float(rows["ours, no probes"][0].rstrip("%"))


@pytest.mark.by_hand
def test_one_command_writes_a_table_of_all_on_both_backends() -> None:
    done = run(str(BENCHMARKS / "table.py"), "--quick")
    assert done.returncode == 0, done.stderr
    said = {f"{name} on {backend} ..." for name in MODULES for backend in BACKENDS}
    said |= {f"{name} is not installed, and left out" for name in PEERS if find_spec(name) is None}
    assert {*done.stderr.splitlines()} == said

    header, rule, *rows, empty, machine = done.stdout.splitlines()
    assert (header, rule, empty) == ("|  | asyncio | trio |", "| --- | --: | --: |", "")
    assert f"CPython {'.'.join(map(str, sys.version_info[:3]))}, anyio 4." in machine
    assert [f"on {backend}: by the insides" in machine for backend in BACKENDS] == [True, True]
    cells = {what: values for what, *values in (row.strip("| ").split(" | ") for row in rows)}
    assert len(cells) == len(rows)
    assert cells["`as_completed`, time relative to `run_all`"] != ["-", "-"]
    assert cells["`run_all`, times as fast as the original (`gather`, `wait_for`)"][1] == "-"
    assert cells["`run_single`, time relative to a bare semaphore and `wait_for`"][1] == "-"
    are_ratios = [values[0].endswith("x") for values in cells.values()]
    assert are_ratios == sorted(are_ratios, reverse=True), "ratios come first"
    numbers = [value for values in cells.values() for value in values if value != "-"]
    assert all(re.fullmatch(r"[\d,]+(\.\d+)?(x| µs| MiB, [\d,]+ tasks)", value) for value in numbers)


def test_way_that_loses_an_output_does_not_win() -> None:
    assert run("-c", LOSSY, "checkpoint", "nested", "streamed").stderr.splitlines() == [
        "checkpoint: 29 outputs of 29 agents have come, not 30 of 30",
        "nested: 29 outputs of 29 agents have come, not 30 of 30",
        "streamed: 89 outputs of 30 agents have come, not 90 of 30",
    ]


def test_peers_that_are_not_installed_are_said_and_left_out() -> None:
    out = output("-c", WITHOUT_PEERS, "--agent", "checkpoint", "--limit", "10", *TINY)
    assert out.splitlines()[3:7] == [f"{name} is not installed, and left out" for name in PEERS]
    assert not [line for line in out.splitlines()[7:] if any(name in line for name in PEERS)]
    assert "anyio, a task each" in out

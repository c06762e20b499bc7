"""
Run all benchmarks on every backend, and write one Markdown table.

    python benchmarks/table.py                  # a few minutes, on a machine that does nothing else
    python benchmarks/table.py --quick          # whether it runs, not what it costs

Each benchmark runs in a process of its own, one after the other. The table goes to standard output, and what
is under way to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import rounds
import ways

MODULES = ("overhead", "limiter", "scale", "streaming", "store", "observability")
PACKAGES = ("anyio", "attrs", "trio", "uvloop", *ways.PACKAGES.values(), "opentelemetry-sdk")
ABSENT = "-"


def run(module: str, backend: str, quick: bool) -> dict[str, str]:
    found: dict[str, str] = importlib.import_module(module).figures(backend, quick)
    return found


def collect(backends: list[str], quick: bool) -> dict[str, dict[str, str]]:
    """Return the figures by what they are about and by backend."""
    table: dict[str, dict[str, str]] = {}
    with rounds.fresh_processes() as processes:
        for module in MODULES:
            for backend in backends:
                print(f"{module} on {backend} ...", file=sys.stderr, flush=True)
                try:
                    found = processes.submit(run, module, backend, quick).result()
                except ModuleNotFoundError as exc:
                    print(f"{module} is left out, since {exc.name} is not installed", file=sys.stderr)
                    break

                for what, figure in found.items():
                    table.setdefault(what, {})[backend] = figure

    # Ratios first: the rest says more about the machine.
    return dict(sorted(table.items(), key=lambda row: not next(iter(row[1].values())).endswith("x")))


def machine() -> str:
    """Say where the figures come from."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass

    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def versions() -> str:
    found = [f"{platform.python_implementation()} {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass

    return ", ".join(found)


def insides(backends: list[str]) -> str:
    with rounds.fresh_processes() as processes:
        return "; ".join(processes.submit(rounds.insides, backend).result() for backend in backends)


def markdown(table: dict[str, dict[str, str]], backends: list[str]) -> str:
    lines = [["", *backends], ["---", *["--:" for _ in backends]]]
    lines += [[what, *(row.get(backend, ABSENT) for backend in backends)] for what, row in table.items()]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n{machine()}; {versions()}; {insides(backends)}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend",
        choices=rounds.installed(),
        action="append",
        help="may be repeated (default: asyncio and trio)",
    )
    parser.add_argument("--quick", action="store_true", help="few of everything")
    options = parser.parse_args()
    backends = options.backend or [name for name in ("asyncio", "trio") if name in rounds.installed()]
    for package in ways.MISSING:
        print(f"{package} is not installed, and left out", file=sys.stderr)

    print(markdown(collect(backends, options.quick), backends))


if __name__ == "__main__":
    main()

"""How the package is put together: what imports what, and what is public."""

import ast
import graphlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

import agentloop
from agentloop.contrib import dask

PACKAGE = Path(agentloop.__file__).parent

# From the bottom to the top: a part imports only what is in it or below it. The other modules at the top of
# the package are its vocabulary.
VOCABULARY = "vocabulary"
PARTS = ["_limits", "_metrics"]
LAYERS = [
    [VOCABULARY],
    ["_eventloop", "_provider"],
    PARTS,
    ["_store"],
    ["_runtime"],
    ["_batch"],
    ["_stream"],
    ["_loop"],
    ["_signals"],
    ["journal"],
    ["__init__"],
]
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}

OUTSIDE = {"anyio", "attrs"}
# What a few modules may import besides, and nobody else may.
RESERVED = {
    "sqlite3": {"journal"},
    "asyncio": {"_eventloop", "testing/_clock_asyncio"},
    "trio": {"_eventloop", "testing/_clock_trio"},
    "outcome": {"testing/_clock_trio"},
    "rich": {"contrib/progress/_display", "contrib/progress/_terminal", "contrib/progress/__init__"},
    "opentelemetry": {"contrib/opentelemetry", "contrib/dask/_tracing"},
    "prometheus_client": {"contrib/prometheus"},
    "distributed": {"contrib/dask/_engine"},
    "cloudpickle": {"contrib/dask/_pickles"},
}

# The names of the contract, as far as they are built.
CONTRACT = [
    *("AgentLoop", "LoopConfig", "Backoff", "Invocation", "InvocationResult", "Status", "Verdict"),
    *("VerdictKind", "classify", "Limiter", "MetricsRecorder", "MetricsSnapshot", "Distribution"),
    *("LoopStatistics", "StreamChunk", "StreamEvent", "ContextStore", "AgentLoopError"),
    *("InvocationTimeout", "FirstChunkTimeout", "IdleTimeout", "InvocationCancelled", "BatchStopped"),
    *("BudgetSpent", "StopRule", "QueueFull", "QueueTimeout", "Attempt", "current_attempt"),
    *("drain_on_signals", "in_thread"),
]


@attrs.frozen
class Import:
    importer: str
    module: str
    """The absolute name of what is imported."""

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports_of(path: Path) -> Iterator[Import]:
    """Yield every import of a module, inside its functions too."""
    package = ["agentloop", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name_of(path), alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                # "from . import _x" names a module, "from ._x import y" what is in one.
                inner = f"{source}.{alias.name}"
                yield Import(name_of(path), inner if is_module(inner) else source)


def is_module(name: str) -> bool:
    parts = name.split(".")
    path = PACKAGE.joinpath(*parts[1:])
    return parts[0] == "agentloop" and (path.with_suffix(".py").exists() or path.is_dir())


IMPORTS = [found for path in sorted(PACKAGE.rglob("*.py")) for found in imports_of(path)]

# An alias of types has nothing of its own.
every_public_name = pytest.mark.parametrize("name", [name for name in agentloop.__all__ if name != "Event"])


# --- what imports what


def part_of(module: str) -> str:
    """Return the part of the package that a module belongs to, given by its path without ``.py``."""
    part = module.partition("/")[0]
    return part if part in HEIGHT or "/" in module else VOCABULARY


def own_imports() -> Iterator[tuple[str, str]]:
    for found in IMPORTS:
        if found.top == "agentloop":
            yield found.importer, found.module.removeprefix("agentloop.").replace(".", "/")


def test_parts_import_downward_only() -> None:
    upward = [
        f"{importer} imports {imported}"
        for importer, imported in own_imports()
        if part_of(importer) in HEIGHT and part_of(importer) != part_of(imported)
        if HEIGHT[part_of(imported)] >= HEIGHT[part_of(importer)]
    ]
    assert not upward


def test_modules_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported in own_imports():
        graph.setdefault(importer, set()).add(imported)

    graphlib.TopologicalSorter(graph).prepare()


def test_import_outside_the_package_is_of_the_standard_library_or_of_what_it_depends_on() -> None:
    foreign = [
        found
        for found in IMPORTS
        if found.top not in sys.stdlib_module_names | OUTSIDE | RESERVED.keys() | {"agentloop"}
    ]
    assert not foreign


@pytest.mark.parametrize("module", RESERVED)
def test_reserved_module_is_imported_only_where_it_may_be(module: str) -> None:
    importers = {found.importer for found in IMPORTS if found.top == module}
    allowed = RESERVED[module]
    assert not {importer for importer in importers if not {importer, part_of(importer)} & allowed}


def test_adapters_use_what_is_public_and_nothing_else() -> None:
    imported = {
        module
        for importer, module in own_imports()
        if importer.startswith("contrib/")
        # A package of its own may have modules of its own.
        if not module.startswith(importer.rpartition("/")[0] + "/_")
    }
    # A worker process says which attempt of its caller's it runs, and fails as the loop itself does.
    assert imported == {"agentloop", "_errors", "_runtime/current"}


def test_package_is_imported_without_trio_and_without_its_own_testing_tools_and_adapters() -> None:
    # Without what was loaded before, such as by the measurement of coverage.
    code = "import sys; before = {*sys.modules}; import agentloop; print(*({*sys.modules} - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    loaded = set(done.stdout.split())
    assert "agentloop._loop" in loaded
    assert not loaded & {"trio", "outcome", "pytest", "agentloop.testing"}
    assert not loaded & {"rich", "opentelemetry", "prometheus_client", "distributed", "agentloop.contrib"}
    assert not loaded & {"sqlite3", "agentloop.journal"}


# --- what is public


def test_list_of_public_names_is_sorted_and_complete() -> None:
    assert agentloop.__all__ == sorted(agentloop.__all__)
    public = {
        name
        for name, value in vars(agentloop).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(agentloop.__all__)


def test_names_of_the_contract_are_public_in_the_adapter_to_dask() -> None:
    assert dask.__all__ == ["RemoteError", "WorkerLost", "Workers", "WorkersStatistics"]


@pytest.mark.parametrize("name", CONTRACT)
def test_name_of_the_contract_is_public(name: str) -> None:
    assert name in agentloop.__all__


@every_public_name
def test_public_name_says_that_it_lives_in_the_package_and_what_it_is(name: str) -> None:
    public = getattr(agentloop, name)
    assert public.__module__ == "agentloop"
    assert public.__name__ == public.__qualname__ == name
    assert vars(public).get("__doc__") or (not inspect.isclass(public) and public.__doc__)
    # Its annotations can be read at run time.
    typing.get_type_hints(public)


def public_members() -> Iterator[tuple[str, Any]]:
    for name in agentloop.__all__:
        public = getattr(agentloop, name)
        if inspect.isclass(public):
            for member, value in vars(public).items():
                value = getattr(value, "__func__", value)
                if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    yield f"{name}.{member}", value


@pytest.mark.parametrize(("name", "member"), [pytest.param(*pair, id=pair[0]) for pair in public_members()])
def test_public_method_has_a_docstring(name: str, member: Any) -> None:
    assert member.__doc__

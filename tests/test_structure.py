"""How large the parts of the package may be, who writes what, and how many of them an invocation passes."""

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import anyio
import attrs
import pytest
from frames import frames_each, run_batch, run_singles, under_a_chunk
from planting import PACKAGE, definitions

ATTRIBUTES = 22
MODULE_LINES = 350
FUNCTION_LINES = 80
MODULES_IN_A_FOLDER = 15
# Adapters and tools for tests, whose classes and modules may be larger.
OUTER = ("contrib/", "testing/", "journal/")

# Our frames and modules for each invocation, and our coroutines below which an agent of a stream runs.
BATCH_FRAMES, BATCH_MODULES = 12, 8
SINGLE_FRAMES = 20
CHUNK_FRAMES = 4


# --- the classes and functions of the package


@attrs.frozen
class Class:
    module: str
    name: str
    """Its qualified name."""
    node: ast.ClassDef

    @property
    def bases(self) -> Iterator[str]:
        for base in self.node.bases:
            # Generic[T] as Generic, anyio.Event as Event
            yield ast.unparse(base).partition("[")[0].rpartition(".")[2]

    @property
    def is_frozen(self) -> bool:
        return any("frozen" in ast.unparse(decorator) for decorator in self.node.decorator_list)

    @property
    def own_attributes(self) -> set[str]:
        """What the class assigns: in its body, in ``__slots__``, and to ``self`` in its methods."""
        names = {write.attr for write in writes_in(self.node) if receiver(write) == "self"}
        for statement in self.node.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                names |= {ast.unparse(target) for target in targets}
                if "__slots__" in names and statement.value is not None:
                    names.discard("__slots__")
                    names |= {
                        str(node.value)
                        for node in ast.walk(statement.value)
                        if isinstance(node, ast.Constant)
                    }

        return {name for name in names if not name.startswith("__")}


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def writes_in(node: ast.AST) -> Iterator[ast.Attribute]:
    """Yield each attribute that a class or a function assigns or deletes, without the classes in it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Attribute) and not isinstance(child.ctx, ast.Load):
            yield child

        if not isinstance(child, ast.ClassDef):
            yield from writes_in(child)


def receiver(write: ast.Attribute) -> str:
    """Return the last name of what an attribute is written to: ``_job`` for ``self._job.error = ...``."""
    return ast.unparse(write.value).rpartition(".")[2]


MODULES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
DEFINITIONS = [(module, name, node) for module, tree in MODULES.items() for name, node in definitions(tree)]
CLASSES = [Class(*found) for found in DEFINITIONS if isinstance(found[2], ast.ClassDef)]
BY_NAME = {found.name: found for found in CLASSES}


@functools.cache
def attributes_of(found: Class) -> frozenset[str]:
    """Return the attributes of a class, with those that it inherits from classes of the package."""
    inherited = (attributes_of(BY_NAME[base]) for base in found.bases if base in BY_NAME)
    return frozenset(found.own_attributes).union(*inherited)


# --- how large they may be


@attrs.frozen
class Finding:
    name: str
    count: int
    where: str


def check(rule: str, findings: Iterable[Finding], limit: int, what_to_do: str) -> None:
    """Assert that nothing breaks a rule."""
    broken = [
        f"{found.name} ({found.where}) has {found.count} {rule}, expected at most {limit}: {what_to_do}"
        for found in findings
        if found.count > limit
    ]
    assert not broken, "\n".join(broken)


def test_no_class_has_too_many_attributes() -> None:
    findings = [
        Finding(one.name, len(attributes_of(one)), one.module)
        for one in CLASSES
        if not one.is_frozen and not one.module.startswith(OUTER)
    ]
    check("attributes", findings, ATTRIBUTES, "make a class of some that belong together")


def test_no_module_is_too_long() -> None:
    findings = [
        Finding(module, len((PACKAGE / module).read_text("utf-8").splitlines()), "agentloop")
        for module in MODULES
        if not module.startswith(OUTER)
    ]
    check("module lines", findings, MODULE_LINES, "move one of its ideas to a module of its own")


def test_no_function_is_too_long() -> None:
    findings = [
        Finding(name, (node.end_lineno or 0) - node.lineno + 1, f"{module}:{node.lineno}")
        for module, name, node in DEFINITIONS
        if isinstance(node, FunctionNode)
    ]
    check("function lines", findings, FUNCTION_LINES, "move a step of it to a function of its own")


def test_no_folder_holds_too_many_modules() -> None:
    modules = [Path("agentloop", module) for module in MODULES if not module.endswith("__init__.py")]
    folders = [module.parent.as_posix() for module in modules]
    findings = [Finding(folder, folders.count(folder), "a folder") for folder in sorted(set(folders))]
    check("modules in a folder", findings, MODULES_IN_A_FOLDER, "give some of them a package of their own")


# --- who writes what

# A module outside of these knows no job, slot or attempt.
WRITERS = ("_limits/", "_runtime/", "_loop")


def is_owner(found: Class) -> bool:
    """Whether only its own methods may write what a class has."""
    name = found.name.rpartition(".")[2]
    return (
        found.module.startswith(WRITERS)
        and not found.is_frozen
        and (name in ("Job", "Slot") or name.endswith(("Attempt", "AttemptScope")))
    )


def owners_of(write: ast.Attribute) -> set[str]:
    """
    Return the classes that an attribute may belong to that is written somewhere, and that alone may write it.

    The attribute's name tells them, and the name of what it is written to: ``waiter`` is a ``Waiter``, if
    that has such an attribute, and not a ``Slot`` that has one too. What cancel scopes have is theirs, unless
    the name of a class says otherwise.
    """
    having = {one for one in CLASSES if write.attr in attributes_of(one)}
    named = {
        one for one in having if one.name.lower().strip("_") == receiver(write).strip("_").replace("_", "")
    }
    if not named and hasattr(anyio.CancelScope, write.attr):
        return set()

    return {one.name for one in named or having if is_owner(one)}


def test_jobs_slots_and_attempts_are_written_by_their_own_methods_only() -> None:
    findings = []
    for module, name, node in DEFINITIONS:
        outer = name.rpartition(".")[0]
        # A function within another one belongs to that.
        if isinstance(node, FunctionNode) and module.startswith(WRITERS) and (not outer or outer in BY_NAME):
            foreign = {
                ast.unparse(write): " or ".join(sorted(owners))
                for write in writes_in(node)
                if receiver(write) != "self" and (owners := owners_of(write)) and outer not in owners
            }
            writes = ", ".join(f"{write} of {owners}" for write, owners in sorted(foreign.items()))
            findings.append(Finding(name, len(foreign), f"{module}: {writes}"))

    check("writes", findings, 0, "make a method of the class that does it, and call that")


# --- how many an invocation passes


def check_frames(found: int, limit: int, frames: object) -> None:
    assert found <= limit, f"{found} found, expected at most {limit}: make one of some\n{frames}"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_invocation_of_a_batch_passes_few_frames(backend: str) -> None:
    frames = frames_each(run_batch, backend)
    check_frames(round(frames.total), BATCH_FRAMES, frames)
    check_frames(len(frames.modules), BATCH_MODULES, frames)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_single_invocation_passes_few_frames(backend: str) -> None:
    frames = frames_each(run_singles, backend)
    check_frames(round(frames.total), SINGLE_FRAMES, frames)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_agent_of_a_stream_runs_below_few_frames(backend: str) -> None:
    frames = under_a_chunk(backend)
    assert frames
    check_frames(len(frames), CHUNK_FRAMES, frames)

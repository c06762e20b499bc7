"""
Changes one place in a function of the package, which is found in its syntax tree.

Neither comments nor line breaks matter, nor where in the package the function stands.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, TypeAlias

PACKAGE = Path(__file__).resolve().parents[2] / "agentloop"

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(node: ast.AST, outer: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield the qualified name and the node of each class and function, however deep."""
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, Definition):
            name = f"{outer}.{child.name}".lstrip(".")
            yield name, child

        yield from definitions(child, name)


def plant(where: str, old: str, new: str, package: Path = PACKAGE) -> tuple[str, str]:
    """
    Replace ``old`` by ``new`` in a function or a class.

    Both are expressions or both are statements; nothing at all is no statement. A block that ends in ``...``
    stands for one that begins like it, and ``...`` in ``new`` for the rest of that.

    :param where: the qualified name, such as ``Slot.release`` or ``make_is_cancelled.look``; after a file and
        ``::`` where it is not the only one
    :return: the path of the module in the package, and its new text
    :raises LookupError: if there is no such function, or ``old`` does not stand there exactly once
    """
    file, _, name = where.rpartition("::")
    files = {module for module, known in _names(package) if known == name and file in ("", module)}
    if len(files) != 1:
        found = f"stands in {sorted(files)}: name one" if files else "is gone: name another place"
        raise LookupError(f"{where} {found}")

    module = files.pop()
    tree = ast.parse((package / module).read_text("utf-8"))
    before, after = _parse(old, new)
    replacements = [
        replace
        for known, node in definitions(tree)
        if known == name
        for replace in _replacements(node, before, after)
    ]
    if len(replacements) != 1:
        raise LookupError(
            f"{where} in {module} has it {len(replacements)} times, expected once:\n{dedent(old)}"
        )

    replacements[0]()
    return module, ast.unparse(tree)


@functools.cache
def _names(package: Path) -> frozenset[tuple[str, str]]:
    return frozenset(
        (path.relative_to(package).as_posix(), name)
        for path in package.rglob("*.py")
        for name, _ in definitions(ast.parse(path.read_text("utf-8")))
    )


def _parse(old: str, new: str) -> tuple[Any, Any]:
    """Return two expressions, or else two lists of statements."""
    try:
        return tuple(ast.parse(text.strip(), mode="eval").body for text in (old, new))
    except SyntaxError:
        return tuple(ast.parse(dedent(text)).body for text in (old, new))


def _replacements(root: ast.AST, old: Any, new: Any) -> Iterator[Callable[[], None]]:
    """Yield what replaces ``old``, for each place where it stands."""
    before, after = ([old], [new]) if isinstance(old, ast.expr) else (old, new)
    for node in ast.walk(root):
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.expr) and _is_like(old, value, []):
                yield functools.partial(setattr, node, field, new)
            elif isinstance(value, list):
                for at in range(len(value)):
                    rest: list[ast.stmt] = []
                    part = slice(at, at + len(before))
                    if _is_like(before, value[part], rest):
                        yield functools.partial(_put, value, part, after, rest)


def _put(block: list[Any], part: slice, new: list[Any], rest: list[ast.stmt]) -> None:
    for node in (node for one in new for node in ast.walk(one)):
        for _, inner in ast.iter_fields(node):
            if isinstance(inner, list) and inner and _is_rest(inner[-1]):
                inner[-1:] = rest

    block[part] = new
    if not block:
        block.append(ast.Pass())


def _is_rest(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def _is_like(pattern: Any, found: Any, rest: list[ast.stmt]) -> bool:
    """Return whether a pattern matches; put what ``...`` stands for into ``rest``."""
    if isinstance(pattern, list) and isinstance(found, list):
        if pattern and _is_rest(pattern[-1]):
            pattern = pattern[:-1]
            rest[:] = found[len(pattern) :]
            found = found[: len(pattern)]

        return len(pattern) == len(found) and all(
            _is_like(*pair, rest) for pair in zip(pattern, found, strict=True)
        )

    if isinstance(pattern, ast.AST):
        return type(pattern) is type(found) and all(
            _is_like(value, getattr(found, field), rest) for field, value in ast.iter_fields(pattern)
        )

    return bool(type(pattern) is type(found) and pattern == found)

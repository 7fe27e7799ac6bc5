"""A fingerprint of the code that a stage runs: of meaning, not of spelling.

It covers the stage's file and every first-party module that it imports, directly or not, as syntax trees without
docstrings: comments and formatting change nothing, and code that a stage does not use cannot rerun it. The config's
sections are left out: they check values, and the values, defaults included, are in the settings of every rule.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = "lowrank"
SETTINGS = f"{PACKAGE}.config"


def fingerprint(scripts: Path, stage: str, *modules: str) -> str:
    """Hex digest of a stage's code.

    Args:
        scripts: the folder that holds `stages/` and the package.
        stage: name of the stage's file, without `.py`.
        modules: modules that the stage imports by a computed name (methods), dotted.
    """
    seen: dict[Path, str] = {}
    pending = [scripts / "stages" / f"{stage}.py", *(_module_file(scripts, name) for name in modules)]
    while pending:
        path = pending.pop()
        if path is None or path in seen:
            continue
        digest, imports = _parsed(path, path.stat().st_mtime_ns)
        seen[path] = digest
        pending.extend(found for name in imports if (found := _module_file(scripts, name)))
    listing = sorted((path.relative_to(scripts).as_posix(), digest) for path, digest in seen.items())
    return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]


@cache
def _parsed(path: Path, _mtime: int) -> tuple[str, tuple[str, ...]]:
    """Digest of a file's meaning, and the first-party modules that it imports anywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = tuple(sorted(_imports(tree)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports


def _imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    skipped = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE and not name.startswith(SETTINGS)}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _module_file(scripts: Path, name: str) -> Path | None:
    base = scripts.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None

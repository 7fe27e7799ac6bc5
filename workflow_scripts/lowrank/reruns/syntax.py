"""What the syntax tree of a module says: which names it binds, what they use, and what its import does.

See `lowrank.reruns.fingerprint` for what it is good for.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Node = tuple[str, str]
"""A module, and a name in it (or `name.attribute`); `*` for all of it, and nothing for what its import does."""
WHOLE, ON_IMPORT = "*", ""

_SILENT = {"ctx", "kind", "type_comment"}
"""Fields of a syntax tree that follow from others, or say nothing."""
INERT = {"dataclass", "cache", "lru_cache", "contextmanager", "no_grad", "inference_mode", "overload"}
"""Decorators that hand what they decorate to nobody."""


@dataclass
class Uses:
    """What some code refers to.

    Attributes:
        nodes: in modules of ours.
        origins: name, and the import that binds it (`module:name`, or `module:`), also of packages of others.
    """

    nodes: set[Node] = field(default_factory=set)
    origins: set[tuple[str, str]] = field(default_factory=set)

    @property
    def packages(self) -> set[str]:
        """The packages of those imports."""
        return {origin.partition(":")[0].partition(".")[0] for _, origin in self.origins}


class Module:
    """One file.

    Attributes:
        definitions: name -> the statements that bind it: functions, classes, constants.
        imports: name -> the imports at the top of the file that bind it.
        loaded: the modules that they import.
        active: the other statements, and the definitions that do more than bind a name.
    """

    def __init__(self, name: str, text: str, ours: Iterable[str]) -> None:
        """Args: name: dotted. text: content. ours: packages whose code counts."""
        self.name, self.ours = name, tuple(ours)
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, set[str]] = {}
        statements = [each for each in ast.parse(text, filename=name).body if not _says_nothing(each)]
        for statement in statements:
            for bound in _bound(statement):
                self.definitions.setdefault(bound, []).append(statement)
            for node in _walked(statement) if not _bound(statement) else ():
                for local, origin in _imported(node):
                    self.imports.setdefault(local, set()).add(origin)
        self.loaded = {
            module
            for origins in self.imports.values()
            for origin in origins
            for module in (origin.partition(":")[0], origin.removesuffix(":").replace(":", "."))
        }
        self.active = [each for each in statements if self._acts(each)]

    def uses(self, statements: Iterable[ast.AST]) -> Uses:
        """What code of this module refers to, wherever it stands in a statement, imports inside functions included."""
        found = Uses()
        for statement in statements:
            names: set[tuple[str, str]] = set()
            owners: set[int] = set()
            for node in _walked(statement):  # an attribute comes before the name that has it
                if isinstance(node, ast.Name) and id(node) not in owners:
                    names.add((node.id, ""))
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    owners.add(id(node.value))
                    names.add((node.value.id, node.attr))
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    for _, origin in _imported(node):
                        self._add(found, "", origin, "")
            for name, attribute in names:
                if name in self.definitions:
                    found.nodes.add((self.name, name))
                for origin in self.imports.get(name, ()):
                    self._add(found, name, origin, attribute)
        return found

    def _add(self, uses: Uses, local: str, origin: str, attribute: str) -> None:
        uses.origins.add((local, origin))
        module, _, name = origin.partition(":")
        if self._is_ours(origin):
            wanted = ".".join(filter(None, (name, attribute))) or WHOLE
            uses.nodes |= {(module, wanted), (module, ON_IMPORT)}

    def _is_ours(self, origin: str) -> bool:
        return origin.partition(":")[0].partition(".")[0] in self.ours

    def _acts(self, statement: ast.stmt) -> bool:
        """Whether the import of the module may change something through a statement, besides binding names."""
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            return False
        if not _bound(statement):
            return True
        calls = [node for node in _evaluated(statement) if isinstance(node, ast.Call)]
        if calls and isinstance(statement, (ast.Assign, ast.AnnAssign)):
            return True
        for call in calls:
            for name in {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}:
                if name in self.definitions or any(self._is_ours(origin) for origin in self.imports.get(name, ())):
                    return True
        return not all(last_name(each) in INERT for each in getattr(statement, "decorator_list", []))


def meaning(statements: Iterable[ast.AST]) -> str:
    """Digest of code that does not depend on comments, docstrings, formatting or the version of Python."""
    return hashlib.sha256(_spelled(list(statements)).encode()).hexdigest()


def last_name(decorator: ast.expr) -> str:
    """`no_grad` of `@torch.no_grad()`."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _spelled(value: object) -> str:
    if isinstance(value, ast.AST):
        fields = []
        for name in value._fields:
            inner = getattr(value, name, None)
            if inner is not None and inner != [] and name not in _SILENT:
                fields.append(f"{name}={_spelled(inner)}")
        return f"{type(value).__name__}({' '.join(fields)})"
    if isinstance(value, list):
        return f"[{','.join(_spelled(each) for each in value if not _says_nothing(each))}]"
    return repr(value)


def _walked(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers, each before its children; without contexts, which say nothing."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if _is_type_checking(node):
            continue
        yield node
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, list):
                pending.extend(each for each in value if isinstance(each, ast.AST))
            elif isinstance(value, ast.AST) and name != "ctx":
                pending.append(value)


def _is_type_checking(node: object) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _says_nothing(node: object) -> bool:
    """A docstring, or what only type checkers read."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return text or _is_type_checking(node)


def _bound(statement: ast.AST) -> list[str]:
    """The names that a definition binds; none if a statement is no definition."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.AnnAssign):
        targets: list[ast.expr] = [statement.target]
    else:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
    flat = [each for target in targets for each in (target.elts if isinstance(target, ast.Tuple) else [target])]
    names = [each.id for each in flat if isinstance(each, ast.Name)]
    return names if len(names) == len(flat) else []


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Name and origin, of an import statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], f"{alias.name}:"
    elif isinstance(node, ast.ImportFrom):
        if node.level or any(alias.name == "*" for alias in node.names):
            raise SyntaxError(f"line {node.lineno}: relative and star imports hide from fingerprints what they bind")
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}:{alias.name}"


def _evaluated(statement: ast.AST) -> Iterator[ast.AST]:
    """The expressions of a definition that are evaluated when it is made, not when it is called."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        parts: list[ast.AST | None] = [*statement.decorator_list, *statement.args.defaults, *statement.args.kw_defaults]
    elif isinstance(statement, ast.ClassDef):
        parts = [*statement.decorator_list, *statement.bases, *statement.keywords]
        for each in statement.body:
            yield from _evaluated(each)
    else:
        parts = [statement.value if isinstance(statement, ast.AnnAssign) else statement]
    for part in parts:
        yield from ast.walk(part) if part else ()

"""A fingerprint of the code that a stage runs: of meaning, not of spelling, and of no more than it can reach.

It goes definition by definition, that is by functions, classes and constants at the top of a module: those that the
stage's file runs, those that their code names, and so on through all modules of the package. Whoever names a class gets
all of it, since nothing tells which of its methods is called; whoever names a module gets all of it, unless for
`module.name`. What a module does on its import counts for all who import it: statements that are no definitions,
constants that call something, and functions and classes that call code of ours while they are defined. Comments,
docstrings and formatting do not count.

Left out are the fields and checks of the config's sections, since the values, defaults included, are in the settings of
every rule; and the frame around a stage (`lowrank.jobs.stage`): how it logs and fails, not what it computes.

Code that no name leads to must be named by the rule: modules that are imported by a computed name (methods), or started
as a process. A test sees to it that the library reaches code in no other hidden way.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from lowrank.reruns.remembered import Remembered
from lowrank.reruns.syntax import ON_IMPORT, WHOLE, Module, Node, Uses, last_name, meaning

PACKAGE = "lowrank"
OURS = (PACKAGE, "stages")
FRAME = f"{PACKAGE}.jobs.stage"
CONFIG = f"{PACKAGE}.config"
SECTION = (f"{CONFIG}.base", "Section")
HELPERS = {"snakemake", "pydantic", "pydantic_core", "filelock", "packaging", "huggingface_hub", "safetensors"}
"""Packages that run stages, check settings or move files whose checksums are known: no number depends on them."""
PINNED_AS = {"yaml": "pyyaml"}
"""Packages that are not imported by the name that they are installed by."""
Found = tuple[str, Uses]
"""Digest of a node's code, and what it refers to."""


class Code:
    """The code of a checkout. Each file is read once, when it is needed: after a change, make another `Code`."""

    def __init__(self, scripts: Path, requirements: Path | None = None) -> None:
        """Args: scripts: the folder that holds `stages/` and the package. requirements: pins of other packages."""
        self.scripts, self.requirements = scripts, requirements
        self._modules: dict[str, Module | None] = {}
        self._nodes: dict[Node, Found | None] = {}
        self._remembered = Remembered(scripts, [requirements] if requirements else [])

    def fingerprint(self, stage: str, *modules: str, only: Mapping[str, str] | None = None) -> str:
        """Hex digest of a stage's code.

        Args:
            stage: name of the stage's file, without `.py`.
            modules: dotted names of modules that it imports by a computed name, or starts.
            only: dotted name of a dict of functions -> the one key by which the job looks something up in it.
        """
        return self._tell(stage, modules, only or {})[0]

    def packages(self, stage: str, *modules: str, only: Mapping[str, str] | None = None) -> dict[str, str]:
        """The packages of others that the same code names, as the requirements name them -> their pinned versions."""
        return dict(self._tell(stage, modules, only or {})[1])

    def _tell(self, stage: str, modules: tuple[str, ...], only: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """Digest and packages, which are found once: a stage has a job for each checkpoint."""

        def find() -> tuple[str, dict[str, str]]:
            reached = self._reached(stage, modules, only)
            listing = sorted((node, digest, sorted(uses.origins)) for node, (digest, uses) in reached.items())
            names = {name for _, uses in reached.values() for name in uses.packages} - HELPERS
            pins = [self._pins.get(_normal(PINNED_AS.get(name, name))) for name in names]
            digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
            return digest, dict(sorted(pin for pin in pins if pin))

        return self._remembered.get((stage, modules, sorted(only.items())), find)

    @cached_property
    def _pins(self) -> dict[str, tuple[str, str]]:
        text = self.requirements.read_text(encoding="utf-8") if self.requirements else ""
        pins = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
        return {_normal(name): (name, version) for name, version in pins}

    def _module(self, name: str) -> Module | None:
        """A module of ours; None for packages of others, and for what is no module."""
        if name not in self._modules:
            base = self.scripts.joinpath(*name.split("."))
            files = [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
            ours = bool(files) and name.partition(".")[0] in OURS
            self._modules[name] = Module(name, files[0].read_text(encoding="utf-8"), OURS) if ours else None
        return self._modules[name]

    def _reached(self, stage: str, modules: Iterable[str], only: Mapping[str, str]) -> dict[Node, Found]:
        """Everything that a stage can reach."""
        reached: dict[Node, Found] = {}
        pending: list[Node] = [(f"stages.{stage}", ON_IMPORT), *((name, WHOLE) for name in modules)]
        for name, _ in pending:
            if self._module(name) is None:
                raise FileNotFoundError(f"{self.scripts}: there is no module {name}")
        while pending:
            node = pending.pop()
            if node not in reached and (found := self._find(node, only)):
                reached[node] = found
                pending.extend(found[1].nodes)
        return reached

    def _find(self, node: Node, only: Mapping[str, str]) -> Found | None:
        if key := only.get(".".join(node)):
            return self._entry(node, key)
        if node not in self._nodes:
            self._nodes[node] = self._look_up(node)
        return self._nodes[node]

    def _look_up(self, node: Node) -> Found | None:
        """A node's code and uses; None if nothing of it counts."""
        (place, name), module = node, self._module(node[0])
        if module is None or place == FRAME:
            return None
        if name == ON_IMPORT:
            active = [] if place.startswith(CONFIG) else module.active
            uses = module.uses(active)
            loaded = {*module.loaded, place.rpartition(".")[0]}
            return meaning(active), Uses(uses.nodes | {(other, ON_IMPORT) for other in loaded}, uses.origins)
        if name == WHOLE:
            found = Uses({(place, each) for each in module.definitions})
        elif name in module.definitions:
            return self._definition(module, name)
        elif name in module.imports:  # from elsewhere
            found = module.uses([ast.Expr(ast.Name(name))])
        else:
            head, _, attribute = name.partition(".")
            inner = f"{place}.{head}"
            if head in module.definitions or head in module.imports:
                found = Uses({(place, head)})
            else:  # a module of this package; or bound in a way that only Python understands
                found = Uses({(inner, attribute or WHOLE)} if self._module(inner) else {(place, WHOLE)})
        found.nodes.add((place, ON_IMPORT))
        return "", found

    def _definition(self, module: Module, name: str) -> Found:
        statements = module.definitions[name]
        counted = [self._without_fields(module, each) for each in statements]
        uses = module.uses(counted)
        for old, new in zip(statements, counted, strict=True):
            if old is not new:
                uses.nodes.update(self._classes(module, _annotations(old)))
        uses.nodes.add((module.name, ON_IMPORT))
        return meaning(counted), uses

    def _entry(self, node: Node, key: str) -> Found:
        """One entry of a dict that is written out."""
        module = self._module(node[0])
        (statement,) = module.definitions[node[1]] if module else [None]
        written = getattr(statement, "value", None)
        if module and isinstance(written, ast.Dict):
            for each, value in zip(written.keys, written.values, strict=True):
                if isinstance(each, ast.Constant) and each.value == key:
                    uses = module.uses([value])
                    return meaning([value]), Uses(uses.nodes | {(node[0], ON_IMPORT)}, uses.origins)
        raise KeyError(f"{'.'.join(node)} is no dict with a key {key!r}")

    # --- sections of the config: methods count, fields and checks do not ---

    def _without_fields(self, module: Module, statement: ast.stmt) -> ast.stmt:
        """A section without its fields and checks; any other definition as it is."""
        if not isinstance(statement, ast.ClassDef) or not self._is_section(module, statement):
            return statement
        kept = [each for each in statement.body if not _is_field(each) and not _is_check(each)]
        return ast.ClassDef(statement.name, statement.bases, [], kept, statement.decorator_list)

    def _is_section(self, module: Module, statement: ast.ClassDef) -> bool:
        if (module.name, statement.name) == SECTION:
            return True
        named = self._named(module, statement.bases)
        return any(isinstance(found, ast.ClassDef) and self._is_section(owner, found) for owner, found in named)

    def _classes(self, module: Module, annotations: Iterable[ast.expr]) -> Iterator[Node]:
        """The classes of ours that annotations name, also by aliases: somebody may call their methods."""
        pending = [(module, annotation) for annotation in annotations]
        while pending:
            for owner, found in self._named(*pending.pop()):
                if isinstance(found, ast.ClassDef):
                    yield owner.name, found.name
                elif isinstance(found, ast.Assign):
                    pending.append((owner, found.value))

    def _named(self, module: Module, *expressions: ast.expr | list[ast.expr]) -> Iterator[tuple[Module, ast.stmt]]:
        """The definitions of ours that expressions name, where they stand."""
        flat = [each for some in expressions for each in (some if isinstance(some, list) else [some])]
        pending = list(module.uses(flat).nodes)
        while pending:
            place, name = pending.pop()
            owner = self._module(place)
            if owner and name in owner.definitions:
                yield owner, owner.definitions[name][-1]
            elif owner and name in owner.imports:
                pending.extend(owner.uses([ast.Expr(ast.Name(name))]).nodes)


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _annotations(statement: ast.stmt) -> list[ast.expr]:
    return [each.annotation for each in getattr(statement, "body", []) if isinstance(each, ast.AnnAssign)]


def _is_field(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation)


def _is_check(statement: ast.stmt) -> bool:
    decorators = getattr(statement, "decorator_list", [])
    return any(last_name(each) in ("model_validator", "field_validator") for each in decorators)

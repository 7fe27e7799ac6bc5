"""The library's rooms: who imports whom, read off the code; and that a step has one name everywhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from lowrank import ROOMS
from lowrank.config.load import load_study
from lowrank.layout import Layout
from lowrank.reruns.syntax import Module

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "workflow_scripts"
LIBRARY = sorted((SCRIPTS / "lowrank").rglob("*.py"))
UPWARDS = {("config", "methods")}
"""A method owns its settings, and a config knows the settings of all methods."""


def module_name(path: Path) -> str:
    """Dotted name of a file of the library."""
    parts = path.relative_to(SCRIPTS).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Dotted names of the modules (or of what is in them) that a file imports, anywhere in it, for type checks too."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(module: str) -> str:
    """The room of a module of the library; nothing for the library itself."""
    return [*module.split("."), ""][1]


def ties() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the imports, as `module -> name`."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in LIBRARY:
        here = module_name(path)
        for name in imports(path):
            if name.split(".")[0] == "lowrank" and room_of(name) != room_of(here):
                found.setdefault((room_of(here), room_of(name)), []).append(f"{here} -> {name}")
    return found


def test_every_room_is_in_the_order_and_says_what_it_is() -> None:
    places = {room_of(module_name(path)): path for path in reversed(LIBRARY) if module_name(path) != "lowrank"}
    assert sorted(places) == sorted(ROOMS)
    for path in LIBRARY:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} does not say what it is"


def test_a_room_imports_only_rooms_below_it() -> None:
    upwards = {tie: who for tie, who in ties().items() if "" not in tie and ROOMS.index(tie[0]) < ROOMS.index(tie[1])}
    assert {tie: who for tie, who in upwards.items() if tie not in UPWARDS} == {}
    assert set(upwards) == UPWARDS, "what is no longer there need not be allowed"


def test_rooms_hand_nothing_on() -> None:
    """A name is imported from where it stands."""
    for path in LIBRARY:
        if path.name == "__init__.py" and path.parent.name not in (
            "methods",
            "tables",
        ):  # registers of what lies in them
            assert not list(imports(path)), path


@pytest.mark.parametrize("package", ["snakemake", "stages"])
def test_the_library_does_not_know_snakemake(package: str) -> None:
    assert not [(path, name) for path in LIBRARY for name in imports(path) if name.split(".")[0] == package]
    scripts = {path.name for path in SCRIPTS.glob("*.py")}
    assert scripts == {"compress.py", "export.py", "run.py", "why.py"}, "one for each `make` beyond a command"


def at_import(module: str, files: dict[str, Path], seen: set[str]) -> set[str]:
    """What the import of a module loads at once: modules of the library, and packages of others."""
    if module in files and module not in seen:
        seen.add(module)
        parsed = Module(module, files[module].read_text(encoding="utf-8"), ("lowrank",))
        for name in parsed.loaded:
            seen.add(name.split(".")[0])
            at_import(name, files, seen)
    return seen


def test_the_paper_never_imports_torch() -> None:
    """Neither in its functions nor by what it loads; functions of other rooms import it where they need it."""
    heavy = {"torch", "transformers"}
    files = {module_name(path): path for path in LIBRARY}
    paper = [module for module in files if room_of(module) == "paper"]
    assert paper
    for module in paper:
        assert not {name.split(".")[0] for name in imports(files[module])} & heavy, module
        assert not at_import(module, files, set()) & heavy, module


# --- one name a step ---


def rules() -> dict[str, tuple[Path, str]]:
    """Rule -> its file, and its text."""
    found = {}
    for path in sorted((REPOSITORY / "rules").glob("*.smk")):
        text = path.read_text(encoding="utf-8")
        for name, body in re.findall(r"^rule (\w+):\n((?:(?: .*)?\n)+)", text, flags=re.MULTILINE):
            found[name] = path, body
    return found


def test_a_rule_its_stage_its_log_and_its_memory_have_one_name() -> None:
    named = rules()
    stages = {path.stem for path in (SCRIPTS / "stages").glob("*.py")}
    assert set(named) == stages
    for name, (path, body) in named.items():
        assert f'"../workflow_scripts/stages/{name}.py"' in body, f"{path}: {name} runs another stage"
        assert re.search(rf'log:\s+f"{{LOGS}}/{name}[/.]', body), f"{path}: {name} logs elsewhere"
        asked = re.findall(r'asks\("(\w+)"\)', body)
        assert asked in ([], [name]), f"{path}: {name} asks for what {asked} need"


def test_the_layout_knows_where_each_rule_logs() -> None:
    layout = Layout(load_study(REPOSITORY / "config/quickstart.yaml"))
    for name, (path, body) in rules().items():
        (log,) = re.findall(r'log:\s+f"{LOGS}(/.*)"', body)
        wildcards = re.findall(r"{{(\w+)}}", log)
        expected = layout.log(name, {wildcard: f"{{{{{wildcard}}}}}" for wildcard in sorted(wildcards)})
        assert expected == layout.logs + log, path


def test_the_tests_of_a_module_are_found_by_its_path() -> None:
    """`tests/unit/<room>/test_<module>[_<aspect>].py`, or `test_<room>.py` for what all its modules have in common."""
    unit = REPOSITORY / "tests/unit"
    for path in sorted(unit.rglob("test_*.py")):
        room = SCRIPTS / "lowrank" / path.parent.relative_to(unit)
        modules = [module.stem for module in room.glob("*.py")] + [room.name]
        name = path.stem.removeprefix("test_")
        assert any(name == each or name.startswith(f"{each}_") for each in modules), f"{path} tests no module of {room}"


# --- where the tests of a module are, by tests/README.md ---


def table(heading: str) -> dict[str, Path]:
    """First column -> the file of tests in the second, of a table of the page."""
    page = (REPOSITORY / "tests/README.md").read_text(encoding="utf-8").partition(f"| {heading} | tests |")[2]
    rows = re.findall(r"^\| `(\S+)` \| `(\S+)` \|$", page.partition("\n## ")[0], re.MULTILINE)
    assert len(dict(rows)) == len(rows)
    return {name: REPOSITORY / "tests" / file for name, file in rows}


def names_module(path: Path, module: str) -> bool:
    """Whether a file imports a module, or something of it."""
    return any(name == module or name.startswith(f"{module}.") for name in imports(path))


def reached(path: Path) -> set[str]:
    """All modules that a file of tests reaches by imports, through the library and other files of tests."""
    library, seen, todo = {module_name(each): each for each in LIBRARY}, set[str](), [path]
    while todo:
        for name in imports(todo.pop()):
            while name and name not in seen:
                if name in library:
                    seen.add(name)
                    todo.append(library[name])
                elif name.startswith("tests.") and (REPOSITORY / name.replace(".", "/")).with_suffix(".py").is_file():
                    seen.add(name)
                    todo.append((REPOSITORY / name.replace(".", "/")).with_suffix(".py"))
                name = name.rpartition(".")[0]
    return seen


def test_the_page_says_where_the_tests_of_each_module_are() -> None:
    unit, listed, needed = REPOSITORY / "tests/unit", table("module"), set()
    for path in LIBRARY:
        relative, module = path.relative_to(SCRIPTS / "lowrank"), module_name(path)
        room = unit / relative.parent
        if path.name == "__init__.py" or list(room.glob(f"test_{path.stem}.py")) + list(
            room.glob(f"test_{path.stem}_*")
        ):
            continue
        if not any(names_module(test, module) for test in room.glob("*.py")):
            needed.add(relative.as_posix())
    assert needed == set(listed)
    for name, file in listed.items():
        module = module_name(SCRIPTS / "lowrank" / name)
        run = file.parent.name == "e2e" or module.startswith("lowrank.methods.")  # loaded by their kind
        assert file.is_file(), name
        assert run or module in reached(file), f"{file} does not reach {name}"


def test_the_page_says_where_the_tests_of_each_step_are() -> None:
    """Unit tests reach what the stage calls in their room; those that run Snakemake name the rule."""
    listed = table("rule")
    assert set(listed) == set(rules())
    for name, file in listed.items():
        room = file.parent.relative_to(REPOSITORY / "tests").parts
        if room[0] != "unit":
            assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{file} does not name {name}"
            continue
        called = {
            each.rpartition(".")[0] for each in imports(SCRIPTS / f"stages/{name}.py") if room_of(each) == room[1]
        }
        assert called & reached(file), f"{file} reaches nothing of {sorted(called)}, which {name} calls"

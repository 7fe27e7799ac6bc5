"""docs/architecture.md names what is there: paths, names in files, rooms, rules; and its picture has every rule."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from lowrank import ROOMS
from lowrank.cluster.planned_jobs import planned_jobs
from lowrank.config.load import load_study, read_config
from lowrank.jobs.record import record_file
from lowrank.layout import Layout

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "workflow_scripts"
DOCS = REPOSITORY / "docs"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```yaml\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
QUICKSTART = REPOSITORY / "config/quickstart.yaml"
RULES = [
    rule
    for path in sorted((REPOSITORY / "rules").glob("*.smk"))
    for rule in re.findall(
        r"^(?:use )?rule (?:\w+ as )?(\w+)(?: with)?:", path.read_text(encoding="utf-8"), re.MULTILINE
    )
]
NAMED = sorted(set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", PAGE))))
ELSEWHERE = {".snakemake/log/", ".snakemake/metadata", ".<output>.lock"}
"""What Snakemake and jobs make, not the repository."""


def found(path: str) -> list[Path]:
    """The files and folders of a path, from the repository or from its scripts; placeholders stand for anything."""
    pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
    return [place for root in (REPOSITORY, SCRIPTS) for place in root.glob(pattern)]


def defines(file: Path, name: str) -> bool:
    """Whether a file defines a name at its top, or `Class.name` within a class."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return re.search(rf"^(?:def |rule )?{name}\b *[(:=]", text, re.MULTILINE) is not None
    body: list[ast.stmt] | None = ast.parse(text).body
    for part in name.split("."):
        bodies = [getattr(each, "body", []) for each in body or [] if part in bound(each)]
        body = bodies[-1] if bodies else None
    return body is not None


def bound(statement: ast.stmt) -> set[str]:
    """The names that a statement binds."""
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return {getattr(statement, "name", "")}


def results() -> set[str]:
    """Every path of the quickstart's results that its tables and figures need, and the folders above them."""
    layout = Layout(load_study(QUICKSTART))
    log = f"{layout.logs}/make_table/table_1.log"
    files = [*layout.fetched(), *layout.evidence(), *layout.tables(), *layout.figures(), log, str(record_file(log))]
    files += [
        f"{layout.state}/make_table-0",
        f"{layout.run}/provenance.json",
        layout.compared_texts,
        layout.used_config,
    ]
    return {str(place) for file in files for place in (Path(file), *Path(file).parents)}


def words(value: Any) -> Iterator[str]:
    """Keys and texts of a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from words(each)


def written() -> set[str]:
    """Words in quotes in the scripts, as the keys of a JSON are."""
    return {word for path in SCRIPTS.rglob("*.py") for word in re.findall(r'"(\w+)"', path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ELSEWHERE])
def test_what_the_page_names_is_there(name: str) -> None:
    if name == "file::name":  # how the page says it
        return
    if name.startswith("results/"):
        pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
        assert [path for path in results() if fnmatch(path, pattern)]
    elif name.startswith("make "):
        assert re.search(rf"^{name.removeprefix('make ')}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif "::" in name:
        path, _, inside = name.partition("::")
        (file,) = found(path)
        assert defines(file, inside)
    elif "/" in name or (REPOSITORY / name).exists():
        assert found(name)
    else:
        known = {*RULES, *ROOMS, "lowrank", *words(read_config(QUICKSTART)), *written()}
        assert [word for word in known if fnmatch(word, re.sub(r"<\w+>", "*", name))]


def test_the_page_names_enough_to_be_worth_a_test() -> None:
    assert sum("::" in name for name in NAMED) > 40
    assert all(f"`{name}`" in PAGE for name in ELSEWHERE)


def test_the_table_of_rooms_is_that_of_the_library() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]\(\.\./workflow_scripts/lowrank/(\w+)(?:\.py)?\) \|", PAGE, re.MULTILINE)
    assert [room for room, _ in rows] == list(ROOMS)
    assert all(room == place for room, place in rows)


def test_the_tree_of_folders_has_the_rooms_in_their_order() -> None:
    tree = PAGE.partition("\n      lowrank/ ")[2]
    named = re.findall(r"\w+", tree.partition("\n    config/ ")[0])
    assert list(dict.fromkeys(word for word in named if word in ROOMS)) == list(ROOMS)


def part_of(some: Any, whole: Any) -> bool:
    """Whether a config has all that a shorter one has."""
    if isinstance(some, dict):
        return isinstance(whole, dict) and all(key in whole and part_of(some[key], whole[key]) for key in some)
    return all(each in whole for each in some) if isinstance(some, list) else some == whole


def test_the_lines_of_the_config_are_those_of_the_quickstart() -> None:
    (block,) = BLOCK.findall(PAGE)
    assert part_of(yaml.safe_load(block), read_config(QUICKSTART))


# --- the picture ---


def drawn(kind: str) -> set[str]:
    """Titles of the nodes or edges of the picture."""
    svg = "{http://www.w3.org/2000/svg}"
    groups = ElementTree.parse(DOCS / "rulegraph.svg").iter(f"{svg}g")
    return {str(group.findtext(f"{svg}title")) for group in groups if group.get("class") == kind}


def reached(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges, and those that follow from them."""
    while more := {(one, far) for one, other in edges for near, far in edges if near == other} - edges:
        edges = edges | more
    return edges


def test_the_picture_has_every_rule() -> None:
    assert drawn("node") == set(RULES) - {"fetch_token_corpus"}, "run `make rulegraph`"


def test_the_picture_says_who_waits_for_whom() -> None:
    jobs = planned_jobs(load_study(REPOSITORY / "config/mini-paper.yaml"))
    planned = {(before.rule, job.rule) for job, after in jobs.items() for before in after}
    shown = {(one, other) for one, _, other in (edge.partition("->") for edge in drawn("edge"))}
    assert reached(shown) == reached(planned), "run `make rulegraph`"

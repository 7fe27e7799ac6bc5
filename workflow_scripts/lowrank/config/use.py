"""`use: presets/default.yaml`: named entries of another file, with those of the study on top.

A file of presets holds sections of named entries and nothing else. Of a name that both have, the study's entry counts,
whole: what an entry says stands in one place. Presets that no entry of the study leads to are left out, so they give
neither errors nor jobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowrank.config.place import shown, written
from lowrank.config.yaml_file import lines_of, read_yaml
from lowrank.errors import RankwiseError

SHIPPED = Path(__file__).resolve().parents[3] / "config"
"""The repository's folder of configs, whose presets are found from everywhere."""

KEY = "use"
SECTION_OF = {
    **{"model": "models", "units_of": "models", "tokenizer": "models", "method": "methods", "methods": "methods"},
    **{"corpus": "corpora", "corpora": "corpora", "tasks": "tasks", "instructions": "instructions"},
    **{"calibration": "calibration", "covariance": "covariance", "validation": "validation", "search": "search"},
    **{"sensitivity": "sensitivity", "tuning": "tuning", "suite": "suites", "suites": "suites", "tables": "tables"},
}
"""Key of an entry -> section of the entries that it names; `tasks` of a suite has the names as keys."""

PRINTED_ELSEWHERE = ("published", "ranks", "statistics")
"""Keys of entries that name rows of published values, and no entries."""

Raw = dict[str, Any]
Entry = tuple[str, str]
"""A section, and a name in it."""


def with_presets(raw: Raw, files: Sequence[str | Path] = ()) -> tuple[Raw, frozenset[Entry]]:
    """A config with the presets that it uses, and without its key `use`; and all entries that its presets have.

    Args:
        raw: the config as it is read.
        files: where it was read from; the file of presets may lie beside one of them.

    Raises:
        RankwiseError: the file of presets is not there, cannot be read, or holds something else than sections.
    """
    if KEY not in raw:
        return raw, frozenset()
    own = {key: value for key, value in raw.items() if key != KEY}
    presets = _sections(presets_file(raw[KEY], files))
    needed = _reached(own, presets)
    merged: Raw = dict(own)
    for section, entries in presets.items():
        mine = own.get(section, {})
        if isinstance(mine, dict):  # else it is the study's error
            used = {name: entry for name, entry in entries.items() if (section, name) in needed}
            merged |= {section: used | mine} if used or section in own else {}
    return merged, frozenset((section, str(name)) for section, entries in presets.items() for name in entries)


def presets_file(named: Any, files: Sequence[str | Path] = ()) -> Path:
    """The file that `use` names: beside the config, or in the repository's `config`.

    Raises:
        RankwiseError: there is none.
    """
    if not isinstance(named, str) or not named:
        raise RankwiseError(f"{KEY}: must be the path of a file of presets, not {shown(named)}")
    folders = [*(Path(file).parent for file in files), SHIPPED]
    for folder in folders:
        if (path := folder / Path(named).expanduser()).is_file():
            return path
    known = ", ".join(sorted(str(path.relative_to(SHIPPED)) for path in (SHIPPED / "presets").glob("*.yaml")))
    places = " or ".join(dict.fromkeys(str(folder) for folder in folders))
    raise RankwiseError(f"{KEY}: there is no {named} in {places} (shipped: {known})")


def _sections(path: Path) -> dict[str, Raw]:
    """The sections of a file of presets."""
    presets = read_yaml(path)
    for key, value in presets.items():
        if not isinstance(value, dict):
            place = written(key, first=True)
            raise RankwiseError(
                f"{path}, line {lines_of(path)[place]}: {place}: cannot stand in a file of presets, which holds "
                "sections of named entries; write it into the study"
            )
    return presets


def _reached(own: Raw, presets: dict[str, Raw]) -> set[Entry]:
    """The presets that entries of a study name, and those that these name."""
    reached: set[Entry] = set()
    entries = [entry for section in own.values() if isinstance(section, dict) for entry in section.values()]
    pending = [name for entry in entries for name in _named(entry)]
    # Figures of perplexity draw the dense model without naming it; by itself it brings no job.
    methods = presets.get("methods", {})
    pending += [("methods", name) for name, entry in methods.items() if entry == {"kind": "dense"}]
    while pending:
        section, name = pending.pop()
        theirs, mine = presets.get(section, {}), own.get(section)
        if name in theirs and (section, name) not in reached and not (isinstance(mine, dict) and name in mine):
            reached.add((section, name))
            pending.extend(_named(theirs[name]))
    return reached


def _named(value: Any, section: str | None = None) -> Iterator[Entry]:
    """Every (section, name) that an entry refers to, by the keys under which names stand."""
    if isinstance(value, dict):
        if section:
            yield from ((section, name) for name in value)
        for key, inner in value.items():
            if key not in PRINTED_ELSEWHERE:
                yield from _named(inner, SECTION_OF.get(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner, section)
    elif section and isinstance(value, str):
        yield section, value

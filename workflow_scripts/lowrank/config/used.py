"""What of a config the tables and figures use; the rest decides nothing."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from lowrank.config.references import references
from lowrank.config.study import Study

Entry = tuple[str, str]
"""A section of the config, and a name in it."""


def used_study(study: Study) -> Study:
    """The same study without the entries that no table and no figure needs, directly or not."""
    wanted = used_entries(study)
    sections: dict[str, Any] = {section: {} for section in _sections(study)}
    for section in sections:
        entries = getattr(study, section)
        sections[section] = {name: entry for name, entry in entries.items() if (section, name) in wanted}
    return study.model_copy(update=sections)


def used_entries(study: Study) -> set[Entry]:
    """The entries that tables and figures need."""
    entries = [(section, name) for section in _sections(study) for name in getattr(study, section)]
    needs: dict[Entry, set[Entry]] = {entry: set() for entry in entries}
    for place, section, name in references(study):
        if owner := _owner(place, needs):
            needs[owner].add((section, name))
    used: set[Entry] = set()
    pending = [entry for entry in entries if entry[0] in ("tables", "figures")]
    while pending:
        entry = pending.pop()
        if entry not in used:
            used.add(entry)
            pending.extend(needs[entry])
    return used


def _owner(place: str, entries: Container[Entry]) -> Entry | None:
    """The entry that a YAML path leads into. Names may hold dots, so that one begins another: the longest is meant."""
    section, _, rest = place.partition(".")
    parts = rest.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next(((section, name) for name in names if (section, name) in entries), None)


def _sections(study: Study) -> list[str]:
    """Names of the parts of a config that hold named entries."""
    return [name for name in type(study).model_fields if isinstance(getattr(study, name), dict)]

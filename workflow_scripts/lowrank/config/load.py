"""Reading a study's YAML: all errors at once, each with its place, what is wrong and what would be right."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lowrank.config.checks import problems_of
from lowrank.config.messages import message
from lowrank.config.numbers import odd_numbers, reading
from lowrank.config.place import shown
from lowrank.config.study import Study
from lowrank.errors import RankwiseError


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (the second would silently win), and numbers that mislead."""

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        node, path = next(odd_numbers(root), (None, "")) if root else (None, "")
        if node:
            where = f"{node.start_mark.name}, line {node.start_mark.line + 1}"
            raise RankwiseError(f"{where}: {path}: {reading(node.value, self.construct_object(node))}")
        return root


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        mark = key_node.start_mark
        if not isinstance(key, Hashable):
            raise RankwiseError(f"{mark.name}, line {mark.line + 1}: {shown(key)} cannot be a key; write a name")
        if key in seen:
            raise RankwiseError(f"{mark.name}, line {mark.line + 1}: the key {shown(key)} is written twice; keep one")
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        RankwiseError: missing, unreadable, no YAML, a duplicate key, a number that misleads, or no mapping.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            value = yaml.load(stream, Loader=_StrictLoader)  # noqa: S506 - it is a SafeLoader
    except FileNotFoundError as error:
        raise RankwiseError(f"{path}: there is no such config file") from error
    except OSError as error:
        raise RankwiseError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RankwiseError(f"{path}: no text in UTF-8 (byte {error.start}); is it a YAML file?") from error
    except RecursionError as error:
        raise RankwiseError(f"{path}: nested too deeply; a config needs no more than ten levels") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-99-99
        raise RankwiseError(_syntax_error(path, error)) from error
    if value is None:
        raise RankwiseError(f"{path}: the file is empty; config/quickstart.yaml shows what a config holds")
    if not isinstance(value, dict):
        raise RankwiseError(f"{path}: a config is a mapping of keys to values, not {shown(value)}")
    return value


def _syntax_error(path: str | Path, error: Exception) -> str:
    """One line for what the YAML reader says in several."""
    mark = getattr(error, "problem_mark", None)
    where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    reason = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
    hint = "; indent by spaces, not tabs" if "\\t" in reason else ""
    return f"{where}: no valid YAML: {reason}{hint}"


def check_study(raw: dict[str, Any], where: str = "config") -> Study:
    """Validate a config.

    Raises:
        RankwiseError: lists every error, one a line, with its YAML path. If an entry is wrong by itself, the
            references to it are not judged.
    """
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [message(Study, item, raw) for item in found]
        raise RankwiseError(listing(where, lines + _further_problems(raw, [item["loc"] for item in found]))) from error
    if problems := problems_of(study):
        raise RankwiseError(listing(where, problems))
    return study


def load_study(path: str | Path) -> Study:
    """Read and validate a config file."""
    return check_study(read_yaml(path), str(path))


def _further_problems(raw: dict[str, Any], locations: list[tuple[int | str, ...]]) -> list[str]:
    """What is wrong between the entries that are sound by themselves; nothing if too little is left to tell."""
    if any(len(location) < 2 or not isinstance(raw.get(str(location[0])), dict) for location in locations):
        return []
    broken = frozenset((str(section), str(name)) for section, name, *_ in locations)
    sound = {
        section: {name: entry for name, entry in entries.items() if (section, str(name)) not in broken}
        if isinstance(entries, dict)
        else entries
        for section, entries in raw.items()
    }
    try:
        return problems_of(Study.model_validate(sound), broken)
    except ValidationError:  # e.g. the only model is broken
        return []


def listing(where: str, lines: list[str]) -> str:
    """The message for all errors of a config, each told once."""
    unique = list(dict.fromkeys(lines))
    count = "1 error" if len(unique) == 1 else f"{len(unique)} errors"
    return f"{where} has {count}:\n" + "\n".join(f"  {line}" for line in unique)


def json_schema() -> str:
    """The JSON schema of the config, for editors; `config/schema.json` holds it."""
    return json.dumps(Study.model_json_schema(), indent=2, sort_keys=True) + "\n"

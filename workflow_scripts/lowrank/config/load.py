"""Reading a study's YAML: all errors at once, each with its place, what is wrong and what would be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lowrank.config import sections
from lowrank.config.study import Study, problems_of, suggestion
from lowrank.errors import RankwiseError


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (the second would silently win)."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node)  # type: ignore[no-untyped-call]
        if key in seen:
            mark = key_node.start_mark
            raise RankwiseError(f"{mark.name}, line {mark.line + 1}: the key '{key}' is written twice; keep one")
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))  # type: ignore[no-untyped-call]


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        RankwiseError: missing, no YAML, a duplicate key, or no mapping.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            value = yaml.load(stream, Loader=_StrictLoader)
    except FileNotFoundError as error:
        raise RankwiseError(f"{path}: there is no such config file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RankwiseError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise RankwiseError(f"{path}: a config is a mapping of keys to values, not a {type(value).__name__}")
    return value


def check_study(raw: dict[str, Any], where: str = "config") -> Study:
    """Validate a config.

    Raises:
        RankwiseError: lists every error, one a line, with its YAML path.
    """
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        lines = [_message(raw, item) for item in error.errors(include_url=False)]
        raise RankwiseError(_listing(where, lines)) from error
    if problems := problems_of(study):
        raise RankwiseError(_listing(where, problems))
    return study


def load_study(path: str | Path) -> Study:
    """Read and validate a config file."""
    return check_study(read_yaml(path), str(path))


def _listing(where: str, lines: list[str]) -> str:
    unique = list(dict.fromkeys(lines))
    count = "1 error" if len(unique) == 1 else f"{len(unique)} errors"
    return f"{where} has {count}:\n" + "\n".join(f"  {line}" for line in unique)


def _message(raw: Any, item: Any) -> str:
    place = _yaml_path(raw, item["loc"])
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return f"{place}: unknown key{suggestion(str(item['loc'][-1]), _known_keys())}"
    if kind == "missing":
        return f"{place}: missing"
    if kind in ("union_tag_invalid", "literal_error"):
        context = item.get("ctx", {})
        expected = str(context.get("expected_tags") or context.get("expected"))
        tag = str(context.get("tag", given))
        choices = [choice.strip(" '") for choice in expected.replace(" or ", ",").split(",") if choice.strip()]
        key = ".kind" if kind == "union_tag_invalid" and "discriminator" in context else ""
        return f"{place}{key}: '{tag}' is not one of {', '.join(choices)}{_did_you_mean(tag, choices)}"
    if kind == "union_tag_not_found":
        return f"{place}: missing the key {item['ctx']['discriminator']}"
    shown = "" if isinstance(given, (dict, list)) or kind in ("source", "value_error") else f" (given: {given!r})"
    return f"{place}: {item['msg'].removeprefix('Value error, ')}{shown}"


def _did_you_mean(name: str, choices: list[str]) -> str:
    hint = suggestion(name, choices)
    return hint if "did you mean" in hint else ""


def _yaml_path(raw: Any, location: tuple[int | str, ...]) -> str:
    """The path a reader finds in the file; pydantic's own union tags are left out."""
    path, value = "", raw
    for position, step in enumerate(location):
        last = position == len(location) - 1
        if (isinstance(value, dict) and step in value) or (
            isinstance(value, (list, tuple)) and isinstance(step, int) and step < len(value)
        ):
            value = value[step]
        elif not last or step == "[key]" or not isinstance(value, (dict, list)):
            continue
        path += f"[{step}]" if isinstance(step, int) else (f".{step}" if path else str(step))
    return path or "the config"


def _known_keys() -> list[str]:
    """All keys of all sections, for suggestions."""
    classes = [value for value in vars(sections).values() if isinstance(value, type) and issubclass(value, BaseModel)]
    return sorted({field for cls in [*classes, Study] for field in cls.model_fields})


def json_schema() -> str:
    """The JSON schema of the config, for editors; `config/schema.json` holds it."""
    return json.dumps(Study.model_json_schema(), indent=2, sort_keys=True) + "\n"

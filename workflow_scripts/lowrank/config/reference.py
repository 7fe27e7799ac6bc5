"""Every key of a config as a page of Markdown, from the JSON schema: `docs/config.md` holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lowrank.config.study import Study

Schema = dict[str, Any]

_WORDS = {"integer": "whole number", "string": "text", "boolean": "true or false"}
_UNREAD = {"calibration", "covariance", "validation", "search", "transfer"}
"""Keys that only those methods may name which declare them."""
BEGINNING = """# All keys of a config

Written by `make schema` from the checks themselves. Keys in bold must be there. The entries of all sections but the
first have names of your own, by which others refer to them: `search: {my-search: {evaluations: 50}}`. Parts that are
linked stand at the end.
"""


def reference() -> str:
    """The page."""
    schema = Study.model_json_schema()
    definitions: dict[str, Schema] = schema["$defs"]
    single = {key: value for key, value in schema["properties"].items() if not _definitions_of(value)}
    lines = [BEGINNING, "## The study", "", *_keys(single, schema.get("required", []))]
    shown: set[str] = set()
    for key, value in schema["properties"].items():
        if key in single:
            continue
        lines += ["", f"## `{key}`"]
        for name in _definitions_of(value):
            lines += _definition(name, definitions[name], _kinds(definitions[name]))
            shown.add(name)
    lines += ["", "## Parts"]
    for name in sorted(set(definitions) - shown):
        lines += _definition(name, definitions[name], [])
    return "\n".join(lines) + "\n"


def _definitions_of(value: Schema) -> list[str]:
    """The definitions that the entries of a section have, one a kind."""
    entries = value.get("patternProperties", {}).values()
    found = [name for entry in entries for name in _references(entry.get("oneOf", [entry]))]
    return list(dict.fromkeys(found))


def _references(options: list[Schema]) -> Iterator[str]:
    yield from (option["$ref"].rpartition("/")[2] for option in options if "$ref" in option)


def _kinds(definition: Schema) -> list[str]:
    """What the key `kind` may be in a definition."""
    kind = definition["properties"].get("kind", {})
    return [kind["const"]] if "const" in kind else kind.get("enum", [])


def _definition(name: str, definition: Schema, kinds: list[str]) -> list[str]:
    title = " or ".join(f"`kind: {kind}`" for kind in kinds) or f"`{_title(name)}`"
    description = " ".join(definition.get("description", "").split("\n\nAttributes:")[0].split())
    required = definition.get("required", [])
    unread = _UNREAD - {*required, *(["transfer"] if "search" in required else [])} if "__" in name else set()
    keys = {key: value for key, value in definition["properties"].items() if key not in {"kind", *unread}}
    table = _keys(keys, required) if keys else ["No keys."]
    return ["", f"### {title}", "", description, "", *table]


def _title(name: str) -> str:
    """`lowrank__methods__afm__Settings` is the definition of a method of the name `afm`."""
    return name.split("__")[-2] if "__" in name else name


def _keys(properties: dict[str, Schema], required: list[str]) -> list[str]:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, value in properties.items():
        name = f"**`{key}`**" if key in required else f"`{key}`"
        default = f"`{json.dumps(value['default'])}`" if "default" in value else ""
        what = value.get("description", "").replace("|", "\\|")  # else it would end the cell
        rows.append(f"| {name} | {_type(value)} | {default} | {what} |".replace("  ", " "))
    return rows


def _type(value: Schema) -> str:
    """A type in words."""
    if "$ref" in value:
        name = _title(value["$ref"].rpartition("/")[2])
        return f"[{name}](#{name.lower()})"
    if options := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_type, options)))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    kind: str = value.get("type", "any")
    if kind == "array":
        items = value.get("items") or {"anyOf": value.get("prefixItems", [{}])}
        return f"list: {_type(items)}"
    if kind == "object":
        inner = [_type(one) for one in value.get("patternProperties", {}).values()]
        return f"name -> {inner[0]}" if inner else "mapping"
    return _WORDS.get(kind, kind) + _bounds(value)


def _bounds(value: Schema) -> str:
    named = (("minimum", "at least"), ("ge", "at least"), ("gt", "above"), ("exclusiveMinimum", "above"))
    upper = (("maximum", "at most"), ("le", "at most"), ("lt", "below"), ("exclusiveMaximum", "below"))
    found = [f"{words} {value[key]}" for key, words in (*named, *upper) if key in value and abs(value[key]) < 1e9]
    return f", {', '.join(found)}" if found else ""

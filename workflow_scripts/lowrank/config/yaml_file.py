"""Reading YAML files: strictly, so that nothing in them misleads, and where in a file each key stands."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from lowrank.config.numbers import odd_numbers, reading
from lowrank.config.place import shown, written
from lowrank.errors import RankwiseError

_MERGE = "tag:yaml.org,2002:merge"


class _Strict:
    """Safe YAML that refuses a key written twice (the second would silently win), and numbers that mislead."""

    def get_single_node(self) -> yaml.Node | None:
        root: yaml.Node | None = super().get_single_node()  # type: ignore[misc]
        node, path = next(odd_numbers(root), (None, "")) if root else (None, "")
        if node:
            where = f"{node.start_mark.name}, line {node.start_mark.line + 1}"
            raise RankwiseError(f"{where}: {path}: {reading(node.value, self.construct_object(node))}")  # type: ignore[attr-defined]
        return root


class _StrictLoader(_Strict, yaml.SafeLoader):
    """In Python, which says best what is wrong in a file."""


class _FastLoader(_Strict, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """By libyaml, in a tenth of the time, where PyYAML was built with it."""


def _mapping(loader: _StrictLoader | _FastLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
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


for _loader in (_StrictLoader, _FastLoader):
    _loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        RankwiseError: missing, unreadable, no YAML, a duplicate key, a number that misleads, or no mapping.
    """
    try:
        value = _parsed(path, yaml.load)
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


def _parsed(path: str | Path, parse: Callable[[IO[str], type[_StrictLoader | _FastLoader]], Any]) -> Any:
    """What one of PyYAML's functions makes of a file; where libyaml refuses it, by the parser that says why."""
    try:
        with open(path, encoding="utf-8") as stream:
            return parse(stream, _FastLoader)
    except (yaml.YAMLError, RecursionError):
        with open(path, encoding="utf-8") as stream:
            return parse(stream, _StrictLoader)


def _syntax_error(path: str | Path, error: Exception) -> str:
    """One line for what the YAML reader says in several."""
    mark = getattr(error, "problem_mark", None)
    where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    reason = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
    hint = "; indent by spaces, not tabs" if "\\t" in reason else ""
    return f"{where}: no valid YAML: {reason}{hint}"


def lines_of(path: str | Path) -> dict[str, int]:
    """YAML path -> line of each key and list item of a file that `read_yaml` can read.

    What an alias or a merge key brings stands where it is written.
    """
    root = _parsed(path, yaml.compose)
    lines: dict[str, int] = {}
    for place, line in _places(root, ""):
        lines.setdefault(place, line)
    return lines


def _places(node: yaml.Node | None, path: str) -> Iterator[tuple[str, int]]:
    """Every place below a node with its line; keys of a mapping before those that are merged into it."""
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{path}[{index}]", value.start_mark.line + 1
            yield from _places(value, f"{path}[{index}]")
    elif isinstance(node, yaml.MappingNode):
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag == _MERGE):
            if key.tag == _MERGE:
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    yield from _places(merged, path)
            else:
                inner = path + written(str(key.value), first=not path)
                yield inner, key.start_mark.line + 1
                yield from _places(value, inner)

"""Where in a config an error lies: follows pydantic's location through the sections to the key that a user sees."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Tag
from pydantic.fields import FieldInfo

from lowrank.config.base import Says, Section

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,79}")
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a mapping of names to entries",
}


@dataclass(frozen=True)
class Place:
    """One place of a config.

    Attributes:
        path: as a user writes it, `tables.table_1.rows[2].ratio`.
        section: the innermost section around it, whose keys are the valid ones there.
        annotation: type of what belongs there; None behind an unknown key.
        metadata: constraints and words of that type.
        optional: whether null is allowed.
    """

    path: str
    section: type[Section]
    annotation: Any
    metadata: tuple[Any, ...] = ()
    optional: bool = False

    @property
    def choices(self) -> list[str]:
        """The tags of a union or the values of a literal; empty for other types."""
        if get_origin(self.annotation) is Literal:
            return [str(value) for value in get_args(self.annotation)]
        return [tag for member in _members(self.annotation) for tag in _tags(member)]

    @property
    def words(self) -> str:
        """What belongs here, in plain words."""
        return self._words() + (" or null" if self.optional else "")

    def _words(self) -> str:
        for item in reversed(self.metadata):
            if isinstance(item, Says):
                return item.words
        if get_origin(self.annotation) is Literal:
            return "one of " + ", ".join(self.choices)
        kind = get_origin(self.annotation) or self.annotation
        return _WORDS.get(kind, "a mapping of keys to values") + _range(self.metadata)


def place_of(root: type[Section], location: tuple[int | str, ...]) -> Place:
    """Follow a location of pydantic, which names union members too, down from the root section."""
    return [Place("", root, root), *(place for place, _ in _way(root, location))][-1]


def entry_around(root: type[Section], location: tuple[int | str, ...], raw: Any) -> dict[Any, Any]:
    """The mapping of a config that holds what lies at a location of pydantic; empty if there is none."""
    steps = [step for _, step in _way(root, location) if step is not None]
    for step in steps[:-1]:
        try:
            raw = raw[step]
        except (KeyError, IndexError, TypeError):
            return {}
    return raw if isinstance(raw, dict) else {}


def _way(root: type[Section], location: tuple[int | str, ...]) -> Iterator[tuple[Place, int | str | None]]:
    """Each place on the way down, and the key or index that leads to it; None where a union member is named."""
    place = Place("", root, root)
    for index, step in enumerate(location):
        below = _below(place, step, is_key=location[index + 1 : index + 2] == ("[key]",))
        yield below, step if below.path != place.path else None
        place = below


def path_of(steps: Iterable[int | str]) -> str:
    """Keys and indices as a user writes them: `tables.table_1.rows[2].ratio`."""
    path = ""
    for step in steps:
        path += written(step, first=not path)
    return path


def _below(place: Place, step: int | str, is_key: bool) -> Place:
    if step == "[key]":
        return place
    annotation = place.annotation
    for member in _members(annotation):
        if step in _tags(member):
            return _bare(place.path, place.section, member)
    path = f"{place.path}{written(step, first=not place.path)}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        field = annotation.model_fields.get(str(step))
        if field is None:
            return Place(path, annotation, None)
        return _bare(path, annotation, field.annotation, tuple(field.metadata))
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return _bare(path, place.section, arguments[0 if is_key else 1])
    if arguments and isinstance(step, int):  # list[X], tuple[X, ...] or tuple[X, Y]
        alike = len(arguments) == 1 or arguments[1] is Ellipsis
        return _bare(f"{place.path}[{step}]", place.section, arguments[0 if alike else step])
    return Place(path, place.section, None)


def _bare(path: str, section: type[Section], annotation: Any, metadata: tuple[Any, ...] = ()) -> Place:
    """The place of a type, freed of its constraints and of `| None`."""
    optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *extra = get_args(annotation)
            for item in extra:
                metadata = (*metadata, *(item.metadata if isinstance(item, FieldInfo) else [item]))
        elif _is_union(annotation) and type(None) in get_args(annotation):
            optional = True
            annotation = Union[tuple(arg for arg in get_args(annotation) if arg is not type(None))]  # noqa: UP007
        else:
            return Place(path, section, annotation, metadata, optional)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if _is_union(annotation) else ()


def _tags(member: Any) -> list[str]:
    """How pydantic names a member of a union: by its tag, or by the values of its `kind`."""
    for item in getattr(member, "__metadata__", ()):
        if isinstance(item, Tag):
            return [item.tag]
    return [str(kind) for kind in get_args(member.model_fields["kind"].annotation)]


def _range(metadata: tuple[Any, ...]) -> str:
    """` from 1 to 90`, ` of at least 0`, ` above 0 and below 1`, or nothing."""
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    bounds = {name: getattr(item, name) for item in metadata for name in words if hasattr(item, name)}
    if "ge" in bounds and "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    return "".join(f" {'and ' if index else ''}{words[name]} {bounds[name]}" for index, name in enumerate(bounds))


def written(step: int | str, first: bool) -> str:
    """A key as it continues a YAML path, or begins one: `.ratio`, `['a b']`."""
    if isinstance(step, str) and _PLAIN_KEY.fullmatch(step):
        return step if first else f".{step}"
    return f"[{shown(step)}]"


def shown(value: Any) -> str:
    """A value of a config on one short line."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple, set)):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = repr(value) if isinstance(value, (str, bytes, int, float)) else str(value)
    text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
    return text if len(text) <= 80 else f"{text[:77]}..."

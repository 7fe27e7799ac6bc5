"""Pydantic's errors in plain words: place, what is wrong, what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from lowrank.config.base import Section
from lowrank.config.place import Place, entry_around, place_of, shown

_NAMED_UNKNOWN = ("union_tag_invalid", "union_tag_not_found")


def message(root: type[Section], item: Any, raw: Any = None) -> str:
    """One line for one error of pydantic.

    Args:
        root: the section that was checked.
        item: one entry of `ValidationError.errors()`.
        raw: what was checked; what stands beside the error decides which keys and choices are offered.
    """
    place, beside = place_of(root, item["loc"]), entry_around(root, item["loc"], raw)
    kind, given = item["type"], item.get("input")
    where = place.path or "the config"
    if kind == "wrong_key":
        key = item["ctx"]["key"]
        return f"{where}{'.' + key if key else ''}: {item['ctx']['reason']}"
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{where}: unknown key{suggestion(str(item['loc'][-1]), place.section.readable(beside))}"
    if kind == "missing":
        return f"{where}: missing; it must be {place.words}"
    if kind == "literal_error":
        return f"{where}: {_not_one_of(given, _accepted(place, item['loc'][-1], beside))}"
    if kind in _NAMED_UNKNOWN:
        return _unknown_kind(where, place, given)
    if kind == "source":
        return f"{where}: {_wrong_source(given, place.choices)}"
    if kind == "too_short":
        return f"{where}: must not be empty"
    return f"{where}: must be {place.words}, not {_given(item)}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """` - did you mean 'x'?` or the list of what there is."""
    names = list(known)
    return (
        did_you_mean(name, names)
        or f" (there {'are' if len(names) != 1 else 'is'}: {', '.join(sorted(names)) or 'none'})"
    )


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """` - did you mean 'x'?` if a name is close enough, small and capital letters being the same; else nothing."""
    if not isinstance(name, str):
        return ""
    plain = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name[:80].casefold(), plain, n=1, cutoff=0.6)
    return f" - did you mean '{plain[close[0]]}'?" if close else ""


def _not_one_of(given: Any, choices: list[str]) -> str:
    return f"{shown(given)} is not one of {', '.join(choices)}{did_you_mean(given, choices)}"


def _accepted(place: Place, key: Any, beside: dict[Any, Any]) -> list[str]:
    """The choices that a section takes beside its other keys; all of them where it takes none."""
    fitting = [choice for choice in place.choices if not _is_refused(place.section, {**beside, key: choice})]
    return fitting or place.choices


def _is_refused(section: type[Section], entry: dict[Any, Any]) -> bool:
    """Whether a key of an entry does not fit the others; what it lacks can be added."""
    try:
        section.model_validate(entry)
    except ValidationError as error:
        blamed = [item["ctx"]["key"] for item in error.errors(include_url=False) if item["type"] == "wrong_key"]
        return any(key in entry for key in blamed)
    return False


def _unknown_kind(where: str, place: Place, given: Any) -> str:
    if "kind" not in given:
        return f"{where}.kind: missing; it must be one of {', '.join(place.choices)}"
    return f"{where}.kind: {_not_one_of(given['kind'], place.choices)}"


def _wrong_source(given: Any, choices: list[str]) -> str:
    names = ", ".join(f"`{name}`" for name in choices)
    if not isinstance(given, dict):
        return f"must be a mapping with one of the keys {names}, not {shown(given)}"
    found = [name for name in ("pypi", "hub", "path", "tokens", "random") if name in given]
    if len(found) > 1:
        return f"has {' and '.join(f'`{name}`' for name in found)}; keep exactly one of the keys {names}"
    if found:
        return f"`{found[0]}` cannot stand here; use one of the keys {names}"
    hints = [hint for key in given if (hint := did_you_mean(key, choices))]
    return f"needs exactly one of the keys {names}{hints[0] if hints else ''}"


def _given(item: Any) -> str:
    """What was given, with a hint where quotes are all that is wrong."""
    value = item.get("input")
    if item["type"] in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return f"{shown(value)}{' (write it without quotes)' if _unquoted(item['type'], value) else ''}"
    if item["type"] == "string_type" and isinstance(value, (bool, int, float)):
        return f"{shown(value)} (put it in quotes)"
    if item["type"] == "too_long" and isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return shown(value)


def _unquoted(kind: str, value: str) -> bool:
    if kind == "bool_type":
        return value.lower() in ("true", "false")
    try:
        (int if kind == "int_type" else float)(value)
    except ValueError:
        return False
    return True

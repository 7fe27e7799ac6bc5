"""A study with another name at one place, to try which names a message may offer there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lowrank.config.base import Section
from lowrank.config.place import written
from lowrank.config.study import Study

Step = int | str


def with_name(study: Study, place: str, name: str) -> Study | None:
    """The study with a name in place of the one that stands at a YAML path.

    Returns:
        None where the name stands beside it already, as lists and mappings hold each once.
    """
    steps = next(_ways(study, f".{place}"))
    renamed: Study | None = _replaced(study, steps, name)
    return renamed


def _ways(value: Any, path: str) -> Iterator[list[Step]]:
    """The keys and indices that a path is written with; names may hold dots, so that beginnings may mislead."""
    if not path:
        yield []
    for step, inner in _parts(value):
        text = written(step, first=False)
        if path.startswith(text):
            yield from ([step, *rest] for rest in _ways(inner, path.removeprefix(text)))


def _parts(value: Any) -> Iterator[tuple[Step, Any]]:
    if isinstance(value, Section):
        yield from ((key, getattr(value, key)) for key in type(value).model_fields)
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


def _replaced(value: Any, steps: Sequence[Step], name: str) -> Any:
    """The value with a name at the end of the steps; None where the name stands beside it."""
    step, *rest = steps
    if not rest and not isinstance(value, Section):
        if name in value:
            return None
        if isinstance(value, dict):  # whose keys are the names
            return {name if key == step else key: inner for key, inner in value.items()}
    below = _replaced(dict(_parts(value))[step], rest, name) if rest else name
    if below is None:
        return None
    if isinstance(value, Section):
        return value.model_copy(update={str(step): below})
    if isinstance(value, dict):
        return {**value, step: below}
    return [below if index == step else inner for index, inner in enumerate(value)]

"""Checking a study: all errors at once, each with its place, what is wrong and what would be right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowrank.config.checks import problems_of
from lowrank.config.lines import Lines
from lowrank.config.messages import message
from lowrank.config.shapes import with_shapes
from lowrank.config.sources import Model, PathSource
from lowrank.config.study import Study
from lowrank.config.use import Entry, with_presets
from lowrank.config.yaml_file import read_yaml
from lowrank.errors import RankwiseError


class ConfigError(RankwiseError):
    """A config that is wrong.

    Attributes:
        problems: one a mistake: its YAML path, a colon, what is wrong and what would be right.
    """

    def __init__(self, where: str, problems: list[str], lines: Lines) -> None:
        super().__init__(listing(where, problems, lines))
        self.problems = problems

    @property
    def sections(self) -> set[str]:
        """The sections of the config that have mistakes."""
        return {problem.partition(":")[0].partition(".")[0] for problem in self.problems}


def check_study(
    raw: dict[str, Any], where: str = "config", files: Sequence[str | Path] = (), unseen: bool = False
) -> Study:
    """Validate a config, with the presets that it uses and the shapes that can be read on this machine.

    Args:
        raw: as it is read.
        where: what it is called in messages.
        files: where it was read from, the later ones on top of the earlier.
        unseen: allow models without a shape that are not on this machine; what they are used for is not checked.

    Raises:
        ConfigError: lists every error, one a line, with its YAML path and the line of the file if that is known. If
            an entry is wrong by itself, the references to it are not judged.
    """
    try:
        whole = isinstance(raw, dict)  # else it has no entries, which is told below
        merged, offered = with_presets(raw, files) if whole else (raw, frozenset[Entry]())
    except RankwiseError as error:
        raise ConfigError(where, [str(error)], Lines(files)) from error
    lines = Lines(files, raw)
    merged, without = with_shapes(merged) if whole else (merged, [])
    if without:
        raise ConfigError(where, without, lines)
    try:
        study = Study.model_validate(merged)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [message(Study, item, merged) for item in found]
        problems += _further_problems(merged, [item["loc"] for item in found], offered)
        raise ConfigError(where, problems, lines) from error
    unknown = models_without_shape(study)
    problems = [] if unseen else [f"models.{name}.shape: {_why_unknown(study.models[name])}" for name in unknown]
    if problems := problems + _problems_between(study, frozenset(), offered):
        raise ConfigError(where, problems, lines)
    return study


def models_without_shape(study: Study) -> list[str]:
    """Models whose shape the config leaves out, and that are not on this machine."""
    return [name for name, model in study.models.items() if model.shape is None]


def _why_unknown(model: Model) -> str:
    if isinstance(model.source, PathSource):
        return f"left out, and there is no model at {model.source.path} to read it from; correct the path, or write it"
    return (
        "left out, and the model is not on this machine yet; write it, or fetch the model first: `snakemake data` with "
        "the same options"
    )


def _problems_between(study: Study, broken: frozenset[Entry], offered: frozenset[Entry]) -> list[str]:
    """What is wrong between entries; nothing is said of models whose shape is unknown."""
    unknown = models_without_shape(study)
    known = {name: model for name, model in study.models.items() if name not in unknown}
    elsewhere = broken | {("models", name) for name in unknown}
    return problems_of(study.model_copy(update={"models": known}), elsewhere, offered)


def read_config(path: str | Path) -> dict[str, Any]:
    """What a config file holds, with the presets that it uses."""
    return with_presets(read_yaml(path), [path])[0]


def load_study(path: str | Path, unseen: bool = False) -> Study:
    """Read and validate a config file; for `unseen` see `check_study`."""
    return check_study(read_yaml(path), str(path), [path], unseen)


def _further_problems(
    raw: dict[str, Any], locations: list[tuple[int | str, ...]], offered: frozenset[Entry]
) -> list[str]:
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
        return _problems_between(Study.model_validate(sound), broken, offered)
    except ValidationError:  # e.g. the only model is broken
        return []


def listing(where: str, problems: list[str], lines: Lines) -> str:
    """The message for all errors of a config, each told once."""
    unique = list(dict.fromkeys(problems))
    count = "1 error" if len(unique) == 1 else f"{len(unique)} errors"
    return f"{where} has {count}:\n" + "\n".join(f"  {lines.before(problem)}" for problem in unique)


def json_schema() -> str:
    """The JSON schema of the config, for editors; `config/schema.json` holds it."""
    return json.dumps(Study.model_json_schema(), indent=2, sort_keys=True) + "\n"

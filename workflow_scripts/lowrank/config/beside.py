"""Checks of what a config names in the folder beside it: published values and DeepSpeed's own configurations."""

from __future__ import annotations

from pathlib import Path

from lowrank.config.arithmetic import arithmetic_problems
from lowrank.config.lines import Lines
from lowrank.config.load import ConfigError
from lowrank.config.published import published_problems
from lowrank.config.study import Study
from lowrank.config.tuning import Tuning


def check_beside(study: Study, folder: str | Path, where: str, lines: Lines) -> Study:
    """Return the study if the folder has everything that it names.

    Args:
        study: a checked config.
        folder: the repository's `config`.
        where: the config's file, for messages.
        lines: of the config.

    Raises:
        ConfigError: all that is missing or does not answer, each with its YAML path.
    """
    published = Path(folder) / "published"
    problems = published_problems(study.tables, published)
    shapes = {name: model.shape for name, model in study.models.items() if model.shape is not None}
    problems += arithmetic_problems(study.tables, published, shapes)
    for name, tuning in study.tuning.items():
        file = deepspeed_file(tuning, folder)
        if not Path(file).is_file():
            problems.append(f"tuning.{name}.deepspeed: there is no {file}")
    if problems:
        raise ConfigError(where, problems, lines)
    return study


def deepspeed_file(tuning: Tuning, folder: str | Path) -> str:
    """DeepSpeed's own configuration for a post-training preset."""
    return f"{folder}/deepspeed/{tuning.deepspeed}.json"

"""`shape:` may be left out of a model that is on this machine: it is read from there.

That is a folder or a GGUF file of the model's `path:`, or what `snakemake data` has fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowrank.config.place import written
from lowrank.config.sources import FoundShape
from lowrank.errors import RankwiseError
from lowrank.files import matching_files, read_record
from lowrank.model.shapes import model_config, shape_numbers

MANIFEST = "results/{run}/models/{model}.json"
"""What `snakemake data` writes of a model, seen from the folder in which Snakemake runs."""


def with_shapes(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config with the shapes that its models leave out, as far as they can be read on this machine.

    Args:
        raw: with its presets.

    Returns:
        The config, and a message for each model that is here and has no shape to be read.
    """
    models, problems = raw.get("models"), []
    if not isinstance(models, dict):
        return raw, []
    seen: dict[Any, Any] = {}
    for name, model in models.items():
        try:
            found = _shape(raw.get("run"), name, model)
        except RankwiseError as error:
            problems.append(f"models.{written(str(name), first=True)}: {error}")
            found = None
        seen[name] = model | {"shape": found} if found else model
    return {**raw, "models": seen}, problems


def _shape(run: Any, name: Any, model: Any) -> FoundShape | None:
    """The shape of a model that states none, or None where there is nothing to read.

    Raises:
        RankwiseError: what is there is no model that is known here.
    """
    source = model.get("source") if isinstance(model, dict) and "shape" not in model else None
    if not isinstance(source, dict):
        return None
    files = model_files(source)
    if files:
        return found_shape(shape_numbers(model_config(files)))
    manifest = Path(MANIFEST.format(run=run, model=name))
    if not manifest.is_file():
        return None
    record = read_record(manifest)
    same = {key: value for key, value in record["source"].items() if value is not None and value is not False}
    if same != {key: value for key, value in source.items() if value is not None and value is not False}:
        return None  # fetched from elsewhere
    return found_shape(record["shape"])


def model_files(source: dict[str, Any]) -> list[Path]:
    """The files of a model's `path:`; none if it has another source, or they are not there."""
    named, inside = source.get("path"), source.get("file")
    if not isinstance(named, str) or not named:
        return []
    path = Path(named).expanduser()
    if path.is_file():
        return [path]
    return matching_files(path, inside if isinstance(inside, str) else None)


def found_shape(numbers: dict[str, Any]) -> FoundShape:
    """Numbers that were read from a model, checked.

    Raises:
        RankwiseError: they are impossible.
    """
    try:
        return FoundShape.model_validate(dict(numbers))
    except ValidationError as error:
        (first, *_) = error.errors()
        key = first["loc"][0] if first["loc"] else first["ctx"]["key"]
        raise RankwiseError(f"the shape that its files describe is impossible ({key}: {first['msg']}).") from error

"""Pointing lm-eval's installed tasks at local rows: no network, no cache that outlives a job."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import lm_eval.tasks
import yaml

from lowrank.errors import RankwiseError
from lowrank.manifest import check_manifest

INSTALLED_TASKS = Path(lm_eval.tasks.__file__).parent
_TASK_LINE = re.compile(r"^task:[ \t]*['\"]?([\w.-]+)['\"]?[ \t]*$", re.MULTILINE)
_SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Schema:
    """What lm-eval scores of a task: the split, and the fields that its rows must have."""

    split: str
    fields: tuple[str, ...]


_ARC = Schema("test", ("question", "choices", "answerKey"))
SCHEMAS: dict[str, Schema] = {
    "boolq": Schema("validation", ("question", "passage", "label")),
    "piqa": Schema("validation", ("goal", "sol1", "sol2", "label")),
    "hellaswag": Schema("validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": Schema("validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "openbookqa": Schema("test", ("question_stem", "choices", "answerKey")),
}
"""Tasks whose rows are checked here; lm-eval takes a field that is missing for literal text in some places.

Other tasks work too: their test split is scored if there is one, else the validation split, as lm-eval does.
"""


@dataclass(frozen=True)
class ScoredRows:
    """The rows of one task that are scored.

    Attributes:
        task: its name in lm-eval.
        split: `test` or `validation`.
        file: JSON lines in the schema that the task reads from the hub.
        count: number of rows.
    """

    task: str
    split: str
    file: Path
    count: int


def find_rows(task: str, folder: str | Path) -> ScoredRows:
    """The file that a task is scored on, with its rows checked.

    Raises:
        RankwiseError: the split is missing, holds fewer than two rows, a row lacks a field, or the file is not the one
            that its index describes; it is named.
    """
    check_manifest(Path(folder), "sha256")
    schema = SCHEMAS.get(task)
    splits = (schema.split,) if schema else _SPLITS
    files = [Path(folder).resolve() / f"{split}.jsonl" for split in splits]
    for split, file in zip(splits, files, strict=True):
        if file.is_file():
            return ScoredRows(task, split, file, _check_rows(task, file, schema.fields if schema else ()))
    wanted = " or ".join(str(file) for file in files)
    raise RankwiseError(f"task '{task}': {wanted} is missing. lm-eval scores the {' or '.join(splits)} split.")


def _check_rows(task: str, file: Path, fields: Iterable[str]) -> int:
    count = 0
    with open(file, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RankwiseError(f"task '{task}': {file}, line {number}: no JSON ({error})") from error
            missing = [field for field in fields if not isinstance(row, dict) or row.get(field) is None]
            if missing:
                raise RankwiseError(
                    f"task '{task}': {file}, line {number}: without {', '.join(missing)}; lm-eval needs rows as on "
                    f"the hub, with {', '.join(fields)}"
                )
            count += 1
    if count < 2:
        raise RankwiseError(f"task '{task}': {file} has {count} rows; a standard error needs two")
    return count


def find_tasks(names: Iterable[str]) -> dict[str, Path]:
    """The YAML file of each task among those that lm-eval installs.

    The files are searched as text, those first that lie where a task's name says: lm-eval's own index parses all
    14,000, which takes longer than a small evaluation.

    Raises:
        RankwiseError: a task that lm-eval does not have, with the nearest names.
    """
    names = list(names)
    known: dict[str, Path] = {}

    def elsewhere(path: Path) -> bool:
        return not any(name == path.stem or path.parent.name in name or name in path.parts for name in names)

    for path in sorted(INSTALLED_TASKS.rglob("*.yaml"), key=elsewhere):
        match = _TASK_LINE.search(path.read_text(encoding="utf-8", errors="replace"))
        if match:
            known[match[1]] = path
            if all(name in known for name in names):
                break
    found = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f" - did you mean {' or '.join(near)}?" if near else ""
            raise RankwiseError(f"lm-eval {version('lm_eval')} has no task '{name}'{hint}")
        found[name] = known[name]
    return found


def write_tasks(folder: str | Path, rows: Iterable[ScoredRows]) -> None:
    """Write one YAML file a task into `folder`: the installed task, zero-shot, on the local rows.

    The data cache lies in the folder too: `datasets` recognises a file by its name and time, not by its content.

    Raises:
        RankwiseError: a task that lm-eval does not have.
    """
    folder, rows = Path(folder), list(rows)
    installed = find_tasks(entry.task for entry in rows)
    for entry in rows:
        task = {
            "include": str(installed[entry.task]),
            "task": entry.task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {entry.split: str(entry.file)}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "validation_split": entry.split if entry.split == "validation" else None,
            "test_split": entry.split if entry.split == "test" else None,
            "num_fewshot": 0,
        }
        (folder / f"{entry.task}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")

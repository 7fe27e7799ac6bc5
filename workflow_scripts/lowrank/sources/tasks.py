"""The scored documents of the seven zero-shot tasks, as rows of the schema that lm-eval's own tasks read.

Only the scored split is written. The suites are zero-shot, so no examples are drawn from a training split.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.config.sources import HubSource, TaskFile
from lowrank.errors import RankwiseError
from lowrank.files import atomic_path, sha256_file, write_json
from lowrank.sources import hub
from lowrank.sources.readers import Record, iter_records
from lowrank.sources.resolve import placed, source_files

log = logging.getLogger(__name__)

UNCONDITIONAL = 1_000_000  # OLMES numbers the copies of a document that have no context from here
LETTERS = "ABCDEFGH"


def _boolq(row: Record, number: int) -> Record:
    label = row["label"] if "label" in row else row["answer"]
    return {"question": row["question"], "passage": row["passage"], "idx": number, "label": _label(label, 2)}


def _piqa(row: Record, _: int) -> Record:
    return {"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"], "label": _label(row["label"], 2)}


def _hellaswag(row: Record, _: int) -> Record:
    names = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type")
    endings = row["endings"]
    return {**{name: row[name] for name in names}, "label": str(_label(row["label"], len(endings)))}


def _winogrande(row: Record, _: int) -> Record:
    sentence, answer = row["sentence"], str(row["answer"])
    if sentence.count("_") != 1 or answer not in ("1", "2"):
        raise ValueError(f"sentence {sentence!r} with answer {answer!r}: one `_` and the answer 1 or 2 are needed")
    return {"sentence": sentence, "option1": row["option1"], "option2": row["option2"], "answer": answer}


def _choices(question: str) -> Callable[[Record, int], Record]:
    """The converter of the tasks with labelled choices; `question` is the column of the question."""

    def convert(row: Record, _: int) -> Record:
        labels, texts, key = list(row["choices"]["label"]), list(row["choices"]["text"]), row["answerKey"].strip()
        if len(labels) != len(texts) or key not in labels:
            raise ValueError(f"{len(texts)} choices with labels {labels}, and the answer {key!r}")
        choices = {"text": texts, "label": labels}
        return {"id": row["id"], question: row[question], "choices": choices, "answerKey": key}

    return convert


def _label(value: Any, choices: int) -> int:
    label = int(value)
    if not 0 <= label < choices:
        raise ValueError(f"label {label} of {choices} choices; test splits of the hub often have none")
    return label


@dataclass(frozen=True)
class Schema:
    """How one task is stored: its scored split, its converter, and the column of the question that OLMES renames."""

    split: str
    convert: Callable[[Record, int], Record]
    question: str | None = None


SCHEMAS = {
    "boolq": Schema("validation", _boolq),
    "piqa": Schema("validation", _piqa),
    "hellaswag": Schema("validation", _hellaswag),
    "winogrande": Schema("validation", _winogrande),
    "arc_easy": Schema("test", _choices("question"), "question"),
    "arc_challenge": Schema("test", _choices("question"), "question"),
    "openbookqa": Schema("test", _choices("question_stem"), "question_stem"),
}


def fetch_task(name: str, task: TaskFile, cache: Path, index: Path, folder: Path) -> dict[str, Any]:
    """Write `folder/<scored split>.jsonl` and its index.

    Args:
        name: the task's name in lm-eval, one of `SCHEMAS`.
        task: its section.
        cache: folder of downloads.
        index: the JSON file to write.
        folder: the folder of the rows.

    Returns:
        The index.

    Raises:
        RankwiseError: an unknown task, a source that cannot be had or read, or rows that do not fit the schema.
    """
    with placed(f"tasks.{name}"):
        if name not in SCHEMAS:
            raise RankwiseError(f"the scored rows of this task are not known here; known are: {', '.join(SCHEMAS)}.")
        schema = SCHEMAS[name]
        file = folder / f"{schema.split}.jsonl"
        with _rows(task, schema, cache) as rows, atomic_path(folder) as temporary:
            temporary.mkdir()
            count = _write_rows(rows, schema, temporary / file.name)
        record = {
            "task": name,
            "source": task.source.plain(),
            "splits": {schema.split: count},
            "sha256": {file.name: sha256_file(file)},
        }
        write_json(index, record)
    log.info("task %s: %d scored documents", name, count)
    return record


def _write_rows(rows: Iterable[Record], schema: Schema, file: Path) -> int:
    count = 0
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        for number, row in enumerate(rows):
            try:
                stream.write(json.dumps(_convert(row, number, schema), ensure_ascii=False) + "\n")
            except UnicodeEncodeError as error:
                raise RankwiseError(f"row {number} is no valid Unicode text ({error.reason}).") from error
            count += 1
    if not count:
        raise RankwiseError("the source has no rows.")
    return count


def _convert(row: Record, number: int, schema: Schema) -> Record:
    try:
        return schema.convert(row, number)
    except KeyError as error:
        raise RankwiseError(f"row {number}: no column {error}; there are: {', '.join(sorted(row))}.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise RankwiseError(f"row {number} does not fit the task: {error}.") from error


@contextmanager
def _rows(task: TaskFile, schema: Schema, cache: Path) -> Iterator[Iterable[Record]]:
    """The rows of a task's source, as they are there."""
    if isinstance(task.source, HubSource):
        yield hub.load_rows(task.source)
        return
    with source_files(task.source, cache) as files:
        if task.reader == "arrow":
            yield _arrow(files)
        elif task.reader == "olmes-requests":
            yield _olmes(files, schema)
        else:
            yield (row for _, row in iter_records(files, "jsonl", ()))


def _arrow(files: list[Path]) -> Iterable[Record]:
    """The rows of a folder that `datasets` saved."""
    from datasets import Dataset, load_from_disk

    folders = {file.parent for file in files}
    if len(folders) != 1:
        raise RankwiseError(f"`reader: arrow` reads one folder, and `file:` matches {len(folders)}.")
    folder = folders.pop()
    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # pyarrow's types, or a FileNotFoundError for a folder of another kind
        raise RankwiseError(f"{folder}: no folder that `datasets` saved ({error}).") from error
    if not isinstance(dataset, Dataset):
        raise RankwiseError(f"{folder}: holds several splits; choose the folder of one of them.")
    rows: Iterable[Record] = dataset
    return rows


def _olmes(files: list[Path], schema: Schema) -> Iterator[Record]:
    """One row a document of an OLMES request file, which has one line a choice, twice: with and without context."""
    if schema.question is None:
        raise RankwiseError("`reader: olmes-requests` knows arc_easy, arc_challenge and openbookqa only; use `arrow`.")
    documents: dict[int, Record] = {}
    for where, request in iter_records(files, "jsonl", ()):
        try:
            if request["doc_id"] < UNCONDITIONAL:
                documents.setdefault(request["doc_id"], _from_olmes(request["doc"], schema.question))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RankwiseError(f"{where}: no OLMES request of a question with choices ({error}).") from error
    return (documents[number] for number in sorted(documents))


def _from_olmes(document: Record, question: str) -> Record:
    query: str = document["query"]
    head, tail = "Question: ", "\nAnswer:"
    if not (query.startswith(head) and query.endswith(tail)):
        raise ValueError(f"the query {query!r} is not `Question: ...` and `Answer:`")
    labels = list(LETTERS[: len(document["choices"])])
    return {
        "id": document["id"],
        question: query.removeprefix(head).removesuffix(tail),
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[_label(document["gold"], len(labels))],
    }

"""Zero-shot tasks: rows in the schema of lm-eval's own tasks, from each kind of file."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from pydantic import ValidationError

from lowrank.config.sources import TaskFile
from lowrank.errors import RankwiseError
from lowrank.sources import hub
from lowrank.sources.tasks import SCHEMAS, fetch_task

ARC = {"id": "M1", "question": "Which?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}}
ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it", "passage": "It is.", "idx": 0, "label": 1},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    "hellaswag": {
        "ind": 4,
        "activity_label": "Roof",
        "ctx_a": "A.",
        "ctx_b": "he",
        "ctx": "A. he",
        "endings": ["a", "b", "c", "d"],
        "source_id": "s",
        "split": "val",
        "split_type": "indomain",
        "label": "3",
    },
    "winogrande": {"sentence": "so _ won", "option1": "a", "option2": "b", "answer": "2"},
    "arc_easy": {**ARC, "answerKey": "3"},
    "arc_challenge": {**ARC, "answerKey": "1"},
    "openbookqa": {"id": "7-1", "question_stem": "The sun", "choices": ARC["choices"], "answerKey": "2"},
}


def fetch(folder: Path, name: str, reader: str, path: Path) -> list[dict[str, Any]]:
    task = TaskFile.model_validate({"source": {"path": str(path)}, "reader": reader})
    index = fetch_task(name, task, folder / "cache", folder / f"{name}.json", folder / name)
    return rows_of(folder, name, index)


def rows_of(folder: Path, name: str, index: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, after checking that the index tells the truth."""
    file = folder / name / f"{SCHEMAS[name].split}.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert index == json.loads((folder / f"{name}.json").read_text())
    assert index["task"] == name
    assert index["splits"] == {SCHEMAS[name].split: len(rows)}
    assert index["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    return rows


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_hubs_schema_pass_unchanged(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{**ROWS[name], "unknown": 1}])
    assert fetch(tmp_path, name, "jsonl", path) == [ROWS[name]]


def test_only_the_scored_split_is_written(tmp_path: Path) -> None:
    fetch(tmp_path, "arc_easy", "jsonl", write_lines(tmp_path / "in.jsonl", [ROWS["arc_easy"]]))
    assert [file.name for file in (tmp_path / "arc_easy").iterdir()] == ["test.jsonl"]


def test_arrow_folders_and_boolean_answers(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"question": "q", "answer": True, "passage": "p"}, {"question": "r", "answer": False, "passage": "s"}]
    )
    rows.save_to_disk(str(tmp_path / "boolq-arrow"))
    assert fetch(tmp_path, "boolq", "arrow", tmp_path / "boolq-arrow") == [
        {"question": "q", "passage": "p", "idx": 0, "label": 1},
        {"question": "r", "passage": "s", "idx": 1, "label": 0},
    ]
    piqa = Dataset.from_list([ROWS["piqa"]]).cast_column("label", ClassLabel(names=["0", "1"]))
    piqa.save_to_disk(str(tmp_path / "piqa-arrow"))
    assert fetch(tmp_path, "piqa", "arrow", tmp_path / "piqa-arrow") == [ROWS["piqa"]]


def request(number: int, question: str, gold: int) -> dict[str, Any]:
    query = f"Question: {question}\nAnswer:"
    return {"doc_id": number, "doc": {"id": f"M{number}", "query": query, "choices": ["x", "y"], "gold": gold}}


def test_olmes_requests_give_each_document_once_and_in_order(tmp_path: Path) -> None:
    second, first = request(1, "What\nis it?", 1), request(0, "Which?", 0)
    lines = [second, second, first, first, {**first, "doc_id": 1_000_000, "doc": {"query": "Answer:"}}]
    with gzip.open(tmp_path / "r.jsonl.gz", "wt") as stream:
        stream.write("\n".join(json.dumps(line) for line in lines))
    choices = {"text": ["x", "y"], "label": ["A", "B"]}
    assert fetch(tmp_path, "arc_challenge", "olmes-requests", tmp_path / "r.jsonl.gz") == [
        {"id": "M0", "question": "Which?", "choices": choices, "answerKey": "A"},
        {"id": "M1", "question": "What\nis it?", "choices": choices, "answerKey": "B"},
    ]
    (stem, _) = fetch(tmp_path, "openbookqa", "olmes-requests", tmp_path / "r.jsonl.gz")
    assert stem["question_stem"] == "Which?"
    assert "question" not in stem


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "load_rows", lambda source: Dataset.from_list([ROWS["winogrande"]]))
    source = {"hub": "allenai/winogrande", "revision": "0" * 40, "split": "validation"}
    task = TaskFile.model_validate({"source": source, "reader": "hub"})
    index = fetch_task("winogrande", task, tmp_path, tmp_path / "winogrande.json", tmp_path / "winogrande")
    assert rows_of(tmp_path, "winogrande", index) == [ROWS["winogrande"]]
    for wrong in ({"source": source, "reader": "arrow"}, {"source": {"path": "x"}, "reader": "hub"}):
        with pytest.raises(ValidationError, match="`reader: hub` goes with a `hub:` source, and only with it"):
            TaskFile.model_validate(wrong)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("boolq", {"label": 2}, "label 2 of 2 choices"),
        ("piqa", {"label": -1}, "label -1 of 2 choices; test splits"),
        ("hellaswag", {"label": ""}, "row 0 does not fit"),
        ("hellaswag", {"endings": ["a"]}, "label 3 of 1 choices"),
        ("winogrande", {"sentence": "no gap"}, "one `_`"),
        ("winogrande", {"answer": ""}, "answer ''"),
        ("arc_easy", {"answerKey": "9"}, "the answer '9'"),
        ("openbookqa", {"choices": {"text": ["x"], "label": ["1", "2"]}}, "1 choices with labels"),
    ],
)
def test_rows_without_a_usable_answer_are_refused(
    tmp_path: Path, name: str, change: dict[str, Any], expected: str
) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{**ROWS[name], **change}])
    with pytest.raises(RankwiseError, match=f"^tasks.{name}: .*{expected}"):
        fetch(tmp_path, name, "jsonl", path)
    assert not (tmp_path / name).exists()
    assert not (tmp_path / f"{name}.json").exists()


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "in.jsonl", [{"goal": "g", "sol1": "a"}])
    empty = write_lines(tmp_path / "empty.jsonl", [])
    data = Dataset.from_list([ROWS["piqa"]])
    DatasetDict(train=data).save_to_disk(str(tmp_path / "splits"))
    odd = write_lines(tmp_path / "odd.jsonl", [{"doc_id": 0, "doc": {"query": "Goal: x", "id": 0, "choices": []}}])
    for name, reader, path, expected in (
        ("piqa", "jsonl", lines, "row 0: no column 'sol2'; there are: goal, sol1"),
        ("piqa", "jsonl", empty, "the source has no rows"),
        ("piqa", "arrow", lines, "no folder that `datasets` saved"),
        ("piqa", "arrow", tmp_path / "splits", "choose the folder of one"),
        ("piqa", "olmes-requests", lines, "arc_easy, arc_challenge and openbookqa only"),
        ("arc_easy", "olmes-requests", odd, r"odd\.jsonl, line 1: no OLMES request"),
        ("mmlu", "jsonl", lines, "known are: boolq, piqa"),
    ):
        with pytest.raises(RankwiseError, match=expected):
            fetch(tmp_path, name, reader, path)


def test_a_row_with_half_a_character_is_named(tmp_path: Path) -> None:
    rows = [ROWS["boolq"], ROWS["boolq"] | {"passage": "\ud83d"}]
    with pytest.raises(RankwiseError, match="row 1 is no valid Unicode text"):
        fetch(tmp_path, "boolq", "jsonl", write_lines(tmp_path / "rows.jsonl", rows))

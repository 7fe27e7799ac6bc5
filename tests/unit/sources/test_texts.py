"""Corpora and instructions: files and indexes as later stages read them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file

from lowrank.config.sources import Corpus, Instructions
from lowrank.errors import RankwiseError
from lowrank.sources import hub
from lowrank.sources.texts import fetch_corpus, fetch_instructions

COMMIT = "0" * 40


def fetch(folder: Path, **section: Any) -> dict[str, Any]:
    corpus = Corpus.model_validate(section)
    suffix = "safetensors" if corpus.format == "tokens" else "jsonl"
    return fetch_corpus("c", corpus, folder / "cache", folder / "c.json", folder / "data" / f"c.{suffix}")


def documents(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "data" / "c.jsonl").read_bytes().decode().split("\n")[:-1]]


def test_a_corpus_and_its_index(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("one\n\ntwo ä\u2028\nthree\nfour", encoding="utf-8")
    index = fetch(tmp_path, source={"path": str(tmp_path / "t")}, format="lines", documents=[1, 4], license="CC0")
    assert documents(tmp_path) == ["", "two ä\u2028", "three"]
    data = tmp_path / "data" / "c.jsonl"
    assert index == json.loads((tmp_path / "c.json").read_text())
    assert index == {
        "corpus": "c",
        "source": {"path": str(tmp_path / "t"), "file": None},
        "kind": "documents",
        "documents": 3,
        "empty": 1,
        "characters": len("two ä\u2028three"),
        "file": "c.jsonl",
        "range": [1, 4],
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("chosen", [[3, 5], [4, None]])
def test_a_range_beyond_the_end_leaves_nothing(tmp_path: Path, chosen: list[int | None]) -> None:
    (tmp_path / "t").write_text("one\ntwo\nthree\nfour", encoding="utf-8")
    with pytest.raises(RankwiseError, match=r"^corpora\.c: documents: \[.*the source has 4 documents"):
        fetch(tmp_path, source={"path": str(tmp_path / "t")}, format="lines", documents=chosen)
    assert not (tmp_path / "c.json").exists()
    assert not list((tmp_path / "data").iterdir())


def test_empty_text_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("\n  \n")
    with pytest.raises(RankwiseError, match="all 2 selected documents are empty"):
        fetch(tmp_path, source={"path": str(tmp_path / "t")}, format="lines")


def test_a_hub_data_set_is_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"page": ["a", "b", "c"], "url": ["", "", ""]})
    monkeypatch.setattr(hub, "load_rows", lambda source: rows)
    source = {"hub": "o/d", "revision": COMMIT, "split": "train"}
    index = fetch(tmp_path, source=source, field="page", documents=[0, 2])
    assert documents(tmp_path) == ["a", "b"]
    assert index["source"]["revision"] == COMMIT
    with pytest.raises(RankwiseError, match=r"o/d, row 0: no column 'text'; there are: page, url"):
        fetch(tmp_path, source=source)


def test_token_windows_are_kept_as_they_are(tmp_path: Path) -> None:
    ids = np.arange(20, dtype=np.int64).reshape(4, 5)
    np.savez(tmp_path / "t.npz", tokens=ids)
    index = fetch(tmp_path, source={"tokens": str(tmp_path / "t.npz")}, format="tokens", documents=[1, 3])
    stored = load_file(tmp_path / "data" / "c.safetensors")["tokens"]
    assert stored.dtype == np.int32
    assert np.array_equal(stored, ids[1:3])
    assert (index["kind"], index["documents"], index["length"], index["file"]) == ("tokens", 2, 5, "c.safetensors")


def instructions(folder: Path, rows: list[dict[str, Any]], **section: Any) -> tuple[int, list[Any]]:
    (folder / "i.json").write_text(json.dumps(rows))
    settings = Instructions.model_validate({"source": {"path": str(folder / "i.json")}, **section})
    count = fetch_instructions("i", settings, folder / "cache", folder / "out.jsonl")
    return count, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_instructions_keep_three_columns(tmp_path: Path) -> None:
    rows = [
        {"instruction": "add", "input": "1 2", "output": "3", "text": "unused"},
        {"instruction": "say", "output": "word"},
        {"instruction": "nothing", "output": " "},
        {"instruction": "beyond the range", "output": "x"},
    ]
    assert instructions(tmp_path, rows, documents=[0, 3]) == (
        2,
        [
            {"instruction": "add", "input": "1 2", "output": "3"},
            {"instruction": "say", "input": "", "output": "word"},
        ],
    )


def test_instructions_of_a_hub_data_set_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "say", "response": "word"}]
    monkeypatch.setattr(hub, "load_rows", lambda source: rows)
    source = {"hub": "o/d", "revision": COMMIT, "split": "train"}
    assert instructions(tmp_path, [], source=source, documents=[0, 1]) == (1, rows[:1])
    with pytest.raises(RankwiseError, match=r"^instructions\.i: .*o/d, row 1: no column 'output'; there are: instr"):
        instructions(tmp_path, [], source=source)


def test_instructions_need_their_columns(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"^instructions\.i: .*record 0: no column 'output'; there are: instr"):
        instructions(tmp_path, [{"instruction": "x", "response": "y"}])
    with pytest.raises(RankwiseError, match="no row with an instruction and an output"):
        instructions(tmp_path, [{"instruction": "x", "output": ""}])
    assert not (tmp_path / "out.jsonl").exists()

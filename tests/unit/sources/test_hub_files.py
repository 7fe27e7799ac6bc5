"""Files of a data set of the hub, through the real client, on a cache that holds them already."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RemoteEntryNotFoundError

from lowrank.config.sources import Corpus, HubSource, Instructions
from lowrank.errors import RankwiseError
from lowrank.sources import hub
from lowrank.sources.texts import fetch_corpus, fetch_instructions

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "en/c4-train.00000-of-01024.json.gz"


def jsonl_gz(texts: list[str]) -> bytes:
    return gzip.compress("".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts).encode())


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Where a file of `some-org/texts` lies in the client's cache; there is no network."""
    snapshot = tmp_path / "hub/datasets--some-org--texts/snapshots" / COMMIT
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def place(name: str) -> Path:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        return snapshot / name

    return place


def source(file: str, **more: str) -> dict[str, str]:
    return {"hub": "some-org/texts", "revision": COMMIT, "file": file, **more}


def fetch(folder: Path, **section: Any) -> list[str]:
    corpus, data = Corpus.model_validate(section), folder / "data/c.jsonl"
    fetch_corpus("c", corpus, folder / "cache", folder / "c.json", data)
    return [json.loads(line)["text"] for line in data.read_text().splitlines()]


def test_one_shard_of_json_lines_that_are_compressed(tmp_path: Path, cached: Callable[[str], Path]) -> None:
    cached(SHARD).write_bytes(jsonl_gz(["zero", "one ä", "two", "three"]))
    cached("en/c4-train.00001-of-01024.json.gz").write_bytes(jsonl_gz(["of another shard"]))
    assert fetch(tmp_path, source=source(SHARD), format="jsonl", documents=[1, 3]) == ["one ä", "two"]


def test_the_parquet_of_a_repository_with_a_script(tmp_path: Path, cached: Callable[[str], Path]) -> None:
    cached("texts.py").write_text("raise SystemExit('never run')")
    pq.write_table(pa.table({"sentence": ["a", "b"], "id": [0, 1]}), cached("data/validation/0000.parquet"))
    section = {"source": source("data/validation/0000.parquet"), "format": "parquet", "field": "sentence"}
    assert fetch(tmp_path, **section) == ["a", "b"]


def test_only_the_first_documents_are_read(tmp_path: Path, cached: Callable[[str], Path]) -> None:
    cached(SHARD).write_bytes(jsonl_gz(["first"]) + b"not gzip at all")
    assert fetch(tmp_path, source=source(SHARD), format="jsonl", documents=[0, 1]) == ["first"]


def test_a_glob_takes_the_files_that_match_in_order(tmp_path: Path, cached: Callable[[str], Path]) -> None:
    for name in ("b.json.gz", "a.json.gz", "c.txt"):
        cached(f"en/{name}").write_bytes(jsonl_gz([name]))
    assert fetch(tmp_path, source=source("en/*.json.gz"), format="jsonl") == ["a.json.gz", "b.json.gz"]
    with pytest.raises(RankwiseError, match=r"some-org/texts at 0123.*no file matches de/\*"):
        fetch(tmp_path, source=source("de/*"), format="jsonl")


def test_instructions_from_a_file(tmp_path: Path, cached: Callable[[str], Path]) -> None:
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}]
    cached("rows.json").write_text(json.dumps(rows))
    settings = Instructions.model_validate({"source": source("rows.json")})
    assert fetch_instructions("i", settings, tmp_path / "cache", tmp_path / "i.jsonl") == 1
    assert json.loads((tmp_path / "i.jsonl").read_text()) == rows[0]


@pytest.mark.parametrize("more", [{"split": "train"}, {"subset": "en"}])
def test_a_file_and_a_split_contradict_each_other(more: dict[str, str]) -> None:
    with pytest.raises(RankwiseError, match="`file:` says what is read; leave out `split:` and `subset:`"):
        hub.fetch_files(HubSource.model_validate(source("a.json", **more)))


def test_a_file_that_is_not_cached_needs_the_hub(cached: Callable[[str], Path]) -> None:
    with pytest.raises(RankwiseError, match=r"some-org/texts at revision 0123.*cannot be reached.*`path:`"):
        hub.fetch_files(HubSource.model_validate(source("absent.json")))


def test_a_file_that_the_repository_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RemoteEntryNotFoundError("404", response=MagicMock(status_code=404))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(RankwiseError, match=r"some-org/texts at revision 0123.*it has no file `absent\.json`"):
        hub.fetch_files(HubSource.model_validate(source("absent.json")))


def test_a_probe_for_a_file_is_not_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such split") from RemoteEntryNotFoundError("404", response=MagicMock(status_code=404))

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    with pytest.raises(RankwiseError, match=r"cannot be loaded \(ValueError: no such split\)"):
        hub.load_rows(HubSource(hub="some-org/texts", revision=COMMIT, split="train"))

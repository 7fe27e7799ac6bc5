"""Files of this machine: paths, token ids, and the readers of text formats."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lowrank.config.sources import PathSource, TokensSource
from lowrank.errors import RankwiseError
from lowrank.sources.local import find_files, read_tokens
from lowrank.sources.readers import iter_records, iter_texts, select, text_of

IDS = np.arange(12, dtype=np.int64).reshape(3, 4)


def test_a_folder_gives_its_files_or_those_that_match(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    assert [f.name for f in find_files(PathSource(path=str(tmp_path)))] == ["a.txt", "b.txt", "c.md"]
    assert [f.name for f in find_files(PathSource(path=str(tmp_path), file="*.txt"))] == ["a.txt", "b.txt"]


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"gone: there is no such file or folder"):
        find_files(PathSource(path=str(tmp_path / "gone")))
    with pytest.raises(RankwiseError, match=r"no file of this folder matches `file: \*\.txt`"):
        find_files(PathSource(path=str(tmp_path), file="*.txt"))
    with pytest.raises(RankwiseError, match="there is no such file"):
        read_tokens(TokensSource(tokens=str(tmp_path / "gone.npz")))


def test_tokens_are_read_from_both_formats(tmp_path: Path) -> None:
    save_file({"tokens": IDS}, tmp_path / "t.safetensors")
    np.savez(tmp_path / "t.npz", tokens=IDS)
    for name in ("t.safetensors", "t.npz"):
        tokens = read_tokens(TokensSource(tokens=str(tmp_path / name)))
        assert tokens.dtype == np.int32
        assert np.array_equal(tokens, IDS)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (IDS.astype(float), "float64 of shape"),
        (IDS[0], r"of shape \(4,\)"),
        (IDS[:0], r"of shape \(0, 4\)"),
        (IDS - 1, "ids from -1 to 10"),
        (IDS + 2**31, "fit in 32 bits"),
        (np.array([[{"a": 1}]], dtype=object), "cannot be read"),  # would need a pickle
    ],
)
def test_wrong_tokens_are_refused(tmp_path: Path, tokens: np.ndarray, expected: str) -> None:
    np.savez(tmp_path / "t.npz", tokens=tokens)
    with pytest.raises(RankwiseError, match=expected):
        read_tokens(TokensSource(tokens=str(tmp_path / "t.npz")))


def test_unreadable_token_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", ids=IDS)
    (tmp_path / "half.npz").write_bytes((tmp_path / "named.npz").read_bytes()[:50])
    save_file({"tokens": IDS}, tmp_path / "half.safetensors")
    data = (tmp_path / "half.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[:-9])
    (tmp_path / "t.txt").write_text("1 2 3")
    for name, expected in {
        "named.npz": "has no array `tokens`, but ids",
        "half.npz": "cannot be read as .npz",
        "half.safetensors": "cannot be read as .safetensors",
        "t.txt": "is a .safetensors or .npz file",
    }.items():
        with pytest.raises(RankwiseError, match=expected):
            read_tokens(TokensSource(tokens=str(tmp_path / name)))


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["one", "zwei äöü\u2028still zwei", "three"]
    rows = [{"body": text, "other": 1} for text in texts]
    for text, name in zip(texts, "abc", strict=True):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "lines").write_text("\r\n".join(texts) + "\r\n", encoding="utf-8", newline="")
    (tmp_path / "j.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with gzip.open(tmp_path / "j.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "j.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert list(iter_texts([tmp_path / f"{name}.txt" for name in "abc"], "text", "")) == texts
    assert list(iter_texts([tmp_path / "lines"], "lines", "")) == texts
    for name, form in {"j.jsonl": "jsonl", "j.jsonl.gz": "jsonl", "j.json": "json", "p.parquet": "parquet"}.items():
        assert list(iter_texts([tmp_path / name], form, "body")) == texts, name


def test_a_wrong_byte_is_shown_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"fine line\nba\xffd\n")
    for form in ("text", "lines"):
        with pytest.raises(RankwiseError, match=r"x: no valid UTF-8 at byte 12 \(0xff\)"):
            list(iter_texts([tmp_path / "x"], form, ""))


def test_a_missing_column_lists_the_columns(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text('{"text": "a"}\n{"content": "b", "url": "c"}\n')
    with pytest.raises(RankwiseError, match=r"j\.jsonl, line 2: no column 'text'; there are: content, url"):
        list(iter_texts([tmp_path / "j.jsonl"], "jsonl", "text"))
    pq.write_table(pa.table({"content": ["b"], "url": ["c"]}), tmp_path / "p.parquet")
    with pytest.raises(RankwiseError, match=r"p\.parquet: no column 'text'; there are: content, url"):
        list(iter_texts([tmp_path / "p.parquet"], "parquet", "text"))


@pytest.mark.parametrize(
    ("form", "content", "expected"),
    [
        ("jsonl", b'{"text": "a"}\n{"text": ', "line 2: no valid JSON"),
        ("jsonl", b"[1]", "line 1: a record is a JSON object, not list"),
        ("json", b'{"text": "a"}', "`format: json` is a list of objects"),
        ("json", b'[{"text": 3}]', "record 0: column 'text' holds int, not text"),
        ("json", b'[{"text": "\\ud800"}]', "no valid Unicode"),
        ("parquet", b"PAR1", "no readable parquet file"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, form: str, content: bytes, expected: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(RankwiseError, match=expected):
        list(iter_texts([tmp_path / "x"], form, "text"))


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "x.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RankwiseError, match=r"x\.gz: cannot be read"):
        list(iter_records([tmp_path / "x.gz"], "jsonl", ()))


def test_null_is_empty_text() -> None:
    assert text_of({"text": None}, "text", "row 1") == ""


@given(count=st.integers(0, 20), start=st.integers(0, 20), size=st.integers(1, 20), end=st.booleans())
def test_select_is_a_slice_or_says_how_many_there_are(count: int, start: int, size: int, end: bool) -> None:
    stop = None if end else start + size
    if start >= count or (stop is not None and stop > count):
        with pytest.raises(RankwiseError, match=f"the source has {count} documents"):
            list(select(range(count), (start, stop)))
    else:
        assert list(select(range(count), (start, stop))) == list(range(count))[start:stop]

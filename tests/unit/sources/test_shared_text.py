"""Tested text under another name, in another order or form; and texts that only look alike."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from lowrank.config.sources import Corpus
from lowrank.config.tested import Pair
from lowrank.errors import RankwiseError
from lowrank.sources.shared_text import SHARE, WORDS, compare_texts
from lowrank.sources.texts import fetch_corpus
from tests.tiny import text
from tests.tiny_study import write_lines

DOCUMENTS = [text(seed, 2 * WORDS) for seed in range(6)]
OTHERS = [text(seed, 2 * WORDS) for seed in range(100, 106)]
SHORT = "All rights reserved."


def fetch(folder: Path, name: str, path: Path, **section: Any) -> None:
    """Fetch a corpus from a file, as the workflow does."""
    source = {"tokens" if section.get("format") == "tokens" else "path": str(path)}
    corpus = Corpus.model_validate({"source": source, "format": "jsonl", **section})
    suffix = "safetensors" if corpus.format == "tokens" else "jsonl"
    fetch_corpus(name, corpus, folder / "cache", folder / f"{name}.json", folder / "data" / f"{name}.{suffix}")


def lines(path: Path, documents: list[str]) -> Path:
    write_lines(path, [{"text": document} for document in documents])
    return path


def windows(path: Path, tokens: npt.NDArray[Any]) -> Path:
    save_file({"tokens": np.ascontiguousarray(tokens)}, path)
    return path


def compare(folder: Path) -> dict[str, Any]:
    """The corpora `test` and `seen` of a folder."""
    pair = Pair("test", "seen", ("suites.held-out.corpora[1]",), ("calibration.c4", "validation.top"))
    return compare_texts([pair], {name: folder / f"{name}.json" for name in ("seen", "test")})


def refused(folder: Path) -> str:
    with pytest.raises(RankwiseError) as caught:
        compare(folder)
    return str(caught.value)


def test_a_copy_under_another_name_is_refused_with_both_places(tmp_path: Path) -> None:
    file = lines(tmp_path / "seen.jsonl", DOCUMENTS)
    copy = Path(shutil.copy(file, tmp_path / "other.jsonl"))
    fetch(tmp_path, "seen", file)
    fetch(tmp_path, "test", copy, documents=[2, 5])
    assert refused(tmp_path) == (
        "suites.held-out.corpora[1]: 3 of the 3 documents of 'test' are in 'seen' too, which calibration.c4, "
        f"validation.top read; one begins {DOCUMENTS[2][:60]!r}. What is tested may not have been seen: give other "
        f"text to corpora.test (path: {copy}, documents: [2, 5]) or to corpora.seen (path: {file}, "
        "documents: [0, null])."
    )


def test_another_order_and_form_are_no_other_text(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    assert shuffled != DOCUMENTS
    (tmp_path / "test.txt").write_text("\r\n".join(document.replace(" ", "  ") for document in shuffled))
    fetch(tmp_path, "seen", lines(tmp_path / "seen.jsonl", DOCUMENTS))
    fetch(tmp_path, "test", tmp_path / "test.txt", format="lines")
    assert "6 of the 6 documents of 'test'" in refused(tmp_path)


def test_one_long_document_in_common_is_enough(tmp_path: Path) -> None:
    fetch(tmp_path, "seen", lines(tmp_path / "seen.jsonl", DOCUMENTS))
    fetch(tmp_path, "test", lines(tmp_path / "test.jsonl", [*OTHERS, DOCUMENTS[4]]))
    said = refused(tmp_path)
    assert "1 of the 7 documents of 'test'" in said
    assert f"one begins {DOCUMENTS[4][:60]!r}" in said


def test_other_text_passes_and_the_record_says_what_was_compared(tmp_path: Path) -> None:
    fetch(tmp_path, "seen", lines(tmp_path / "seen.jsonl", DOCUMENTS))
    fetch(tmp_path, "test", lines(tmp_path / "test.jsonl", [*OTHERS, ""]))
    assert compare(tmp_path) == {
        "shared_is": {"words": WORDS, "share": SHARE},
        "corpora": {name: {"kind": "documents", "count": 6, "words": 12 * WORDS} for name in ("seen", "test")},
        "pairs": [{"tested": "test", "seen": "seen", "compared": "documents", "shared": 0}],
    }


def test_short_documents_in_common_are_told_and_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    almost = text(7, WORDS - 1)
    fetch(tmp_path, "seen", lines(tmp_path / "seen.jsonl", ["", SHORT, almost, *DOCUMENTS]))
    fetch(tmp_path, "test", lines(tmp_path / "test.jsonl", ["", SHORT, SHORT, almost, *OTHERS]))
    assert compare(tmp_path)["pairs"][0]["shared"] == 3  # the line that stands twice counts twice, the empty one never
    assert "3 of the 9 documents of 'test' are in 'seen' too" in caplog.text


@pytest.mark.parametrize(("others", "is_refused"), [(0, True), (3, True), (4, False)])
def test_a_copy_of_short_lines_is_text_in_common(others: int, is_refused: bool, tmp_path: Path) -> None:
    """Three of which half the test, or less, consists."""
    common = [f"{number} green bottles" for number in range(3)]
    fetch(tmp_path, "seen", lines(tmp_path / "seen.jsonl", [*common, *DOCUMENTS]))
    fetch(tmp_path, "test", lines(tmp_path / "test.jsonl", common + [f"{number} red ones" for number in range(others)]))
    if is_refused:
        assert "3 of the" in refused(tmp_path)
    else:
        assert compare(tmp_path)["pairs"][0]["shared"] == 3


def test_given_windows_that_repeat_are_refused_and_others_pass(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 400, (8, WORDS), dtype=np.int64)
    fetch(tmp_path, "seen", windows(tmp_path / "seen.safetensors", tokens[:5]), format="tokens")
    np.savez(tmp_path / "test.npz", tokens=tokens[[7, 3, 6]].astype(np.uint16))
    fetch(tmp_path, "test", tmp_path / "test.npz", format="tokens")
    said = refused(tmp_path)
    assert "1 of the 3 windows of 'test'" in said
    assert f"one begins '{' '.join(map(str, tokens[3, :10]))} " in said
    fetch(tmp_path, "test", windows(tmp_path / "test.safetensors", tokens[5:]), format="tokens")
    (pair,) = compare(tmp_path)["pairs"]
    assert (pair["compared"], pair["shared"]) == ("windows", 0)


def test_text_and_windows_are_not_said_to_be_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fetch(tmp_path, "seen", lines(tmp_path / "seen.jsonl", DOCUMENTS))
    tokens = np.arange(2 * WORDS).reshape(2, WORDS)
    fetch(tmp_path, "test", windows(tmp_path / "test.safetensors", tokens), format="tokens")
    assert compare(tmp_path)["pairs"][0]["compared"] is None
    assert "'test' is windows and 'seen' documents: not compared" in caplog.text


def test_all_pairs_are_named_at_once(tmp_path: Path) -> None:
    for name in ("seen", "one", "two", "three"):
        chosen = OTHERS if name == "three" else DOCUMENTS
        fetch(tmp_path, name, lines(tmp_path / f"{name}.jsonl", chosen))
    pairs = [Pair(name, "seen", (f"suites.s.corpora[{name}]",), ("calibration.c",)) for name in ("one", "two", "three")]
    with pytest.raises(RankwiseError) as caught:
        compare_texts(pairs, {name: tmp_path / f"{name}.json" for name in ("seen", "one", "two", "three")})
    found = str(caught.value).split("\n")
    assert [line.partition(":")[0] for line in found] == ["suites.s.corpora[one]", "suites.s.corpora[two]"]
    assert "which calibration.c reads" in found[0]


def test_a_text_that_is_not_the_one_of_its_index_is_not_compared(tmp_path: Path) -> None:
    for name, chosen in (("seen", DOCUMENTS), ("test", OTHERS)):
        fetch(tmp_path, name, lines(tmp_path / f"{name}.jsonl", chosen))
    data = tmp_path / "data/test.jsonl"
    data.write_text(json.dumps({"text": "other"}) + "\n")
    assert re.search(r"test\.jsonl: not the file that .*test\.json describes", refused(tmp_path))

"""Sources, models and windows that cannot be used are refused when they are fetched; what was there before stays."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.calibration.corpora import load_documents, sample_calibration
from lowrank.config.presets import Calibration
from lowrank.config.sources import Corpus, Instructions
from lowrank.errors import RankwiseError
from lowrank.evaluation.perplexity import evaluate_perplexity
from lowrank.evaluation.task_files import find_rows
from lowrank.files import save_tensors, sha256_file, write_json
from lowrank.model.checkpoint import load_checkpoint
from lowrank.post_training.instructions import read_rows
from lowrank.sources.models import fetch_model
from lowrank.sources.texts import fetch_corpus, fetch_instructions
from tests import tiny_study
from tests.survival.workshop import (
    VOCABULARY,
    Damage,
    a_list,
    emptied,
    empty_object,
    flipped,
    half_json,
    model_section,
    no_utf8,
    refused,
    removed,
    snapshot,
    truncated,
)


def corpus_of(path: Path) -> Corpus:
    return Corpus.model_validate({"source": {"path": str(path)}, "format": "lines"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"good line\nba\xffd line\n", r"no valid UTF-8 at byte 12 \(0xff\)"),
        (b"\xfe\xff\x00a", r"no valid UTF-8 at byte 0 \(0xfe\)"),
        (b"\n \n\t\n", "all 3 selected documents are empty"),
        (b"", r"documents: .* the source has 0 documents"),
    ],
)
def test_a_corpus_that_cannot_be_used(content: bytes, said: str, run: Path, tmp_path: Path) -> None:
    source = tmp_path / "new.txt"
    source.write_bytes(content)
    before = snapshot(run)
    with pytest.raises(RankwiseError, match=said) as caught:
        fetch_corpus("text", corpus_of(source), tmp_path, run / "corpora/text.json", run / "corpora/data/text.jsonl")
    assert str(caught.value).startswith("corpora.text: ")
    assert snapshot(run) == before


def test_an_empty_document_among_others_is_kept_and_counted(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "new.txt"
    source.write_text("one\n\ntwo\n")
    index = fetch_corpus(
        "text", corpus_of(source), tmp_path, run / "corpora/text.json", run / "corpora/data/text.jsonl"
    )
    assert (index["documents"], index["empty"]) == (3, 1)
    assert load_documents(run / "corpora/text.json") == ["one", "", "two"]


@pytest.mark.parametrize("content", [b'{"instruction": "a"}\n', b'{"instruction": "a", "output": "\xff"}\n', b"[]\n"])
def test_instructions_that_cannot_be_used(content: bytes, run: Path, tmp_path: Path) -> None:
    source = tmp_path / "new.jsonl"
    source.write_bytes(content)
    section = Instructions.model_validate({"source": {"path": str(source)}, "format": "jsonl"})
    before = snapshot(run)
    with pytest.raises(RankwiseError, match=rf"instructions\.i: {re.escape(str(source))}"):
        fetch_instructions("i", section, tmp_path, run / "instructions.jsonl")
    assert snapshot(run) == before


@pytest.mark.parametrize("damage", [truncated, no_utf8, removed], ids=lambda d: d.__name__)
def test_fetched_instructions(damage: Damage, run: Path) -> None:
    file = run / "instructions.jsonl"
    tiny_study.write_lines(file, [{"instruction": "a", "input": "", "output": "b" * 50}])
    damage(file)
    refused(run, file, lambda run: read_rows(file))


@pytest.mark.parametrize("damage", [truncated, flipped, removed], ids=lambda d: d.__name__)
def test_rows_of_a_task(damage: Damage, run: Path) -> None:
    rows = run / "tasks/piqa/validation.jsonl"
    tiny_study.write_lines(rows, tiny_study.task_rows()["piqa"])
    write_json(run / "tasks/piqa.json", {"sha256": {rows.name: sha256_file(rows)}})
    assert find_rows("piqa", rows.parent).count == 6
    damage(rows)
    refused(run, rows, lambda run: find_rows("piqa", rows.parent))


def spoil_weights(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def other_tokenizer(folder: Path) -> None:
    """A tokenizer with more tokens than the model has."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    tokens = content["model"]["vocab"]
    tokens |= {f"word{index}": len(tokens) + index for index in range(VOCABULARY)}
    file.write_text(json.dumps(content))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (spoil_weights(float("nan")), r"up_proj\.weight holds NaN or infinite values"),
    "infinite": (spoil_weights(float("inf")), r"up_proj\.weight holds NaN or infinite values"),
    "truncated weights": (lambda folder: truncated(folder / "model.safetensors"), "truncated or damaged"),
    "empty config": (lambda folder: emptied(folder / "config.json"), r"config\.json: empty"),
    "half config": (lambda folder: half_json(folder / "config.json"), r"config\.json: damaged"),
    "config without a type": (lambda folder: empty_object(folder / "config.json"), "architecture"),
    "config that is a list": (lambda folder: a_list(folder / "config.json"), r"config\.json: damaged"),
    "other tokenizer": (other_tokenizer, "They do not belong together"),
    "half tokenizer": (lambda folder: half_json(folder / "tokenizer.json"), "its tokenizer cannot be loaded"),
    "no weights": (lambda folder: removed(folder / "model.safetensors"), r"no `model\.safetensors`"),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_cannot_be_used_and_the_one_that_was_there_before(
    what: str, finished: Path, run: Path, tmp_path: Path
) -> None:
    spoil, said = MODELS[what]
    source = Path(shutil.copytree(finished / "sources/model", tmp_path / "new"))
    spoil(source)
    before = snapshot(run)
    with pytest.raises(RankwiseError, match=said) as caught:
        fetch_model("tiny", model_section(source), tmp_path / "cache", run / "models/tiny")
    assert str(caught.value).startswith("models.tiny: ")
    assert snapshot(run) == before


def test_windows_of_another_tokenizer(run: Path) -> None:
    model = load_checkpoint(run / "models/tiny", torch.float32)
    with pytest.raises(RankwiseError, match="another tokenizer"):
        evaluate_perplexity(model, torch.full((2, 8), VOCABULARY))


def test_more_windows_than_the_text_holds_leave_the_old_ones(run: Path) -> None:
    before = snapshot(run)
    many = Calibration.model_validate({"corpora": ["text"], "windows": 10**6, "length": 32})
    file = run / "calibration/tiny/c.safetensors"
    with pytest.raises(RankwiseError, match=r"corpus 'text': the text is too short: it has \d+ tokens, enough for \d+"):
        sample_calibration("tiny", many, run / "models/tiny", [run / "corpora/text.json"], file)
    assert snapshot(run) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_never_reach_a_file(value: float, run: Path) -> None:
    before = snapshot(run)
    with pytest.raises(RankwiseError, match=r"c\.safetensors: tensor 'tokens' holds values that are not finite"):
        save_tensors(run / "calibration/tiny/c.safetensors", {"tokens": torch.tensor([value])})
    with pytest.raises(RankwiseError, match=r"tiny\.json: a result is not finite"):
        write_json(run / "models/tiny.json", {"perplexity": value})
    assert snapshot(run) == before

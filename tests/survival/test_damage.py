"""Every kind of damage is met where a file is first read: with the file, the reason and the cure, and nothing lost."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_families import some_tokens
from workshop import (
    CPU,
    KIND,
    SHAPE,
    VOCABULARY,
    Damage,
    a_list,
    build,
    disagreeing,
    emptied,
    empty_object,
    flip,
    flipped,
    garbage,
    half_json,
    model_section,
    no_utf8,
    removed,
    replaced,
    snapshot,
    truncated,
)

from lowrank import statistics
from lowrank.bases import Bases
from lowrank.checkpoint import load_checkpoint, load_tokenizer
from lowrank.config.presets import Calibration
from lowrank.config.sources import Corpus, Instructions
from lowrank.corpora import load_documents, sample_calibration
from lowrank.errors import RankwiseError
from lowrank.evaluation.perplexity import evaluate_perplexity
from lowrank.evaluation.task_files import find_rows
from lowrank.families import FAMILIES
from lowrank.files import load_tensors, read_record, save_tensors, sha256_file, write_json
from lowrank.objective import Score
from lowrank.output_gradients import load_output_gradients
from lowrank.post_training.engine_state import SafeCheckpoints
from lowrank.post_training.instructions import Examples, read_rows
from lowrank.post_training.job import PROGRESS_FILE, Progress
from lowrank.search import Trial, TrialLog
from lowrank.sources.models import fetch_model
from lowrank.sources.texts import fetch_corpus, fetch_instructions
from lowrank.state import Clock
from lowrank.statistics import Statistics, collect_statistics

CURES = "[Rr]un the workflow again"
Read = Callable[[Path], Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workshop")
    build(root)
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def refused(run: Path, file: Path, read: Read) -> str:
    """The message of an error that names the file (or the folder that is made as a whole), and spoils nothing."""
    before = snapshot(run)
    with pytest.raises(RankwiseError, match=CURES) as caught:
        read(run)
    message = str(caught.value)
    named = [file, *file.parents]
    assert any(str(path) in message for path in named[: 1 + named.index(run)][:-1]), message
    assert "Traceback" not in message
    assert snapshot(run) == before
    return message


LAYER = "layers/layer_001.safetensors"
TYPES = [linear.name for linear in FAMILIES[SHAPE.family].types]
TENSORS: dict[str, tuple[str, Read]] = {
    "statistics": (f"statistics/{LAYER}", lambda run: Statistics(run / "statistics/layers", SHAPE).of(1)),
    "gradients": (f"gradients/{LAYER}", lambda run: load_output_gradients(run / f"gradients/{LAYER}", TYPES)),
    "bases": (f"bases/{LAYER}", lambda run: Bases(run / "bases/layers", tiny.LAYERS).of(1, "q")),
    "dense weights": ("models/tiny/model.safetensors", lambda run: load_checkpoint(run / "models/tiny", torch.float32)),
    "compressed weights": (
        "compressed/checkpoint/model.safetensors",
        lambda run: load_checkpoint(run / "compressed/checkpoint", torch.float32),
    ),
}


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, replaced, removed, garbage], ids=lambda d: d.__name__)
@pytest.mark.parametrize("what", TENSORS)
def test_tensors_of_a_folder_with_a_manifest(what: str, damage: Damage, run: Path) -> None:
    name, read = TENSORS[what]
    read(run)
    damage(run / name)
    refused(run, run / name, read)


def test_any_bit_of_a_tensor_file(run: Path) -> None:
    """Two hundred bits, half of them in the header: each is noticed, or has changed nothing that is read."""
    file = run / "calibration/tiny/c.safetensors"
    whole, before = load_tensors(file), file.read_bytes()
    header = 8 * (8 + int.from_bytes(before[:8], "little"))
    draw = random.Random(0)
    noticed = 0
    for index in range(200):
        file.write_bytes(before)
        flip(file, draw.randrange(header) if index % 2 else draw.randrange(header, 8 * len(before)))
        try:
            found = load_tensors(file, ["tokens"])
        except RankwiseError:
            noticed += 1
        else:
            assert torch.equal(found["tokens"], whole["tokens"])
    assert noticed > 150


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, removed, garbage], ids=lambda d: d.__name__)
def test_calibration_windows(damage: Damage, run: Path) -> None:
    file = run / "calibration/tiny/c.safetensors"
    damage(file)
    refused(run, file, lambda run: load_tensors(file, ["tokens"]))


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, removed, garbage], ids=lambda d: d.__name__)
def test_hidden_states_of_unfinished_work(damage: Damage, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states on disk belong to a killed pass; without them the pass starts again, which loses no finished work."""
    monkeypatch.setattr(statistics, "TOKENS_PER_BATCH", 48)
    model, tokens = tiny.model(KIND), some_tokens(4, seed=0)
    state = run / ".state/collect_statistics-0"
    collect_statistics(model, tokens, 1, run / "whole", CPU)
    collect_statistics(model, tokens, 1, state, CPU)
    kept = state / "layer_000.safetensors"
    shutil.rmtree(state / "hidden_002")
    (state / "layer_001.safetensors").unlink()
    states = [load_tensors(kept)]  # as after a kill between the two blocks
    interrupted(model, tokens, state)
    file = sorted((state / "hidden_001").glob("*.safetensors"))[0]
    damage(file)
    message = refused(run, file, lambda run: collect_statistics(model, tokens, 1, state, CPU))
    assert f"Delete {state}" in message
    assert torch.equal(load_tensors(kept)["mlp.within"], states[0]["mlp.within"])
    shutil.rmtree(state)  # the cure
    again = collect_statistics(model, tokens, 1, state, CPU)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in sorted((run / "whole").glob("l*"))]


def interrupted(model: Any, tokens: torch.Tensor, state: Path) -> None:
    """Run the pass over the first block only, and leave its state as a kill would."""
    shutil.rmtree(state)
    store = statistics._store

    def stop(files: list[Path], accumulators: Any, layers: range) -> None:
        if layers.start:
            raise KeyboardInterrupt
        store(files, accumulators, layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_store", stop)
        with pytest.raises(KeyboardInterrupt):
            collect_statistics(model, tokens, 1, state, CPU)


EXAMPLES = Examples(torch.arange(12).reshape(3, 4).int(), torch.ones(3).long(), torch.full((3,), 4))


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, removed, garbage], ids=lambda d: d.__name__)
@pytest.mark.parametrize("what", ["rows", "engine"])
def test_state_of_post_training(what: str, damage: Damage, run: Path) -> None:
    file = run / ".state/post_train-0/x.safetensors"
    if what == "rows":
        EXAMPLES.save(file)
    else:
        SafeCheckpoints(file.parent).save({"step": 3, "moments": [torch.arange(3.0)], 0: (None, "a")}, str(file))
        found = SafeCheckpoints(file.parent).load(str(file))
        assert found.pop("moments")[0].tolist() == [0, 1, 2]
        assert found == {"step": 3, 0: (None, "a")}
    damage(file)
    refused(
        run, file, lambda run: Examples.load(file) if what == "rows" else SafeCheckpoints(file.parent).load(str(file))
    )


def write_evaluation(run: Path) -> None:
    write_json(run / "evaluation.json", {"kind": "perplexity", "subject": {"seed": 0}, "corpora": {}})


def write_progress(run: Path) -> None:
    (run / "post_train").mkdir()
    Progress(step=2, loss=[(1, 0.5)], validation=[(0, 1.0)]).save(run / "post_train")


def write_clock(run: Path) -> None:
    Clock(run / "seconds.json").save()


def write_allocation(run: Path) -> None:
    write_json(run / "allocation.json", {"ranks": {}})


def nothing(run: Path) -> None:
    """The file is one of the finished run."""


RECORDS: dict[str, tuple[str, Callable[[Path], None], Read]] = {
    "manifest of statistics": (
        "statistics/manifest.json",
        nothing,
        lambda run: Statistics(run / "statistics/layers", SHAPE).of(0),
    ),
    "manifest of a model": ("models/tiny.json", nothing, lambda run: load_tokenizer(run / "models/tiny")),
    "manifest of a checkpoint": (
        "compressed/manifest.json",
        nothing,
        lambda run: load_checkpoint(run / "compressed/checkpoint", torch.float32),
    ),
    "index of a corpus": ("corpora/text.json", nothing, lambda run: load_documents(run / "corpora/text.json")),
    "evaluation": (
        "evaluation.json",
        write_evaluation,
        lambda run: read_record(run / "evaluation.json")["subject"]["seed"],
    ),
    "allocation": ("allocation.json", write_allocation, lambda run: read_record(run / "allocation.json")["ranks"]),
    "progress of a training": (
        f"post_train/{PROGRESS_FILE}",
        write_progress,
        lambda run: Progress.load(run / "post_train"),
    ),
    "clock of a search": ("seconds.json", write_clock, lambda run: Clock(run / "seconds.json")),
}


@pytest.mark.parametrize("damage", [emptied, half_json, no_utf8, empty_object, a_list], ids=lambda d: d.__name__)
@pytest.mark.parametrize("what", RECORDS)
def test_records(what: str, damage: Damage, run: Path) -> None:
    name, write, read = RECORDS[what]
    write(run)
    read(run)
    damage(run / name)
    if what == "clock of a search" and damage is half_json:
        (run / name).write_text('"0.1')
    refused(run, run / name, read)


@pytest.mark.parametrize("what", ["manifest of statistics", "manifest of a model", "manifest of a checkpoint"])
def test_a_manifest_that_disagrees(what: str, run: Path) -> None:
    name, _, read = RECORDS[what]
    disagreeing(run / name)
    message = refused(run, run / name, read)
    assert f"not the file that {run / name} describes" in message


def test_a_layer_that_the_manifest_does_not_know(run: Path) -> None:
    write_json(run / "bases/manifest.json", {"layers": {}})
    refused(run, run / f"bases/{LAYER}", TENSORS["bases"][1])


def test_a_basis_of_a_type_that_is_not_there(run: Path) -> None:
    shutil.copy(run / f"statistics/{LAYER}", run / f"bases/{LAYER}")
    (run / "bases/manifest.json").unlink()
    assert "holds no basis of 'q'" in refused(run, run / f"bases/{LAYER}", TENSORS["bases"][1])


@pytest.mark.parametrize("damage", [emptied, truncated, flipped, removed], ids=lambda d: d.__name__)
def test_the_text_of_a_corpus(damage: Damage, run: Path) -> None:
    damage(run / "corpora/data/text.jsonl")
    refused(run, run / "corpora/data/text.jsonl", RECORDS["index of a corpus"][2])


@pytest.mark.parametrize(
    "line", [b"0,uniform,1.5\n", b"1,uniform,2.0,,3.0,0.8,0.5\n", b"0,x,abc,,1.0,0.8,0.5\n", b"\xff\n"]
)
def test_the_log_of_a_search(line: bytes, run: Path) -> None:
    trials = TrialLog(run / "trials.csv", ["q/0"])
    trials.append(0, Trial("uniform", np.array([0.5]), Score(2.0, None, 3.0), 0.8))
    head, *_ = trials.path.read_bytes().splitlines(keepends=True)
    trials.path.write_bytes(head + line)
    refused(run, trials.path, lambda run: trials.read())


def test_a_line_that_a_kill_cut_short_is_no_damage(run: Path) -> None:
    trials = TrialLog(run / "trials.csv", ["q/0"])
    trials.append(0, Trial("uniform", np.array([0.5]), Score(2.0, None, 3.0), 0.8))
    with trials.path.open("ab") as stream:
        stream.write(b"1,uniform,2.")
    assert [trial.origin for trial in trials.read()] == ["uniform"]


# --- sources: refused when they are fetched, and what was fetched before stays as it was ---


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
    tiny.write_lines(file, [{"instruction": "a", "input": "", "output": "b" * 50}])
    damage(file)
    refused(run, file, lambda run: read_rows(file))


@pytest.mark.parametrize("damage", [truncated, flipped, removed], ids=lambda d: d.__name__)
def test_rows_of_a_task(damage: Damage, run: Path) -> None:
    rows = run / "tasks/piqa/validation.jsonl"
    tiny.write_lines(rows, tiny.task_rows()["piqa"])
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

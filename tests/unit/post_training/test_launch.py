"""A worker process that fails, and the whole stage."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowrank.errors import RankwiseError
from lowrank.files import read_json, save_tensors, sha256_file
from lowrank.jobs import launcher, state
from lowrank.jobs.crew import Crew
from lowrank.model.checkpoint import load_checkpoint
from lowrank.post_training import tune
from lowrank.post_training.adapters import learnt_by, trained_numbers
from lowrank.post_training.job import Progress, TrainingJob, vectors_file
from lowrank.post_training.launch import launch
from lowrank.post_training.subspace import SubspaceVectors, attach_subspaces, pack_vectors
from lowrank.post_training.tune import describe_training, tune_checkpoint
from tests.marks import ON_CPU
from tests.unit.post_training.post_training_samples import (
    REPOSITORY,
    SUBJECT,
    a_job,
    save_tiny_model,
    train_by_few_tokens,
    write_manifest,
)


@ON_CPU
def test_a_failing_process_is_reported_with_its_message(tmp_path: Path) -> None:
    dense = save_tiny_model(tmp_path, compressed=False)
    with pytest.raises(RankwiseError, match=r"^this checkpoint has no low-rank layer"):
        launch(a_job(dense, tmp_path / "job"), Crew(), threads=1)


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
def test_processes_whose_rows_have_different_numbers_of_tokens_train_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ZeRO 3, and weights gathered each time, as larger ones are: of the head too, whenever it reads some tokens."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    checkpoint = save_tiny_model(tmp_path / "model")
    found = []
    for name, crew in (("one", Crew()), ("two", Crew(2))):
        job = a_job(checkpoint, tmp_path / name, "zero3", micro_batch_size=2, steps=4)
        job.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        work = f"{train_by_few_tokens.__module__}:{train_by_few_tokens.__name__}"
        launcher.launch(work, asdict(job), crew, 2, job.folder)
        found.append(Progress.load(Path(job.folder)))
    for curve in ("loss", "validation"):
        one, two = (dict(getattr(progress, curve)) for progress in found)
        assert len(one) >= 3
        assert two == pytest.approx(one, rel=1e-5)


def a_tokenizer(folder: Path) -> None:
    """One token per character, saved into a checkpoint folder."""
    vocabulary = {character: index for index, character in enumerate(["<eos>", "?", *map(chr, range(97, 123))])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)


def a_stage(folder: Path) -> dict[str, Any]:
    """What the whole stage is called with, but for its crew."""
    source = save_tiny_model(folder / "source")
    a_tokenizer(source)
    words = ["alpha", "beta", "gamma", "delta"]
    rows = [{"instruction": "say", "output": " ".join(words[i % 4 :])} for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_manifest(folder / "manifest.json")
    job = a_job(source, folder / "unused", max_length=300, learning_rate=0.05)
    settings = {
        "tuning": job.tuning, "deepspeed": job.deepspeed, "subject": SUBJECT, "dtype": "float32",
        "code": "abc", "state": str(folder / "state"),
    }  # fmt: skip
    files = {"manifest": folder / "manifest.json", "instructions": folder / "rows.jsonl"}
    targets = {"target": folder / "tuned", "target_manifest": folder / "tuned.json"}
    return {"checkpoint": source, **files, **targets, "settings": settings, "threads": 1}


@ON_CPU
def test_the_whole_stage_writes_a_merged_checkpoint_and_its_manifest(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    tune_checkpoint(**stage, crew=Crew())

    source, manifest = stage["checkpoint"], read_json(tmp_path / "tuned.json")
    assert manifest["ranks"] == {"x": 6}
    assert manifest["kept"] == {"total": 0.8, "linears": 0.75}
    assert manifest["tuning"] == stage["settings"]["tuning"]
    assert manifest["subject"] == SUBJECT
    card = (tmp_path / "tuned/README.md").read_text()
    assert "# tiny, svd, 20 % removed, post-trained (eq9)" in card
    assert "6 steps, of which step" in card
    assert manifest["files"]["model.safetensors"] == sha256_file(tmp_path / "tuned" / "model.safetensors")
    training = manifest["training"]
    assert training["steps"] == 6
    assert len(training["loss"]) == 6
    assert [step for step, _ in training["validation"]] == [0, 2, 4, 6]
    assert training["validation"][-1][1] < training["validation"][0][1]
    # 8 layers: 4 inner values each, outer ones of 32 outputs (q, o, down) and 48 (up), twice
    assert training["trainable"] == 8 * 4 + 2 * (32 + 32 + 48 + 32)
    before, after = (load_checkpoint(folder, torch.float32) for folder in (source, tmp_path / "tuned"))
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed
    assert all(name.endswith("up.weight") for name in changed)
    assert len(changed) == 8
    assert training["trainable_share"] == training["trainable"] / sum(p.numel() for p in after.parameters())
    assert not list((tmp_path / "state").iterdir())


def test_a_stopped_stage_goes_on_with_as_many_processes_and_begins_anew_with_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []

    def stopped(job: TrainingJob, crew: Crew, threads: int) -> None:
        folders.append(job.folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "launch", stopped)
    stage = a_stage(tmp_path)
    for processes in (1, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            tune_checkpoint(**stage, crew=Crew(processes))
    assert folders[0] == folders[1] != folders[2]


def test_the_seconds_of_a_stage_are_those_of_all_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and writing, as for compressions; and the loop of a try that was killed, as far as it was kept."""
    now, tokenise = [0.0], tune._tokenise
    monkeypatch.setattr(state, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def tokenised(*arguments: Any) -> None:
        now[0] += 5
        tokenise(*arguments)

    def trained(job: TrainingJob, crew: Crew, threads: int) -> None:
        folder = Path(job.folder)
        progress = Progress.load(folder)
        now[0] += 10 + 30  # to load, and in the loop
        step = progress.step + 3
        layers = attach_subspaces(load_checkpoint(job.checkpoint, torch.float32), 4, "top", job.seed)
        vectors = {name: learnt_by(layer) for name, layer in layers.items()}
        save_tensors(vectors_file(folder, step), pack_vectors(vectors))
        validation = [(0, 3.0), (step, 2.0)]
        Progress(step, validation=validation, best=step, seconds=progress.seconds + 30).save(folder)
        if step < 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune, "_tokenise", tokenised)
    monkeypatch.setattr(tune, "launch", trained)
    stage = a_stage(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tune_checkpoint(**stage, crew=Crew())
    tune_checkpoint(**stage, crew=Crew())
    manifest = read_json(tmp_path / "tuned.json")
    assert manifest["training"]["seconds"] == 30 + 30
    assert manifest["seconds"] == 5 + 30 + 5 + 10 + 30


@pytest.mark.parametrize(("after", "warns"), [(2.9, False), (3.0, True), (3.1, True)])
def test_a_training_that_did_not_help_says_so(after: float, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    tune._warn_if_worse(Progress(step=2, validation=[(0, 3.0), (2, after)], best=2))
    said = f"did not lower the validation loss (3.0000 before, {after:.4f} at best after it)"
    assert (said in caplog.text) == warns


def test_the_description_counts_both_vectors() -> None:
    vectors = pack_vectors({"a": SubspaceVectors(torch.arange(2), torch.ones(2), torch.ones(8))})
    progress = Progress(step=3, loss=[(1, 2.0)], validation=[(0, 3.0), (3, 2.5)], best=3, seconds=1.5)
    described = describe_training(progress, trained_numbers(vectors), parameters=1000, processes=2)
    assert described["trainable"] == 10
    assert described["trainable_share"] == 0.01
    assert described["best_step"] == 3

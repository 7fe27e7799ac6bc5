"""Every kind of damage is met where a file is first read: with the file, the reason and the cure, and nothing lost."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.bases.principal import Bases
from lowrank.calibration import statistics
from lowrank.calibration.corpora import load_documents
from lowrank.calibration.output_gradients import load_output_gradients
from lowrank.calibration.statistics import Statistics, collect_statistics
from lowrank.compression.eliminate_neurons import Eliminations
from lowrank.errors import RankwiseError
from lowrank.files import layer_name, load_tensors, read_record, write_json
from lowrank.jobs.state import Clock
from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.families import FAMILIES
from lowrank.model.tokenizer import load_tokenizer
from lowrank.post_training.engine_state import SafeCheckpoints
from lowrank.post_training.instructions import Examples
from lowrank.post_training.job import PROGRESS_FILE, Progress
from lowrank.search.objective import Score
from lowrank.search.search import Trial, TrialLog
from tests import tiny
from tests.survival.workshop import (
    CPU,
    KIND,
    SHAPE,
    Damage,
    a_list,
    disagreeing,
    emptied,
    empty_object,
    flip,
    flipped,
    garbage,
    half_json,
    no_utf8,
    refused,
    removed,
    replaced,
    truncated,
)
from tests.unit.model.test_families import some_tokens

Read = Callable[[Path], Any]


LAYER = "layers/layer_001.safetensors"
TYPES = [linear.name for linear in FAMILIES[SHAPE.family].types]
TENSORS: dict[str, tuple[str, Read]] = {
    "statistics": (f"statistics/{LAYER}", lambda run: Statistics(run / "statistics/layers", SHAPE).of(1)),
    "gradients": (f"gradients/{LAYER}", lambda run: load_output_gradients(run / f"gradients/{LAYER}", TYPES)),
    "bases": (f"bases/{LAYER}", lambda run: Bases(run / "bases/layers", tiny.LAYERS).losses(1, "q")),
    "neurons": (f"neurons/{LAYER}", lambda run: Eliminations(run / "neurons/layers", tiny.LAYERS).of(1)),
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
    save = statistics.save_tensors

    def stop(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if path.name == layer_name(1):
            raise KeyboardInterrupt
        save(path, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "save_tensors", stop)
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

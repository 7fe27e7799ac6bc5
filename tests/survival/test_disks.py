"""Disks that are full or may not be written, links, and odd names: one clear message, and nothing finished is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowrank.bases.principal import Bases
from lowrank.calibration.statistics import Statistics, collect_statistics
from lowrank.config.sources import Corpus
from lowrank.errors import RankwiseError
from lowrank.files import load_tensors, save_tensors, write_json, write_text
from lowrank.jobs.stage import disk_problem
from lowrank.jobs.state import Clock, resumable_state
from lowrank.model.checkpoint import load_checkpoint, save_checkpoint
from lowrank.search.objective import Score
from lowrank.search.search import Trial, TrialLog
from lowrank.sources.models import fetch_model
from lowrank.sources.texts import fetch_corpus
from tests import tiny
from tests.survival.workshop import CPU, KIND, SHAPE, build, model_section, snapshot
from tests.unit.model.test_families import some_tokens

KIB = 1024


@contextmanager
def mounted(folder: Path, kib: int) -> Iterator[Path]:
    """A small disk of its own; it needs the right to mount, which CI's containers may not have."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that takes all room but `leave` bytes."""
    ballast = folder / "ballast"
    ballast.write_bytes(b"x" * (shutil.disk_usage(folder).free - leave))
    return ballast


BIG = torch.arange(100_000.0)


def tensors(disk: Path, finished: Path) -> None:
    save_tensors(disk / "run/new.safetensors", {"x": BIG})


def record(disk: Path, finished: Path) -> None:
    write_json(disk / "run/record.json", {"x": list(range(100_000))})


def table(disk: Path, finished: Path) -> None:
    write_text(disk / "run/table.csv", "x" * 400_000)


def checkpoint(disk: Path, finished: Path) -> None:
    save_checkpoint(tiny.model(KIND), finished / "run/models/tiny", disk / "run/checkpoint")


def model(disk: Path, finished: Path) -> None:
    fetch_model("tiny", model_section(finished / "sources/model"), disk / "cache", disk / "run/models/tiny")


def corpus(disk: Path, finished: Path) -> None:
    source = finished / "sources/many.txt"
    source.write_text("word\n" * 40_000)
    section = Corpus.model_validate({"source": {"path": str(source)}, "format": "lines"})
    fetch_corpus("c", section, disk / "cache", disk / "run/c.json", disk / "run/data/c.jsonl")


def hidden_states(disk: Path, finished: Path) -> None:
    loaded = load_checkpoint(finished / "run/models/tiny", torch.float32)
    collect_statistics(loaded, some_tokens(40, seed=0), 1, disk / "run/.state/statistics", CPU)


WRITERS = [tensors, record, table, checkpoint, model, corpus, hidden_states]
Write = Callable[[Path, Path], None]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_full_disk(write: Write, finished: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 256) as disk:
        (disk / "run").mkdir()
        write_json(disk / "run/old.json", {"finished": True})
        before = snapshot(disk)
        with pytest.raises(RankwiseError, match=r"(no space left on|only \d+ MiB are free)") as caught:
            write(disk, finished)
        assert str(disk) in str(caught.value)
        assert "finished results are intact" in str(caught.value)
        after = {name: content for name, content in snapshot(disk).items() if ".state" not in name}
        assert after == before


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_disk_that_may_not_be_written(write: Write, finished: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 4096) as disk:
        (disk / "run").mkdir()
        write_json(disk / "run/old.json", {"finished": True})
        read_only(disk)
        before = snapshot(disk)
        with pytest.raises(RankwiseError, match=r"Read-only file system.*finished results are intact") as caught:
            write(disk, finished)
        assert str(disk) in str(caught.value)
        assert snapshot(disk) == before


@pytest.mark.parametrize("write", [tensors, record, checkpoint], ids=lambda write: write.__name__)
def test_a_result_is_replaced_or_stays(write: Write, finished: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 4096) as disk:
        write(disk, finished)
        before = snapshot(disk / "run")
        fill(disk, leave=64 * KIB)
        with pytest.raises(RankwiseError, match="no space left"):
            write(disk, finished)
        assert snapshot(disk / "run") == before


def test_unfinished_work_goes_on_when_there_is_room_again(finished: Path, tmp_path: Path) -> None:
    loaded, tokens = load_checkpoint(finished / "run/models/tiny", torch.float32), some_tokens(12, seed=0)
    whole = collect_statistics(loaded, tokens, 1, tmp_path / "whole", CPU)
    used = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    with mounted(tmp_path / "disk", 4 * used // KIB) as disk:
        state = disk / "state"
        state.mkdir()
        ballast = fill(disk, leave=whole[0].stat().st_size * 3 // 2)
        with pytest.raises(RankwiseError, match="no space left"):
            collect_statistics(loaded, tokens, 1, state, CPU)
        ballast.unlink()
        again = collect_statistics(loaded, tokens, 1, state, CPU)
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in whole]


def test_the_log_of_a_search_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    trial = Trial("uniform", np.array([0.5] * 20), Score(2.0, None, 3.0), 0.8)
    with mounted(tmp_path / "disk", 64) as disk:
        trials = TrialLog(disk / "trials.csv", [f"q/{index}" for index in range(20)])
        trials.append(0, trial)
        ballast = fill(disk)
        written = 1
        while trials.path.stat().st_size < 4096 - 300:  # the rest of its block is still free
            trials.append(written, trial)
            written += 1
        with pytest.raises(OSError, match="No space left") as caught:
            append_many(trials, trial)
        job = SimpleNamespace(output=[str(disk / "allocation.json")])
        assert "allocation.json: no space left on the disk" in disk_problem(job, caught.value)  # type: ignore[arg-type]
        ballast.unlink()
        found = len(trials.read())
        assert found >= written
        trials.append(found, trial)
        assert len(trials.read()) == found + 1


def append_many(trials: TrialLog, trial: Trial) -> None:
    for index in range(len(trials.read()), 1000):
        trials.append(index, trial)


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_state_that_cannot_be_made(kind: str, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 64) as disk:
        fill(disk) if kind == "full" else read_only(disk)
        with (
            pytest.raises(RankwiseError, match=r"disk/\.state/search-.*(no space left|Read-only file system)"),
            resumable_state(disk / ".state", "search", {"x": "y" * 8000}, {}) as folder,
        ):
            Clock(folder / "seconds.json").save()


ODD = [
    "with a space",
    "größe-ünïcode-名前",
    "quote'and\"quote",
    "; touch x",
    "$(touch x) `touch y`",
    "percent%20#[a]*?{b}",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_of_folders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / name
    build(root)
    plain = tmp_path / "plain"
    build(plain)
    model = load_checkpoint(root / "run/compressed/checkpoint", torch.float32)
    expected = load_checkpoint(plain / "run/compressed/checkpoint", torch.float32)
    assert torch.equal(model(some_tokens(1, seed=0)).logits, expected(some_tokens(1, seed=0)).logits)
    assert Statistics(root / "run/statistics/layers", SHAPE).of(1)["mlp"].tokens == 6 * 32
    assert Bases(root / "run/bases/layers", tiny.LAYERS).losses(1, "q") is None
    assert sorted(os.listdir(tmp_path)) == sorted([name, "plain"])  # no file `x`: nothing went through a shell


def test_results_behind_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk/results").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/run").symlink_to(tmp_path / "disk/results", target_is_directory=True)
    build(tmp_path / "root")
    build(tmp_path / "plain")
    assert (tmp_path / "root/run").is_symlink()
    ours, plain = snapshot(tmp_path / "disk/results"), snapshot(tmp_path / "plain/run")
    assert ours.keys() == plain.keys()
    same = [name for name in ours if name.endswith((".safetensors", "manifest.json", ".jsonl"))]
    assert len(same) >= 10
    assert all(ours[name] == plain[name] for name in same)


def test_an_output_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.safetensors").write_bytes(b"not ours")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    save_tensors(tmp_path / "x.safetensors", {"x": BIG})
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["x"], BIG)
    assert (tmp_path / "elsewhere.safetensors").read_bytes() == b"not ours"

"""The DeepSpeed loop: in this process, against a plain PyTorch loop with full logits, and in real workers.

All in one module, since DeepSpeed cannot be given a second process group after the first is gone.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowrank.config.tuning import LoraTuning, ScaledSubspaceTuning, Tuning
from lowrank.errors import RankwiseError
from lowrank.files import load_tensors
from lowrank.jobs.crew import Crew
from lowrank.jobs.forkserver import SERVER
from lowrank.post_training.instructions import IGNORED
from lowrank.post_training.job import PROGRESS_FILE, Progress, TrainingJob, vectors_file
from lowrank.post_training.launch import launch
from lowrank.post_training.schedule import learning_rate, rows_of_step
from lowrank.post_training.subspace import attach_subspaces
from lowrank.post_training.train import Trainer, train
from tests.marks import ON_CPU
from tests.unit.jobs import fake_slurm
from tests.unit.post_training.post_training_samples import (
    REPOSITORY,
    a_job,
    save_model,
    save_tiny_model,
    some_rows,
    tiny_mixture,
    tiny_model,
)

ENGINES = sorted(path.stem for path in (REPOSITORY / "config" / "deepspeed").glob("*.json"))


@pytest.fixture(autouse=True)
def linear_of_torch() -> Iterator[None]:
    """ZeRO 3 puts a function of its own in its place, for good; other tests look at what a linear layer does."""
    own = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = own


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A process group of this process alone, without a port."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    monkeypatch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def plain_training(model: nn.Module, tuning: Tuning, seed: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What the paper's training is, with none of our loop: full batches, full logits, torch's AdamW."""
    rows = some_rows(20, seed=1)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1.0, weight_decay=tuning.weight_decay)
    losses = []
    for step in range(tuning.steps or 0):
        tokens, labels = rows.rows(rows_of_step(step, tuning.batch_size, 20, seed)).batch()
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)  # `gradient_clipping` of config/deepspeed
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, tuning.steps or 0, tuning.warmup_steps, tuning.learning_rate)
        optimizer.step()
        losses.append(loss.item())
    return {name: parameter.detach() for name, parameter in trained.items()}, losses


@pytest.mark.parametrize("engine", ENGINES)
def test_every_shipped_engine_trains_as_plain_torch_does(engine: str, checkpoint: Path, tmp_path: Path) -> None:
    job = a_job(checkpoint, tmp_path, deepspeed=engine, weight_decay=0.01)
    trainer = Trainer(job)
    trainer.validate()
    trainer.run()
    tuning, model = ScaledSubspaceTuning(**job.tuning), tiny_model()
    attach_subspaces(model, tuning.rank, tuning.subspace, job.seed)
    expected, losses = plain_training(model, tuning, job.seed)
    assert [loss for _, loss in trainer.progress.loss] == pytest.approx(losses, rel=1e-5)
    for name, learnt in trainer.vectors().items():
        for field in ("inner", "outer"):
            torch.testing.assert_close(vars(learnt)[field], expected[f"{name}.{field}"], rtol=1e-3, atol=2e-6)


class PlainLora(nn.Module):
    """LoRA as its paper writes it, without dropout."""

    def __init__(self, weight: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.scale = weight, scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight(x) + self.scale * (x @ self.a.T) @ self.b.T


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_trains_in_the_same_loop_as_plain_torch_does(engine: str, checkpoint: Path, tmp_path: Path) -> None:
    job = a_job(checkpoint, tmp_path, deepspeed=engine, kind="lora", dropout=0.0, alpha=12.0)
    trainer = Trainer(job)
    model = tiny_model().requires_grad_(False)
    for name, learnt in trainer.vectors().items():
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, child, PlainLora(getattr(module, child), learnt.a.clone(), learnt.b.clone(), scale=12 / 4))
    trainer.validate()
    trainer.run()
    expected, losses = plain_training(model, LoraTuning(**job.tuning), job.seed)
    assert len(expected) == 2 * 2 * (3 + 2 * 4)  # two matrices, two blocks of three dense layers and four pairs
    assert [loss for _, loss in trainer.progress.loss] == pytest.approx(losses, rel=1e-5)
    for name, learnt in trainer.vectors().items():
        for field in ("a", "b"):
            torch.testing.assert_close(vars(learnt)[field], expected[f"{name}.{field}"], rtol=1e-3, atol=1e-5)


def test_dropout_is_drawn_in_steps_and_not_in_validation(checkpoint: Path, tmp_path: Path) -> None:
    without, first, again, other = (
        train(a_job(checkpoint, tmp_path / str(n), kind="lora", dropout=dropout, steps=2, seed=seed))
        for n, (dropout, seed) in enumerate([(0.0, 0), (0.5, 0), (0.5, 0), (0.5, 1)])
    )
    assert first.validation[0] == pytest.approx(without.validation[0], rel=1e-6)
    assert first.loss[0] == pytest.approx(without.loss[0], rel=1e-6)  # updates are zero before the first step
    assert first.loss[1] != pytest.approx(without.loss[1], rel=1e-6)
    assert first == replace(again, seconds=first.seconds)
    assert first.loss != other.loss


def test_vectors_move_the_loss_falls_and_the_rest_stays(checkpoint: Path, tmp_path: Path) -> None:
    job = a_job(checkpoint, tmp_path, steps=20, evaluate_every=5)
    trainer = Trainer(job)
    frozen = {n: p.clone() for n, p in trainer.engine.module.named_parameters() if not p.requires_grad}
    trainer.validate()
    trainer.run()
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.engine.module.named_parameters() if n in frozen)
    losses = dict(trainer.progress.validation)
    assert list(losses) == [0, 5, 10, 15, 20]
    assert losses[20] < losses[0] - 0.1
    for learnt in trainer.vectors().values():
        assert (learnt.inner - 0.1).abs().max() > 1e-3
        assert learnt.outer.abs().max() > 1e-3


def test_vectors_are_not_rounded_when_the_model_is_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    trainer = Trainer(a_job(checkpoint, tmp_path, dtype="bfloat16", learning_rate=1e-5, steps=2, warmup_steps=0))
    assert trainer.engine.module.model.model.norm.weight.dtype == torch.bfloat16
    trainer.train_step(0)
    moved = torch.cat([learnt.outer for learnt in trainer.vectors().values()])
    inner = torch.cat([learnt.inner for learnt in trainer.vectors().values()])
    assert moved.dtype == inner.dtype == torch.float32
    # Adam's first step is the learning rate in size; the spacing of bfloat16 near 0.1 is 5e-4.
    assert moved.abs().max().item() == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize("micro", [1, 8])
def test_the_size_of_micro_batches_does_not_matter(micro: int, checkpoint: Path, tmp_path: Path) -> None:
    one, other = (train(a_job(checkpoint, tmp_path / str(size), micro_batch_size=size, steps=3)) for size in (micro, 4))
    assert [loss for _, loss in one.loss] == pytest.approx([loss for _, loss in other.loss], rel=1e-5)
    assert [loss for _, loss in one.validation] == pytest.approx([loss for _, loss in other.validation], rel=1e-5)


def test_the_best_vectors_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    """With a learning rate that overshoots, the last vectors are not the best ones."""
    progress = train(a_job(checkpoint, tmp_path, steps=12, evaluate_every=2, learning_rate=3.0, warmup_steps=0))
    after = dict(progress.validation[1:])
    assert progress.best == min(after, key=after.__getitem__)
    assert progress.best_loss == min(after.values())
    assert [path.name for path in tmp_path.glob("vectors*")] == [vectors_file(tmp_path, progress.best).name]
    assert progress.best != 12
    assert [path.name for path in (tmp_path / "deepspeed").glob("step*")] == ["step12"]


@pytest.mark.parametrize("kind", ["scaled-subspace", "lora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_job_gives_the_same_bits(engine: str, kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """LoRA has dropout here, which is drawn anew."""
    whole = train(a_job(checkpoint, tmp_path / "whole", deepspeed=engine, kind=kind))
    job = a_job(checkpoint, tmp_path / "cut", deepspeed=engine, kind=kind)
    first = Trainer(job)
    first.validate()
    done = [first.train_step(step) for step in range(2)]
    first.progress.step, first.progress.loss = 2, [(i + 1, loss) for i, (loss, _) in enumerate(done)]
    first.validate()
    first.save()
    first.train_step(2)  # lost work, as after a kill
    resumed = train(job)
    assert resumed.loss == Progress.load(tmp_path / "whole").loss == whole.loss
    assert resumed.validation == whole.validation
    assert resumed.best == whole.best is not None
    ours, theirs = (load_tensors(vectors_file(tmp_path / name, whole.best)) for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_job_has_nothing_left_to_do(checkpoint: Path, tmp_path: Path) -> None:
    """A job of several stages meets its finished ones again when it goes on."""
    job = a_job(checkpoint, tmp_path, kind="lora", stages=["up"], steps=2)
    done = train(job)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(job) == done
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(("layer", "what"), [("mlp.down_proj", "loss"), ("self_attn.q_proj", "(loss|gradient)")])
def test_numbers_that_are_not_finite_stop_the_job(layer: str, what: str, checkpoint: Path, tmp_path: Path) -> None:
    trainer = Trainer(a_job(checkpoint, tmp_path))
    with torch.no_grad():
        trainer.wrapped[f"model.layers.1.{layer}"].outer.fill_(math.nan)
    with pytest.raises(RankwiseError, match=f"the {what} of step 1 is not finite. Lower `learning_rate`"):
        trainer.train_step(0)


def best_vectors(job: TrainingJob) -> dict[str, torch.Tensor]:
    folder = Path(job.folder)
    best = Progress.load(folder).best
    assert best is not None
    return load_tensors(vectors_file(folder, best))


def stage_process(job: TrainingJob, processes: int = 1) -> subprocess.Popen[bytes]:
    """A process that does what the stage does: launch the job and wait."""
    arguments = [job.checkpoint, job.folder, job.tuning, job.deepspeed, job.seed]
    code = (
        "import json, sys; from lowrank.post_training.launch import launch; "
        "from lowrank.post_training.job import TrainingJob; from lowrank.jobs.crew import Crew; "
        f"launch(TrainingJob(*json.loads(sys.argv[1])), Crew({processes}), 1)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "workflow_scripts")}
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(arguments)], env=environment)


def processes_of(folder: str) -> list[int]:
    """Ids of the processes that have this folder's job on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"{folder}/job.json" in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: object, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@ON_CPU
def test_a_killed_job_leaves_no_process_and_goes_on_to_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    whole, cut = (a_job(checkpoint, tmp_path / name, steps=200, evaluate_every=4) for name in ("whole", "cut"))
    train(whole)
    stage = stage_process(cut)
    wait_for((Path(cut.folder) / PROGRESS_FILE).exists)
    assert processes_of(cut.folder)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    wait_for(lambda: not processes_of(cut.folder), seconds=60)
    assert 0 < Progress.load(Path(cut.folder)).step < 200  # stopped on its way
    train(cut)
    ours, theirs = best_vectors(cut), best_vectors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Progress.load(Path(cut.folder)).loss == Progress.load(Path(whole.folder)).loss


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    "crew", [Crew(2, 1, "deepspeed"), Crew(1, 2)], ids=["one machine, DeepSpeed's launcher", "two machines"]
)
def test_two_processes_train_as_one_and_nothing_is_compiled(
    crew: Crew, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler or ninja within reach (and 6 validation rows, which two processes share unevenly)."""
    fake_slurm.install(tmp_path / "programs", monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    jobs = [a_job(checkpoint, tmp_path / f"of{count}", micro_batch_size=2) for count in (1, 2)]
    train(jobs[0])
    launch(jobs[1], crew, threads=2)
    one, two = (Progress.load(Path(job.folder)) for job in jobs)
    for curve in ("loss", "validation"):
        first, second = (dict(getattr(progress, curve)) for progress in (one, two))
        assert second == pytest.approx(first, rel=1e-5)
    first, second = map(best_vectors, jobs)
    assert all(torch.allclose(first[name].double(), second[name].double(), atol=1e-5) for name in first)
    assert not list((tmp_path / "extensions").rglob("*.so"))


DIVIDED: dict[str, Any] = {"micro_batch_size": 2, "steps": 16, "evaluate_every": 4}


class Divided(NamedTuple):
    """A job of two processes of one machine, done without a fault, and what its processes said."""

    job: TrainingJob
    said: str


@pytest.fixture(scope="module")
def divided(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, fork_server: str) -> Divided:
    """By ZeRO's third stage: neither process has the model."""
    job = a_job(checkpoint, tmp_path_factory.mktemp("divided"), "zero3", **DIVIDED)
    said = io.StringIO()
    handler, logger = logging.StreamHandler(said), logging.getLogger("lowrank")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SERVER, fork_server)
            launch(job, Crew(2), threads=2)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return Divided(job, said.getvalue())


@ON_CPU
def test_weights_divided_between_two_processes_train_as_in_one(
    divided: Divided, checkpoint: Path, tmp_path: Path
) -> None:
    whole = a_job(checkpoint, tmp_path, **DIVIDED)
    train(whole)
    held, of = re.findall(r"each process holds (\d+) of (\d+) weights", divided.said)[-1]
    assert int(of) / 2 <= int(held) < 0.6 * int(of)
    one, two = (Progress.load(Path(job.folder)) for job in (whole, divided.job))
    for curve in ("loss", "validation"):
        assert dict(getattr(two, curve)) == pytest.approx(dict(getattr(one, curve)), rel=1e-5)
    first, second = map(best_vectors, (whole, divided.job))
    assert all(torch.allclose(first[name].double(), second[name].double(), atol=1e-5) for name in first)


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
def test_divided_weights_go_on_after_a_kill(divided: Divided, checkpoint: Path, tmp_path: Path) -> None:
    cut = a_job(checkpoint, tmp_path, "zero3", **DIVIDED)
    stage = stage_process(cut, 2)
    wait_for((Path(cut.folder) / PROGRESS_FILE).exists)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    wait_for(lambda: not processes_of(cut.folder), seconds=60)
    assert 0 < Progress.load(Path(cut.folder)).step < 16  # stopped on its way
    launch(cut, Crew(2), threads=2)
    assert Progress.load(Path(cut.folder)).loss == Progress.load(Path(divided.job.folder)).loss
    ours, theirs = best_vectors(cut), best_vectors(divided.job)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_mixture(), tmp_path_factory.mktemp("mixture"))


FEW: dict[str, Any] = {"micro_batch_size": 1, "batch_size": 4, "steps": 2, "evaluate_every": 1, "warmup_steps": 0}


def test_divided_experts_train_where_nothing_before_them_does(mixture: Path, tmp_path: Path) -> None:
    """DeepSpeed gathers a block's experts as one, and must not take their gradients before they are there."""
    whole, divided = (train(a_job(mixture, tmp_path / name, name, **FEW)) for name in ("zero2", "zero3"))
    assert [loss for _, loss in divided.loss] == pytest.approx([loss for _, loss in whole.loss], rel=1e-5)
    assert dict(divided.validation) == pytest.approx(dict(whole.validation), rel=1e-5)


@ON_CPU
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("changes", [{}, {"leaf_module": {"classes": []}}], ids=["as one", "singly"])
def test_experts_gathered_in_two_processes_train_as_in_one(
    changes: dict[str, Any], mixture: Path, tmp_path: Path
) -> None:
    """Gathered each time, as larger weights are; experts without a token are not the same in both processes."""
    whole, job = (a_job(mixture, tmp_path / name, name, **FEW) for name in ("zero2", "zero3"))
    train(whole)
    job.deepspeed["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} | changes
    stage = stage_process(job, 2)
    try:
        assert stage.wait(timeout=240) == 0  # processes that gather different weights may wait for each other
    finally:
        stage.kill()
        stage.wait()
    one, two = (Progress.load(Path(each.folder)) for each in (whole, job))
    for curve in ("loss", "validation"):
        assert dict(getattr(two, curve)) == pytest.approx(dict(getattr(one, curve)), rel=1e-5)

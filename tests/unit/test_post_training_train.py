"""The DeepSpeed loop, in one process of gloo, against a plain PyTorch loop with full logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from post_training_samples import REPOSITORY, a_job, save_tiny_model, some_rows, tiny_model
from torch import nn

from lowrank.config.sections import Tuning
from lowrank.errors import RankwiseError
from lowrank.files import load_tensors
from lowrank.post_training.instructions import IGNORED
from lowrank.post_training.job import Progress, vectors_file
from lowrank.post_training.schedule import learning_rate, rows_of_step
from lowrank.post_training.subspace import attach_subspaces
from lowrank.post_training.train import Trainer, train

ENGINES = sorted(path.stem for path in (REPOSITORY / "config" / "deepspeed").glob("*.json"))


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A process group of this process alone, without a port."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def plain_training(tuning: Tuning, seed: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What the paper's training is, with none of our loop: full batches, full logits, torch's AdamW."""
    model = tiny_model()
    attach_subspaces(model, tuning.rank, tuning.subspace, seed)
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
    expected, losses = plain_training(Tuning(**job.tuning), job.seed)
    assert [loss for _, loss in trainer.progress.loss] == pytest.approx(losses, rel=1e-5)
    for name, learnt in trainer.vectors().items():
        for field in ("inner", "outer"):
            torch.testing.assert_close(vars(learnt)[field], expected[f"{name}.{field}"], rtol=1e-3, atol=2e-6)


def test_vectors_move_the_loss_falls_and_the_rest_stays(checkpoint: Path, tmp_path: Path) -> None:
    job = a_job(checkpoint, tmp_path, steps=20, evaluate_every=5)
    trainer = Trainer(job)
    frozen = {n: p.clone() for n, p in trainer.engine.module.named_parameters() if not p.requires_grad}
    trainer.validate()
    trainer.run()
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.engine.module.named_parameters() if n in frozen)
    losses = dict(trainer.progress.validation)
    assert list(losses) == [0, 5, 10, 15, 20] and losses[20] < losses[0] - 0.1
    for learnt in trainer.vectors().values():
        assert (learnt.inner - 0.1).abs().max() > 1e-3 and learnt.outer.abs().max() > 1e-3


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
    one, other = (
        train(a_job(checkpoint, tmp_path / str(size), micro_batch_size=size, steps=3)) for size in (micro, 4)
    )
    assert [loss for _, loss in one.loss] == pytest.approx([loss for _, loss in other.loss], rel=1e-5)
    assert [loss for _, loss in one.validation] == pytest.approx([loss for _, loss in other.validation], rel=1e-5)


def test_the_best_vectors_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    """With a learning rate that overshoots, the last vectors are not the best ones."""
    progress = train(a_job(checkpoint, tmp_path, steps=12, evaluate_every=2, learning_rate=3.0, warmup_steps=0))
    after = dict(progress.validation[1:])
    assert progress.best == min(after, key=after.__getitem__) and progress.best_loss == min(after.values())
    assert [path.name for path in tmp_path.glob("vectors*")] == [vectors_file(tmp_path, progress.best).name]
    assert [path.name for path in (tmp_path / "deepspeed").iterdir()] == ["step12"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_job_gives_the_same_bits(engine: str, checkpoint: Path, tmp_path: Path) -> None:
    whole = train(a_job(checkpoint, tmp_path / "whole", deepspeed=engine))
    job = a_job(checkpoint, tmp_path / "cut", deepspeed=engine)
    first = Trainer(job)
    first.validate()
    done = [first.train_step(step) for step in range(2)]
    first.progress.step, first.progress.loss = 2, [(i + 1, loss) for i, (loss, _) in enumerate(done)]
    first.validate()
    first.save()
    first.train_step(2)  # lost work, as after a kill
    resumed = train(job)
    assert resumed.loss == Progress.load(tmp_path / "whole").loss == whole.loss
    assert resumed.validation == whole.validation and resumed.best == whole.best is not None
    ours, theirs = (load_tensors(vectors_file(tmp_path / name, whole.best)) for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("layer", "what"), [("mlp.down_proj", "loss"), ("self_attn.q_proj", "(loss|gradient)")])
def test_numbers_that_are_not_finite_stop_the_job(layer: str, what: str, checkpoint: Path, tmp_path: Path) -> None:
    trainer = Trainer(a_job(checkpoint, tmp_path))
    with torch.no_grad():
        trainer.wrapped[f"model.layers.1.{layer}"].outer.fill_(math.nan)
    with pytest.raises(RankwiseError, match=f"the {what} of step 1 is not finite. Lower `learning_rate`"):
        trainer.train_step(0)

"""The training loop: DeepSpeed with torch's AdamW on what `adapters.py` attaches, everything else frozen.

The engine runs in float32 mode although the frozen model may be bfloat16: the trained numbers, their gradients
and the moments of Adam are float32, and nothing is rounded on the way out. ZeRO shares them between processes.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import get_z3_leaf_modules

from lowrank.config.tuning import parse_tuning
from lowrank.config.zero import DIVIDED_STAGE
from lowrank.errors import RankwiseError
from lowrank.files import load_tensors, save_tensors
from lowrank.model.checkpoint import family_of, load_checkpoint
from lowrank.model.runtime import parse_dtype, peak_memory_mib, pick_device
from lowrank.post_training.adapters import Learnt, attach, learnt_by, merge, trained_numbers
from lowrank.post_training.engine_state import SafeCheckpoints
from lowrank.post_training.instructions import Examples
from lowrank.post_training.job import TRAIN_FILE, VALIDATION_FILE, Progress, TrainingJob, vectors_file
from lowrank.post_training.loss import InstructionLoss
from lowrank.post_training.schedule import engine_config, learning_rate, rows_of_step, total_steps
from lowrank.post_training.subspace import pack_vectors

log = logging.getLogger(__name__)


def train(job: TrainingJob) -> Progress:
    """Train to the end, from the last checkpoint in the job's folder if there is one.

    `torch.distributed` must be initialised, also for one process, and LOCAL_RANK set, which DeepSpeed reads.
    With one process a resumed job gives the same bits as an uninterrupted one.

    Raises:
        RankwiseError: nothing to train, a batch that cannot be shared, a warm-up that is too long, or a loss
            that is not finite.
    """
    trainer = Trainer(job)
    trainer.resume()
    if not trainer.progress.validation:
        trainer.validate()
    trainer.run()
    return trainer.progress


class Trainer:
    """A DeepSpeed engine around one compressed model, its data and its progress."""

    def __init__(self, job: TrainingJob) -> None:
        self.tuning = parse_tuning(job.tuning)
        self.seed = job.seed
        self.stage = len(job.earlier)
        self.folder = Path(job.folder)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.training = Examples.load(self.folder / TRAIN_FILE)
        self.validation = Examples.load(self.folder / VALIDATION_FILE)
        self.steps = total_steps(self.tuning, len(self.training))
        self.progress = Progress()
        self.device = pick_device()
        config = engine_config(job.deepspeed, self.tuning, self.world)
        self.divided = config.get("zero_optimization", {}).get("stage") == DIVIDED_STAGE
        # Weights that are divided never lie on one device as a whole.
        place = torch.device("cpu") if self.divided else self.device
        model = load_checkpoint(job.checkpoint, parse_dtype(self.tuning.dtype), place)
        for learnt in job.earlier:
            merge(model, self.tuning, load_tensors(Path(learnt)))
        self.wrapped = attach(model, self.tuning, self.stage, self.seed)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.tuning.learning_rate, weight_decay=self.tuning.weight_decay)
        loss = InstructionLoss(model, family_of(model).decoder)
        if self.device.type == "cpu":
            # DeepSpeed would compile its shared-memory collectives on first use; gloo does the same without a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.divided:
            _divide(loss, config, self.device)
        self.engine = _initialize(loss, optimizer, config, self.device, self.folder)
        if get_z3_leaf_modules(loss):
            # DeepSpeed gathers a block's experts as one, and reduces their gradients when that of their input is known:
            # too early in the first block, if nothing before its experts is trained.
            model.enable_input_require_grads()
        # Neither in steps has the frozen model dropout, as in its own statistics; what is trained may have.
        self.engine.eval()
        vectors = self.vectors()  # on all processes: they gather divided ones together
        if self.rank == 0:
            count = trained_numbers(pack_vectors(vectors))
            log.info("training %d numbers in %d layers, %d process(es)", count, len(self.wrapped), self.world)

    def resume(self) -> None:
        """Go on from the last checkpoint of this folder, if there is one."""
        progress = Progress.load(self.folder)
        if not progress.step:
            return
        path, _ = self.engine.load_checkpoint(str(self.checkpoints), progress.checkpoint, load_module_strict=False)
        if path is None:
            raise RankwiseError(
                f"{self.checkpoints}: the checkpoint is gone. Delete {self.folder} and run the workflow again."
            )
        self.progress = progress
        log.info("going on after step %d of %d", progress.step, self.steps)

    @property
    def checkpoints(self) -> Path:
        """Folder of the DeepSpeed checkpoints."""
        return self.folder / "deepspeed"

    def run(self) -> None:
        """Train the remaining steps; validate and save every `evaluate_every` steps and at the end."""
        for step in range(self.progress.step, self.steps):
            started = time.monotonic()
            loss, tokens = self.train_step(step)
            self.progress.step = step + 1
            self.progress.loss.append((step + 1, loss))
            seconds = time.monotonic() - started
            self.progress.seconds += seconds
            self._log_step(loss, tokens / seconds)
            if (step + 1) % self.tuning.evaluate_every == 0 or step + 1 == self.steps:
                self.validate()
                self.save()
        if self.rank == 0:
            peaks = {name: f"{mib:.0f} MiB" for name, mib in peak_memory_mib([self.device]).items()}
            log.info("peak memory: %s", peaks)

    def train_step(self, step: int) -> tuple[float, int]:
        """One optimiser step. Returns the mean loss of a scored token before it, and the tokens of the batch.

        Gradients are those of the mean over all scored tokens of the whole batch, so neither the size of the
        micro-batches nor the number of processes matters, except for what dropout draws.
        """
        self._set_dropout(step)
        batch = self.training.rows(rows_of_step(step, self.tuning.batch_size, len(self.training), self.seed))
        scored = int(batch.scored.sum())
        rate = learning_rate(step, self.steps, self.tuning.warmup_steps, self.tuning.learning_rate)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        accumulation = self.engine.gradient_accumulation_steps()
        for part in self._shares(len(batch)):
            loss = self.engine(*self._on_device(batch.rows(part)))
            # DeepSpeed divides by the number of micro-batches and of processes; the mean over tokens does not.
            self.engine.backward(loss * (accumulation * self.world / scored))
            self.engine.step()
            total += loss.detach()
        mean = self._sum(total) / scored
        self._check_finite(mean, f"the loss of step {step + 1}")
        if self.engine.skipped_steps:  # DeepSpeed leaves such a step out with a warning; a result must not hide that
            self._check_finite(math.nan, f"the gradient of step {step + 1}")
        return mean, int(batch.length.sum())

    @torch.no_grad()
    def validate(self) -> None:
        """Add the validation loss at this step to the progress."""
        started = time.monotonic()
        self._set_dropout(None)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in self._shares(len(self.validation)):
            # With ZeRO 3 all processes must run the same number of passes: one without rows repeats the last row.
            loss = self.engine(*self._on_device(self.validation.rows(part or [len(self.validation) - 1])))
            total += loss * bool(part)
        mean = self._sum(total) / int(self.validation.scored.sum())
        self._check_finite(mean, f"the validation loss after step {self.progress.step}")
        self.progress.validation.append((self.progress.step, mean))
        self.progress.seconds += time.monotonic() - started
        if self.rank == 0:
            log.info("validation loss after step %d: %.4f", self.progress.step, mean)

    def save(self) -> None:
        """Keep the vectors if they are the best so far, and everything that a resumed job needs."""
        step, loss = self.progress.validation[-1]
        vectors = self.vectors()
        if loss < self.progress.best_loss:
            self.progress.best = step
            if self.rank == 0:
                save_tensors(vectors_file(self.folder, step), pack_vectors(vectors))
        self.engine.save_checkpoint(
            str(self.checkpoints), self.progress.checkpoint, save_latest=False, exclude_frozen_parameters=True
        )
        dist.barrier()
        if self.rank == 0:
            self.progress.save(self.folder)
            self._remove_older()
        dist.barrier()

    def vectors(self) -> dict[str, Learnt]:
        """The trained numbers as they are now, complete on every process."""
        found: dict[str, Learnt] = {}
        for name, layer in self.wrapped.items():
            trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            with deepspeed.zero.GatheredParameters(trained):  # does nothing below ZeRO 3
                found[name] = learnt_by(layer)
        return found

    def _set_dropout(self, step: int | None) -> None:
        """Dropout in what is trained, drawn anew from the step alone, so that a resumed job draws the same; or none."""
        for layer in self.wrapped.values():
            layer.train(step is not None)
        if step is not None:
            torch.manual_seed(random.Random(f"{self.seed} {self.stage} {step} {self.rank}").getrandbits(63))

    def _shares(self, rows: int) -> Iterator[list[int]]:
        """This process's rows of each micro-batch round; empty where the rows do not suffice for all."""
        size = self.tuning.micro_batch_size
        for start in range(0, rows, size * self.world):
            first = start + self.rank * size
            yield list(range(first, min(first + size, rows)))

    def _on_device(self, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = examples.batch()
        return tokens.to(self.device), labels.to(self.device)

    def _sum(self, value: torch.Tensor) -> float:
        """The sum of a scalar over all processes."""
        dist.all_reduce(value)
        return float(value)

    def _check_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise RankwiseError(f"{what} is not finite. Lower `learning_rate`, or set `dtype: float32` in this tuning.")

    def _log_step(self, loss: float, tokens_per_second: float) -> None:
        if self.rank:
            return
        step = self.progress.step
        rate = learning_rate(step - 1, self.steps, self.tuning.warmup_steps, self.tuning.learning_rate)
        left = (self.steps - step) * self.progress.seconds / step
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  %.0f tokens/s  %.0f s left",
            *(step, self.steps, loss, rate, tokens_per_second, left),
        )

    def _remove_older(self) -> None:
        for path in self.checkpoints.iterdir():
            if path.is_dir() and path.name != self.progress.checkpoint:
                shutil.rmtree(path)
        for path in self.folder.glob(vectors_file(self.folder, 0).name.replace("0", "*")):
            if self.progress.best is not None and path != vectors_file(self.folder, self.progress.best):
                path.unlink()


def _divide(module: torch.nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Give every process its part of each parameter, one parameter after the other, before the engine sees any.

    It would move a whole model to its device first. Buffers are small, and every process has all of them there.
    """
    whole = sum(parameter.numel() for parameter in module.parameters())
    deepspeed.zero.Init(module=module, config_dict_or_path=config)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    parts: list[Any] = list(module.parameters())
    held = sum(parameter.ds_tensor.numel() for parameter in parts)
    log.info("each process holds %d of %d weights", held, whole)


def _initialize(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    device: torch.device,
    folder: Path,
) -> Any:
    """A DeepSpeed engine that compiles nothing and pickles nothing."""
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=config,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
    )
    engine.checkpoint_engine = SafeCheckpoints(folder)
    return engine

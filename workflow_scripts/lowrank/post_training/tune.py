"""The whole post-training of one checkpoint: tokenise, train in worker processes, merge, write."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lowrank.compression.given_up import write_manifest
from lowrank.config.tuning import Tuning, parse_tuning
from lowrank.errors import RankwiseError
from lowrank.files import Record, load_tensors, read_record
from lowrank.jobs.crew import Crew
from lowrank.jobs.state import SECONDS, Clock, resumable_state
from lowrank.model.card import model_card
from lowrank.model.checkpoint import load_checkpoint, save_checkpoint
from lowrank.model.runtime import describe_environment, parse_dtype
from lowrank.model.tokenizer import load_tokenizer
from lowrank.post_training.adapters import merge, stages_of, trained_numbers
from lowrank.post_training.instructions import read_rows, split, tokenise
from lowrank.post_training.job import TRAIN_FILE, VALIDATION_FILE, Progress, TrainingJob, joined, vectors_file
from lowrank.post_training.launch import launch
from lowrank.post_training.schedule import engine_config, total_steps

log = logging.getLogger(__name__)


def tune_checkpoint(
    checkpoint: str | Path,
    manifest: str | Path,
    instructions: str | Path,
    target: str | Path,
    target_manifest: str | Path,
    settings: dict[str, Any],
    threads: int,
    crew: Crew,
) -> None:
    """Post-train a compressed checkpoint and write it, merged, with its manifest.

    Args:
        checkpoint: folder of the compressed model.
        manifest: its manifest.json.
        instructions: jsonl of `instruction`, `input`, `output`.
        target: folder of the tuned checkpoint.
        target_manifest: its manifest.json.
        settings: "tuning", "deepspeed", "subject" (with "seed"), "dtype", "state", "code".
        threads: CPU threads of all training processes of a machine together.
        crew: the training processes.

    Raises:
        RankwiseError: bad settings or data, or a failed training process.
    """
    tuning = parse_tuning(settings["tuning"])
    processes = crew.processes
    engine_config(settings["deepspeed"], tuning, processes)  # its complaints come before any work
    # A DeepSpeed checkpoint belongs to a number of processes: with another number, the job starts afresh.
    key = {name: value for name, value in settings.items() if name != "state"} | {"processes": processes}
    inputs = {"manifest": manifest, "instructions": instructions}
    with resumable_state(settings["state"], "post_train", key, inputs) as folder:
        clock = Clock(folder / SECONDS)  # of all but the loops, whose progress says how long they took
        folders = [folder / f"stage{stage}" for stage in range(len(stages_of(tuning)))]
        _tokenise(instructions, checkpoint, tuning, folders)
        clock.save()
        seed = settings["subject"]["seed"]
        results: list[Path] = []
        for name, part in zip(stages_of(tuning), folders, strict=True):
            log.info("post-training: %s", name)
            earlier = [str(path) for path in results]
            job = TrainingJob(str(checkpoint), str(part), settings["tuning"], settings["deepspeed"], seed, earlier)
            before = Progress.load(part).seconds
            launch(job, crew, threads)
            clock.leave_out(Progress.load(part).seconds - before)
            clock.save()
            results.append(_result(part))
        progress = joined([Progress.load(part) for part in folders])
        _warn_if_worse(progress)
        model = load_checkpoint(checkpoint, parse_dtype(settings["dtype"]))
        learnt = [load_tensors(path, whole=folder) for path in results]
        for tensors in learnt:
            merge(model, tuning, tensors)
        trainable = sum(map(trained_numbers, learnt))
        total = sum(parameter.numel() for parameter in model.parameters())
        new = {
            "subject": settings["subject"],
            "tuning": settings["tuning"],
            "training": describe_training(progress, trainable, total, processes),
        }
        described = Record(read_record(manifest) | new, Path(manifest))
        files = save_checkpoint(model, checkpoint, target, lambda folder: model_card(described, folder))
        seconds = progress.seconds + clock.seconds
        write_manifest(
            target_manifest, described | {"files": files, "seconds": seconds, "environment": describe_environment()}
        )


def describe_training(progress: Progress, trainable: int, parameters: int, processes: int) -> dict[str, Any]:
    """The `training` part of a tuned checkpoint's manifest; losses are means over scored tokens, in nats.

    Args:
        progress: of all stages together.
        trainable: how many numbers they trained, together.
        parameters: of the model.
        processes: that trained it.
    """
    return {
        "steps": progress.step,
        "best_step": progress.best,
        "trainable": trainable,
        "trainable_share": trainable / parameters,
        "loss": progress.loss,
        "validation": progress.validation,
        "processes": processes,
        "seconds": progress.seconds,
    }


def _result(folder: Path) -> Path:
    """What a finished job learnt.

    Raises:
        RankwiseError: it learnt nothing.
    """
    best = Progress.load(folder).best
    if best is None:
        raise RankwiseError(f"{folder}: the training ended without a result. Delete this folder and run again.")
    return vectors_file(folder, best)


def _tokenise(instructions: str | Path, checkpoint: str | Path, tuning: Tuning, folders: list[Path]) -> None:
    """Leave the tokenised training and validation rows in the folder of every stage's job."""
    rows = read_rows(instructions)
    tokenizer = load_tokenizer(checkpoint)
    training, validation = split(tokenise(rows, tokenizer, tuning.max_length, tuning.mask_prompt), tuning)
    steps = total_steps(tuning, len(training))
    log.info("%d rows to train on, %d to validate, %d steps", len(training), len(validation), steps)
    for folder in folders:
        folder.mkdir(exist_ok=True)
        training.save(folder / TRAIN_FILE)
        validation.save(folder / VALIDATION_FILE)


def _warn_if_worse(progress: Progress) -> None:
    before = progress.validation[0][1]
    if progress.best_loss >= before:
        log.warning(
            "post-training did not lower the validation loss (%.4f before, %.4f at best after it); "
            "the tuned checkpoint holds the best of the trained vectors all the same",
            *(before, progress.best_loss),
        )

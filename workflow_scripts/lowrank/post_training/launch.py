"""Start the processes of a post-training, and wait for them."""

from __future__ import annotations

from dataclasses import asdict

from lowrank.jobs import launcher
from lowrank.jobs.crew import Crew
from lowrank.post_training.job import TrainingJob

WORK = "lowrank.post_training.worker:train_share"
"""By its name: this process never imports DeepSpeed."""


def launch(job: TrainingJob, crew: Crew, threads: int) -> None:
    """Run a job in worker processes, also if it is only one; their lines go to the log.

    Args:
        job: what to train, and the folder of its state.
        crew: the processes.
        threads: CPU threads of all processes of a machine together.

    Raises:
        RankwiseError: a worker failed; with its message.
    """
    launcher.launch(WORK, asdict(job), crew, threads, job.folder)

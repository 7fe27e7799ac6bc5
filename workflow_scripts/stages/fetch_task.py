"""Fetch the scored documents of one zero-shot task, and their index."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.config.sources import TaskFile
from lowrank.jobs.stage import run_stage
from lowrank.sources.tasks import fetch_task


def work(job: Snakemake) -> None:
    settings = job.params.settings
    task = TaskFile.model_validate(settings["task"])
    fetch_task(settings["name"], task, Path(job.params.cache), Path(job.output.index), Path(job.output.rows))


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

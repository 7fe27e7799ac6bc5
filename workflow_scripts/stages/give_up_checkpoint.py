"""Delete a checkpoint after its last use; its manifest stays."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.compression.given_up import give_up
from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Delete the folder, and note its manifest."""
    give_up(Path(job.output[0]).parent, job.output[0])


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

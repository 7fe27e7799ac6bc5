"""Fetch one set of instructions for post-training."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.config.sources import Instructions
from lowrank.jobs.stage import run_stage
from lowrank.sources.texts import fetch_instructions


def work(job: Snakemake) -> None:
    settings = job.params.settings
    instructions = Instructions.model_validate(settings["instructions"])
    fetch_instructions(settings["name"], instructions, Path(job.params.cache), Path(job.output.rows))


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

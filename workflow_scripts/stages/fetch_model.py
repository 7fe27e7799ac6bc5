"""Fetch one model: a checked checkpoint folder, and its manifest."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.config.sources import Model
from lowrank.files import write_json
from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    from lowrank.sources.models import fetch_model

    settings = job.params.settings
    model = Model.model_validate(settings["model"] | {"max_length": job.params.max_length})
    lender = job.input.get("tokenizer")
    manifest = fetch_model(
        settings["name"], model, Path(job.params.cache), Path(job.output.checkpoint), Path(lender) if lender else None
    )
    write_json(job.output.manifest, manifest)


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

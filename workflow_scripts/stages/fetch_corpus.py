"""Fetch one corpus: its selected documents (or token ids), and its index."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.config.sources import Corpus
from lowrank.jobs.stage import run_stage
from lowrank.sources.texts import fetch_corpus


def work(job: Snakemake) -> None:
    settings = job.params.settings
    corpus = Corpus.model_validate(settings["corpus"])
    cache, index, data = Path(job.params.cache), Path(job.output.index), Path(job.output.data)
    fetch_corpus(settings["name"], corpus, cache, index, data)


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

"""Compare the texts that tables and figures report numbers on with those that calibration and validation read."""

from snakemake.iocontainers import Snakemake

from lowrank.config.tested import Pair
from lowrank.files import write_json
from lowrank.jobs.stage import run_stage
from lowrank.sources.shared_text import compare_texts


def work(job: Snakemake) -> None:
    """Compare all pairs and write what was compared."""
    settings = job.params.settings
    pairs = [
        Pair(pair["tested"], pair["seen"], tuple(places["tested_at"]), tuple(places["seen_at"]))
        for pair, places in zip(settings["pairs"], job.params.places, strict=True)
    ]
    indices = dict(zip(settings["corpora"], job.input.corpora, strict=True))
    write_json(job.output[0], compare_texts(pairs, indices))


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

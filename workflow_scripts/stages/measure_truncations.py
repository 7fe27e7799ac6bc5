"""Truncate single matrices, and measure what their bases predicted."""

import time

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Measure a random sample of matrices at several ranks on windows of one corpus."""
    from lowrank.bases.principal import Bases
    from lowrank.calibration.corpora import load_documents, sample_windows
    from lowrank.files import write_json
    from lowrank.model.runtime import describe_environment
    from lowrank.search.sliced_model import open_sliced_model
    from lowrank.search.truncations import choose_truncations, measure_truncations

    started = time.monotonic()
    settings = job.params.settings
    study = settings["truncations"]
    opened = open_sliced_model(job.input.model, job.input.bases, settings, job.threads)
    documents = load_documents(job.input.corpus)
    windows = sample_windows(documents, opened.tokenizer, study["windows"], study["length"], study["seed"]).long()
    bases = Bases(job.input.bases, opened.budget.dimensions.layers)
    truncations = choose_truncations(opened.budget, bases, study["matrices"], study["kept"], study["seed"])
    result = measure_truncations(opened.sliced, truncations, windows, opened.device)
    write_json(
        job.output[0],
        {
            "kind": "truncations",
            "subject": {"model": study["model"]},
            "protocol": study | {"dtype": settings["dtype"]},
            **result,
            "environment": describe_environment(opened.device),
            "seconds": time.monotonic() - started,
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

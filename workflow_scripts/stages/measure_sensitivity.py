"""Measure how perplexity rises when one type of matrix is compressed alone."""

import time

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Evaluate every type at every kept ratio on windows of one corpus."""
    from lowrank.calibration.corpora import load_documents, sample_windows
    from lowrank.files import write_json
    from lowrank.model.runtime import describe_environment
    from lowrank.search.sensitivity import measure_sensitivity
    from lowrank.search.sliced_model import open_sliced_model

    started = time.monotonic()
    settings = job.params.settings
    study = settings["sensitivity"]
    opened = open_sliced_model(job.input.model, job.input.bases, settings, job.threads)
    documents = load_documents(job.input.corpus)
    windows = sample_windows(documents, opened.tokenizer, study["windows"], study["length"], study["seed"]).long()
    result = measure_sensitivity(opened.sliced, opened.budget, windows, study["kept"], opened.device)
    write_json(
        job.output[0],
        {
            "kind": "sensitivity",
            "subject": {"model": study["model"]},
            "protocol": study | {"dtype": settings["dtype"]},
            **result,
            "environment": describe_environment(opened.device),
            "seconds": time.monotonic() - started,
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

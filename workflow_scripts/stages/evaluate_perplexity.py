"""Evaluate one checkpoint by token perplexity on the corpora of a suite."""

import time
from tempfile import TemporaryDirectory

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Write the perplexities, with the losses of each window."""
    from lowrank.config.suites import PerplexitySuite
    from lowrank.evaluation.perplexity import evaluate_share
    from lowrank.files import write_json
    from lowrank.jobs.crew import crew_of
    from lowrank.jobs.launcher import run_shared
    from lowrank.model.runtime import describe_environment, limit_threads

    started = time.monotonic()
    settings = job.params.settings
    limit_threads(job.threads)
    suite = PerplexitySuite.model_validate(settings["suite"])
    arguments = {
        "checkpoint": str(job.input.checkpoint),
        "dtype": settings["dtype"],
        "suite": suite.plain(),
        "corpora": [str(index) for index in job.input.corpora],
    }
    with TemporaryDirectory(prefix="rankwise-") as folder:
        found = run_shared(evaluate_share, arguments, crew_of(job.resources), job.threads, folder)
    write_json(
        job.output[0],
        {
            "kind": "perplexity",
            "subject": settings["subject"],
            "protocol": suite.plain() | found["protocol"] | {"dtype": settings["dtype"]},
            "corpora": found["corpora"],
            "environment": describe_environment(),
            "seconds": time.monotonic() - started,
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

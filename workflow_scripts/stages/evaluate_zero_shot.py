"""Evaluate one checkpoint by zero-shot accuracy on the tasks of a suite, with lm-eval."""

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Write the accuracies with their standard errors."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read at import
    from lowrank.config.suites import ZeroShotSuite
    from lowrank.evaluation.zero_shot import evaluate_share
    from lowrank.files import write_json
    from lowrank.jobs.crew import crew_of
    from lowrank.jobs.launcher import run_shared
    from lowrank.model.runtime import describe_environment, limit_threads

    started = time.monotonic()
    settings = job.params.settings
    limit_threads(job.threads)
    suite = ZeroShotSuite.model_validate(settings["suite"])
    arguments = {
        "checkpoint": str(job.input.checkpoint),
        "dtype": settings["dtype"],
        "suite": suite.plain(),
        "rows": {Path(folder).name: str(folder) for folder in job.input.rows},
        "longest": settings["max_length"],
    }
    with TemporaryDirectory(prefix="rankwise-") as folder:
        results = run_shared(evaluate_share, arguments, crew_of(job.resources), job.threads, folder)
    protocol = suite.plain() | results.pop("protocol") | {"dtype": settings["dtype"]}
    write_json(
        job.output[0],
        {
            "kind": "zero-shot",
            "subject": settings["subject"],
            "protocol": protocol,
            **results,
            "smoke": suite.limit is not None,
            "environment": describe_environment(),
            "seconds": time.monotonic() - started,
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

"""Evaluate one checkpoint by zero-shot accuracy on the tasks of a suite, with lm-eval."""

import os
import time
from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.stage import run_stage


def work(job: Snakemake) -> None:
    """Write the accuracies with their standard errors."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read at import
    from lowrank.checkpoint import load_checkpoint, load_tokenizer
    from lowrank.config.suites import ZeroShotSuite
    from lowrank.evaluation.zero_shot import evaluate_zero_shot
    from lowrank.files import write_json
    from lowrank.runtime import describe_environment, limit_threads, parse_dtype, pick_device

    started = time.monotonic()
    settings = job.params.settings
    limit_threads(job.threads)
    device = pick_device()
    checkpoint = job.input.checkpoint
    model = load_checkpoint(checkpoint, parse_dtype(settings["dtype"]), device)
    suite = ZeroShotSuite.model_validate(settings["suite"])
    rows = {Path(folder).name: folder for folder in job.input.rows}
    results = evaluate_zero_shot(model, load_tokenizer(checkpoint), suite, rows, settings["max_length"])
    protocol = suite.plain() | results.pop("protocol") | {"dtype": settings["dtype"]}
    write_json(
        job.output[0],
        {
            "kind": "zero-shot",
            "subject": settings["subject"],
            "protocol": protocol,
            **results,
            "smoke": suite.limit is not None,
            "environment": describe_environment(device),
            "seconds": time.monotonic() - started,
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

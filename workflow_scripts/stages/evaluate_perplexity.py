"""Evaluate one checkpoint by token perplexity on the corpora of a suite."""

import time

from snakemake.iocontainers import Snakemake

from lowrank.stage import run_stage


def work(job: Snakemake) -> None:
    """Write the perplexities, with the losses of each window."""
    from lowrank.checkpoint import load_checkpoint, load_tokenizer
    from lowrank.config.suites import PerplexitySuite
    from lowrank.evaluation.perplexity import evaluate_corpora
    from lowrank.files import write_json
    from lowrank.runtime import describe_environment, limit_threads, parse_dtype, pick_device

    started = time.monotonic()
    settings = job.params.settings
    limit_threads(job.threads)
    device = pick_device()
    checkpoint = job.input.checkpoint
    model = load_checkpoint(checkpoint, parse_dtype(settings["dtype"]), device)
    suite = PerplexitySuite.model_validate(settings["suite"])
    tokenizer = load_tokenizer(checkpoint)
    corpora, protocol = evaluate_corpora(model, checkpoint, tokenizer, suite, job.input.corpora)
    write_json(
        job.output[0],
        {
            "kind": "perplexity",
            "subject": settings["subject"],
            "protocol": suite.plain() | protocol | {"dtype": settings["dtype"]},
            "corpora": corpora,
            "environment": describe_environment(device),
            "seconds": time.monotonic() - started,
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

"""Evaluate one checkpoint by how it goes on after the prompts of a suite, with greedy decoding."""

import time

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Write the continuations."""
    from lowrank.config.suites import GenerationSuite
    from lowrank.evaluation.generation import continue_prompts
    from lowrank.files import write_json
    from lowrank.model.checkpoint import load_checkpoint
    from lowrank.model.devices import pick_devices
    from lowrank.model.runtime import describe_environment, limit_threads, parse_dtype
    from lowrank.model.tokenizer import load_tokenizer

    started = time.monotonic()
    settings = job.params.settings
    limit_threads(job.threads)
    checkpoint = job.input.checkpoint
    model = load_checkpoint(checkpoint, parse_dtype(settings["dtype"]), pick_devices())
    suite = GenerationSuite.model_validate(settings["suite"])
    completions, protocol = continue_prompts(model, load_tokenizer(checkpoint), suite, settings["max_length"])
    write_json(
        job.output[0],
        {
            "kind": "generation",
            "subject": settings["subject"],
            "protocol": suite.plain() | protocol | {"dtype": settings["dtype"]},
            "completions": completions,
            "environment": describe_environment(model.device),
            "seconds": time.monotonic() - started,
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

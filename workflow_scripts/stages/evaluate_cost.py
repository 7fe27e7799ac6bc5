"""Evaluate what one checkpoint costs: parameters, multiply-accumulates, bytes, memory, speed."""

import time

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Write the counts and the measured times."""
    from lowrank.config.sources import ModelShape
    from lowrank.config.suites import CostSuite
    from lowrank.evaluation.cost import CONVENTION, count_bytes, count_macs, measure_speed
    from lowrank.files import write_json
    from lowrank.model.checkpoint import load_checkpoint
    from lowrank.model.devices import pick_devices
    from lowrank.model.parameters import count_parameters
    from lowrank.model.runtime import describe_environment, limit_threads, parse_dtype

    started = time.monotonic()
    settings = job.params.settings
    limit_threads(job.threads)
    suite = CostSuite.model_validate(settings["suite"])
    shape = ModelShape.model_validate(settings["shape"])
    model = load_checkpoint(job.input.checkpoint, parse_dtype(settings["dtype"]), pick_devices())
    write_json(
        job.output[0],
        {
            "kind": "cost",
            "subject": settings["subject"],
            "protocol": suite.plain() | {"dtype": settings["dtype"], "macs": CONVENTION},
            "parameters": count_parameters(model, shape),
            "macs": count_macs(model, shape, suite.mac_tokens),
            **count_bytes(model, job.input.checkpoint),
            "measured": measure_speed(model, suite),
            "environment": describe_environment(model.device),
            "seconds": time.monotonic() - started,
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

"""Compress a model by one method at one ratio, and write its checkpoint with an account of its parameters."""

from pathlib import Path
from typing import Any

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Run the method in a resumable folder; the dense model's files are linked, not copied."""
    from lowrank.bases.principal import Bases
    from lowrank.calibration.output_gradients import OutputGradients
    from lowrank.calibration.statistics import Statistics
    from lowrank.compression.compress import compress_model
    from lowrank.compression.eliminate_neurons import Eliminations
    from lowrank.compression.given_up import write_manifest
    from lowrank.config.presets import Covariance
    from lowrank.config.sources import ModelShape
    from lowrank.files import load_tensors, read_record
    from lowrank.jobs.state import Parts, resumable_state
    from lowrank.model.card import base_of, model_card
    from lowrank.model.checkpoint import link_checkpoint, load_checkpoint, recipe_of, save_checkpoint
    from lowrank.model.parameters import count_parameters, linear_sizes
    from lowrank.model.runtime import describe_environment, limit_threads, parse_dtype, seed_everything
    from lowrank.ranks.budget import Budget

    settings = job.params.settings
    method: dict[str, Any] = settings["method"]
    limit_threads(job.threads)
    seed = int(job.wildcards.seed)
    seed_everything(seed)
    shape = ModelShape.model_validate(settings["shape"])
    inputs = {name: path for name, path in job.input.items() if Path(path).is_file()}
    with resumable_state(settings["state"], job.rule, settings, inputs) as state:
        parts = Parts(state)
        dtype = parse_dtype(settings["dtype"])
        model = load_checkpoint(job.input.model, dtype, "cpu")
        allocation = read_record(job.input.allocation)["ranks"] if job.input.get("allocation") else None
        tokens = load_tensors(job.input.tokens, ("tokens",))["tokens"].long() if job.input.get("tokens") else None
        account: dict[str, Any] = {}
        ranks = compress_model(
            method["kind"],
            method,
            {
                "model": model,
                "budget": Budget.of(shape),
                "ratio": int(job.wildcards.ratio),
                "seed": seed,
                "bases": Bases(job.input.bases, shape.layers) if job.input.get("bases") else None,
                "allocation": allocation,
                "covariance": Covariance.model_validate(settings["covariance"]) if settings["covariance"] else None,
                "statistics": Statistics(job.input.statistics, shape) if job.input.get("statistics") else None,
                "gradients": OutputGradients(job.input.gradients, shape) if job.input.get("gradients") else None,
                "eliminations": Eliminations(job.input.neurons, shape.layers) if job.input.get("neurons") else None,
                "tokens": tokens,
                "account": account,
                "parts": parts,
            },
        )
        target, base = job.output.checkpoint, job.params.base
        parameters = count_parameters(model, shape)
        size = parameters["total_dense"] * dtype.itemsize
        described = {
            "subject": settings["subject"],
            "base": base_of(job.wildcards.model, base["source"], base["license"], size),
            "method": method,
            "ranks": ranks,
            **account,
            "linears": linear_sizes(model, shape),
            "parameters": parameters,
            "kept": {
                "linears": parameters["decoder_linears"] / parameters["decoder_linears_dense"],
                "total": parameters["total"] / parameters["total_dense"],
            },
        }
        if recipe_of(model):
            files = save_checkpoint(model, job.input.model, target, lambda folder: model_card(described, folder))
        else:
            files = link_checkpoint(job.input.model, target)
        write_manifest(
            job.output.manifest,
            described | {"files": files, "seconds": parts.clock.seconds, "environment": describe_environment()},
        )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

"""Predict what removing neurons of every block costs, and what pairs of those that are left cost besides."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Block by block in a resumable folder, then move the layer files to their place."""
    from lowrank.calibration.output_gradients import OutputGradients
    from lowrank.calibration.statistics import Statistics
    from lowrank.compression.eliminate_neurons import Eliminations, eliminate_neurons
    from lowrank.config.presets import Covariance
    from lowrank.config.sources import ModelShape
    from lowrank.files import publish_layers, write_json
    from lowrank.jobs.state import Parts, resumable_state
    from lowrank.manifest import checksums_of
    from lowrank.model.runtime import describe_environment, limit_threads, parse_dtype, pick_device
    from lowrank.model.stored_blocks import StoredBlocks
    from lowrank.ranks.budget import Budget

    settings = job.params.settings
    limit_threads(job.threads)
    device = pick_device()
    shape = ModelShape.model_validate(settings["shape"])
    inputs = {name: path for name, path in job.input.items() if Path(path).is_file()}
    key = settings | {"wildcards": dict(job.wildcards.items())}  # two presets may ask for the same at the same time
    with resumable_state(settings["state"], job.rule, key, inputs) as state:
        parts = Parts(state)
        eliminate_neurons(
            StoredBlocks(job.input.model, shape, parse_dtype(settings["dtype"])).layers,
            Budget.of(shape),
            Statistics(job.input.statistics, shape),
            OutputGradients(job.input.gradients, shape),
            Covariance.model_validate(settings["covariance"]),
            device,
            parts,
            settings["multiple"],
            Eliminations(job.input.neurons, shape.layers) if job.input.get("neurons") else None,
        )
        publish_layers(state, job.output.layers)
        write_json(
            job.output.manifest,
            {
                "model": job.wildcards.model,
                "calibration": job.wildcards.calibration,
                "covariance": settings["covariance"],
                "multiple": settings["multiple"],
                "layers": checksums_of(job.output.layers),
                "environment": describe_environment(device),
                "seconds": parts.clock.seconds,
            },
        )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

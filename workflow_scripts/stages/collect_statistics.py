"""Collect the moments of the inputs of every linear layer, in one pass over the calibration windows."""

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Run the pass in a resumable folder, then move the layer files to their place."""
    from lowrank.calibration.routing import experts_left_dense
    from lowrank.calibration.statistics import collect_share
    from lowrank.config.sources import ModelShape
    from lowrank.files import layer_files, load_tensors, publish_layers, write_json
    from lowrank.jobs.crew import crew_of
    from lowrank.jobs.launcher import run_shared
    from lowrank.jobs.state import resumable_state
    from lowrank.manifest import checksums_of
    from lowrank.model.runtime import describe_environment, limit_threads
    from lowrank.ranks.budget import Budget

    settings = job.params.settings
    limit_threads(job.threads)
    inputs = {"model": job.input.model_manifest, "tokens": job.input.tokens}
    tokens = load_tensors(job.input.tokens, ("tokens",))["tokens"]
    key = settings | {"wildcards": dict(job.wildcards.items())}  # two presets may ask for the same at the same time
    with resumable_state(settings["state"], job.rule, key, inputs) as state:
        arguments = {
            "model": str(job.input.model),
            "dtype": settings["dtype"],
            "tokens": str(job.input.tokens),
            "layers_per_pass": int(job.resources.layers_per_pass),
            "state": str(state),
            "expert_tokens": settings.get("expert_tokens"),
        }
        run_shared(collect_share, arguments, crew_of(job.resources), job.threads, state)
        publish_layers(state, job.output.layers)
        shape = ModelShape.model_validate(settings["shape"])
        few = experts_left_dense(layer_files(job.output.layers, shape.layers), Budget.of(shape))
        write_json(
            job.output.manifest,
            {
                "model": job.wildcards.model,
                "calibration": job.wildcards.calibration,
                "windows": tokens.shape[0],
                "length": tokens.shape[1],
                **({"experts_left_dense": few} if shape.experts else {}),
                "layers": checksums_of(job.output.layers),
                "environment": describe_environment(),
            },
        )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

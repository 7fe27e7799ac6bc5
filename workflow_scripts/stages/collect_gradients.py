"""Collect the second moments of the loss gradient at the output of every linear layer, for Fisher-weighted bases."""

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Run the backward passes in a resumable folder, then move the layer files to their place."""
    from lowrank.calibration.output_gradients import collect_share
    from lowrank.files import load_tensors, publish_layers, write_json
    from lowrank.jobs.crew import crew_of
    from lowrank.jobs.launcher import run_shared
    from lowrank.jobs.state import SECONDS, Clock, resumable_state
    from lowrank.manifest import checksums_of
    from lowrank.model.runtime import describe_environment, limit_threads

    settings = job.params.settings
    limit_threads(job.threads)
    inputs = {"model": job.input.model_manifest, "tokens": job.input.tokens}
    tokens = load_tensors(job.input.tokens, ("tokens",))["tokens"][: settings["windows"]]
    key = settings | {"wildcards": dict(job.wildcards.items())}  # two presets may ask for the same at the same time
    with resumable_state(settings["state"], job.rule, key, inputs) as state:
        clock = Clock(state / SECONDS)
        arguments = {
            "model": str(job.input.model),
            "dtype": settings["dtype"],
            "tokens": str(job.input.tokens),
            "windows": settings["windows"],
            "draws": settings["draws"],
            "layers_per_pass": int(job.resources.layers_per_pass),
            "state": str(state),
        }
        run_shared(collect_share, arguments, crew_of(job.resources), job.threads, state)
        publish_layers(state, job.output.layers)
        clock.save()
        write_json(
            job.output.manifest,
            {
                "model": job.wildcards.model,
                "calibration": job.wildcards.calibration,
                "windows": tokens.shape[0],
                "length": tokens.shape[1],
                "draws": settings["draws"],
                "layers": checksums_of(job.output.layers),
                "environment": describe_environment(),
                "seconds": clock.seconds,
            },
        )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

"""Collect the moments of the inputs of every linear layer, in one pass over the calibration windows."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Run the pass in a resumable folder, then move the layer files to their place."""
    from lowrank.calibration.statistics import collect_share
    from lowrank.files import atomic_path, link_or_copy, load_tensors, sha256_file, write_json
    from lowrank.jobs.crew import crew_of
    from lowrank.jobs.launcher import run_shared
    from lowrank.jobs.state import resumable_state
    from lowrank.model.runtime import describe_environment, limit_threads

    settings = job.params.settings
    limit_threads(job.threads)
    inputs = {"model": job.input.model_manifest, "tokens": job.input.tokens}
    tokens = load_tensors(job.input.tokens, ("tokens",))["tokens"]
    with resumable_state(settings["state"], job.rule, settings, inputs) as state:
        arguments = {
            "model": str(job.input.model),
            "dtype": settings["dtype"],
            "tokens": str(job.input.tokens),
            "layers_per_pass": int(job.resources.layers_per_pass),
            "state": str(state),
        }
        run_shared(collect_share, arguments, crew_of(job.resources), job.threads, state)
        with atomic_path(job.output.layers) as folder:
            folder.mkdir()
            for file in sorted(state.glob("layer_*.safetensors")):
                link_or_copy(file, folder / file.name)  # the state must outlive a kill before the end
        write_json(
            job.output.manifest,
            {
                "model": job.wildcards.model,
                "calibration": job.wildcards.calibration,
                "windows": tokens.shape[0],
                "length": tokens.shape[1],
                "layers": {path.name: sha256_file(path) for path in sorted(Path(job.output.layers).iterdir())},
                "environment": describe_environment(),
            },
        )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

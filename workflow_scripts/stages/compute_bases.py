"""Compute the principal bases of every linear layer from the statistics of its inputs."""

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Block by block: estimate covariances, decompose, write."""
    from functools import partial

    from lowrank.bases.block import bases_of_block
    from lowrank.calibration.output_gradients import load_output_gradients
    from lowrank.calibration.routing import about_experts
    from lowrank.calibration.statistics import load_moments
    from lowrank.config.presets import Covariance
    from lowrank.config.sources import ModelShape
    from lowrank.files import atomic_path, layer_files, save_tensors, write_json
    from lowrank.jobs.beside import Writer
    from lowrank.jobs.stage import log
    from lowrank.manifest import checksums_of
    from lowrank.model.runtime import describe_environment, limit_threads, parse_dtype, pick_device
    from lowrank.model.stored_blocks import StoredBlocks

    settings = job.params.settings
    limit_threads(job.threads)
    device = pick_device()
    covariance = Covariance.model_validate(settings["covariance"])
    shape = ModelShape.model_validate(settings["shape"])
    stored = StoredBlocks(job.input.model, shape, parse_dtype(settings["dtype"]))
    family = stored.family
    sources = layer_files(job.input.layers, shape.layers)
    gradients = layer_files(job.input.gradients, shape.layers) if job.input.get("gradients") else None
    with atomic_path(job.output.layers) as folder, Writer() as writer:
        folder.mkdir()
        for layer, source in enumerate(sources):
            moments = load_moments(source, family.sites)
            layers = stored.of(layer, moments)
            linears = {linear.key: (linear.site, *weights) for linear, weights in layers.items()}
            loaded = load_output_gradients(gradients[layer], linears) if gradients else None
            bases = bases_of_block(linears, moments, covariance, device, f"{family.blocks}.{layer}", loaded)
            tensors = {name: tensor.cpu() for name, tensor in (bases | about_experts(source, family)).items()}
            writer.do(partial(save_tensors, folder / source.name, tensors))
            log.info("bases: block %d of %d", layer + 1, shape.layers)
    write_json(
        job.output.manifest,
        {
            "model": job.wildcards.model,
            "calibration": job.wildcards.calibration,
            "covariance": settings["covariance"],
            "layers": checksums_of(job.output.layers),
            "environment": describe_environment(device),
        },
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

"""Train the factors of a compressed checkpoint, block by block, on the hidden states of the dense model."""

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Write the tuned checkpoint and its manifest."""
    from lowrank.model.runtime import limit_threads
    from lowrank.post_training.distil import distil_checkpoint

    limit_threads(job.threads)
    distil_checkpoint(
        checkpoint=job.input.checkpoint,
        manifest=job.input.manifest,
        model=job.input.model,
        model_manifest=job.input.model_manifest,
        tokens=job.input.tokens,
        target=job.output.checkpoint,
        target_manifest=job.output.manifest,
        settings=job.params.settings,
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

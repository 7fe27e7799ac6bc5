"""Post-train a checkpoint with DeepSpeed, by scaled subspaces (paper, Equation 9) or LoRA, and merge the result."""

from snakemake.iocontainers import Snakemake

from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    """Write the tuned checkpoint and its manifest."""
    from lowrank.jobs.crew import crew_of
    from lowrank.model.runtime import limit_threads
    from lowrank.post_training.tune import tune_checkpoint

    limit_threads(job.threads)
    tune_checkpoint(
        checkpoint=job.input.checkpoint,
        manifest=job.input.manifest,
        instructions=job.input.instructions,
        target=job.output.checkpoint,
        target_manifest=job.output.manifest,
        settings=job.params.settings,
        threads=job.threads,
        crew=crew_of(job.resources),
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

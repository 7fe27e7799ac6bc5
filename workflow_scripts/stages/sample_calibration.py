"""Draw the calibration windows of one preset with one model's tokenizer."""

from snakemake.iocontainers import Snakemake

from lowrank.config.presets import Calibration
from lowrank.jobs.stage import run_stage


def work(job: Snakemake) -> None:
    from lowrank.calibration.corpora import sample_calibration

    settings = job.params.settings
    calibration = Calibration.model_validate(settings["calibration"])
    sample_calibration(settings["model"], calibration, job.input.model, list(job.input.corpora), job.output.tokens)


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

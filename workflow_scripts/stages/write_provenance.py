"""Write the provenance of a run: config, commit, versions, checksums."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.files import write_json
from lowrank.jobs.stage import run_stage
from lowrank.paper.provenance import describe_run


def work(job: Snakemake) -> None:
    """Collect and write what the run was made from."""
    settings = job.params.settings
    target = Path(job.output[0])
    write_json(target, describe_run(settings["run"], settings["config"], settings["artefacts"], target.parent))


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

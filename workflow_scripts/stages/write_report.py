"""Write the report: one self-contained HTML page with tables, figures, settings and provenance."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.files import read_record, write_text
from lowrank.jobs.stage import run_stage
from lowrank.paper.report import render_report


def work(job: Snakemake) -> None:
    """Render the report from the files that the rule names."""
    report = Path(job.output.report)
    write_text(report, render_report(job.params.settings, read_record(job.input.provenance), report))


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

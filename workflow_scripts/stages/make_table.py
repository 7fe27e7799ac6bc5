"""Make one table: CSV, Markdown, LaTeX and HTML from the evaluations of its rows, or from other tables."""

import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from snakemake.iocontainers import Snakemake

from lowrank.config.outputs import Row, Table
from lowrank.config.sources import ModelShape
from lowrank.config.suites import Suite
from lowrank.files import read_record, write_text
from lowrank.jobs.stage import run_stage
from lowrank.paper.render import to_csv, to_html, to_latex, to_markdown
from lowrank.paper.tables import Context, RowResults, build_table
from lowrank.paper.tables.agreement import read_table


def work(job: Snakemake) -> None:
    """Build the table from the files that the rule names and write it in all formats."""
    settings = job.params.settings
    suite_type: TypeAdapter[Any] = TypeAdapter(Suite)
    table_type: TypeAdapter[Any] = TypeAdapter(Table)
    context = Context(
        suites={name: suite_type.validate_python(suite) for name, suite in settings["suites"].items()},
        smoke=settings["smoke"],
        shapes={name: ModelShape.model_validate(shape) for name, shape in settings["shape"].items()},
        published_folder=Path(settings["published_folder"]),
        compared={Path(path).stem: read_table(Path(path)) for path in job.input.compared},
    )
    folder = Path(job.output.csv).parent
    rows = [
        read_row(entry, f"tables.{settings['name']}.rows[{index}]", folder)
        for index, entry in enumerate(settings["rows"])
    ]
    table = build_table(table_type.validate_python(settings["table"]), rows, context)
    write_text(job.output.csv, to_csv(table))
    write_text(job.output.md, to_markdown(table))
    write_text(job.output.tex, to_latex(table, settings["name"]))
    write_text(job.output.html, to_html(table, settings["name"]))


def read_row(entry: dict[str, Any], place: str, folder: Path) -> RowResults:
    """One row with its results; the paths become evidence, relative to the table's folder."""
    manifests = entry["manifests"] + entry["allocations"]
    paths = [path for found in entry["evaluations"].values() for path in found] + manifests
    return RowResults(
        row=Row.model_validate(entry["row"]),
        evaluations={suite: [read_record(path) for path in found] for suite, found in entry["evaluations"].items()},
        manifests=[read_record(path) for path in manifests],
        place=place,
        evidence=[Path(os.path.relpath(path, folder)).as_posix() for path in paths],
    )


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)

"""`python -m lowrank.paper.show results/<run>` prints the main table and says where everything lies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lowrank.config.outputs import RowTable
from lowrank.config.study import Study
from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.files import read_json
from lowrank.layout import in_order
from lowrank.paper.tables.data import MISSING, Context
from lowrank.paper.tables.measures import Measure, measures_of
from lowrank.paper.tables.rows import estimate_text

Record = dict[str, Any]
METHOD_WIDTH = 14
PIPE_WIDTH = 120  # of lines that go to a file or a pipe, which has no width of its own


def show(folder: Path, console: Console) -> None:
    """Print the first table of kind `accuracy` of a finished run, and the places of all results.

    Raises:
        RankwiseError: the folder holds no finished run.
    """
    provenance = folder / "provenance.json"
    if not provenance.is_file():
        raise RankwiseError(f"{folder}: holds no finished run ({provenance.name} is missing). Run the workflow first.")
    study = Study.model_validate(read_json(provenance)["config"])
    tables = ((name, study.tables[name]) for name in in_order(study.tables))
    main_table = next(((name, table) for name, table in tables if table.kind == "accuracy"), None)
    if main_table is not None:
        _print_table(folder / "tables" / f"{main_table[0]}.csv", main_table[1], study, console)
    console.print()
    for name, path in (
        ("report", folder / "report.html"),
        ("tables", folder / "tables"),
        ("figures", folder / "figures"),
        ("provenance", provenance),
    ):
        if path.exists():
            console.print(f"{name + ':':<12}{path}", soft_wrap=True, highlight=False)


def _print_table(csv: Path, table: RowTable, study: Study, console: Console) -> None:
    if not csv.is_file():
        raise RankwiseError(f"{csv}: missing. Run the workflow again: it makes what is missing.")
    records = [{str(key): value for key, value in row.items()} for row in pd.read_csv(csv).to_dict(orient="records")]
    suites = {
        name: suite for name in table.suites if isinstance(suite := study.suites[name], ZeroShotSuite | PerplexitySuite)
    }
    measures = measures_of(Context(suites=suites), table.tasks)
    console.print(Text(table.title, style="bold"))
    limits = [suite.limit for suite in suites.values() if isinstance(suite, ZeroShotSuite) and suite.limit]
    if study.smoke or limits:
        extent = f": first {limits[0]} documents per task" if limits else ""
        console.print(Text(f"Smoke run{extent}, not a measurement.", style="yellow"))
    for group in dict.fromkeys(measure.group for measure in measures):
        # In the terminal the average and the perplexities carry their error; the full table is in the report.
        console.print(_rich_table(group, [m for m in measures if m.group == group], records))


def _rich_table(group: str, measures: list[Measure], records: list[Record]) -> RichTable:
    shown = RichTable(title=group, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    models = list(dict.fromkeys(record["model"] for record in records if record["source"] == "ours"))
    if len(models) > 1:
        shown.add_column("Model")
    shown.add_column("Removed", justify="right", no_wrap=True)
    shown.add_column("Kept", justify="right", no_wrap=True)
    shown.add_column("Method", overflow="fold", min_width=METHOD_WIDTH)
    for measure in measures:
        shown.add_column(measure.title, justify="right", no_wrap=True)
    previous: tuple[Any, Any] | None = None
    for record in records:
        if record["source"] != "ours" and all(_value(record, measure) == MISSING for measure in measures):
            continue  # nothing of this group was published
        block = (record["model"], record["target_removed_percent"])
        if record["source"] == "ours":
            if previous is not None and block != previous:
                shown.add_section()
            previous = block
        shown.add_row(
            *_texts(record, measures, len(models) > 1), style="dim italic" if record["source"] != "ours" else ""
        )
    return shown


def _texts(record: Record, measures: list[Measure], several_models: bool) -> list[str]:
    ours = record["source"] == "ours"
    leading = [f"{record['target_removed_percent']} %", f"{record['kept_percent']:.1f} %"] if ours else ["", ""]
    model = [str(record["model"])] if several_models else []
    return [*model, *leading, str(record["label"]), *(_value(record, measure) for measure in measures)]


def _value(record: Record, measure: Measure) -> str:
    value, stderr = record.get(measure.key), record.get(f"{measure.key}_stderr")
    if value is None or pd.isna(value):
        return MISSING
    with_error = measure.key.endswith("average") or measure.lower_is_better
    return estimate_text(value, stderr if with_error and stderr is not None else None, measure.digits)


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    try:
        show(Path(arguments[0]), console)
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

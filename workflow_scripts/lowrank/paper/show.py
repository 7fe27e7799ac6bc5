"""`python -m lowrank.paper.show results/<run>` prints what came out, what it means, and where everything lies."""

from __future__ import annotations

import sys
from collections.abc import Collection
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
from lowrank.layout import PROVENANCE, in_order, study_of
from lowrank.paper.tables.accuracy import BEST, BEST_RULE
from lowrank.paper.tables.agreement import read_table
from lowrank.paper.tables.data import MISSING, Context
from lowrank.paper.tables.measures import ACCURACY, PERPLEXITY, Measure, measures_of, without_lone_averages
from lowrank.paper.tables.rows import estimate_text
from lowrank.terminal import print_folder

Record = dict[str, Any]
METHOD_WIDTH = 14
MARK = "*"


def show(folder: Path, console: Console) -> None:
    """Print the main tables of a finished run, how to read them, and the places of all results.

    Main are, of the tables of kind `accuracy`, the first that shows perplexity and the first that shows tasks.

    Raises:
        RankwiseError: the folder holds no finished run.
    """
    provenance = folder / PROVENANCE
    if not provenance.is_file():
        raise RankwiseError(f"{folder}: holds no finished run ({provenance.name} is missing). Run the workflow first.")
    study = study_of(folder)
    shown: set[str] = set()
    for name in in_order(study.tables):
        table = study.tables[name]
        if table.kind != "accuracy":
            continue
        groups = {measure.group for measure in _measures(table, study)}
        if groups - shown:
            _print_table(folder / "tables" / f"{name}.csv", table, study, console)
            shown |= groups
    if shown:
        console.print(how_to_read(study, shown), style="dim")
    console.print()
    for name, path in (
        ("report", folder / "report.html"),
        ("tables", folder / "tables"),
        ("figures", folder / "figures"),
        ("provenance", provenance),
    ):
        if path.exists():
            console.print(f"{name + ':':<12}{path}", soft_wrap=True, highlight=False)


def how_to_read(study: Study, groups: Collection[str]) -> str:
    """What the numbers of some groups of measures mean."""
    parts = [
        "0 % is the model before compression; Removed: percent of its decoder's linear weights that were to go, Kept: "
        "percent that remain, counted."
    ]
    if PERPLEXITY in groups:
        parts.append("Perplexity: how surprised the model is by text that no step has read; lower is better.")
    if ACCURACY in groups:
        parts.append("Accuracy: percent of questions answered right; higher is better.")
    parts.append(f"±: one standard error. {MARK}: {BEST_RULE}.")
    if study.smoke:
        parts.append("A smoke run tells large differences apart; it does not rank close methods.")
    return " ".join(parts)


def _measures(table: RowTable, study: Study) -> list[Measure]:
    return without_lone_averages(measures_of(Context(suites=_suites(table, study)), table.tasks))


def _suites(table: RowTable, study: Study) -> dict[str, ZeroShotSuite | PerplexitySuite]:
    found = {name: study.suites[name] for name in table.suites}
    return {name: suite for name, suite in found.items() if isinstance(suite, ZeroShotSuite | PerplexitySuite)}


def _print_table(csv: Path, table: RowTable, study: Study, console: Console) -> None:
    if not csv.is_file():
        raise RankwiseError(f"{csv}: missing. Run the workflow again: it makes what is missing.")
    records = [{str(key): value for key, value in row.items()} for row in read_table(csv).to_dict(orient="records")]
    suites, measures = _suites(table, study), _measures(table, study)
    console.print(Text(table.title, style="bold"))
    limits = [suite.limit for suite in suites.values() if isinstance(suite, ZeroShotSuite) and suite.limit]
    if study.smoke or limits:
        extent = f": first {limits[0]} documents per task" if limits else ""
        console.print(Text(f"Smoke run{extent}, not a measurement.", style="yellow"))
    for group in dict.fromkeys(measure.group for measure in measures):
        # In the terminal the average and the perplexities carry their error; the full table is in the report.
        console.print(_rich_table(group, [measure for measure in measures if measure.group == group], records))


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
    alone = len(measures) == 1
    previous: tuple[Any, Any] | None = None
    for record in records:
        if record["source"] != "ours" and all(_value(record, measure) == MISSING for measure in measures):
            continue  # nothing of this group was published
        block = (record["model"], record["target_removed_percent"])
        if record["source"] == "ours":
            if previous is not None and block != previous:
                shown.add_section()
            previous = block
        best = str(record.get(BEST)).split()  # published lines have none
        values = [_value(record, measure, alone) + f" {MARK}" * (measure.key in best) for measure in measures]
        shown.add_row(
            *_leading(record, len(models) > 1), *values, style="dim italic" if record["source"] != "ours" else ""
        )
    return shown


def _leading(record: Record, several_models: bool) -> list[str]:
    ours = record["source"] == "ours"
    leading = [f"{record['target_removed_percent']} %", f"{record['kept_percent']:.1f} %"] if ours else ["", ""]
    model = [str(record["model"])] if several_models else []
    return [*model, *leading, str(record["label"])]


def _value(record: Record, measure: Measure, with_error: bool = False) -> str:
    """A value as it is printed; a perplexity and an average always have their error."""
    value, stderr = record.get(measure.key), record.get(f"{measure.key}_stderr")
    if value is None or pd.isna(value):
        return MISSING
    with_error = with_error or measure.key.endswith("average") or measure.lower_is_better
    return estimate_text(value, stderr if with_error and stderr is not None else None, measure.digits)


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    return print_folder(arguments, __doc__, show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m lowrank.progress.status results/<run>` says what of a run is done, runs, failed and is missing.

It reads the config that the run was started with, and locks, logs and records; it changes nothing, and may be asked
while the run goes on. Whether something that is done would run again, `make why` tells.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank.cluster.planned_jobs import planned_jobs, rules_in_order
from lowrank.errors import RankwiseError
from lowrank.layout import USED_CONFIG, Layout, study_of
from lowrank.progress.steps import State, Step, steps_of
from lowrank.progress.words import WITHOUT_A_WORD, duration, named
from lowrank.terminal import print_folder

STYLES = {State.RUNNING: "cyan", State.FAILED: "bold red", State.STOPPED: "yellow"}


def show(run: Path, console: Console) -> None:
    """Print the state of a run.

    Args:
        run: its folder, `results/<run>`, or the folder of one model that `make compress` has made.
        console: where to.

    Raises:
        RankwiseError: the folder holds no run, or a copy of one.
    """
    run = _of_compress(run)
    study = study_of(run)
    root, name = run.absolute().parents[1], Layout(study).run
    if (root / name).resolve() != run.resolve():
        raise RankwiseError(
            f"{run}: its config is that of {name}, so this is a copy, or renamed; a run is looked through under its "
            "own name alone."
        )
    steps = steps_of(study, root)
    counts = Counter(step.state for step in steps)
    console.print(as_table(steps, rules_in_order(planned_jobs(study))))
    console.print(
        ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state]) + f" of {len(steps)}."
    )
    for step in steps:
        if step.state in STYLES:
            console.print(_line(step), soft_wrap=True)


def _of_compress(folder: Path) -> Path:
    """The run in a folder of `make compress`, which holds one; any other folder itself."""
    inner = sorted((folder / "results").glob("*/")) if not (folder / USED_CONFIG).is_file() else []
    return inner[0] if len(inner) == 1 else folder


def as_table(steps: list[Step], rules: list[str]) -> Table:
    """The numbers of jobs by rule and state, and the time that was spent on them; a row for each of `rules`."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("rule")
    for state in State:
        table.add_column(state.value, justify="right")
    table.add_column("time", justify="right")
    for rule in rules:
        mine = [step for step in steps if step.job.rule == rule]
        counts = Counter(step.state for step in mine)
        spent = [step.seconds for step in mine if step.seconds is not None]
        cells = [Text(str(counts[state] or ""), style=STYLES.get(state, "")) for state in State]
        table.add_row(rule, *cells, duration(sum(spent)) if spent else "")
    return table


def _line(step: Step) -> Text:
    what = named(step.job.rule, step.job.wildcards)
    said = f"since {duration(step.seconds or 0)}" if step.state is State.RUNNING else step.error or WITHOUT_A_WORD
    return Text.assemble((step.state.value, STYLES[step.state]), f" {what}: {said}\n    log: {step.log}")


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    return print_folder(arguments, __doc__, show, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a compression of one's own model brought: perplexity, size and speed before and after, as a small table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lowrank.config.outputs import Row
from lowrank.config.study import Study
from lowrank.files import read_record
from lowrank.layout import Layout
from lowrank.paper.tables.rows import estimate_text

GIB, MIB = 2**30, 2**20


def outcome(study: Study, folder: Path) -> Table:
    """The rows of a study's first table beside each other.

    Args:
        study: with suites of perplexity and cost, of which there are results.
        folder: in which Snakemake has run it.

    Raises:
        RankwiseError: a result is missing or damaged.
    """
    table = next(iter(study.tables.values()))
    columns = {row.label or _called(row): _measured(study, row, folder) for row in table.rows}
    shown = Table(box=box.SIMPLE_HEAD, title=table.title, title_justify="left", title_style="bold")
    shown.add_column("")
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for measure in next(iter(columns.values())):
        shown.add_row(measure, *(values[measure] for values in columns.values()))
    return shown


def checkpoint(study: Study, folder: Path) -> Path:
    """The folder of the checkpoint that came out."""
    row = next(iter(study.tables.values())).rows[-1]
    return _place(Layout(study).compressed, row, study, folder) / "checkpoint"


def _called(row: Row) -> str:
    return "before" if not row.ratio else f"{row.method}, {row.ratio} %"


def _place(pattern: str, row: Row, study: Study, folder: Path, **more: str) -> Path:
    seed = Layout(study).seeds(row.method, row.tuning)[0]
    return folder / pattern.format(
        model=row.model, method=row.method, ratio=row.ratio, tuning=row.tuning, seed=seed, **more
    )


def _measured(study: Study, row: Row, folder: Path) -> dict[str, str]:
    """Measure -> the value of a row, as it is printed."""
    found: dict[str, dict[str, Any]] = {}
    for name, suite in study.suites.items():
        if suite.kind in ("perplexity", "cost"):
            found[suite.kind] = read_record(_place(Layout(study).evaluation, row, study, folder, suite=name))
    corpora, cost = found["perplexity"]["corpora"], found["cost"]
    parameters, speed = cost["parameters"], cost["measured"]
    removed = 1 - parameters["decoder_linears"] / parameters["decoder_linears_dense"]
    return {
        **{f"perplexity ({name})": estimate_text(of["perplexity"], of["stderr"], 2) for name, of in corpora.items()},
        "parameters": f"{parameters['total'] / 1e6:,.2f} M",
        "linear weights removed": f"{100 * removed:.1f} %",
        "size on disk": _bytes(cost["disk_bytes"]),
        "prompt, tokens/s": f"{speed['prefill_tokens_per_second']:,.0f}",
        "generation, tokens/s": f"{speed['decode_tokens_per_second']:,.1f}",
    }


def _bytes(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"

"""What a compression of one's own model brought: perplexity, size and speed before and after, as a small table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich import box
from rich.table import Table

from lowrank.config.outputs import Row
from lowrank.config.study import Study
from lowrank.config.tested import corpora_shown
from lowrank.errors import RankwiseError
from lowrank.layout import Layout
from lowrank.paper.results import load_results
from lowrank.paper.tables.rows import estimate_text
from lowrank.paper.tables.statistics import size_unit


def outcome(study: Study, folder: Path) -> Table:
    """The rows of a study's first table beside each other.

    Args:
        study: with suites of perplexity and cost, of which there are results.
        folder: in which Snakemake has run it.

    Raises:
        RankwiseError: a result is missing or damaged.
    """
    table = next(iter(study.tables.values()))
    results = load_results(folder / Layout(study).run)
    columns = {row.label or _called(row): _measured(results, row) for row in table.rows}
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
    (manifest,) = Layout(study).manifests(row)
    return folder / Path(manifest).with_name("checkpoint")


def tested_texts(study: Study) -> dict[str, str]:
    """Corpus -> its source in words, of the texts whose perplexity the first table shows."""
    corpora = corpora_shown(study, next(iter(study.tables.values())))
    return {corpus: _source_of(study, corpus) for corpus in sorted(corpora)}


def _source_of(study: Study, corpus: str) -> str:
    source, (first, end) = study.corpora[corpus].source.plain(), study.corpora[corpus].documents
    place = next(str(source[key]) for key in ("path", "pypi", "hub", "tokens") if key in source)
    file = f", {source['file']}" if source.get("file") else ""
    part = f", documents {first} to {end - 1}" if end is not None else f", documents from {first}" if first else ""
    return f"{place}{file}{part}"


def _called(row: Row) -> str:
    return "before" if not row.ratio else f"{row.method}, {row.ratio} %"


def _measured(results: pd.DataFrame, row: Row) -> dict[str, str]:
    """Measure -> the value of a row, as it is printed."""
    of_row = (results["method"] == row.method) & (results["ratio"] == row.ratio) & (results["tuning"] == row.tuning)
    mine = results[of_row & (results["model"] == row.model)].set_index("measure")
    if not {"perplexity", "disk_bytes"} <= set(mine.index):
        raise RankwiseError(f"{row.model}, {row.method}, {row.ratio} %: not evaluated yet. Run the workflow again.")
    texts = mine[mine.index == "perplexity"]
    costs = mine["value"].drop(index="perplexity")
    unit, size = size_unit(costs["disk_bytes"])
    loaded, of_weights = size_unit(costs["weight_bytes"])
    return {
        **{
            f"perplexity ({of})": estimate_text(value, stderr, 2)
            for of, value, stderr in zip(texts["of"], texts["value"], texts["stderr"], strict=True)
        },
        "parameters": f"{costs['parameters'] / 1e6:,.2f} M",
        "linear weights removed": f"{100 * (1 - costs['linears_kept']):.1f} %",
        # The model that came may be stored in another dtype than it runs in.
        "weights in memory": f"{costs['weight_bytes'] / of_weights:.2f} {loaded}",
        "size on disk": f"{costs['disk_bytes'] / size:.2f} {unit}",
        "prompt, tokens/s": f"{costs['prefill_tokens_per_second']:,.0f}",
        "generation, tokens/s": f"{costs['decode_tokens_per_second']:,.1f}",
    }

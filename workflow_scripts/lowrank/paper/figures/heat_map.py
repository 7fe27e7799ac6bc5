"""How much worse than dense some rows are on each kind of text: a line a row, a column a corpus, a panel a ratio.

The question that it answers is whether an order of methods on one kind of text holds on another. So the best row of
each column is marked, and those from which it cannot be told by differences that are paired by windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lowrank.config.suites import PerplexitySuite
from lowrank.errors import RankwiseError
from lowrank.paper.figures.comparison import refuse_equal_names
from lowrank.paper.figures.panels import DOUBLE_COLUMN, balanced, legend_below, panel_grid, write_title
from lowrank.paper.figures.style import TEXT, style
from lowrank.paper.figures.values import perplexity_over_seeds
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.differences import loss_difference
from lowrank.paper.tables.rows import evaluations_of, kept_percent, number_text

ROW_HEIGHT, AROUND_ROWS = 0.24, 0.75  # inches: of a row, and of a panel's title and the names of its corpora
LABEL_CHARACTERS, CORPUS_CHARACTERS = 24, 11
COLOURS = "cividis_r"  # even in print without colour, and to colour-blind readers
LEAST_RISE = 0.01
"""Nats per token below which colours do not differ: a rise of no more is hardly one."""
DARK = 0.55
"""Place on the scale of colours from which on text is white."""
LEVEL = 1.0
"""Standard errors of the paired difference to the best row within which a row is marked as level with it."""
BOUNDS: dict[str, Any] = {"fill": False, "edgecolor": "black", "linewidth": 1.4}
NOTES = (
    "perplexity; colour: loss above that of the dense model (nats per token, log scale)",
    "bold frame: the best of its column; thin frame: within one paired standard error of it",
)


def heat_map_frame(rows: Sequence[RowResults], suite_name: str, suite: PerplexitySuite) -> pd.DataFrame:
    """What is drawn: model, ratio, kept_percent, label, method, tuning, corpus, perplexity, `loss_rise`, `behind`,
    `behind_stderr`, `mark`.

    `loss_rise` is the loss less that of the model's dense row, `behind` less that of the best row of the same model,
    ratio and corpus, with its paired standard error, both in nats per token; `mark` is `best`, `level` or empty.

    Args:
        rows: each with its evaluations and manifests, one a seed; the dense row of each model among them.
        suite_name: the suite that judges them.
        suite: its corpora are the columns.

    Raises:
        RankwiseError: no compressed row, a model without its dense row, two rows of one name, a row that missed its
            ratio, or rows that were not judged on the same windows.
    """
    refuse_equal_names(rows)
    dense = {results.row.model: results for results in rows if not results.row.ratio}
    blocks: dict[tuple[str, int], list[RowResults]] = {}
    for results in rows:
        if results.row.ratio:
            blocks.setdefault((results.row.model, results.row.ratio), []).append(results)
    if not blocks:
        raise RankwiseError("a heat map needs at least one compressed row; write some in the figure's `rows`.")
    records = []
    for (model, _), block in blocks.items():
        if model not in dense:
            raise RankwiseError(f"a heat map needs the dense row of {model}; add it to the figure's `rows`.")
        for corpus in suite.corpora:
            records += _column(block, dense[model], suite_name, corpus)
    return pd.DataFrame(records).astype({"behind_stderr": "float64"})


def draw_heat_map(frame: pd.DataFrame, title: str, smoke: bool = False) -> Figure:
    """Draw the frame of `heat_map_frame`: a panel a model and ratio, one scale of colours for all."""
    blocks = [part for _, part in frame.groupby(["model", "ratio"], sort=False)]
    tallest = max(part["label"].nunique() for part in blocks)
    rises = frame["loss_rise"].clip(lower=LEAST_RISE)
    scale = LogNorm(float(rises.min()), max(float(rises.max()), 2 * float(rises.min())))
    with style():
        # One column of panels where rows have names of their own, else the first panel's stand for all beside it.
        shared = all(list(_labels(part)) == list(_labels(blocks[0])) for part in blocks)
        columns = min(len(blocks), 3) if shared else 1
        figure, panels = panel_grid(len(blocks), tallest * ROW_HEIGHT + AROUND_ROWS, columns)
        figure.set_figwidth(DOUBLE_COLUMN)
        several = frame["model"].nunique() > 1
        for index, (axes, part) in enumerate(zip(panels, blocks, strict=True)):
            _draw_panel(axes, part, scale, named=index % columns == 0)
            ratio = f"{part['ratio'].iloc[0]}\u00a0% removed"
            axes.set_title(f"{part['model'].iloc[0]}, {ratio}" if several else ratio)
        write_title(figure, title, smoke)
        legend_below(figure, {}, NOTES)
    return figure


def _column(block: Sequence[RowResults], dense: RowResults, suite: str, corpus: str) -> list[dict[str, Any]]:
    """One corpus of the rows of one model and ratio."""
    rises = [loss_difference(results, dense, suite, corpus).value for results in block]
    best = block[int(np.argmin(rises))]
    records = []
    for results, rise in zip(block, rises, strict=True):
        behind = loss_difference(results, best, suite, corpus)
        level = behind.stderr is not None and behind.value <= LEVEL * behind.stderr
        measured = perplexity_over_seeds(evaluations_of(results, suite, "perplexity"), corpus)
        records.append(
            {
                "model": results.row.model,
                "ratio": results.row.ratio,
                "kept_percent": kept_percent(results).value,
                "label": results.row.title,
                "method": results.row.method,
                "tuning": results.row.tuning,
                "corpus": corpus,
                "perplexity": measured["perplexity"],
                "loss_rise": rise,
                "behind": behind.value,
                "behind_stderr": behind.stderr,
                "mark": "best" if results is best else "level" if level else "",
            }
        )
    return records


def _labels(part: pd.DataFrame) -> dict[str, int]:
    return {label: index for index, label in enumerate(dict.fromkeys(part["label"]))}


def _draw_panel(axes: Axes, part: pd.DataFrame, scale: LogNorm, named: bool) -> None:
    labels = _labels(part)
    corpora = {corpus: index for index, corpus in enumerate(dict.fromkeys(part["corpus"]))}
    table = part.pivot(index="label", columns="corpus", values="loss_rise").loc[list(labels), list(corpora)]
    axes.imshow(table.clip(lower=LEAST_RISE).to_numpy(), aspect="auto", cmap=COLOURS, norm=scale)
    axes.set_xticks(range(len(corpora)), ["\n".join(wrap(name, CORPUS_CHARACTERS)) for name in corpora])
    axes.set_yticks(range(len(labels)), _shown(labels) if named else [""] * len(labels))
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for cell in part.to_dict(orient="records"):
        x, y = corpora[cell["corpus"]], labels[cell["label"]]
        dark = float(scale(max(cell["loss_rise"], LEAST_RISE))) > DARK
        text = number_text(cell["perplexity"], 1)
        axes.text(x, y, text, color="white" if dark else "black", ha="center", va="center", fontsize=TEXT)
        if cell["mark"]:
            width = BOUNDS["linewidth"] if cell["mark"] == "best" else BOUNDS["linewidth"] / 3
            axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, **BOUNDS | {"linewidth": width}))


def _shown(labels: Mapping[str, int]) -> list[str]:
    return ["\n".join(balanced(label, LABEL_CHARACTERS)) for label in labels]

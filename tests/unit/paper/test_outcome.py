"""The table that a compression of one's own model ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.config.load import check_study
from lowrank.config.outputs import Row
from lowrank.errors import RankwiseError
from lowrank.layout import Layout
from lowrank.paper.outcome import outcome
from tests.config.wrong import changed
from tests.unit.paper import paper_samples as samples
from tests.unit.paper.test_results import write

ROWS = [Row(model="smollm2-135m", method="dense"), Row(model="smollm2-135m", method="svd", ratio=20)]
STUDY = check_study(changed((("tables", "table_1", "rows"), [row.plain() for row in ROWS])), "x")


def evaluate(row: Row, folder: Path) -> None:
    run = folder / Layout(STUDY).run
    write(run, "held-out", samples.perplexity(row, 10.0 + row.ratio / 10))
    write(run, "cost", samples.cost(row, float(row.ratio)))


def test_each_measure_stands_before_and_after(tmp_path: Path) -> None:
    for row in ROWS:
        evaluate(row, tmp_path)
    measures, *columns = outcome(STUDY, tmp_path).columns
    assert [column.header for column in columns] == ["before", "svd, 20 %"]
    told = dict(zip(measures.cells, zip(*(column.cells for column in columns), strict=True), strict=True))
    assert told == {
        "perplexity (wiki_test)": ("10.00 ± 0.20", "12.00 ± 0.24"),
        "perplexity (speeches)": ("20.00 ± 0.20", "24.00 ± 0.24"),
        "parameters": ("1.20 M", "1.00 M"),
        "linear weights removed": ("0.0 %", "20.0 %"),
        "weights in memory": ("4.58 MiB", "3.81 MiB"),
        "size on disk": ("4.58 MiB", "3.82 MiB"),
        "prompt, tokens/s": ("250", "270"),
        "generation, tokens/s": ("12.5", "12.5"),
    }


def test_a_row_without_its_results_is_named(tmp_path: Path) -> None:
    evaluate(ROWS[0], tmp_path)
    with pytest.raises(RankwiseError, match="smollm2-135m, svd, 20 %: not evaluated yet"):
        outcome(STUDY, tmp_path)

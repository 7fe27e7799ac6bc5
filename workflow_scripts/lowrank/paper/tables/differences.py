"""Tables of differences: each method against the first of its model and ratio, window by window.

Two methods are tested on the same windows, and most of the spread between windows is common to both. So the standard
error of a difference is that of the paired differences, and much smaller than two separate errors suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank.config.outputs import RowTable
from lowrank.config.suites import PerplexitySuite
from lowrank.errors import RankwiseError
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import Cell, Column, Context, Line, RowResults, TableData

CLEAR = 2.0
"""Standard errors from which on a difference is marked."""


@dataclass(frozen=True)
class Difference:
    """Of the mean loss per token, in nats; positive where the reference is better.

    Attributes:
        value: loss of the row less that of the reference.
        stderr: of the mean over windows of paired differences; None with one window.
    """

    value: float
    stderr: float | None

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors."""
        return self.stderr is not None and abs(self.value) > CLEAR * self.stderr


def build_differences(table: RowTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of paired differences of the loss on held-out text.

    Raises:
        RankwiseError: results are missing or of another row, rows of one block were tested on different windows, or a
            method missed its ratio.
    """
    tested = [
        (name, corpus)
        for name, suite in context.suites.items()
        if isinstance(suite, PerplexitySuite)
        for corpus in suite.corpora
    ]
    references = _references(rows)
    lines, records = [], []
    for number, (results, starts_block) in enumerate(shared.block_starts(rows)):
        kept, reference = shared.kept_percent(results), references[results.row.model, results.row.ratio]
        texts = [*shared.leading_texts(rows, results), f"{kept.value:.1f}"]
        found = {key: paired(results, reference, *key) for key in tested}
        cells = [Cell("reference" if results is reference else _text(found[key])) for key in tested]
        lines.append(Line((*map(Cell, texts), *cells), starts_block=starts_block))
        record: dict[str, Any] = shared.record_start(results, number) | {"kept_percent": kept.value}
        record["reference"] = shared.method_title(reference)
        for (_, corpus), difference in found.items():
            record[f"{corpus}_difference"] = difference.value
            record[f"{corpus}_difference_stderr"] = difference.stderr
            record[f"{corpus}_perplexity_ratio"] = math.exp(difference.value)
        records.append(record | shared.evidence_record(results))
    leading = shared.leading_columns(rows)
    return TableData(
        title=table.title,
        notes=(
            *shared.model_note(rows),
            "Loss less that of the first method of the block, in nats per token; positive: the first is better. "
            "± is the standard error of the mean of the windows' differences; * marks more than two of them. "
            "The exponential of a difference is the ratio of perplexities.",
            *shared.seeds_note(rows),
        ),
        frame=shared.frame_of(records),
        columns=(
            *leading,
            Column("Kept (%)"),
            *(Column(corpus, group="Difference of the loss (nats per token)") for _, corpus in tested),
        ),
        lines=tuple(lines),
        heading=len(leading),
        warning=shared.smoke_warning(context.smoke),
    )


def paired(results: RowResults, reference: RowResults, suite: str, corpus: str) -> Difference:
    """The paired difference of one row and its reference on one corpus; a row's seeds are averaged first.

    Raises:
        RankwiseError: an evaluation is missing, or they were made on different windows.
    """
    one, windows = _window_losses(results, suite, corpus)
    other, same = _window_losses(reference, suite, corpus)
    if windows != same:
        raise RankwiseError(
            f"{results.place}: '{corpus}' was scored on other windows than for '{shared.method_title(reference)}', the "
            "first row of the block, so that no differences can be taken. Rows of different tokenizers cannot stand in "
            "one block; else delete the older evaluation and run the workflow again."
        )
    difference = one - other
    stderr = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else None
    return Difference(float(difference.mean()), stderr)


def _references(rows: Sequence[RowResults]) -> dict[tuple[str, int], RowResults]:
    first: dict[tuple[str, int], RowResults] = {}
    for results in rows:
        first.setdefault((results.row.model, results.row.ratio), results)
    return first


def _window_losses(results: RowResults, suite: str, corpus: str) -> tuple[np.ndarray, str]:
    """Mean loss of each window, and the hash of the windows' tokens."""
    found = [e["corpora"][corpus] for e in shared.evaluations_of(results, suite, "perplexity")]
    hashes = {result["tokens_sha256"] for result in found}
    if len(hashes) > 1:
        raise RankwiseError(f"{results.place}: its seeds were scored on different windows of '{corpus}'; run again.")
    return np.mean([result["window_nll"] for result in found], axis=0), hashes.pop()


def _text(difference: Difference) -> str:
    text = shared.estimate_text(difference.value, difference.stderr, 3)
    return f"{text} *" if difference.clear else text

"""Tables of arithmetic: what published ranks come to by the model's shape alone, beside what was published of it.

Each verdict comes from a comparison of numbers, see `_parameters` and `_macs`; no row is known by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.config.arithmetic import TOKENS, arithmetic_of
from lowrank.config.outputs import ArithmeticRow, ArithmeticTable
from lowrank.config.published import Published, find_published
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import Cell, Column, Context, Line, RowResults, TableData
from lowrank.ranks.counts import Counts

HALF_A_DIGIT = 0.005  # values are printed with two decimals
CLOSE = 0.005  # relative
EXPLAINS = 0.02  # relative
OFF_TARGET = 0.5  # percentage points
REPRODUCED, NEAR, NOT_DERIVED = "reproduced", "close", "cannot be derived"


@dataclass(frozen=True)
class Verdict:
    """How a computed number stands to the printed one.

    Attributes:
        ours, printed: in the printed unit.
        word: `reproduced`: it rounds to the printed value; `close`: it does not, but is within 0.5 %; else `cannot be
            derived`.
        reason: what a check of numbers says about a value that cannot be derived, and how ranks were converted.
    """

    ours: float
    printed: float
    word: str
    reason: str = ""

    @property
    def difference_percent(self) -> float:
        """Of the printed value."""
        return 100 * (self.ours / self.printed - 1)

    @property
    def text(self) -> str:
        """Word and reason."""
        return f"{self.word}: {self.reason}" if self.reason else self.word


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        row: of the config.
        counts: from the ranks, converted if the config says so.
        as_printed: from the ranks as they are printed; None where nothing was converted, or the model cannot have them.
        parameters, macs: billions.
    """

    row: ArithmeticRow
    counts: Counts
    as_printed: Counts | None
    parameters: Verdict
    macs: Verdict


def build_arithmetic(table: ArithmeticTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of counts from published ranks.

    Raises:
        RankwiseError: ranks and statistics of different rows, ranks that the model cannot have, or an unknown row.
    """
    published: list[Published] = []
    checks: list[Check] = []
    for index, row in enumerate(table.checks):
        place = f"table '{table.title}', checks[{index}]"
        ranks = find_published(context.published_folder, row.ranks, f"{place}.ranks")
        statistics = find_published(context.published_folder, row.statistics, f"{place}.statistics")
        published += [ranks, statistics]
        try:
            checks.append(_check(row, ranks, statistics, context.shapes))
        except RankwiseError as error:
            raise RankwiseError(f"{place}: {error}") from error
    lines = [line for index, check in enumerate(checks) for line in _lines(check, starts_block=index > 0)]
    return TableData(
        title=table.title,
        notes=_notes(checks, published),
        frame=shared.frame_of([_record(index, check) for index, check in enumerate(checks)]),
        columns=(
            Column("Model", "left"),
            Column("Removed (%)"),
            Column("Method", "left"),
            Column("Linears kept (%)"),
            Column("Quantity", "left"),
            Column("From the ranks"),
            Column("Printed"),
            Column("Difference (%)"),
            Column("Verdict", "text"),
        ),
        lines=tuple(lines),
        heading=3,
    )


def _check(row: ArithmeticRow, ranks: Published, statistics: Published, shapes: Mapping[str, ModelShape]) -> Check:
    found = arithmetic_of(row, ranks, statistics, shapes)
    return Check(
        row,
        found.counts,
        found.as_printed,
        _parameters(found.counts, found.as_printed, found.parameters, row),
        _macs(found.counts, found.macs, row),
    )


def _parameters(counts: Counts, as_printed: Counts | None, printed: float, row: ArithmeticRow) -> Verdict:
    """Judge the parameters; ranks that miss the row's own ratio are the reason where there is one."""
    ours = counts.parameters / 1e9
    word = _word(ours, printed)
    reasons = [_off_target(counts, row)] if word == NOT_DERIVED else []
    if row.units_of is not None:
        printed_so = (
            f"give {as_printed.parameters / 1e9:.2f} and keep {100 * as_printed.kept:.2f} % of the linears"
            if as_printed
            else "are none that this model can have"
        )
        reasons.append(f"ranks converted from units of {row.units_of}; as printed they {printed_so}")
    return Verdict(ours, printed, word, "; ".join(reasons))


def _macs(counts: Counts, printed: float, row: ArithmeticRow) -> Verdict:
    """Judge the multiply-accumulates; a count with q, k, v and o dense, if it comes near, says where they are from."""
    ours, other = counts.macs / 1e9, counts.macs_attention_dense / 1e9
    word = _word(ours, printed)
    if word != NOT_DERIVED:
        return Verdict(ours, printed, word)
    off = 100 * (other / printed - 1)
    reasons = [_off_target(counts, row)] if abs(_missed_by(counts, row)) > OFF_TARGET else []
    if abs(off) <= 100 * EXPLAINS:
        reasons.append(f"the printed count takes q, k, v and o for dense, which gives {other:.2f} ({off:+.1f} %)")
    else:
        reasons.append(f"not even with q, k, v and o dense, which gives {other:.2f} ({off:+.1f} %)")
    return Verdict(ours, printed, word, "; ".join(reasons))


def _word(ours: float, printed: float) -> str:
    if abs(ours - printed) <= HALF_A_DIGIT + 1e-9:
        return REPRODUCED
    return NEAR if abs(ours / printed - 1) <= CLOSE else NOT_DERIVED


def _missed_by(counts: Counts, row: ArithmeticRow) -> float:
    """Points of the linear weights that the ranks keep beyond the row's ratio."""
    return 100 * counts.kept - (100 - row.ranks.ratio)


def _off_target(counts: Counts, row: ArithmeticRow) -> str:
    if abs(_missed_by(counts, row)) > OFF_TARGET:
        return f"the ranks keep {100 * counts.kept:.2f} % of the linears, not {100 - row.ranks.ratio} %"
    return "no cause found"


def _lines(check: Check, starts_block: bool) -> list[Line]:
    row = check.row
    naming = (row.model, str(row.ranks.ratio), row.ranks.method, f"{100 * check.counts.kept:.2f}")
    quantities = {"Parameters (B)": (check.parameters, 4), f"MACs of {TOKENS} tokens (G)": (check.macs, 2)}
    lines: list[Line] = []
    for title, (verdict, digits) in quantities.items():
        texts = (
            *(naming if not lines else ("",) * len(naming)),
            title,
            f"{verdict.ours:.{digits}f}",
            f"{verdict.printed:.2f}",
            f"{verdict.difference_percent:+.2f}",
            verdict.text,
        )
        lines.append(Line(tuple(map(Cell, texts)), starts_block=starts_block and not lines))
    return lines


def _record(number: int, check: Check) -> dict[str, Any]:
    row = check.row
    record: dict[str, Any] = {
        "source": "computed",
        "row": number,
        "model": row.model,
        "method": row.ranks.method,
        "label": row.ranks.method,
        "target_removed_percent": row.ranks.ratio,
        "units_of": row.units_of,
        "kept_percent": 100 * check.counts.kept,
        "kept_percent_as_printed": 100 * check.as_printed.kept if check.as_printed else None,
        "parameters": check.counts.parameters,
        "parameters_as_printed": check.as_printed.parameters if check.as_printed else None,
        "macs": check.counts.macs,
        "macs_attention_dense": check.counts.macs_attention_dense,
    }
    for name, verdict in (("parameters", check.parameters), ("macs", check.macs)):
        record |= {
            f"{name}_printed": round(verdict.printed * 1e9),
            f"{name}_difference_percent": verdict.difference_percent,
            f"{name}_verdict": verdict.word,
            f"{name}_reason": verdict.reason,
        }
    return record | {"evidence": ""}


def _notes(checks: Sequence[Check], published: Sequence[Published]) -> tuple[str, ...]:
    verdicts = [verdict for check in checks for verdict in (check.parameters, check.macs)]
    tally = ", ".join(
        f"{sum(verdict.word == word for verdict in verdicts)} {word}" for word in (REPRODUCED, NEAR, NOT_DERIVED)
    )
    converted = [check for check in checks if check.row.units_of is not None]
    sources = {
        source.citation: f"Ranks and printed values: {source.citation}. "
        + " ".join(f"{note}." for note in source.notes)
        for source in published
    }
    return (
        f"Of {len(verdicts)} printed values: {tally}.",
        "Computed from the published ranks and the model's shape alone: no model is run. Types without a published "
        "rank are dense; biases of the low-rank form are not counted. "
        f"MACs: multiply-accumulates of a pass over {TOKENS} tokens, attention and head included.",
        f"Verdicts. {REPRODUCED}: rounds to the printed value; {NEAR}: does not, but is within {100 * CLOSE:g} %. "
        "Other values cannot be derived from the ranks; a count with q, k, v and o dense is named as the cause where "
        f"it is within {100 * EXPLAINS:g} % of the printed value, and what is left of the difference is unexplained.",
        *(
            ["Converted ranks: multiplied by the ratio of the break-even ranks m n / (m + n) of the two models."]
            * bool(converted)
        ),
        *sources.values(),
    )

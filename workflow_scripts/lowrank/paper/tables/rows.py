"""What all kinds of tables do with a row: check that its results belong to it, name it, average over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from lowrank.config.outputs import tolerance_holder
from lowrank.config.published import Published, find_published
from lowrank.errors import RankwiseError
from lowrank.paper.tables.data import Column, Context, Json, RowResults

SCIENTIFIC = 1e5  # from here on with an exponent
ERROR_DIGITS = 6  # at most, of standard errors
NAMING = ("source", "row", "model", "method", "label", "tuning", "target_removed_percent", "citation", "evidence")
"""The columns of a CSV that name a line; all others hold its values."""


@dataclass(frozen=True)
class Estimate:
    """A value with its uncertainty.

    Attributes:
        value: mean over seeds.
        stderr: standard error from the finite test set, the mean over seeds; None if the value has none.
        sd_over_seeds: standard deviation between seeds; None with one seed.
    """

    value: float
    stderr: float | None = None
    sd_over_seeds: float | None = None


def over_seeds(values: Sequence[float], stderrs: Sequence[float | None] = ()) -> Estimate:
    """Average one value over seeds.

    The seeds share one test set, so averaging over them does not shrink the test set's error: its mean is kept,
    and the spread between seeds is a number of its own. A test set of one window has no error (None).
    """
    known = [stderr for stderr in stderrs if stderr is not None]
    return Estimate(
        fmean(values),
        fmean(known) if known and len(known) == len(stderrs) else None,
        stdev(values) if len(values) > 1 else None,
    )


def evaluations_of(results: RowResults, suite: str, kind: str) -> Sequence[Json]:
    """The evaluations of a row with one suite, after a check that they are of this row and kind.

    Raises:
        RankwiseError: there are none, or one belongs to another row.
    """
    evaluations = results.evaluations.get(suite, ())
    if not evaluations:
        raise RankwiseError(f"{results.place}: no evaluation with suite '{suite}'. Run the workflow again.")
    wanted = {key: getattr(results.row, key) for key in ("model", "method", "ratio", "tuning")}
    for evaluation in evaluations:
        subject = evaluation["subject"]
        found = {key: subject[key] for key in wanted}
        if evaluation["kind"] != kind or {**found, "ratio": int(found["ratio"])} != wanted:
            raise RankwiseError(
                f"{results.place}: the evaluation '{suite}' is of kind {evaluation['kind']} for {found}, "
                f"not of kind {kind} for {wanted}. Delete it and run the workflow again."
            )
    return evaluations


def stage_of(manifest: Json) -> str:
    """Which stage wrote a manifest: `search`, `tuning` or `compression`."""
    if "variables" in manifest:
        return "search"
    return "tuning" if "training" in manifest else "compression"


def manifests_of(results: RowResults, stage: str) -> list[Json]:
    """The manifests of one stage, one a seed."""
    return [manifest for manifest in results.manifests if stage_of(manifest) == stage]


def seconds_of(results: RowResults, stage: str) -> float | None:
    """What a stage took, mean over seeds; None where there is no such stage.

    Raises:
        RankwiseError: a manifest does not say.
    """
    manifests = manifests_of(results, stage)
    if any("seconds" not in manifest for manifest in manifests):
        raise RankwiseError(f"{results.place}: the manifest of the {stage} lacks `seconds`. Delete it and run again.")
    return over_seeds([manifest["seconds"] for manifest in manifests]).value if manifests else None


def checkpoints_of(results: RowResults) -> list[Json]:
    """The manifests of the row's checkpoints, one a seed: the post-trained ones where there are any.

    Raises:
        RankwiseError: there are none.
    """
    manifests = manifests_of(results, "tuning") or manifests_of(results, "compression")
    if not manifests:
        raise RankwiseError(f"{results.place}: no manifest of the compression. Run the workflow again.")
    return manifests


def kept_percent(results: RowResults) -> Estimate:
    """Percent of the decoder's linear weights that is kept, as stored, not as asked for.

    Raises:
        RankwiseError: no manifest, or what was removed misses the target by more than the row's tolerance.
    """
    if results.row.ratio == 0:
        return Estimate(100.0)
    return target_met(results, [100 * linears_kept(manifest["parameters"]) for manifest in checkpoints_of(results)])


def target_met(results: RowResults, kept: Sequence[float]) -> Estimate:
    """Kept percent over seeds, after a check against the row's target.

    Raises:
        RankwiseError: what was removed misses the target by more than the row's tolerance.
    """
    row = results.row
    for percent in kept:
        if not row.met_by(percent):
            tolerance = max(row.tolerance_for(share) for share in kept)
            raise RankwiseError(
                f"{results.place}: {row.method} removed {100 - percent:.2f} % of the decoder's linear weights, not "
                f"{row.ratio} %. Such a row cannot stand beside others: correct the "
                "method's allocation or the ratio; or, where ranks in steps of 8 are coarse for a small model, write "
                f"`tolerance: {tolerance:g}` on the {tolerance_holder(results.place)} (now {row.tolerance:g} points)."
            )
    return over_seeds(kept)


def linears_kept(parameters: Json) -> float:
    """Share of the decoder's linear weights that is kept."""
    return float(parameters["decoder_linears"]) / float(parameters["decoder_linears_dense"])


def published_of(results: RowResults, context: Context) -> Published | None:
    """The published values that the row names, if it names any."""
    reference = results.row.published
    if reference is None:
        return None
    return find_published(context.published_folder, reference, f"{results.place}.published")


def leading_columns(rows: Sequence[RowResults]) -> tuple[Column, ...]:
    """The columns that name a line; the model only where there are several."""
    model = (Column("Model", "left"),) if several_models(rows) else ()
    return (*model, Column("Removed (%)"), Column("Method", "left"))


def leading_texts(rows: Sequence[RowResults], results: RowResults) -> tuple[str, ...]:
    """The texts of `leading_columns` for one row."""
    model = (results.row.model,) if several_models(rows) else ()
    return (*model, str(results.row.ratio), results.row.title)


def published_texts(rows: Sequence[RowResults], published: Published) -> tuple[str, ...]:
    """The texts of `leading_columns` for a line of published values."""
    return (*(("",) if several_models(rows) else ()), str(published.reference.ratio), published.title)


def several_models(rows: Sequence[RowResults]) -> bool:
    """Whether the table compares models."""
    return len({results.row.model for results in rows}) > 1


def block_starts(rows: Sequence[RowResults]) -> Iterator[tuple[RowResults, bool]]:
    """Each row, and whether it begins a block: another model or ratio than the row above."""
    previous: tuple[str, int] | None = None
    for results in rows:
        block = (results.row.model, results.row.ratio)
        yield results, previous is not None and block != previous
        previous = block


def record_start(results: RowResults, number: int) -> dict[str, Any]:
    """The first columns of a CSV line of ours; `row` numbers the rows of the table, on published lines too."""
    row = results.row
    return {
        "source": "ours",
        "row": number,
        "model": row.model,
        "method": row.method,
        "label": results.row.title,
        "tuning": row.tuning,
        "target_removed_percent": row.ratio,
    }


def published_record(published: Published, number: int) -> dict[str, Any]:
    """The first columns of a CSV line of published values; `row` is that of ours that they stand beside."""
    reference = published.reference
    return {
        "source": "published",
        "row": number,
        "model": reference.model,
        "method": reference.method,
        "label": published.title,
        "tuning": None,
        "target_removed_percent": reference.ratio,
        "citation": published.citation,
    }


def evidence_record(results: RowResults) -> dict[str, Any]:
    """The last column of a CSV line of ours: the files that its numbers come from, relative to the CSV."""
    return {"evidence": " ".join(results.evidence)}


def model_note(rows: Sequence[RowResults]) -> list[str]:
    """Names the model where no column does."""
    return [] if several_models(rows) else [f"Model: {rows[0].row.model}."]


def smoke_warning(smoke: bool, limits: Sequence[str] = ()) -> str:
    """The warning of a run that is no measurement, else nothing."""
    if not smoke:
        return ""
    return f"Smoke run{': ' if limits else ''}{', '.join(limits)}, not a measurement."


def most_seeds(rows: Sequence[RowResults]) -> int:
    """The largest number of seeds of a row."""
    return max((len(found) for results in rows for found in results.evaluations.values()), default=0)


def seeds_note(rows: Sequence[RowResults]) -> list[str]:
    """Says that values are means where some row has several seeds."""
    count = most_seeds(rows)
    return [f"Values are means over up to {count} seeds."] if count > 1 else []


def published_notes(rows: Sequence[RowResults], context: Context) -> list[str]:
    """Cites each source of published values once, with its notes."""
    found = [published for results in rows if (published := published_of(results, context)) is not None]
    notes = [
        f"Lines in italics are published values, cited and not ours, from {published.citation}. "
        + " ".join(f"{note}." for note in published.notes)
        for published in found
    ]
    return list(dict.fromkeys(note.strip() for note in notes))


def frame_of(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows of a CSV; whole numbers stay whole beside empty cells, which they would not in a typed column."""
    return pd.DataFrame(records, dtype="object")


def number_text(value: float, digits: int) -> str:
    """A rounded number; large ones lose digits that say nothing."""
    if abs(value) >= SCIENTIFIC:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    if abs(value) >= 1000:
        digits = 0
    elif abs(value) >= 100:
        digits = min(digits, 1)
    return f"{value:.{digits}f}"


def estimate_text(value: float, stderr: float | None, digits: int) -> str:
    """`62.1 ± 1.3`: a value and its standard error with as many digits; `(7.9 ± 3.6)e6` where it is very large."""
    text = number_text(value, digits)
    if stderr is None or not math.isfinite(stderr):
        return text
    mantissa, mark, exponent = text.partition("e")
    if mark:
        return f"({mantissa} ± {_error_text(stderr / 10 ** int(exponent), 1)})e{exponent}"
    return f"{text} ± {_error_text(stderr, len(text.partition('.')[2]))}"


def _error_text(stderr: float, digits: int) -> str:
    """With as many digits as its value, or as it takes to see that it is not zero."""
    texts = [f"{stderr:.{more}f}" for more in range(digits, max(digits, ERROR_DIGITS) + 1)]
    return next((text for text in texts if float(text)), texts[0])

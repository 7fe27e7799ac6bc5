"""Rows whose kept share shapes alone decide: a miss is told before anything runs, with what the next try accepts."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config.outputs import Row
from lowrank.config.study import Study
from lowrank.errors import RankwiseError
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.rows import target_met
from lowrank.ranks.budget import Budget
from tests.config.test_fit_methods import PRUNED, ROW, SHAPE, study
from tests.config.wrong import BASE, MODEL, Change, changed, errors_of

SLICED = {"kind": "slicegpt", "calibration": "c4-32"}
NAMED = {"calibration": "c4-32", "covariance": "naive"}
_TINY = {"hidden": 64, "intermediate": 64, "heads": 1, "kv_heads": 1}
SMALL: Change = ((*MODEL, "shape"), {**BASE["models"]["smollm2-135m"]["shape"], **_TINY})
"""Where 8 of 32 are a quarter, ranks keep 25 or 50 or 75 % if they are rounded down, and 8 are 1/28 of all."""
CASES: list[tuple[dict[str, Any], int, tuple[Change, ...], str, str, float, str | None]] = [
    ({**SLICED, "slice": 0.2}, 20, (), "`slice: 0.2`", "91.30", 11.4, "slice"),
    ({**SLICED, "slice": 0.3}, 30, (), "`slice: 0.3`", "79.03", 9.1, "slice"),
    ({**PRUNED, "own_ratio": 0.25}, 20, (), "`own_ratio: 0.25`", "81.88", 1.9, "own_ratio"),
    ({"kind": "svd", "rounding": "down"}, 90, (), "`rounding: down`", "9.07", 1, "rounding"),
    ({"kind": "svd", "rounding": "down"}, 40, (SMALL,), "`rounding: down`", "50.00", 10, None),
    (
        {"kind": "asvd", "calibration": "c4-32", "allocation": "uniform", "rounding": "down"},
        *(40, (SMALL,), "`rounding: down`", "50.00", 10, None),
    ),
    ({"kind": "lord", **NAMED, "rounding": "down"}, 40, (SMALL,), "`rounding: down`", "51.34", 8.7, None),
    ({"kind": "svd"}, 20, (SMALL,), "by the shapes alone, it", "78.57", 1.5, None),
]


@pytest.mark.parametrize(("method", "ratio", "changes", "keeper", "kept", "tolerance", "leave_out"), CASES)
def test_a_miss_is_told_with_what_the_next_try_accepts(
    method: dict[str, Any],
    ratio: int,
    changes: tuple[Change, ...],
    keeper: str,
    kept: str,
    tolerance: float,
    leave_out: str | None,
) -> None:
    found = study(method, ratio, *changes, tolerance=0.1)
    cure = f"write `tolerance: {tolerance:g}` on the row" + (f", or leave out `{leave_out}`" if leave_out else "")
    assert found == [
        f"{ROW}: {keeper} keeps {kept} % of the decoder's linear weights where {100 - ratio} % are asked for, give or "
        f"take 0.1 points; {cure} (`methods.other`, {SHAPE})"
    ]
    assert study(method, ratio, *changes, tolerance=tolerance) == []
    assert study(method, ratio, *changes, tolerance=round(tolerance - 0.1, 1)) != []
    if leave_out:
        assert study({key: value for key, value in method.items() if key != leave_out}, ratio, *changes) == []


def test_a_figure_tells_it_as_a_table_does() -> None:
    drawn = ("figures", "figure_3")
    changes: list[Change] = [SMALL, ((*drawn, "methods"), ["svd"]), ((*drawn, "ratios"), [20])]
    rows = [
        {"model": "smollm2-135m", "method": method, "ratio": 20, "tolerance": 0.1} for method in ("svd", "bolaco-5x1")
    ]
    compared = {"kind": "comparison", "title": "C", "suite": "held-out", "rows": rows}
    found = errors_of(changed(*changes, (("figures", "compared"), compared)))
    told = sorted(line for line in found if line.startswith("figures.") and "it keeps 78.57 %" in line)
    assert [line.partition(":")[0] for line in told] == ["figures.compared.rows[0].ratio", "figures.figure_3.ratios[0]"]
    assert "give or take 0.1 points; write `tolerance: 1.5` on the row" in told[0]
    assert "give or take 0.5 points; write `tolerance: 1.5` on the figure" in told[1]
    mended = errors_of(changed(*changes, ((*drawn, "tolerance"), 1.5)))
    assert not any(line.startswith("figures.figure_3.ratios") for line in mended)


def test_rows_that_shapes_do_not_decide_are_left_to_their_table() -> None:
    assert study({"kind": "asvd", "calibration": "c4-32"}, 40, SMALL, tolerance=0) == []
    assert study({"kind": "flap", "calibration": "c4-32"}, 20, SMALL, tolerance=0) == []


def test_leaving_out_a_key_is_offered_only_if_all_rows_of_the_preset_could_stand_it() -> None:
    """Without `slice` the row of 90 % would be out of reach."""
    rows = [
        {"model": "smollm2-135m", "method": "other", "ratio": ratio, "tolerance": tolerance}
        for ratio, tolerance in ((20, 0.5), (90, 90))
    ]
    raw = changed((("methods", "other"), {**SLICED, "slice": 0.2}), (("tables", "table_7", "rows"), rows), SMALL)
    (message,) = [line for line in errors_of(raw) if "methods.other" in line]
    assert "write `tolerance: " in message
    assert "leave out" not in message


def test_every_row_that_misses_is_told_at_once() -> None:
    row = {"model": "smollm2-135m", "method": "other", "ratio": 20}
    method = (("methods", "other"), {**SLICED, "slice": 0.2})
    raw = changed(method, *((("tables", name, "rows", 1), row) for name in ("table_7", "times")))
    assert [line.split(":")[0] for line in errors_of(raw)] == [
        f"tables.{name}.rows[1].ratio" for name in ("table_7", "times")
    ]


def test_the_quickstarts_rows_meet_their_ratio_by_far() -> None:
    checked = Study.model_validate(BASE)
    budget = Budget.of(checked.models["smollm2-135m"].shape)
    for name in ("svd", "lord"):
        kept = checked.method(name).kept_parameters(budget, 20)
        assert kept is not None
        assert abs(100 * kept / budget.dense_parameters - 80) < 0.1


@given(st.integers(1, 90), st.floats(0, 100))
def test_the_tolerance_that_is_written_is_the_smallest_tenth_that_the_table_accepts(ratio: int, kept: float) -> None:
    row = Row(model="m", method="x", ratio=ratio, tolerance=0)
    tolerance = row.tolerance_for(kept)
    assert re.fullmatch(r"\d+(\.\d)?", f"{tolerance:g}")
    for given_row, fits in ((row.model_copy(update={"tolerance": tolerance}), True), (row, tolerance == 0)):
        assert given_row.met_by(kept) == fits
        if fits:
            target_met(RowResults(given_row), [kept])
        else:
            with pytest.raises(RankwiseError, match=f"`tolerance: {tolerance:g}`"):
                target_met(RowResults(given_row), [kept])
            for place, holder in (("figures.f.methods (x, 20 %)", "figure"), ("figures.f.rows[0]", "row")):
                with pytest.raises(RankwiseError, match=f"`tolerance: {tolerance:g}` on the {holder}"):
                    target_met(RowResults(given_row, place=place), [kept])
    if tolerance:
        assert not row.model_copy(update={"tolerance": tolerance - 0.1}).met_by(kept)

"""Tables of arithmetic: verdicts follow from numbers, whatever the rows are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank.config.outputs import ArithmeticTable
from lowrank.errors import RankwiseError
from lowrank.paper.render import to_csv, to_html, to_latex, to_markdown
from lowrank.paper.tables import Context, TableData, build_table
from lowrank.ranks.counts import count, module_ranks
from tests.unit.ranks.test_counts import LLAMA_7B, LLAMA_13B

PUBLISHED = Path(__file__).parents[4] / "config" / "published"
SHAPES = {"llama-2-7b": LLAMA_7B, "llama-2-13b": LLAMA_13B}
RANKS = {"qk": 744, "o": 1616, "gate": 2512, "up": 2408, "down": None}


def check(model: str = "llama-2-7b", method: str = "bolaco-5x1", ratio: int = 20, **changes: Any) -> dict[str, Any]:
    row = {"model": model, "method": method, "ratio": ratio}
    return {"model": model, "ranks": {"file": "table_8", **row}, "statistics": {"file": "table_7", **row}, **changes}


def build(*checks: dict[str, Any], folder: Path = PUBLISHED) -> TableData:
    table = ArithmeticTable(kind="arithmetic", title="Title", checks=list(checks))
    return build_table(table, [], Context(shapes=SHAPES, published_folder=folder))


def records(*checks: dict[str, Any], folder: Path = PUBLISHED) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in build(*checks, folder=folder).frame.to_dict("records")]


def made_up(folder: Path, parameters: float, macs: float, **ranks: float | None) -> Path:
    """A folder of published values with one row, called `x`."""
    shown = {name: "NA" if rank is None else rank for name, rank in (RANKS | ranks).items()}
    (folder / "ranks.csv").write_text(
        f"# source: nobody\nmodel,ratio,method,{','.join(shown)}\nx,20,x,{','.join(map(str, shown.values()))}\n"
    )
    (folder / "statistics.csv").write_text(
        "# source: nobody\n# Made up\nmodel,ratio,method,parameters_billion,macs_giga\n"
        f"x,20,x,{parameters:.2f},{macs:.2f}\n"
    )
    return folder


def of_x(**changes: Any) -> dict[str, Any]:
    row = {"model": "x", "method": "x", "ratio": 20}
    ranks, statistics = {"file": "ranks", **row}, {"file": "statistics", **row}
    return {"model": "llama-2-7b", "ranks": ranks, "statistics": statistics, **changes}


def test_the_published_rows_of_the_paper() -> None:
    rows = [("bolaco-5x1", 20), ("bolaco-5x1", 30), ("bolaco-5x4", 20), ("bolaco-5x4", 30)]
    found = records(*(check(method=method, ratio=ratio) for method, ratio in rows))
    assert found[0]["parameters"] == 5_433_790_464
    assert found[0]["kept_percent"] == pytest.approx(79.854, abs=5e-4)
    assert [row["parameters_verdict"] for row in found] == ["close", "reproduced", "cannot be derived", "close"]
    assert "keep 81.95 % of the linears, not 80 %" in found[2]["parameters_reason"]
    assert {row["macs_verdict"] for row in found} == {"cannot be derived"}
    assert [round(row["macs"] / 1e9, 1) for row in found[:2]] == [340.4, 299.3]
    assert all("takes q, k, v and o for dense" in row["macs_reason"] for row in found)
    assert "391.43 (+0.6 %)" in found[0]["macs_reason"]


def test_ranks_in_the_units_of_another_model_are_converted() -> None:
    converted = check("llama-2-13b", units_of="llama-2-7b")
    first, second = records(converted, check("llama-2-13b"))
    assert (first["parameters_verdict"], second["parameters_verdict"]) == ("close", "cannot be derived")
    assert first["kept_percent"] == pytest.approx(79.9, abs=0.05)
    assert first["kept_percent_as_printed"] == second["kept_percent"] == pytest.approx(70.0, abs=0.05)
    assert first["parameters_as_printed"] == second["parameters"]
    assert "converted from units of llama-2-7b; as printed they give 9.21" in first["parameters_reason"]
    assert "keep 69.99 % of the linears, not 80 %" in second["parameters_reason"]
    notes = [any("Converted ranks" in note for note in build(row).notes) for row in (converted, check("llama-2-13b"))]
    assert notes == [True, False]


def test_verdicts_know_no_names(tmp_path: Path) -> None:
    """The same numbers under other names, and other numbers under one name."""
    counts = count(LLAMA_7B, module_ranks([RANKS], LLAMA_7B), 64)
    parameters, macs, dense = counts.parameters / 1e9, counts.macs / 1e9, counts.macs_attention_dense / 1e9
    for printed, expected in (
        ((parameters, macs), ("reproduced", "reproduced")),
        ((parameters * 1.004, macs * 0.996), ("close", "close")),
        ((parameters * 1.006, macs * 0.994), ("cannot be derived", "cannot be derived")),
    ):
        (found,) = records(of_x(), folder=made_up(tmp_path, *printed))
        assert (found["parameters_verdict"], found["macs_verdict"]) == expected
        assert found["parameters_printed"] == round(printed[0] * 1e9, -7)
    for printed_macs, reason in (
        (dense, "the printed count takes q, k, v and o for dense"),
        (dense * 1.019, "the printed count takes q, k, v and o for dense"),
        (dense * 1.03, "not even with q, k, v and o dense"),
    ):
        (found,) = records(of_x(), folder=made_up(tmp_path, parameters, printed_macs))
        assert found["macs_reason"].startswith(reason)


def test_a_ratio_that_the_ranks_miss_is_the_reason_only_where_they_miss_it(tmp_path: Path) -> None:
    (found,) = records(of_x(), folder=made_up(tmp_path, 5.30, 340.0))
    assert found["parameters_reason"] == "no cause found"
    (found,) = records(of_x(), folder=made_up(tmp_path, 5.30, 340.0, up=None))
    assert "of the linears, not 80 %" in found["parameters_reason"]
    assert "of the linears, not 80 %" in found["macs_reason"]


def test_the_shown_table_names_each_row_once_and_counts_verdicts() -> None:
    table = build(check(), check(ratio=30))
    texts = [[cell.text for cell in line.cells] for line in table.lines]
    assert texts[0] == ["llama-2-7b", "20", "bolaco-5x1", "79.85", "Parameters (B)", "5.4338", "5.44", "-0.11", "close"]
    assert texts[1][:8] == ["", "", "", "", "MACs of 64 tokens (G)", "340.43", "388.95", "-12.47"]
    assert [line.starts_block for line in table.lines] == [False, False, True, False]
    assert table.notes[0] == "Of 4 printed values: 1 reproduced, 1 close, 2 cannot be derived."
    assert {line.source for line in table.lines} == {"ours"}
    for text in (to_csv(table), to_markdown(table), to_latex(table, "t"), to_html(table, "t")):
        assert "391.43" in text


def test_ranks_and_statistics_must_be_of_one_row() -> None:
    with pytest.raises(RankwiseError, match=r"checks\[0\]: the ranks are of method 'bolaco-5x1', .* 'lord'"):
        build(check(statistics={"file": "table_7", "model": "llama-2-7b", "method": "lord", "ratio": 20}))


def test_statistics_without_the_counts_are_refused() -> None:
    row = {"file": "table_1", "model": "llama-2-7b", "method": "bolaco-5x1", "ratio": 20}
    with pytest.raises(RankwiseError, match=r"checks\[0\]: .* prints no `parameters_billion`"):
        build(check(statistics=row))


def test_ranks_that_are_no_smaller_than_the_matrix_are_refused_with_a_hint() -> None:
    narrow = LLAMA_7B.model_copy(update={"hidden": 1024, "heads": 8})
    shapes = SHAPES | {"narrow": narrow}
    table = ArithmeticTable(kind="arithmetic", title="Title", checks=[check() | {"model": "narrow"}])
    with pytest.raises(RankwiseError, match=r"'Title', checks\[0\]: rank 744 of .*q_proj .*`units_of: llama-2-7b or"):
        build_table(table, [], Context(shapes=shapes, published_folder=PUBLISHED))


def test_ranks_that_only_their_conversion_makes_possible() -> None:
    """Ranks of a wide model mean the same shares of a narrow one, which cannot have them as they are printed."""
    narrow = LLAMA_7B.model_copy(update={"hidden": 1024, "heads": 8})
    table = ArithmeticTable(
        kind="arithmetic", title="Title", checks=[check() | {"model": "narrow", "units_of": "llama-2-7b"}]
    )
    built = build_table(table, [], Context(shapes=SHAPES | {"narrow": narrow}, published_folder=PUBLISHED))
    (found,) = built.frame.to_dict("records")
    assert found["parameters_as_printed"] is None
    assert "as printed they are none that this model can have" in found["parameters_reason"]
    assert any("Converted ranks" in note for note in built.notes)

"""Tables: the right number in the right cell, published values apart, and results of another row refused."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config.outputs import PublishedRow, Row, RowTable
from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.model.families import linear_modules
from lowrank.paper.render import to_markdown
from lowrank.paper.tables import Context, RowResults, TableData, build_table
from lowrank.paper.tables.allocations import group_layers, layer_ranks
from tests.unit.paper.paper_samples import (
    COST,
    PERPLEXITY,
    SHAPE,
    TASKS,
    ZERO_SHOT,
    context,
    dense_results,
    manifest,
    row_results,
    uniform_ranks,
)

PUBLISHED = Path(__file__).parents[4] / "config" / "published"


def build(kind: str, rows: list[RowResults], given_context: Context | None = None) -> TableData:
    table = RowTable(kind=kind, title="Title", rows=[results.row for results in rows])
    return build_table(table, rows, given_context or context())


def shown(table: TableData, line: int) -> dict[str, str]:
    return {column.title: cell.text for column, cell in zip(table.columns, table.lines[line].cells, strict=True)}


def with_published(results: RowResults, **reference: object) -> RowResults:
    cited = PublishedRow(**{"file": "table_1", "model": "llama-2-7b", "method": "lord", "ratio": 20, **reference})
    return replace(results, row=results.row.model_copy(update={"published": cited}))


# --- accuracy -------------------------------------------------------------------------------------------------


def test_accuracy_shows_percent_with_standard_error_and_the_true_share() -> None:
    table = build("accuracy", [dense_results(), row_results(0.5, removed=20.3)])
    line = shown(table, 1)
    assert line["BoolQ"] == "50.0 ± 1.0"
    assert line["OBQA"] == "56.0 ± 1.6"
    assert line["Average"] == "53.0 ± 1.2"
    assert line["wiki_test"] == "20.00 ± 0.40"
    assert (line["Removed (%)"], line["Kept (%)"]) == ("20", "79.7")


def test_the_csv_holds_value_error_and_documents_apart() -> None:
    frame = build("accuracy", [row_results(0.123456789)]).frame
    (record,) = frame.to_dict(orient="records")
    assert record["boolq"] == pytest.approx(12.3456789, abs=1e-9)
    assert (record["boolq_stderr"], record["boolq_documents"], record["boolq_documents_of"]) == (1.0, 20, 1000)
    assert record["hellaswag_metric"] == "acc_norm"
    assert record["wiki_test_perplexity"] == 10 / 0.123456789
    assert record["evidence"] == "../evaluation/a/zs.json ../evaluation/a/ppl.json"
    assert record["source"] == "ours"


def test_an_accuracy_that_a_blind_guess_has_is_marked() -> None:
    for blind, text in ((0.47, "51.0 ± 1.0 †"), (0.45, "51.0 ± 1.0")):  # two standard errors of the guess are 0.04
        results = row_results(0.5, seeds=3)
        for seed, evaluation in enumerate(results.evaluations["zs"]):
            evaluation["tasks"]["boolq"] |= {"blind": blind + seed / 100, "blind_stderr": 0.02, "auc": 0.6 + seed / 10}
        table = build("accuracy", [results, dense_results()])
        assert shown(table, 0)["BoolQ"] == text
        assert shown(table, 1)["BoolQ"] == "60.0 ± 1.0", "of this row no guess is known"
        assert any(note.startswith("†") for note in table.notes) == ("†" in text)
        record = table.frame.to_dict(orient="records")[0]
        assert record["boolq_blind"] == pytest.approx(100 * blind + 1)
        assert (record["boolq_blind_stderr"], record["boolq_auc"]) == pytest.approx((2, 70))


def test_a_task_that_the_dense_model_cannot_do_either_is_named() -> None:
    dense, compressed = dense_results(), row_results(0.5)
    compressed.evaluations["zs"][0]["tasks"]["boolq"]["blind"] = 0.5
    assert not [note for note in build("accuracy", [dense, compressed]).notes if "dense models themselves" in note]
    dense.evaluations["zs"][0]["tasks"]["boolq"]["blind"] = 0.6
    assert [note for note in build("accuracy", [dense, compressed]).notes if "(tiny on BoolQ)" in note]


def test_the_best_compressed_value_of_each_ratio_is_marked() -> None:
    rows = [
        dense_results(0.9),
        row_results(0.8, method="lord"),
        row_results(0.7, method="svd"),
        row_results(0.6, method="lord", ratio=30),
    ]
    best = [[cell.best for cell in line.cells[3:]] for line in build("accuracy", rows).lines]
    assert not any(best[0]), "the dense row is no candidate"
    assert all(best[1]), "highest accuracy and lowest perplexity"
    assert not any(best[2])
    assert not any(best[3]), "one row alone is not the best of anything"
    named = [str(value).split() for value in build("accuracy", rows).frame["best"]]
    assert named == [[], ["wiki_test_perplexity", "speeches_perplexity", *TASKS, "average"], [], []]


def test_an_average_of_one_task_is_no_column() -> None:
    one = ZeroShotSuite(kind="zero-shot", tasks={"arc_easy": "acc"})
    table = build("accuracy", [dense_results(), row_results()], context(suites={"zs": one}))
    assert [column.title for column in table.columns] == ["Removed (%)", "Method", "Kept (%)", "ARC-e"]
    assert "Zero-shot accuracy by lm-eval: acc for ARC-e." in table.notes
    assert "average" in table.frame.columns, "the CSV is complete"


@pytest.mark.parametrize(("removed", "competes"), [(19.5, True), (19.0, True), (18.9, False), (9.0, False)])
def test_a_row_that_keeps_much_more_than_its_target_does_not_compete(removed: float, competes: bool) -> None:
    rows = [
        row_results(0.8, removed, method="svd", tolerance=20),
        row_results(0.7, method="lord", label="LoRD"),
        row_results(0.6, 23, method="afm", tolerance=20),
    ]
    table = build("accuracy", rows)
    best = [[cell.best for cell in line.cells[3:]] for line in table.lines]
    assert all(best[0 if competes else 1])
    assert not any(best[1 if competes else 0] + best[2])
    told = "No value in bold for rows that keep more than a point above the target: svd at 20 %."
    assert (told in table.notes) == (not competes)


def test_where_one_row_is_left_to_compare_it_is_not_the_best_of_anything() -> None:
    rows = [
        row_results(0.9, 9, method="svd", tolerance=20, model="other"),
        row_results(0.5, model="other"),
        dense_results(),
    ]
    table = build("accuracy", rows)
    assert not any(cell.best for line in table.lines for cell in line.cells)
    assert [note for note in table.notes if note.endswith("above the target: svd at 20 % (other).")]


def test_seeds_are_averaged_and_their_spread_is_kept_apart() -> None:
    (record,) = build("accuracy", [row_results(0.5, seeds=3)]).frame.to_dict(orient="records")
    values = [50.0, 51.0, 52.0]
    assert record["boolq"] == pytest.approx(statistics.mean(values))
    assert record["boolq_sd_over_seeds"] == pytest.approx(statistics.stdev(values))
    assert record["boolq_stderr"] == pytest.approx(1.0), "the test set's error does not shrink with seeds"
    assert record["seeds"] == 3


def test_one_seed_has_no_spread() -> None:
    assert not [name for name in build("accuracy", [row_results()]).frame.columns if "sd_over_seeds" in name]


def test_rows_are_named_by_label_and_post_training() -> None:
    rows = [row_results(label="LoRD"), row_results(tuning="alpaca"), row_results(label="LoRD", tuning="alpaca")]
    assert [shown(build("accuracy", rows), i)["Method"] for i in range(3)] == ["LoRD", "lord + alpaca", "LoRD + alpaca"]


def test_a_column_names_the_model_where_there_are_several() -> None:
    rows = [row_results(), row_results(model="other")]
    assert shown(build("accuracy", rows), 1)["Model"] == "other"
    assert "Model" not in shown(build("accuracy", rows[:1]), 0)


def test_published_values_stand_in_lines_of_their_own() -> None:
    table = build("accuracy", [with_published(row_results())], context(published_folder=PUBLISHED))
    assert [line.source for line in table.lines] == ["ours", "published"]
    line = shown(table, 1)
    assert (line["BoolQ"], line["Average"], line["wiki_test"], line["Kept (%)"]) == ("72.6", "60.3", "–", "")
    assert line["Method"] == "published: llama-2-7b, lord"
    ours, theirs = table.frame.to_dict(orient="records")
    assert (ours["source"], theirs["source"], theirs["boolq"]) == ("ours", "published", 72.60)
    assert "arXiv:2405.10616" in theirs["citation"]
    assert any("italics are published values" in note for note in table.notes)


def test_a_published_average_over_other_tasks_is_not_shown() -> None:
    fewer = ZeroShotSuite(kind="zero-shot", tasks={name: TASKS[name] for name in list(TASKS)[:3]})
    given_context = context(suites={"zs": fewer}, published_folder=PUBLISHED)
    line = shown(build("accuracy", [with_published(row_results())], given_context), 1)
    assert (line["BoolQ"], line["Average"]) == ("72.6", "–")


def test_published_values_never_count_as_best() -> None:
    rows = [with_published(row_results(0.8)), row_results(0.7, method="svd")]
    lines = build("accuracy", rows, context(published_folder=PUBLISHED)).lines
    assert not any(cell.best for cell in lines[1].cells)
    assert all(cell.best for cell in lines[0].cells[3:])


def test_a_limit_on_documents_is_said_in_the_caption() -> None:
    limited = ZERO_SHOT.model_copy(update={"limit": 20})
    table = build("accuracy", [row_results()], context(suites={"zs": limited}, smoke=True))
    assert table.caption == "Title. Smoke run: first 20 documents per task, not a measurement."
    assert build("accuracy", [row_results()]).caption == "Title"


def test_a_name_that_two_suites_share_is_told_apart() -> None:
    longer = PerplexitySuite(kind="perplexity", corpora=["wiki_test"], length=512)
    rows = [row_results()]
    rows[0].evaluations["long"] = rows[0].evaluations["ppl"]  # type: ignore[index]
    frame = build("accuracy", rows, context(suites={"ppl": PERPLEXITY, "long": longer})).frame
    assert {"ppl.wiki_test_perplexity", "long.wiki_test_perplexity", "speeches_perplexity"} <= set(frame.columns)


def test_tasks_that_two_suites_share_are_told_apart_in_markdown() -> None:
    rows = [row_results()]
    rows[0].evaluations["again"] = rows[0].evaluations["zs"]  # type: ignore[index]
    heading = to_markdown(build("accuracy", rows, context(suites={"zs": ZERO_SHOT, "again": ZERO_SHOT})))
    for title in ("BoolQ (zs)", "BoolQ (again)", "Average (zs)", "Average (again)"):
        assert heading.count(f" {title} ") == 1


def test_a_row_that_missed_its_ratio_is_refused() -> None:
    build("accuracy", [row_results(removed=20.5)])
    counted = {"cost": COST}
    for kind, suites in (("accuracy", None), ("statistics", counted), ("times", counted), ("allocations", {})):
        given_context = context() if suites is None else context(suites=suites)
        with pytest.raises(RankwiseError, match=r"tables\.t\.rows\[0\]: lord removed 20\.60 % .* not 20 %"):
            build(kind, [row_results(removed=20.6)], given_context)


def test_the_ratio_of_every_seed_counts() -> None:
    row = Row(model="tiny", method="lord", ratio=20)
    results = replace(row_results(seeds=2), manifests=[manifest(row, 18, 0), manifest(row, 22, 1)])
    with pytest.raises(RankwiseError, match=r"removed 18\.00 %"):
        build("accuracy", [results])


def test_results_of_another_row_are_refused() -> None:
    results = replace(row_results(), evaluations=row_results(method="svd").evaluations)
    with pytest.raises(RankwiseError, match=r"tables\.t\.rows\[0\]: the evaluation 'ppl' .*'svd'"):
        build("accuracy", [results])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (replace(row_results(), evaluations={}), "no evaluation with suite 'ppl'"),
        (replace(row_results(), manifests=[]), "no manifest of the compression"),
    ],
)
def test_missing_results_are_named(broken: RowResults, message: str) -> None:
    with pytest.raises(RankwiseError, match=message):
        build("accuracy", [broken])


def test_a_row_may_come_with_the_manifest_of_its_post_trained_checkpoint_only() -> None:
    results = row_results(tuning="alpaca")
    tuned = {**manifest(results.row, 20.25), "training": {}}
    line = shown(build("accuracy", [replace(results, manifests=[tuned])]), 0)
    assert line["Kept (%)"] == "79.8"
    assert shown(build("allocations", [replace(results, manifests=[tuned])], context(suites={})), 0)["o"] == "20"


def test_a_perplexity_of_one_window_has_no_error() -> None:
    results = row_results()
    results.evaluations["ppl"][0]["corpora"]["wiki_test"]["stderr"] = None
    table = build("accuracy", [results])
    assert shown(table, 0)["wiki_test"] == "20.00"
    assert table.frame["wiki_test_perplexity_stderr"].isna().all()


# --- statistics and times ---------------------------------------------------------------------------------------


def test_statistics_are_exact_counts_in_fitting_units() -> None:
    table = build("statistics", [dense_results(), row_results()], context(suites={"cost": COST}))
    line = shown(table, 1)
    assert line["Parameters (M)"] == "1.00"
    assert line["Kept of linears (%)"] == "80.0"
    assert line["Weights (MiB)"] == f"{4e6 / 2**20:.2f}"
    record = table.frame.to_dict(orient="records")[1]
    assert (record["parameters"], record["macs"], record["disk_bytes"]) == (1_000_000, 64_000_000, 4_001_000)
    assert all(isinstance(record[key], int) for key in ("parameters", "macs", "weight_bytes", "disk_bytes"))
    assert any("over 64 tokens" in note for note in table.notes)


def test_published_statistics_are_shown_in_our_units() -> None:
    rows = [with_published(row_results(), file="table_7")]
    table = build("statistics", rows, context(suites={"cost": COST}, published_folder=PUBLISHED))
    assert [note for note in table.notes if "a table shows them in the units of its columns." in note]
    assert shown(table, 1) == {
        "Removed (%)": "20",
        "Method": "published: llama-2-7b, lord",
        "Parameters (M)": "5450.00",
        "Kept of linears (%)": "–",
        "MACs (G)": "370.12",
        "Weights (MiB)": f"{10.32 * 1024:.2f}",
        "On disk (MiB)": "–",
    }


def test_times_take_each_stage_from_its_manifest() -> None:
    results = row_results(method="bolaco")
    search = {"variables": {}, "ranks": {}, "seconds": 70.0}
    tuning = {**manifest(results.row, 20), "training": {}, "seconds": 30.0}
    table = build(
        "times",
        [dense_results(), replace(results, manifests=[*results.manifests, search, tuning])],
        context(suites={"cost": COST}),
    )
    line = shown(table, 1)
    assert (line["Search (s)"], line["Compression (s)"], line["Post-training (s)"]) == ("70.0", "4.0", "30.0")
    assert (line["Prefill (tokens/s)"], line["Peak host (MiB)"]) == ("270.0", "812.5")
    assert shown(table, 0)["Search (s)"] == "–"
    assert any("Measured on: cpu, 2 threads" in note for note in table.notes)


def test_a_peak_that_one_seed_has_is_none_of_the_row() -> None:
    results = row_results(seeds=2)
    results.evaluations["cost"][0]["measured"]["peak_mib"] = {"host": 800.0, "gpu": 70.0}
    line = shown(build("times", [results], context(suites={"cost": COST})), 0)
    assert "Peak gpu (MiB)" not in line
    assert line["Peak host (MiB)"] == "806.2"


def test_a_manifest_without_seconds_is_refused() -> None:
    results = replace(row_results(), manifests=[{"variables": {}}])
    with pytest.raises(RankwiseError, match="manifest of the search lacks `seconds`"):
        build("times", [results], context(suites={"cost": COST}))


# --- allocations ------------------------------------------------------------------------------------------------


def ranks_by_layer(rank_of_layer: list[int]) -> dict[str, int | None]:
    ranks = uniform_ranks(1)
    return {name: None if rank is None else rank_of_layer[int(name.split(".")[2])] for name, rank in ranks.items()}


def test_layers_with_equal_ranks_share_a_line() -> None:
    results = replace(row_results(), manifests=[manifest(row_results().row, 20, 0, ranks_by_layer([9, 9, 9, 7]))])
    table = build("allocations", [dense_results(), results], context(suites={}))
    assert [shown(table, i)["Layers"] for i in range(3)] == ["0–3", "0–2", "3"]
    assert [shown(table, i)["down"] for i in range(3)] == ["NA", "9", "7"]
    assert [shown(table, i)["v"] for i in range(3)] == ["NA"] * 3
    assert table.frame[["first_layer", "last_layer", "rank_down"]].values.tolist()[1:] == [[0, 2, 9], [3, 3, 7]]


def test_tied_types_share_a_column_and_differ_in_it_under_grouped_queries() -> None:
    ranks = {name: 5 if "k_proj" in name else rank for name, rank in uniform_ranks(20).items()}
    table = build(
        "allocations",
        [replace(row_results(), manifests=[manifest(row_results().row, 20, 0, ranks)])],
        context(suites={}),
    )
    assert shown(table, 0)["q/k"] == "20/5"


def test_each_seed_has_its_own_allocation() -> None:
    table = build("allocations", [row_results(seeds=2)], context(suites={}))
    assert [shown(table, i)["Method"] for i in range(2)] == ["lord, seed 0", "lord, seed 1"]


def test_families_share_a_table_and_lack_each_others_types() -> None:
    shape = SHAPE.model_copy(update={"family": "opt", "kv_heads": 4})
    ranks = {module.name: 8 for module in linear_modules(shape)}
    opt = row_results(model="opt")
    rows = [row_results(), replace(opt, manifests=[manifest(row_results().row, 20, 0) | {"ranks": ranks}])]
    table = build("allocations", rows, context(suites={}, shapes={"tiny": SHAPE, "opt": shape}))
    assert [(shown(table, i)["gate"], shown(table, i)["fc1"], shown(table, i)["v"]) for i in range(2)] == [
        ("20", "–", "NA"),
        ("–", "8", "8"),
    ]
    assert table.frame["rank_fc1"].tolist() == [None, 8]


def test_published_ranks_stand_beside_ours() -> None:
    rows = [with_published(row_results(), file="table_8", method="bolaco-5x4")]
    table = build("allocations", rows, context(suites={}, published_folder=PUBLISHED))
    assert [shown(table, i)["Layers"] for i in range(1, 5)] == [f"group {group}" for group in range(1, 5)]
    first = shown(table, 1)
    assert (first["q/k"], first["o"], first["up"], first["v"]) == ("1680", "1728", "NA", "–")


def test_a_rank_for_a_module_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(RankwiseError, match=r"'model\.layers\.9\.mlp\.up_proj', which the model does not have"):
        layer_ranks({"model.layers.9.mlp.up_proj": 3}, SHAPE, "x")


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_groups_of_layers_cover_each_layer_once_and_cannot_be_merged(ranks: list[int]) -> None:
    groups = group_layers([{"q": rank} for rank in ranks])
    covered = [layer for (first, last), _ in groups for layer in range(first, last + 1)]
    assert covered == list(range(len(ranks)))
    assert all(ranks[layer] == found["q"] for (first, last), found in groups for layer in range(first, last + 1))
    assert all(left[1] != right[1] for left, right in pairwise(groups))

"""What would be found after hours of jobs only, or never: tables without room; tasks, layers and metrics not there."""

from __future__ import annotations

from pathlib import Path

from lowrank.config.load import check_study
from lowrank.config.suites import METRICS
from lowrank.config.used import used_entries
from tests.config.wrong import BASE, Change, changed, errors_of


def test_tables_show_what_they_have_room_for() -> None:
    again: Change = (("suites", "cost-again"), BASE["suites"]["cost"])
    for kind in ("times", "statistics"):
        table = next(name for name, table in BASE["tables"].items() if table["kind"] == kind)
        assert errors_of(changed(again, (("tables", table, "suites"), ["cost", "cost-again"]))) == [
            f"tables.{table}.suites[1]: a table of {kind} shows one suite; make a table for each"
        ]
    rows = [{"model": "smollm2-135m", "method": method, "ratio": 20} for method in ("lord", "svd")]
    corpus = BASE["suites"]["held-out"]["corpora"][0]
    named: Change = (("suites", corpus), BASE["suites"]["zero-shot"])
    table = {"kind": "differences", "title": "D", "suites": ["held-out", corpus], "rows": rows}
    assert errors_of(changed(named, (("tables", "d"), table))) == [
        f"tables.d.suites[1]: '{corpus}' is the name of a suite of tasks and of a corpus, and a table of differences "
        "has a column of that name for each; rename the suite"
    ]


def test_tasks_are_those_whose_rows_are_known_by_what_is_computed_of_them() -> None:
    (name, task) = next(iter(BASE["tasks"].items()))
    assert errors_of(changed((("tasks", "mmlu"), task))) == [
        "tasks.mmlu: the scored rows of this task are not known here; known are: boolq, piqa, hellaswag, winogrande, "
        "arc_easy, arc_challenge, openbookqa"
    ]
    assert name in METRICS
    assert errors_of(changed((("suites", "zero-shot", "tasks"), {"boolq": "acc_norm"}))) == [
        "suites.zero-shot.tasks.boolq: 'acc_norm' is not computed of it, only acc"
    ]


def test_an_entry_whose_name_goes_on_with_a_dot_does_not_need_what_another_does() -> None:
    method = BASE["methods"]["bolaco-5x1"]
    alone = {**BASE["methods"]["svd"]}
    raw = changed((("methods", "svd.searched"), method), (("methods", "svd"), alone))
    study = check_study(raw, "x")
    without = check_study(changed(), "x")
    assert used_entries(study) - {("methods", "svd.searched")} == used_entries(without)


def test_a_lora_names_layers_that_the_model_has() -> None:
    tuning = {"kind": "lora", "instructions": next(iter(BASE["instructions"])), "targets": ["q", "query"]}
    place = ("tables", "table_1", "rows", 1, "tuning")
    assert errors_of(changed((("tuning", "lora"), tuning), (place, "lora"))) == [
        "tuning.lora.targets: model 'smollm2-135m' has no linear layers of type query (there are: q, k, v, o, "
        "gate, up, down)"
    ]


def test_the_cache_may_be_in_the_home_folder() -> None:
    assert check_study(changed((("cache",), "~/downloads")), "x").cache_folder == Path.home() / "downloads"

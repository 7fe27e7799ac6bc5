"""What would be found after hours of jobs only, or never: tables without room; tasks, layers and metrics not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank.config.load import check_study
from lowrank.config.suites import METRICS
from lowrank.config.used import used_entries
from tests.config.wrong import BASE, GONE, SELECT, Change, changed, errors_of

SEARCHED = BASE["methods"]["bolaco-5x1"]
SCALED = SEARCHED | {"search": "scales", "covariance": "fisher"}
SCALES: list[Change] = [
    (("search", "scales"), {"variables": "loss-scales"}),
    (("covariance", "fisher"), {"estimator": "naive", "gradients": "weigh"}),
]


def moved(method: dict[str, Any], source: str) -> Change:
    """One more method, which begins with what another one found."""
    return ("methods", f"of-{source}"), method | {"transfer": {"model": "smollm2-135m", "method": source}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [moved(SEARCHED, "lord")],
            "methods.of-lord.transfer.method: 'lord' has no search of its own to take an allocation from",
        ),
        (
            [moved(SEARCHED, "bolaco-5x1"), moved(SEARCHED, "of-bolaco-5x1")],
            "methods.of-of-bolaco-5x1.transfer.method: 'of-bolaco-5x1' has no search of its own to take an allocation "
            "from",
        ),
        (
            [*SCALES, moved(SCALED, "bolaco-5x1")],
            "methods.of-bolaco-5x1.search: 'scales' searches loss scales; kept ratios cannot start it",
        ),
        (
            [*SCALES, (("methods", "scaled"), SCALED), moved(SEARCHED, "scaled")],
            "methods.of-scaled.transfer.method: 'scaled' searches loss scales, which are no kept ratios",
        ),
    ],
    ids=["of no search", "of a transfer", "by a search of scales", "of a search of scales"],
)
def test_a_transfer_takes_the_ratios_of_a_search(changes: list[Change], message: str) -> None:
    assert errors_of(changed(*changes)) == [message]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            ("figures", "course"),
            {"kind": "search", "title": "S", "model": "smollm2-135m", "methods": ["lord"], "ratios": [20]},
            "figures.course.methods[0]: 'lord' has no search whose progress could be drawn",
        ),
        (
            ("tables", "agreement"),
            {"kind": "agreement", "title": "A", "tables": ["table_1", "table_8"]},
            "tables.agreement.tables[1]: 'table_8' is a table of allocations; name tables of accuracy or statistics",
        ),
        ((*SELECT, "keep"), GONE, "validation.wikipedia-top6.select.keep: is needed by `strategy: top` and `bottom`"),
        (
            ("search", "scales"),
            {"variables": "loss-scales", "initial": 11, "evaluations": 10},
            "search.scales.initial: 11 is more than `evaluations: 10`",
        ),
    ],
    ids=lambda part: ".".join(part) if isinstance(part, tuple) else "",
)
def test_entries_say_what_they_need(place: tuple[str, ...], value: Any, message: str) -> None:
    assert errors_of(changed((place, value))) == [message]


@pytest.mark.parametrize(
    "place",
    [
        ("sensitivity", "by-type", "length"),
        ("tuning", "scales", "max_length"),
        ("suites", "said", "new_tokens"),
        ("suites", "cost", "mac_tokens"),
    ],
    ids=".".join,
)
def test_no_model_reads_more_than_it_can(place: tuple[str, ...]) -> None:
    said = {"kind": "generation", "prompts": ["The river"]}
    table = {"kind": "generations", "title": "G", "suites": ["said"], "rows": BASE["tables"]["times"]["rows"]}
    added: list[Change] = [(("suites", "said"), said), (("tables", "said"), table)]
    assert errors_of(changed(*added, (place, 2048))) == []
    assert errors_of(changed(*added, (place, 2049))) == [
        f"{'.'.join(place)}: 2049 tokens, more than the `max_length` of model 'smollm2-135m' (2048)"
    ]


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
    only_there: Change = (("calibration", "other"), next(iter(BASE["calibration"].values())) | {"windows": 3})
    study = check_study(changed(only_there, (("methods", "svd.flap"), {"kind": "flap", "calibration": "other"})), "x")
    assert used_entries(study) == used_entries(check_study(changed(), "x"))


def test_a_lora_names_layers_that_the_model_has() -> None:
    tuning = {"kind": "lora", "instructions": next(iter(BASE["instructions"])), "targets": ["q", "query"]}
    place = ("tables", "table_1", "rows", 1, "tuning")
    assert errors_of(changed((("tuning", "lora"), tuning), (place, "lora"))) == [
        "tuning.lora.targets: model 'smollm2-135m' has no linear layers of type query (there are: q, k, v, o, "
        "gate, up, down)"
    ]


def test_the_cache_may_be_in_the_home_folder() -> None:
    assert check_study(changed((("cache",), "~/downloads")), "x").cache_folder == Path.home() / "downloads"

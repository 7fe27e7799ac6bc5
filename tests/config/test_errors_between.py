"""Entries that do not fit together, each pair with the one message that it gives: place, reason, cure."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.wrong import BASE, GONE, ROW, SELECT, SHAPE, Change, changed, errors_of

OPT = {**BASE["models"]["smollm2-135m"]["shape"], "family": "opt"}


CORPORA = ", ".join(sorted(BASE["corpora"]))
NAMES: list[tuple[tuple[str | int, ...], Any, str]] = [
    (
        ("calibration", "c4-32", "corpora", 0),
        "c4-calibraton",
        "calibration.c4-32.corpora[0]: 'c4-calibraton' is not in `corpora` - did you mean 'c4-calibration'?",
    ),
    (
        ("validation", "wikipedia-top6", "corpora", 0),
        "zzz",
        "validation.wikipedia-top6.corpora[0]: 'zzz' is not in `corpora` (there are: c4-calibration, "
        "wikipedia-validation)",  # no text of the tests
    ),
    (
        (*SELECT, "calibration"),
        "zzz",
        "validation.wikipedia-top6.select.calibration: 'zzz' is not in `calibration` (there is: c4-32)",
    ),
    (
        (*SELECT, "covariance"),
        "pooled",
        "validation.wikipedia-top6.select.covariance: 'pooled' is not in `covariance` - did you mean 'pooled-8'?",
    ),
    (
        ("sensitivity", "by-type", "model"),
        "zzz",
        "sensitivity.by-type.model: 'zzz' is not in `models` (there is: smollm2-135m)",
    ),
    (
        ("sensitivity", "by-type", "corpus"),
        "zzz",
        f"sensitivity.by-type.corpus: 'zzz' is not in `corpora` (there are: {CORPORA})",
    ),
    *(
        (
            ("methods", "bolaco-5x1", section),
            "zzz",
            f"methods.bolaco-5x1.{section}: 'zzz' is not in `{section}` (there {there})",
        )
        for section, there in [
            ("calibration", "is: c4-32"),
            ("covariance", "are: naive, pooled-8"),
            ("validation", "is: wikipedia-top6"),
            ("search", "is: bo-10"),
        ]
    ),
    (
        ("tuning", "scales", "instructions"),
        "alpaca",
        "tuning.scales.instructions: 'alpaca' is not in `instructions` - did you mean 'alpaca-demo'?",
    ),
    (
        ("suites", "held-out", "corpora", 1),
        "wiki-test",
        "suites.held-out.corpora[1]: 'wiki-test' is not in `corpora` - did you mean 'wikipedia-test'?",
    ),
    (
        ("suites", "zero-shot", "tasks", "boolqq"),
        "acc",
        "suites.zero-shot.tasks.boolqq: 'boolqq' is not in `tasks`, and nothing else there fits here",
    ),
    (
        ("tables", "table_1", "suites", 0),
        "zeroshot",
        "tables.table_1.suites[0]: 'zeroshot' is not in `suites` - did you mean 'zero-shot'?",
    ),
    ((*ROW, "model"), "zzz", "tables.table_1.rows[1].model: 'zzz' is not in `models` (there is: smollm2-135m)"),
    (
        (*ROW, "method"),
        "lor",  # whose row is there already
        "tables.table_1.rows[1].method: 'lor' is not in `methods` (there is: svd)",
    ),
    (
        ("tables", "table_8", "rows", 1, "method"),
        "bolaco",
        "tables.table_8.rows[1].method: 'bolaco' is not in `methods` - did you mean 'bolaco-5x1'?",
    ),
    ((*ROW, "tuning"), "scale", "tables.table_1.rows[1].tuning: 'scale' is not in `tuning` - did you mean 'scales'?"),
    (
        ("figures", "figure_1", "sensitivity", 0),
        "zzz",
        "figures.figure_1.sensitivity[0]: 'zzz' is not in `sensitivity` (there is: by-type)",
    ),
    (
        ("figures", "figure_3", "model"),
        "zzz",
        "figures.figure_3.model: 'zzz' is not in `models` (there is: smollm2-135m)",
    ),
    (
        ("figures", "figure_3", "suite"),
        "zzz",
        "figures.figure_3.suite: 'zzz' is not in `suites` (there is: held-out)",
    ),
    (
        ("figures", "figure_3", "methods", 2),
        "bolaco",
        "figures.figure_3.methods[2]: 'bolaco' is not in `methods` - did you mean 'bolaco-5x1'?",
    ),
]

SENSE: list[tuple[tuple[str | int, ...], Any, str]] = [
    *(
        (
            (*ROW, "ratio"),
            value,
            "tables.table_1.rows[1].ratio: 0 or missing; write how many percent 'svd' is to remove, 1 to 90",
        )
        for value in (0, GONE)
    ),
    (
        ("tables", "table_1", "rows", 0, "ratio"),
        20,
        "tables.table_1.rows[0].ratio: 20 on a dense row; write 0 or leave it out",
    ),
    (
        ("tables", "table_1", "rows", 0, "tuning"),
        "scales",
        "tables.table_1.rows[0].tuning: post-training heals what compression did, and this row is dense",
    ),
    (
        ("figures", "figure_3", "methods", 0),
        "dense",
        "figures.figure_3.methods[0]: 'dense' is dense and drawn anyway; leave it out",
    ),
    (
        ("figures", "seen"),
        {
            "kind": "heat-map",
            "title": "T",
            "suite": "held-out",
            "rows": [{"model": "smollm2-135m", "method": "svd", "ratio": 20}],
        },
        "figures.seen.rows: a heat map shows losses above those of the dense model; add the dense row of "
        "'smollm2-135m'",
    ),
    (
        ("figures", "figure_3", "suite"),
        "cost",
        "figures.figure_3.suite: a figure of perplexity does not show a cost suite",
    ),
    (
        ("tables", "table_1", "suites"),
        ["cost"],
        "tables.table_1.suites[0]: a table of accuracy does not show a cost suite",
    ),
    (
        ("tables", "table_7", "suites"),
        ["held-out"],
        "tables.table_7.suites[0]: a table of statistics does not show a perplexity suite",
    ),
    (
        ("tables", "table_8", "suites"),
        ["zero-shot"],
        "tables.table_8.suites[0]: a table of allocations does not show a zero-shot suite",
    ),
    (("tables", "times", "suites"), GONE, "tables.times.suites: a table of times needs at least one suite"),
    (
        ("tuning", "none"),
        BASE["tuning"]["scales"],
        "tuning.none: the name 'none' means no post-training; choose another",
    ),
    (
        ("smoke",),
        GONE,
        "suites.zero-shot.limit: a limit on documents is allowed only in a config with `smoke: true`",
    ),
    (
        ("corpora", "c4-test", "documents"),
        [199, 300],
        "suites.held-out.corpora[0]: 'c4-test' shares documents with 'c4-calibration', which calibration.c4-32 uses;"
        " give them disjoint `documents:` ranges of the file, or different files",
    ),
    (
        ("corpora", "wikipedia-validation", "documents"),
        [0, None],
        "suites.held-out.corpora[1]: 'wikipedia-test' shares documents with 'wikipedia-validation', which"
        " validation.wikipedia-top6 uses; give them disjoint `documents:` ranges of the file, or different files",
    ),
    (
        ("suites", "held-out", "length"),
        2049,
        "suites.held-out.length: 2049 tokens, more than the `max_length` of model 'smollm2-135m' (2048)",
    ),
    (
        ("calibration", "c4-32", "length"),
        4096,
        "calibration.c4-32.length: 4096 tokens, more than the `max_length` of model 'smollm2-135m' (2048)",
    ),
    (
        ("suites", "cost", "prompt_tokens"),
        2040,
        "suites.cost.prompt_tokens (with `new_tokens`): 2056 tokens, more than the `max_length` of model"
        " 'smollm2-135m' (2048)",
    ),
    (
        ("methods", "bolaco-5x1", "groups"),
        31,
        "methods.bolaco-5x1.groups: 31 groups of layers, but model 'smollm2-135m' has only 30 layers",
    ),
    (
        (*SELECT, "groups"),
        31,
        "validation.wikipedia-top6.select.groups: 31 groups of layers, but model 'smollm2-135m' has only 30 layers",
    ),
    (
        ("methods", "svd", "uncompressed"),
        ["v", "fc1"],
        "methods.svd.uncompressed: model 'smollm2-135m' of family 'llama' has no linear layers of type fc1"
        " (there are: q, k, v, o, gate, up, down)",
    ),
    (
        (*SELECT, "ratio"),
        85,
        "validation.wikipedia-top6.select.ratio: removing 85 % is out of reach: with v dense and at least 20 % of every"
        " other matrix, 22.6 % stays; lower `lower`, compress more types, or remove less (model 'smollm2-135m')",
    ),
    (
        ("methods", "svd", "uncompressed"),
        ["q", "k", "v", "o", "gate", "up"],
        "tables.table_1.rows[5].ratio: removing 30 % is out of reach: with q, k, v, o, gate, up dense, 75.0 % stays;"
        " compress more types, or remove less (`methods.svd`, model 'smollm2-135m')",
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [*NAMES, *SENSE],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else "",
)
def test_one_mistake_gives_one_message(path: tuple[str | int, ...], value: Any, message: str) -> None:
    assert errors_of(changed((path, value))) == [message]


def test_all_windows_can_be_kept_of_any_model_without_bases() -> None:
    few: Change = ((*SHAPE, "layers"), 2)
    assert "validation.wikipedia-top6.select.groups: 4 groups" in " ".join(errors_of(changed(few)))
    assert "validation." not in " ".join(errors_of(changed(few, (SELECT, {"strategy": "all"}))))
    assert errors_of(changed((SELECT, {"strategy": "all"}))) == []


def test_mistakes_within_and_between_entries_are_told_at_once() -> None:
    mistakes: list[Change] = [
        (("search", "bo-10", "intial"), 3),
        ((*ROW, "method"), "lor"),
        (("tuning", "scales", "rank"), 0),
    ]
    assert errors_of(changed(*mistakes)) == [
        "search.bo-10.intial: unknown key - did you mean 'initial'?",
        "tuning.scales.rank: must be a whole number of at least 1, not 0",
        "tables.table_1.rows[1].method: 'lor' is not in `methods` (there is: svd)",
    ]


def test_types_of_another_family_are_named_with_the_model() -> None:
    mistakes: list[Change] = [(SHAPE, OPT), (("methods", "bolaco-5x1", "uncompressed"), ["v", "gate", "up"])]
    assert errors_of(changed(*mistakes)) == [
        "methods.bolaco-5x1.uncompressed: model 'smollm2-135m' of family 'opt' has no linear layers of type gate, up"
        " (there are: q, k, v, o, fc1, fc2)"
    ]


def test_what_many_rows_share_is_told_once_a_ratio() -> None:
    assert errors_of(changed((("search", "bo-10", "lower"), 0.9))) == [
        f"tables.table_1.rows[{row}].ratio: removing {ratio} % is out of reach: with v dense and at least 90 % of every"
        " other matrix, 90.5 % stays; lower `lower`, compress more types, or remove less"
        " (`methods.bolaco-5x1`, `search.bo-10`, model 'smollm2-135m')"
        for row, ratio in [(3, 20), (7, 30)]
    ]


FLAP = {"kind": "flap", "calibration": "c4-32"}
RANKWISE = {"kind": "rankwise", "calibration": "c4-32", "covariance": "fisher"}
FISHER = {"estimator": "pooled", "groups": 8, "gradients": "weigh"}
DISTILLED = {"kind": "feature-distillation", "calibration": "c4-32"}
TWO_STAGES = {"kind": "lora", "instructions": "alpaca-demo", "stages": ["up", "down"]}


@pytest.mark.parametrize(
    ("method", "tuning", "message"),
    [
        (FLAP, {}, "'scales' trains low-rank pairs, and 'other' makes none; take a tuning of kind `lora` with"),
        (FLAP, TWO_STAGES, "'scales' trains low-rank pairs, and 'other' makes none"),
        (
            RANKWISE,
            {"subspace": "top"},
            "'scales' takes a subspace by the order of dimensions, and those of pairs with",
        ),
        (FLAP, DISTILLED, "'scales' trains low-rank pairs, and 'other' makes none; take a tuning of kind `lora` with"),
        (FLAP, TWO_STAGES | {"stages": ["all"]}, None),
        (RANKWISE, DISTILLED, None),
        (RANKWISE, {}, None),
        (RANKWISE | {"identity_block": False}, {"subspace": "top"}, None),
    ],
)
def test_a_training_that_would_find_nothing_to_train(
    method: dict[str, object], tuning: dict[str, object], message: str | None
) -> None:
    scales = tuning if "kind" in tuning else BASE["tuning"]["scales"] | tuning
    row = {"model": "smollm2-135m", "method": "other", "ratio": 20, "tuning": "scales"}
    trained = [(("tuning", "scales"), scales), (("methods", "other"), method), (("covariance", "fisher"), FISHER)]
    rows = [*BASE["tables"]["table_1"]["rows"], row]
    own = [r for r in rows if r.get("tuning", "none") == "none" or r is row]
    found = errors_of(changed(*trained, (("tables", "table_1", "rows"), own)))
    place = f"tables.table_1.rows[{len(own) - 1}].tuning: "
    assert [line[: len(place + (message or ""))] for line in found] == ([place + message] if message else [])


def test_a_distillation_reads_windows_that_the_model_can_read_and_keeps_some_to_train_on() -> None:
    few = [
        (("tuning", "scales"), DISTILLED | {"validation_windows": 32, "calibration": "new"}),
        (("calibration", "new"), BASE["calibration"]["c4-32"] | {"length": 4096}),
    ]
    assert errors_of(changed(*few)) == [
        "calibration.new.length: 4096 tokens, more than the `max_length` of model 'smollm2-135m' (2048)",
        "tuning.scales.validation_windows: 32 of the 32 windows of `calibration.new` leave none to train on; lower it, "
        "or take more windows",
    ]
    assert errors_of(changed((("tuning", "scales"), DISTILLED | {"calibration": "c4-23"}))) == [
        "tuning.scales.calibration: 'c4-23' is not in `calibration` - did you mean 'c4-32'?"
    ]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("search", "bo-10", "lord"), ("covariance", "naive", "svd"), ("calibration", "c4-32", "svd")],
)
def test_a_method_may_not_name_what_it_does_not_read(name: str, value: str, kind: str) -> None:
    preset = {**BASE["methods"]["lord"], "kind": "lord"} if kind == "lord" else {"kind": kind}
    assert errors_of(changed((("methods", "other"), {**preset, name: value}))) == [
        f"methods.other.{name}: methods of kind '{kind}' read no {name}; leave it out, or take another `kind`"
    ]


def test_rows_that_a_table_has_nothing_to_show_for() -> None:
    one, other = ({"model": "smollm2-135m", "method": "lord", "ratio": ratio} for ratio in (20, 30))
    flap = {"model": "smollm2-135m", "method": "flap", "ratio": 20}
    differences = {"kind": "differences", "title": "D", "suites": ["held-out"], "rows": [one, flap, other]}
    allocations = {"kind": "allocations", "title": "A", "rows": [one, flap, one]}
    tables = [(("tables", "d"), differences), (("tables", "e"), differences | {"reference": "dense"})]
    dense = {"model": "smollm2-135m", "method": "dense"}
    costs = [differences | {"suites": suites, "rows": [one, flap]} for suites in (["held-out", "cost"], ["cost"])]
    tables += [
        (("tables", name), table | {"rows": [dense, *table["rows"]]}) for name, table in zip("gh", costs, strict=True)
    ]
    tables += [(("tables", "i"), costs[0])]
    tables += [(("tables", "f"), differences | {"reference": "dense", "rows": [dense]}), (("tables", "a"), allocations)]
    assert errors_of(changed((("methods", "flap"), FLAP), *tables)) == [
        "tables.d.rows[2]: the only row of 'smollm2-135m' at 30 %, so there is nothing to compare; the first row of a "
        "model and ratio is what its others are compared with, unless the table says `reference: dense`",
        "tables.e.rows: `reference: dense` compares with the dense model; add the dense row of 'smollm2-135m'",
        "tables.h.suites: 'cost' compares no losses; a table of differences needs a suite that does",
        "tables.i.rows: 'cost' shows speeds against the dense model; add the dense row of 'smollm2-135m'",
        "tables.f.rows: of 'smollm2-135m' only the dense model, with which `reference: dense` compares other rows",
        "tables.a.rows[0]: stands 2 times in this table",
        "tables.a.rows[1].method: 'flap' makes no low-rank pairs, so it has no ranks to show",
    ]


def test_only_a_table_of_differences_has_a_reference() -> None:
    table = {"kind": "allocations", "title": "A", "rows": [{"model": "smollm2-135m", "method": "lord", "ratio": 20}]}
    assert errors_of(changed((("tables", "a"), table | {"reference": "dense"}))) == [
        "tables.a.reference: only a table of differences compares its rows; leave it out"
    ]


def test_a_comparison_names_no_two_rows_alike() -> None:
    one, other = ({"model": "smollm2-135m", "method": method, "ratio": 20} for method in ("lord", "svd"))
    place = ("figures", "compared")

    def drawn(*rows: dict[str, Any]) -> list[str]:
        return errors_of(
            changed((place, {"kind": "comparison", "title": "C", "suite": "held-out", "rows": list(rows)}))
        )

    assert drawn(one, other, {**other, "label": "lord"}, {**one, "ratio": 30}) == [
        "figures.compared.rows[2]: 'lord' of 'smollm2-135m' at 20 % stands in rows[0] already; leave one out, or give "
        "it a `label` of its own"
    ]
    assert drawn(one, other, {**other, "label": "plain"}) == []
    assert drawn(one, {**one, "tuning": "scales"}) == []


def test_differences_have_one_column_a_corpus() -> None:
    rows = [{"model": "smollm2-135m", "method": method, "ratio": 20} for method in ("lord", "svd")]
    more = {**BASE["suites"]["held-out"], "corpora": ["speeches-test"]}
    table = {"kind": "differences", "title": "D", "suites": ["held-out", "more"], "rows": rows}
    changes: list[Change] = [(("suites", "more"), more), (("tables", "d"), table)]
    assert errors_of(changed(*changes)) == [
        "tables.d.suites[1]: 'more' and 'held-out' both judge on 'speeches-test', and a table of differences has one "
        "column a corpus; show one of the two suites"
    ]
    assert errors_of(changed(*changes, (("tables", "d", "suites"), ["more"]))) == []


def test_ranks_of_a_training_may_not_exceed_the_width() -> None:
    assert errors_of(changed((("tuning", "scales", "rank"), 577))) == [
        "tuning.scales.rank: 577, but no matrix of model 'smollm2-135m' has a rank of more than 576, its width"
    ]


def test_groups_may_not_exceed_the_calibration_windows() -> None:
    messages = errors_of(changed((("covariance", "pooled-8", "groups"), 33)))
    assert messages == [
        f"{place}.covariance: 'pooled-8' pools 33 groups, but 'c4-32' has only 32 windows; calibrate on more windows or"
        " pool fewer groups"
        for place in ("methods.bolaco-5x1", "validation.wikipedia-top6.select", "sensitivity.by-type")
    ]


@pytest.mark.parametrize(
    "change",
    [
        (("suites", "held-out", "windows"), 1),
        (("search", "bo-10", "kl_weight"), "1e-3"),
        (("search", "bo-10", "kl_weight"), 0),
        (("search", "unused"), {"evaluations": 3, "initial": 2, "lower": 0.99}),
        (("calibration", "unused"), {"corpora": ["c4-calibration"], "windows": 1, "length": 10**6}),
        (("models", "unused"), {**BASE["models"]["smollm2-135m"], "max_length": 8}),
        (("corpora", "c4-test", "documents"), [200, None]),
        ((*ROW, "ratio"), 80),
    ],
    ids=lambda change: ".".join(map(str, change[0])),
)
def test_right_configs_stay_right(change: Change) -> None:
    assert errors_of(changed(change)) == []

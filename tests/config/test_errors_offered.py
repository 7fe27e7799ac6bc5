"""An error offers only what works: each key, choice and name that a message lists is accepted by the next try."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest

from lowrank.config.base import Section
from lowrank.config.references import references
from lowrank.config.renaming import with_name
from lowrank.config.study import Study
from lowrank.methods import method_modules
from tests.config.wrong import BASE, Change, changed, errors_of

NAMED = {"calibration": "c4-32", "covariance": "naive", "validation": "wikipedia-top6", "search": "bo-10"}
NAMED |= {"transfer": {"model": "smollm2-135m", "method": "bolaco-5x1"}}
PRESETS: dict[str, dict[str, Any]] = {
    kind: {"kind": kind}
    | {name: NAMED[name] for name in ("calibration", "covariance", "validation", "search") if required(module, name)}
    for kind, module in method_modules().items()
    for required in [lambda module, name: module.Settings.model_fields[name].is_required()]
}
LORA = {"kind": "lora", "instructions": "alpaca-demo"}
SLICED = {"source": {"random": 1, "tokenizer": "smollm2-135m"}, "shape": BASE["models"]["smollm2-135m"]["shape"]}
ENTRIES: list[tuple[tuple[str | int, ...], dict[str, Any]]] = [
    *((("methods", "new"), preset) for preset in PRESETS.values()),
    (("methods", "new"), {**PRESETS["flap"], "structure": "AL-MM", "remove_heads": 3}),
    (("methods", "new"), {**PRESETS["rankwise"], "mlp": "neurons"}),
    (("methods", "new"), {**PRESETS["rankwise"], "mlp": "both"}),
    (("methods", "new"), {**PRESETS["svd-llm"], "update": True}),
    (("methods", "new"), {**PRESETS["svd"], "rounding": "down"}),
    (("search", "new"), {}),
    (("search", "new"), {"variables": "loss-scales"}),
    (("covariance", "new"), {"estimator": "naive"}),
    (("covariance", "new"), {"estimator": "pooled", "groups": 8}),
    (("calibration", "new"), BASE["calibration"]["c4-32"]),
    (("validation", "new"), BASE["validation"]["wikipedia-top6"]),
    (("validation", "new", "select"), BASE["validation"]["wikipedia-top6"]["select"]),
    (("validation", "new", "select"), {"strategy": "all"}),
    (("sensitivity", "new"), BASE["sensitivity"]["by-type"]),
    (("tuning", "new"), LORA),
    (("tuning", "new"), {**LORA, "steps": 200}),
    (("tuning", "new"), {**LORA, "epochs": 1}),
    (("tuning", "new"), BASE["tuning"]["scales"]),
    (("tuning", "new"), {"kind": "feature-distillation", "calibration": "c4-32"}),
    (("models", "new"), SLICED),
    (("models", "new", "shape"), SLICED["shape"]),
    (("models", "new", "source"), SLICED["source"]),
    *((("corpora", "new"), corpus) for corpus in BASE["corpora"].values()),
    (("corpora", "new"), {"source": {"tokens": "x.npz"}, "format": "tokens"}),
    (("instructions", "new"), BASE["instructions"]["alpaca-demo"]),
    (("tasks", "new"), BASE["tasks"]["boolq"]),
    *((("suites", "new"), suite) for suite in BASE["suites"].values()),
    (("suites", "new"), {"kind": "generation", "prompts": ["a"]}),
    *((("tables", "new"), table) for table in BASE["tables"].values()),
    *((("figures", "new"), figure) for figure in BASE["figures"].values()),
    (("tables", "table_1", "rows", 1), {"model": "smollm2-135m", "method": "svd", "ratio": 20}),
]
VALUES: dict[str, Any] = {
    **NAMED,
    "remove_heads": 3,
    "identity_block": True,
    "widths": "one",
    "start": ["uniform"],
    "largest_scale": 4.0,
    "start_at": {"o": 0.5},
    "bounds": {"o": [0.3, 0.9]},
    "length_scales": {"attention": 1.0, "mlp": 1.0},
    "targets": ["q"],
    "suites": ["held-out"],
}
"""A value for each key that another might refuse; others get a plain one by type."""
OFFERED = re.compile(r": unknown key \(there (?:are|is): (.*)\)$")
UNREAD = re.compile(
    "unknown key|read no |have no search|says nothing|only by|says how long too|for `update|those of plain|of one shape"
)


def at(place: tuple[str | int, ...], entry: dict[str, Any], **keys: Any) -> list[str]:
    """What is said of the quickstart with an entry at a place that has some keys more."""
    above: list[Change] = []
    if place[-1] in ("select", "shape", "source"):
        outer = BASE["validation"]["wikipedia-top6"] if place[0] == "validation" else SLICED
        above = [(place[:-1], outer)]
    return errors_of(changed(*above, (place, {**entry, **keys})))


def a_value(section: type[Section], key: str) -> Any:
    """Something other than the default, as far as one is easily had; whether it fits otherwise is not asked here."""
    annotation = section.model_fields[key].annotation if key in section.model_fields else None
    choices = next((get_args(part) for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal), ())
    default = section.model_fields[key].default if key in section.model_fields else None
    others = [choice for choice in choices if choice != default]
    return others[-1] if others else 7


@pytest.mark.parametrize(("place", "entry"), ENTRIES)
def test_every_key_that_is_offered_is_read(place: tuple[str | int, ...], entry: dict[str, Any]) -> None:
    (offer,) = [line for line in at(place, entry, zzzzzz=1) if ".zzzzzz: " in line]
    found = OFFERED.search(offer)
    assert found, offer
    keys = found[1].split(", ")
    assert set(entry) <= set(keys), "keys that stand there already are among those that may"
    for key in keys:
        if key in entry:
            continue
        section = method_modules()[entry["kind"]].Settings if place[0] == "methods" else Section
        path = re.escape(".".join(map(str, place)).replace(".rows.1", ".rows[1]") + f".{key}")
        said = at(place, entry, **{key: VALUES.get(key, a_value(section, key))})
        assert not [line for line in said if re.match(rf"{path}[:.\[]", line) and UNREAD.search(line)], said


def test_every_section_and_method_is_tried() -> None:
    assert {place[0] for place, _ in ENTRIES} == {name for name in BASE if name not in ("run", "smoke")}
    assert {entry["kind"] for place, entry in ENTRIES if place[0] == "methods"} == set(method_modules())


@pytest.mark.parametrize("kind", [kind for kind in method_modules() if kind != "bolaco"])
def test_a_method_offers_no_key_that_it_refuses(kind: str) -> None:
    """The keys of what all methods have in common were offered by each."""
    (offer,) = [line for line in at(("methods", "new"), PRESETS[kind], zzzzzz=1) if ".zzzzzz: " in line]
    assert not {"search", "validation", "transfer"} & set(re.split(r"[ ,()]+", offer))


@pytest.mark.parametrize(
    ("place", "entry", "key", "wrong", "offered"),
    [
        (
            *(("corpora", "new"), BASE["corpora"]["c4-test"], "format", "zzz"),
            ["text", "lines", "jsonl", "json", "parquet"],
        ),
        (("corpora", "new"), {"source": {"tokens": "x.npz"}, "format": "tokens"}, "format", "zzz", ["tokens"]),
        (("covariance", "new"), {"estimator": "pooled", "groups": 8}, "estimator", "zzz", ["pooled"]),
        (("covariance", "new"), {"estimator": "naive"}, "estimator", "zzz", ["pooled", "naive", "uncentred"]),
        (("search", "new"), {"lower": 0.3}, "variables", "zzz", ["kept-ratios"]),
        (("methods", "new"), {**PRESETS["svd"], "identity_block": True}, "rounding", "zzz", ["give-back"]),
        (("methods", "new"), {**PRESETS["flap"], "remove_heads": 3}, "structure", "zzz", ["AL-MM", "UL-MM"]),
    ],
)
def test_every_choice_that_is_offered_fits_what_stands_beside_it(
    place: tuple[str | int, ...], entry: dict[str, Any], key: str, wrong: str, offered: list[str]
) -> None:
    path = ".".join(map(str, place))
    assert at(place, entry, **{key: wrong}) == [f"{path}.{key}: 'zzz' is not one of {', '.join(offered)}"]


NOT_THERE = re.compile(r": 'zzzzzz' is not in `\w+`(?: \(there (?:are|is): (.*)\)|, and nothing else there fits here)$")
_MODEL = "smollm2-135m"
_ROW = {"model": _MODEL, "method": "lord", "ratio": 20}
_ROWS = [_ROW, {**_ROW, "method": "svd"}]
_FISHER = {"estimator": "naive", "gradients": "predict"}
_PREDICTED = {"calibration": "c4-32", "covariance": ["fisher"], "corpus": "c4-test", "windows": 3, "length": 128}
LARGER = changed(
    (("covariance", "fisher"), _FISHER),
    (("covariance", "other-fisher"), _FISHER),
    (("methods", "moved"), {**PRESETS["bolaco"], "transfer": NAMED["transfer"]}),
    (("methods", "ours"), {**PRESETS["rankwise"], "covariance": "fisher"}),
    (("models", "random"), SLICED),
    (("tables", "agreement"), {"kind": "agreement", "title": "A", "tables": ["table_1"]}),
    (("tables", "d"), {"kind": "differences", "title": "D", "suites": ["held-out"], "rows": _ROWS}),
    (("figures", "compared"), {"kind": "comparison", "title": "C", "suite": "held-out", "rows": [_ROW]}),
    (
        ("figures", "progress"),
        {"kind": "search", "title": "S", "model": _MODEL, "methods": ["bolaco-5x1"], "ratios": [20]},
    ),
    (("figures", "predicted"), {"kind": "predicted-loss", "title": "P", "model": _MODEL, **_PREDICTED}),
)
"""The quickstart with everything that names entries."""


def places_of() -> Iterator[str]:
    """One place of each kind that names an entry of another section."""
    seen: set[str] = set()
    for place, _, _ in references(Study.model_validate(LARGER)):
        first, name, *rest = place.split(".")
        alike = f"{first}.{LARGER[first][name].get('kind', '')}.{re.sub(r'[0-9]+', '0', '.'.join(rest))}"
        if alike not in seen:
            seen.add(alike)
            yield place


def test_the_study_with_all_names_is_right() -> None:
    assert errors_of(LARGER) == []


@pytest.mark.parametrize("place", list(places_of()))
def test_every_name_that_is_offered_is_accepted(place: str) -> None:
    study = Study.model_validate(copy.deepcopy(LARGER))
    wrong = with_name(study, place, "zzzzzz")
    assert wrong is not None
    said = [line for line in errors_of(wrong.plain()) if "'zzzzzz' is not in" in line]
    found = NOT_THERE.search(said[0])
    assert found, said
    offered = found[1].split(", ") if found[1] else []
    before = next(name for where, _, name in references(study) if where == place)
    assert before in offered, "what stood there is among them"
    key = place if ".tasks." not in place else place.rpartition(".")[0] + ".zzzzzz"
    for name in offered:
        renamed = with_name(wrong, key, name)
        assert renamed is not None
        assert [line for line in errors_of(renamed.plain()) if "out of reach" not in line] == [], said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            (("tables", "table_7", "suites"), ["cots"]),
            "tables.table_7.suites[0]: 'cots' is not in `suites` - did you mean 'cost'?",
        ),
        (
            (("tables", "table_1", "suites"), ["cots"]),
            "tables.table_1.suites[0]: 'cots' is not in `suites` (there are: held-out, zero-shot)",
        ),
        (
            (("models", "new"), {**SLICED, "source": {"random": 1, "tokenizer": "neww"}}),
            "models.new.source.tokenizer: 'neww' is not in `models` (there is: smollm2-135m)",
        ),
        (
            (("models", "new"), {**SLICED, "source": {"random": 1, "tokenizer": "new"}}),
            "models.new.source.tokenizer: 'new' has no tokenizer of its own; name another model",
        ),
        (
            (("methods", "new"), {**PRESETS["rankwise"], "covariance": "fisher"}),
            "methods.new.covariance: 'fisher' is not in `covariance`, and nothing else there fits here",
        ),
        (
            (("suites", "held-out", "corpora", 0), "c4-tests"),
            "suites.held-out.corpora[0]: 'c4-tests' is not in `corpora` - did you mean 'c4-test'?",
        ),
        (
            (("suites", "held-out", "corpora", 0), "c4-calibratio"),
            "suites.held-out.corpora[0]: 'c4-calibratio' is not in `corpora` (there is: c4-test)",
        ),
    ],
)
def test_names_that_another_check_would_refuse_are_not_offered(change: Change, message: str) -> None:
    assert errors_of(changed(change)) == [message]

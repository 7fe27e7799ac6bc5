"""The paper's study: every table and figure, every published value, and the jobs that a dry run plans for it."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from wrong import REPOSITORY

from lowrank.budget import Budget
from lowrank.config.load import load_study, read_yaml
from lowrank.config.study import Study

PAPER = REPOSITORY / "config/paper.yaml"
RAW = read_yaml(PAPER)
DOCS = (REPOSITORY / "docs/paper.md").read_text(encoding="utf-8")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study(PAPER)


def test_every_table_and_figure_of_the_paper_is_there(study: Study) -> None:
    kinds = {name: table.kind for name, table in study.tables.items()}
    accuracy = {f"table_{number}": "accuracy" for number in (1, 2, 3, 4, 5, 6, 10)}
    others = {"table_7": "statistics", "table_8": "allocations", "table_9": "generations"}
    ours = {"searches": "accuracy", "bases": "accuracy", "times": "times"}
    checks = {"agreement": "agreement", "arithmetic": "arithmetic"}
    assert kinds == accuracy | others | ours | checks
    assert {name: figure.kind for name, figure in study.figures.items()} == {
        "figure_1": "sensitivity",
        "figure_3": "perplexity",
        "figure_4": "comparison",
        "figure_5": "comparison",
        "figure_6": "search",
    }
    assert not study.smoke


def test_a_table_is_about_its_model(study: Study) -> None:
    models = {name: {row.model for row in table.rows} for name, table in study.tables.items()}
    assert models["table_5"] == {"llama-2-13b"}
    assert models["table_6"] == {"mistral-7b-v0.1"}
    assert models["table_7"] == models["table_8"] == {"llama-2-7b", "llama-2-13b"}
    assert models["table_10"] == {"llama-2-7b-chat", "llama-2-13b-chat"}
    assert all(models[f"table_{number}"] == {"llama-2-7b"} for number in (1, 2, 3, 4, 9))
    assert {sensitivity.model for sensitivity in study.sensitivity.values()} == {"llama-2-7b", "opt-6.7b"}


def references(value: Any) -> Iterator[tuple[str, str, str, int]]:
    """Every published row that a part of the config names."""
    if isinstance(value, dict):
        if {"file", "model", "method", "ratio"} == value.keys():
            yield value["file"], value["model"], value["method"], value["ratio"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_published_row_of_our_methods_stands_in_its_table(study: Study) -> None:
    presets = {*study.methods, "naive", "pooled"}
    for file in sorted((REPOSITORY / "config/published").glob("table_*.csv")):
        frame = pd.read_csv(file, comment="#")
        printed = {
            (file.stem, str(row.model), str(row.method), int(row.ratio))
            for row in frame.itertuples()
            if row.method.removesuffix("+pt") in presets or row.method.startswith(("samples-", "validation-"))
        }
        assert printed, file
        assert printed == set(references(RAW["tables"][file.stem])), file


def test_a_published_row_stands_beside_the_row_that_it_is_about(study: Study) -> None:
    compared = 0
    for number in (1, 5, 6, 7, 8):
        for row in study.tables[f"table_{number}"].rows:
            published = row.published
            assert published is not None
            suffix = "" if row.tuning == "none" else "+pt"
            assert (published.model, published.method, published.ratio) == (row.model, row.method + suffix, row.ratio)
            compared += 1
    assert compared == 11 + 11 + 4 + 14 + 8


def test_shapes_are_those_of_the_models(study: Study) -> None:
    """Parameters of the decoder's linear layers, from the models' cards and papers."""
    linears = {name: Budget.of(model.shape).dense_parameters for name, model in study.models.items()}
    assert linears == {
        "llama-2-7b": 32 * (4 * 4096**2 + 3 * 4096 * 11008),
        "llama-2-7b-chat": 32 * (4 * 4096**2 + 3 * 4096 * 11008),
        "llama-2-13b": 40 * (4 * 5120**2 + 3 * 5120 * 13824),
        "llama-2-13b-chat": 40 * (4 * 5120**2 + 3 * 5120 * 13824),
        "mistral-7b-v0.1": 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
        "opt-6.7b": 32 * (4 * 4096**2 + 2 * 4096 * 16384),
    }


def test_the_search_is_the_paper_s_and_never_sees_a_test_corpus(study: Study) -> None:
    ours = study.search["bo-50"]
    assert (ours.evaluations, ours.kl_direction, ours.kl_weight) == (50, "reverse", 4.096)
    top = study.validation["wikipedia-top100"]
    assert (top.length, top.select.strategy, top.select.keep, top.select.allocations) == (4096, "top", 100, 20)
    released = study.search["released-20"]
    # One objective in two spellings: 1e-3 of the sum over 4096 positions is 4.096 of the mean over them.
    assert released.kl_weight * top.length == pytest.approx(ours.kl_weight)
    tested = {"wikitext", "ptb", "c4"}
    seen = {corpus for validation in study.validation.values() for corpus in validation.corpora}
    seen |= {corpus for calibration in study.calibration.values() for corpus in calibration.corpora}
    assert study.suites["perplexity"].plain()["corpora"] == ["wikitext", "ptb", "c4"]
    assert not tested & seen
    assert seen | tested == set(study.corpora)


def test_every_preset_is_used(study: Study) -> None:
    rows = [*table_rows(), *figure_rows()]
    assert {row["method"] for row in rows} == set(study.methods)
    assert {row["model"] for row in rows} | {"opt-6.7b"} == set(study.models)
    searches = {study.method(name).search for name in study.methods} - {None}
    assert searches == set(study.search)
    assert {study.method(name).validation for name in study.methods} - {None} == set(study.validation)


def test_the_document_names_every_repository_and_commit() -> None:
    sections = ("models", "corpora", "instructions", "tasks")
    sources = [entry["source"] for section in sections for entry in RAW[section].values()]
    repositories = {(source["hub"], source["revision"]) for source in sources if "hub" in source}
    assert len(repositories) == 16
    for repository, revision in repositories:
        assert re.search(rf"\| `{re.escape(repository)}` \|.*`{revision}`", DOCS), repository
    by_hand = {source["path"] for source in sources if "path" in source}
    assert by_hand == {"cache/opt-6.7b", "cache/ptb/penn_treebank/validation/0000.parquet"}
    assert all(path in DOCS for path in by_hand)


# --- the jobs of a dry run, counted again from the YAML alone ---


def table_rows() -> Iterator[Row]:
    """All rows of tables, with the suites that judge them."""
    for table in RAW["tables"].values():
        for row in table.get("rows", []):
            yield {"ratio": 0, "tuning": "none", **row, "suites": table.get("suites", [])}


def figure_rows() -> Iterator[Row]:
    """What figures show, as rows; a figure of a search needs its search only."""
    for figure in RAW["figures"].values():
        common = {"tuning": "none", "suites": [figure["suite"]] if "suite" in figure else [], "kind": figure["kind"]}
        for row in figure.get("rows", []):
            yield {"ratio": 0, **common, **row}
        for method in figure.get("methods", []):
            for ratio in figure["ratios"]:
                yield {**common, "model": figure["model"], "method": method, "ratio": ratio}
        if figure["kind"] == "perplexity":
            yield {**common, "model": figure["model"], "method": "dense", "ratio": 0}


def expected_jobs(reads: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Jobs by rule, for one seed; `reads`: what a preset's method reads of its calibration besides bases."""
    rows = [*table_rows(), *figure_rows()]
    methods, validation = RAW["methods"], RAW["validation"]
    checkpoints = {(r["model"], r["method"], r["ratio"]) for r in rows if r.get("kind") != "search"}
    searches = {(r["model"], r["method"], r["ratio"]) for r in rows if "search" in methods[r["method"]]}
    for _, method, ratio in list(searches):
        if source := methods[method].get("transfer"):
            searches.add((source["model"], source["method"], ratio))
    windows = {(model, methods[method]["validation"]) for model, method, _ in searches}
    choices = [(model, validation[name]["select"]) for model, name in windows]
    choices += [(study["model"], study) for study in RAW["sensitivity"].values()]
    choices += [(model, methods[method]) for model, method, _ in checkpoints | searches]
    bases = {(model, c["calibration"], c["covariance"]) for model, c in choices if "covariance" in c}
    statistics = {(model, calibration) for model, calibration, _ in bases}
    statistics |= {(m, methods[name]["calibration"]) for m, name, _ in checkpoints if "statistics" in reads[name]}
    tokens = {(m, methods[name]["calibration"]) for m, name, _ in checkpoints if "tokens" in reads[name]}
    evaluations = {(r["model"], r["method"], r["ratio"], r["tuning"], suite) for r in rows for suite in r["suites"]}
    judged = Counter(RAW["suites"][suite]["kind"] for *_, suite in evaluations)
    return {
        "fetch_model": len(RAW["models"]),
        "fetch_corpus": len(RAW["corpora"]),
        "fetch_instructions": 1,
        "fetch_task": 7,
        "sample_calibration": len(statistics | tokens),
        "collect_statistics": len(statistics),
        "compute_bases": len(bases),
        "select_validation": len(windows),
        "measure_sensitivity": len(RAW["sensitivity"]),
        "search_allocation": len(searches),
        "compress_model": len(checkpoints),
        "post_train": len({e[:-1] for e in evaluations if e[3] != "none"}),
        "evaluate_perplexity": judged["perplexity"],
        "evaluate_zero_shot": judged["zero-shot"],
        "evaluate_cost": judged["cost"],
        "evaluate_generation": judged["generation"],
        "make_table": len(RAW["tables"]),
        "draw_figure": len(RAW["figures"]),
        "write_provenance": 1,
        "write_report": 1,
        "all": 1,
    }


def test_a_dry_run_plans_the_whole_study_in_seconds(study: Study, tmp_path: Path) -> None:
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--configfile", str(PAPER), "--directory", str(tmp_path), "all"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stdout + run.stderr
    statistics = (run.stdout + run.stderr).partition("Job stats:")[2].partition("total")[0]
    planned = {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", statistics, re.MULTILINE)}
    assert planned == expected_jobs({name: study.method(name).reads for name in study.methods})
    seconds = ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime
    assert seconds < 20, f"{seconds:.1f} s of a processor"

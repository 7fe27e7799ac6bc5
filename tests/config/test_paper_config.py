"""The paper's study: every table and figure, every published value, and the jobs that a dry run plans for it."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lowrank.cluster.planned_jobs import planned_jobs
from lowrank.compression.branches import Structure
from lowrank.config.load import load_study, read_config
from lowrank.config.study import Study
from lowrank.methods import method_modules
from lowrank.methods.llm_pruner import pruned_blocks, removal
from lowrank.ranks.budget import Budget
from tests.config.wrong import REPOSITORY

PAPER = REPOSITORY / "config/paper.yaml"
RAW = read_config(PAPER)
DOCS = (REPOSITORY / "docs/paper.md").read_text(encoding="utf-8")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study(PAPER)


def test_every_table_and_figure_of_the_paper_is_there(study: Study) -> None:
    kinds = {name: table.kind for name, table in study.tables.items()}
    accuracy = {f"table_{number}": "accuracy" for number in (1, 2, 3, 4, 5, 6, 10)}
    others = {"table_7": "statistics", "table_8": "allocations", "table_9": "generations"}
    ours = {"searches": "accuracy", "bases": "accuracy", "field": "accuracy", "times": "times"}
    ours |= {"differences": "differences", "differences_trained": "differences"}
    ours |= {f"transfer_{text}": "differences" for text in ("c4", "wikipedia", "arxiv")}
    checks = {"agreement": "agreement", "arithmetic": "arithmetic"}
    assert kinds == accuracy | others | ours | checks
    assert {name: figure.kind for name, figure in study.figures.items()} == {
        "figure_1": "sensitivity",
        "figure_3": "perplexity",
        "figure_4": "comparison",
        "figure_5": "comparison",
        "figure_6": "search",
        **{f"transfer_{text}": "heat-map" for text in ("c4", "wikipedia", "arxiv")},
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


def test_every_published_row_stands_in_its_table_once() -> None:
    for file in sorted((REPOSITORY / "config/published").glob("*.csv")):
        frame = pd.read_csv(file, comment="#").drop_duplicates(["model", "method", "ratio"])
        printed = [(file.stem, str(row.model), str(row.method), int(row.ratio)) for row in frame.itertuples()]
        assert sorted(printed) == sorted(references(RAW["tables"][file.stem])), file


def test_a_published_row_stands_beside_the_row_that_it_is_about(study: Study) -> None:
    compared = dict.fromkeys((1, 5, 6, 7, 8), 0)
    for number in compared:
        for row in study.tables[f"table_{number}"].rows:
            if row.published is None:
                continue
            preset = re.sub("-13b$|-original-ratio(-30)?$", "", row.method)
            method = preset + ("" if row.tuning == "none" else "+pt")
            published = row.published
            assert (published.model, published.method, published.ratio) == (row.model, method, row.ratio)
            compared[number] += 1
    assert compared == {1: 21, 5: 21, 6: 5, 7: 22, 8: 8}


# Not in the paper, or (slicegpt, asvd) not in its Table 7.
WITHOUT_PRINTED_VALUES = {
    *("svd", "fwsvd", "afm", "svd-llm", "svd-llm-update", "rankwise"),
    "llm-pruner",  # of 7B: the printed sizes are those of its own ratio
}


def test_the_rows_without_printed_values_are_of_other_methods(study: Study) -> None:
    for number, others in {1: set(), 5: set(), 6: set(), 7: {"slicegpt", "asvd"}, 8: set()}.items():
        rows = study.tables[f"table_{number}"].rows
        assert {row.method for row in rows if row.published is None} <= WITHOUT_PRINTED_VALUES | others, number
    assert {row.method for row in study.tables["table_1"].rows if row.published is None} == WITHOUT_PRINTED_VALUES


OF_THE_FIELD = ("aa-svd", "basis-sharing", "llrc", "modegpt", "obd-llm", "skipcat", "zs-svd")
"""Later than the paper: they stand in the tables `field`, here and of the miniature."""


def test_every_kind_of_method_stands_in_the_main_table(study: Study) -> None:
    rows = study.tables["table_1"].rows
    for ratio in (20, 30):
        kinds = {study.method(row.method).kind for row in rows if row.ratio == ratio}
        assert kinds == set(method_modules()) - {"dense", *OF_THE_FIELD}
        later = [study.method(row.method).kind for row in study.tables["field"].rows if row.ratio == ratio]
        assert set(later) == {"rankwise", "svd-llm", *OF_THE_FIELD}
    assert {row.tuning for row in rows} == {"none", *study.tuning} - {"distilled"}
    distilled = [(row.method, row.ratio) for row in study.tables["field"].rows if row.tuning == "distilled"]
    assert distilled == [("svd-llm", 20), ("svd-llm", 30)]


def test_what_is_pruned_are_the_blocks_that_its_authors_prune(study: Study) -> None:
    """Blocks 4 to 29 of LLaMA-2-7B, and 4 to 35 of LLaMA-2-13B; a quarter of each gives the published sizes."""
    blocks = {
        (row.model, row.method): pruned_blocks(study.method(row.method), study.models[row.model].shape.layers)
        for table in study.tables.values()
        for row in table.rows
        if study.method(row.method).kind == "llm-pruner"
    }
    assert {blocks for (model, _), blocks in blocks.items() if model == "llama-2-7b"} == {range(4, 30)}
    assert {blocks for (model, _), blocks in blocks.items() if model == "llama-2-13b"} == {range(4, 36)}
    assert {method for model, method in blocks if model == "llama-2-13b"} == {"llm-pruner-13b"}
    for name, share, removed in (("", 0.25, 20.31), ("-30", 0.37, 29.36)):
        preset = study.method(f"llm-pruner-original-ratio{name}")
        budget = replace(Budget.of(study.models["llama-2-7b"].shape), adds_bias=False)
        structure = Structure.of(budget)
        left = structure.remaining(removal(structure, preset, 0.0))
        assert preset.plain()["own_ratio"] == share
        assert 100 * (1 - left / budget.dense_parameters) == pytest.approx(removed, abs=0.005)


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
    tested = {"wikitext", "ptb", "c4", "arxiv"}
    seen = {corpus for validation in study.validation.values() for corpus in validation.corpora}
    seen |= {corpus for calibration in study.calibration.values() for corpus in calibration.corpora}
    assert study.suites["perplexity"].plain()["corpora"] == ["wikitext", "ptb", "c4"]
    assert set(study.suites["four-texts"].plain()["corpora"]) == tested
    assert not tested & seen
    assert seen | tested == set(study.corpora)


def test_every_preset_is_used(study: Study) -> None:
    rows = [*table_rows(), *figure_rows()]
    assert {row["method"] for row in rows} == set(study.methods)
    assert {row["model"] for row in rows} | {"opt-6.7b"} == set(study.models)
    assert {row.get("tuning", "none") for row in rows} - {"none"} == set(study.tuning)
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


def test_the_document_counts_rows_and_jobs(study: Study) -> None:
    for name, table in study.tables.items():
        if not table.rows:
            continue
        (counts,) = re.findall(rf"^\| `{name}` \|.*\| (\d+) \| (\d+|none) \|$", DOCS, re.MULTILINE)
        printed = sum(row.published is not None for row in table.rows)
        assert counts == (str(len(table.rows)), str(printed or "none")), name
    jobs = {seeds: len(planned_jobs(study.model_copy(update={"seeds": list(range(seeds))}))) + 1 for seeds in (1, 3)}
    assert f"# {jobs[1]} jobs, planned in seconds" in DOCS
    assert f"and their evaluations: {jobs[3]} jobs" in DOCS.replace("\n", " ")


def test_the_document_counts_the_jobs_of_each_rule(study: Study) -> None:
    jobs = Counter(job.rule for job in planned_jobs(study))
    costs = DOCS.partition("## What it costs")[2]
    counted = re.findall(r"^\| (`[a-z_`, ]+) \| (\d+) \|", costs, re.MULTILINE)
    assert len(counted) == 14
    for rules, count in counted:
        assert sum(jobs[rule] for rule in re.findall(r"\w+", rules)) == int(count), rules


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
    weighed = {name for name, covariance in RAW["covariance"].items() if "gradients" in covariance}
    gradients = {(model, calibration) for model, calibration, covariance in bases if covariance in weighed}
    statistics = {(model, calibration) for model, calibration, _ in bases}
    statistics |= {(m, methods[name]["calibration"]) for m, name, _ in checkpoints if "statistics" in reads[name]}
    tokens = {(m, methods[name]["calibration"]) for m, name, _ in checkpoints if "tokens" in reads[name]}
    removing = [(m, methods[name]) for m, name, _ in checkpoints if methods[name].get("mlp", "pairs") != "pairs"]
    eliminated = {(m, c["calibration"], c["covariance"], c["mlp"], c.get("multiple", 8)) for m, c in removing}
    assert {mlp for *_, mlp, _ in eliminated} == {"both"}  # each takes one without pairs, and goes on from there
    distilled = {name: each["calibration"] for name, each in RAW["tuning"].items() if "calibration" in each}
    tokens |= {(r["model"], distilled[r["tuning"]]) for r in rows if r["tuning"] in distilled}
    evaluations = {(r["model"], r["method"], r["ratio"], r["tuning"], suite) for r in rows for suite in r["suites"]}
    kept, tuned = RAW["keep_checkpoints"], {e[:-1] for e in evaluations if e[3] != "none"}
    given_up = [made for made in [*checkpoints, *tuned] if made[1] != "dense" and made[1] not in kept["methods"]]
    judged = Counter(RAW["suites"][suite]["kind"] for *_, suite in evaluations)
    return {
        "fetch_model": len(RAW["models"]),
        "fetch_corpus": len(RAW["corpora"]),
        "compare_texts": 1,
        "fetch_instructions": 1,
        "fetch_task": 7,
        "sample_calibration": len(statistics | tokens),
        "collect_statistics": len(statistics),
        "collect_gradients": len(gradients),
        "compute_bases": len(bases),
        "eliminate_neurons": len(eliminated | {(*of[:-1], "any") for of in eliminated}),
        "select_validation": len(windows),
        "measure_sensitivity": len(RAW["sensitivity"]),
        "search_allocation": len(searches),
        "compress_model": len(checkpoints),
        "post_train": len([made for made in tuned if made[3] not in distilled]),
        "distil_features": len([made for made in tuned if made[3] in distilled]),
        "evaluate_perplexity": judged["perplexity"],
        "evaluate_zero_shot": judged["zero-shot"],
        "evaluate_cost": judged["cost"],
        "evaluate_generation": judged["generation"],
        "give_up_checkpoint": len(given_up),
        "make_table": len(RAW["tables"]),
        "draw_figure": len(RAW["figures"]),
        "write_provenance": 1,
        "write_report": 1,
        "all": 1,
    }


@pytest.mark.slow
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
    assert planned == expected_jobs({name: study.method(name).needs for name in study.methods})
    seconds = ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime
    assert seconds < 20, f"{seconds:.1f} s of a processor"

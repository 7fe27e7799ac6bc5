"""Changes of a checkout, and the jobs that they concern: the table "what reruns when"."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lowrank.cluster.planned_jobs import Job
from lowrank.config.study import Study
from tests.workflow.clones import change_code, read_config, replace, write_config

Config = dict[str, Any]
Concerns = Callable[[Job, Study], bool]
CONFIGS = ("quickstart", "mini-paper", "paper")
REMOVES_NEURONS = (("rankwise-neurons", "quickstart"), ("rankwise", "paper"))
"""A preset, and the config that has it."""
PARAMS, INPUT, MISSING = "Params have changed", "Updated input files", "Missing output files"
INPUTS = "Set of input files has changed"

# --- which jobs a change concerns ---


def rule(*names: str) -> Concerns:
    """All jobs of some rules."""
    return lambda job, study: job.rule in names


def nothing(job: Job, study: Study) -> bool:
    """No job."""
    return False


def either(*several: Concerns) -> Concerns:
    """Jobs that at least one of these concerns."""
    return lambda job, study: any(concerns(job, study) for concerns in several)


def unless(concerns: Concerns) -> Concerns:
    """All jobs but some."""
    return lambda job, study: not concerns(job, study)


def method(kind: str) -> Concerns:
    """Compressions by methods of some kind."""
    return lambda job, study: job.rule == "compress_model" and study.method(job.wildcards["method"]).kind == kind


def compressing(preset: str) -> Concerns:
    """Compressions by a preset."""
    return lambda job, study: job.rule == "compress_model" and job.wildcards["method"] == preset


def of_kind(what: str, kind: str) -> Concerns:
    """Tables or figures of some kind."""
    made_by = {"table": "make_table", "figure": "draw_figure"}[what]
    return lambda job, study: job.rule == made_by and getattr(study, f"{what}s")[job.wildcards[what]].kind == kind


def showing(suite: str) -> Concerns:
    """Tables that show a suite."""
    return lambda job, study: job.rule == "make_table" and suite in study.tables[job.wildcards["table"]].suites


def having(name: str, **wildcards: str) -> Concerns:
    """Jobs of a rule with some wildcards."""
    return lambda job, study: job.rule == name and wildcards.items() <= job.wildcards.items()


def judging(model: str) -> Concerns:
    """Evaluations of what has become of a model."""
    return lambda job, study: job.rule.startswith("evaluate_") and job.wildcards["model"] == model


def searching(preset: str) -> Concerns:
    """Searches by a preset, and what draws them with its settings."""

    def concerns(job: Job, study: Study) -> bool:
        if job.rule == "search_allocation":
            return study.method(job.wildcards["method"]).search == preset
        figure: Any = study.figures[job.wildcards["figure"]] if job.rule == "draw_figure" else None
        return bool(figure and figure.kind == "search" and preset in [study.method(m).search for m in figure.methods])

    return concerns


RECORDS = rule("write_provenance", "write_report")
"""Both hold the settings of what was used."""
WITHOUT_TORCH = rule(
    *("fetch_corpus", "fetch_token_corpus", "fetch_instructions", "fetch_task"),
    *("compare_texts", "make_table", "draw_figure", "write_provenance", "write_report"),
)

# --- changes ---


@dataclass(frozen=True)
class Change:
    """Something that a user does to a checkout whose study is finished.

    Attributes:
        name: in words.
        do: given the checkout and the name of the config.
        concerns: the jobs that have a reason of their own to run again.
        reason: what Snakemake says of them.
        configs: for which it is tried.
        arguments: further ones of Snakemake.
    """

    name: str
    do: Callable[[Path, str], None]
    concerns: Concerns
    reason: str = PARAMS
    configs: tuple[str, ...] = ("quickstart",)
    arguments: tuple[str, ...] = ()


def code(file: str, function: str) -> Callable[[Path, str], None]:
    """A change of a function of the library."""
    return lambda checkout, config: change_code(checkout, file, function)


def text(file: str, old: str, new: str, times: int | None = None) -> Callable[[Path, str], None]:
    """A change of some text."""
    return lambda checkout, name: replace(checkout, file, old, new, times)


def pin(package: str) -> Callable[[Path, str], None]:
    """An upgrade of a package that the workflow is pinned to."""
    return text("envs/requirements.txt", f"\n{package}==", f"\n{package}==9")


def study(edit: Callable[[Config], Any]) -> Callable[[Path, str], None]:
    """A change of the config."""

    def do(checkout: Path, name: str) -> None:
        content = read_config(checkout, name)
        before = repr(content)
        edit(content)
        assert repr(content) != before
        write_config(checkout, name, content)

    return do


def value(new: object, *keys: str) -> Callable[[Config], None]:
    """Another value at some place of a config."""

    def do(content: Config) -> None:
        *sections, last = keys
        place = content
        for key in sections:
            place = place[key]
        place[last] = new

    return do


def comments(checkout: Path, name: str) -> None:
    """Comments, docstrings, blank lines and line breaks in every file of code, and in the config."""
    for path in [*(checkout / "workflow_scripts").rglob("*.py"), *(checkout / "rules").glob("*.smk")]:
        content = path.read_text().replace("\n    return ", "\n\n    # as it should be\n    return ")
        content = content.replace('"""The', '"""Here the').replace(" = (\n", " = (  # a comment\n")
        path.write_text(f"{content}\n# The end.\n")
    path = checkout / f"config/{name}.yaml"
    path.write_text("\n# A comment.\n\n".join(path.read_text().split("\n\n")))


def other_order(value: Any) -> Any:
    """All mappings the other way round."""
    if isinstance(value, dict):
        return {key: other_order(value[key]) for key in reversed(value)}
    return [other_order(each) for each in value] if isinstance(value, list) else value


def reverse_keys(content: Config) -> None:
    turned = other_order(content)
    content.clear()
    content.update(turned)


def swap(content: Config, section: str, preset: str, one: str, other: str) -> None:
    entry = content[section][preset]
    entry[one], entry[other] = entry[other], entry[one]


def add_unused(content: Config) -> None:
    content["methods"]["never-asked-for"] = {"kind": "svd"}
    content["search"]["never-run"] = {"evaluations": 7}
    content["corpora"]["never-read"] = next(iter(content["corpora"].values())) | {"documents": [900, 901]}
    content["suites"]["never-judged"] = {"kind": "cost"}


def calibrate_on_more(content: Config) -> None:
    content["corpora"]["more"] = content["corpora"]["wikipedia-validation"] | {"documents": [0, 5]}
    content["calibration"]["c4-32"]["corpora"].append("more")


def add_row(content: Config) -> None:
    content["tables"]["table_7"]["rows"].append({"model": "smollm2-135m", "method": "svd", "ratio": 40})


def other_ratio(content: Config, method: str, table: str) -> None:
    """One more row, at a ratio of its own."""
    row = next(row for row in content["tables"][table]["rows"] if row["method"] == method)
    content["tables"][table]["rows"].append(row | {"ratio": 13})


def add_suite(content: Config) -> None:
    content["suites"]["shorter"] = content["suites"]["held-out"] | {"length": 64}
    content["tables"]["table_1"]["suites"].append("shorter")


def new_times(checkout: Path, name: str) -> None:
    """A fresh clone, and results that were copied into it in any order."""
    moments = random.Random(0)
    for path in sorted(checkout.rglob("*")):
        if ".snakemake" not in path.parts:
            moment = moments.randrange(10**9, 17 * 10**8)
            if path.stat().st_nlink > 1 and path.is_file():  # other clones have it too
                copied = path.with_name(f"{path.name}.copied")
                shutil.copyfile(path, copied)
                copied.replace(path)
            os.utime(path, (moment, moment))


ALL = CONFIGS
CHANGES = [
    # code
    Change("nothing", lambda checkout, name: None, nothing),
    Change("comments and formatting", comments, nothing, configs=ALL),
    Change("one method", code("lowrank/methods/svd.py", "compress"), method("svd"), configs=ALL),
    Change("another method", code("lowrank/methods/lord.py", "compress"), method("lord"), configs=("paper",)),
    Change("the search", code("lowrank/search/search.py", "search_allocation"), rule("search_allocation"), configs=ALL),
    Change(
        "what searches and selections share",
        code("lowrank/search/kept_ratios.py", "SearchSpace.ranks"),
        rule("search_allocation", "select_validation"),
    ),
    Change(
        "what searches, selections and uniform allocations share",
        code("lowrank/ranks/rounding.py", "Rounder._give_back"),
        either(rule("search_allocation", "select_validation"), method("svd")),
    ),
    Change("the choice of windows", code("lowrank/search/validation.py", "select_windows"), rule("select_validation")),
    Change("bases", code("lowrank/bases/block.py", "bases_of_block"), rule("compute_bases")),
    Change(
        "what removing neurons costs",
        code("lowrank/compression/eliminate_neurons.py", "_tensors"),
        rule("eliminate_neurons"),
        configs=ALL,
    ),
    Change("training", code("lowrank/post_training/train.py", "train"), rule("post_train")),
    Change(
        "distillation",
        code("lowrank/post_training/distil.py", "distil_model"),
        rule("distil_features"),
        configs=("mini-paper", "paper"),
    ),
    Change("perplexity", code("lowrank/evaluation/perplexity.py", "evaluate_corpora"), rule("evaluate_perplexity")),
    Change(
        "the comparison of texts",
        code("lowrank/sources/shared_text.py", "is_evidence"),
        rule("compare_texts"),
        configs=ALL,
    ),
    Change(
        "one kind of figure",
        code("lowrank/paper/figures/perplexity.py", "draw_perplexity"),
        of_kind("figure", "perplexity"),
        configs=("quickstart", "paper"),
    ),
    Change("the style of figures", code("lowrank/paper/figures/style.py", "save_figure"), rule("draw_figure")),
    Change(
        "one kind of table",
        code("lowrank/paper/tables/statistics.py", "build_statistics"),
        of_kind("table", "statistics"),
        configs=("quickstart", "paper"),
    ),
    Change(
        "a template",
        text("workflow_scripts/lowrank/paper/templates/table.tex.j2", "toprule", "midrule"),
        rule("make_table"),
    ),
    Change(
        "a template of the report",
        text("workflow_scripts/lowrank/paper/templates/report.css.j2", "--link: #0a5aa8", "--link: #0a5aa9"),
        rule("write_report"),
    ),
    Change("the frame of stages", code("lowrank/jobs/stage.py", "run_stage"), nothing),
    # the schema
    Change("a check", code("lowrank/config/presets.py", "Search._initial_points_fit"), nothing),
    Change(
        "a default that the config leaves out",
        text("workflow_scripts/lowrank/config/suites.py", "repeats: Positive = 3", "repeats: Positive = 4"),
        either(rule("evaluate_cost"), showing("cost"), RECORDS),
        configs=("quickstart", "paper"),
    ),
    Change(
        "a default that the config states",
        text("workflow_scripts/lowrank/config/suites.py", "new_tokens: Positive = 32", "new_tokens: Positive = 33"),
        nothing,
        configs=("quickstart", "paper"),
    ),
    Change(
        "a default of a method that the config leaves out",
        text(
            "workflow_scripts/lowrank/config/low_rank.py",
            'one that may have it."""\n\n    uncompressed: tuple[str, ...] = Field(default=()',
            'one that may have it."""\n\n    uncompressed: tuple[str, ...] = Field(default=("v",)',
        ),
        either(method("svd"), RECORDS),
    ),
    # the config
    Change(
        "a swapped pair of values",
        study(partial(swap, section="suites", preset="cost", one="prompt_tokens", other="new_tokens")),
        either(rule("evaluate_cost"), showing("cost"), RECORDS),
        configs=ALL,
    ),
    Change("another order of keys", study(reverse_keys), nothing, configs=ALL),
    Change("unused presets", study(add_unused), nothing, configs=("quickstart", "paper")),
    Change("another cache", study(value("elsewhere", "cache")), nothing),
    Change("fewer checkpoints that are kept", study(value({"ratios": [20]}, "keep_checkpoints")), nothing),
    Change("a licence", study(value("MIT", "models", "smollm2-135m", "license")), RECORDS),
    Change(
        "the tokens that an expert needs, where no model has experts",
        study(value(100, "calibration", "c4-32", "expert_tokens")),
        RECORDS,
    ),
    Change(
        "the longest context of a model",
        study(value(4096, "models", "smollm2-135m", "max_length")),
        either(judging("smollm2-135m"), RECORDS),
    ),
    Change(
        "the longest context of a random model",
        study(value(4096, "models", "opt-random", "max_length")),
        either(having("fetch_model", model="opt-random"), judging("opt-random"), RECORDS),
        configs=("mini-paper",),
    ),
    Change(
        "the title of a figure",
        study(value("Other words", "figures", "figure_3", "title")),
        either(having("draw_figure", figure="figure_3"), RECORDS),
    ),
    Change(
        "a learning rate",
        study(value(0.5, "tuning", "scales", "learning_rate")),
        either(rule("post_train"), RECORDS),
    ),
    Change(
        "the iterations of one search",
        study(value(60, "search", "bo-50-forward-kl", "evaluations")),
        either(searching("bo-50-forward-kl"), RECORDS),
        configs=("paper",),
    ),
    Change(
        "the groups of one covariance",
        study(value(16, "covariance", "pooled-8", "groups")),
        either(having("compute_bases", covariance="pooled-8"), RECORDS),
    ),
    *(
        Change(
            f"other ratios of {method}",
            study(partial(other_ratio, method=method, table="table_1")),
            either(having("make_table", table="table_1"), RECORDS),
            configs=(config,),
        )
        for method, config in REMOVES_NEURONS
    ),
    *(
        Change(
            f"the influence of blocks of {method}",
            study(value(False, "methods", method, "influence")),
            either(compressing(method), RECORDS),
            reason=INPUTS,  # it reads no windows then
            configs=(config,),
        )
        for method, config in REMOVES_NEURONS
    ),
    Change(
        "the multiple of neurons, where pairs are made of what is left",
        study(value(16, "methods", "rankwise", "multiple")),
        either(compressing("rankwise"), RECORDS),
        configs=("mini-paper", "paper"),
    ),
    Change(
        "the multiple of neurons, where no pairs are",
        study(value(16, "methods", "rankwise-neurons", "multiple")),
        either(compressing("rankwise-neurons"), RECORDS),
    ),
    Change(
        "the windows of one calibration",
        study(value(500, "calibration", "c4-512", "windows")),
        either(having("sample_calibration", calibration="c4-512"), RECORDS),
        configs=("paper",),
    ),
    Change(
        "one more text to calibrate on",
        study(calibrate_on_more),
        either(having("sample_calibration", calibration="c4-32"), rule("compare_texts"), RECORDS),
    ),
    Change(
        "tokens drawn for loss gradients",
        study(value(2, "calibration", "c4-32", "gradient_draws")),
        either(having("collect_gradients", calibration="c4-32"), RECORDS),
        configs=("mini-paper",),
    ),
    Change("a new row", study(add_row), either(having("make_table", table="table_7"), RECORDS)),
    Change("a table gains a suite", study(add_suite), either(having("make_table", table="table_1"), RECORDS)),
    # elsewhere
    Change(
        "a published value",
        text("config/published/table_8.csv", "\n", "\n# checked again\n", 1),
        having("make_table", table="table_8"),
        reason=INPUT,
    ),
    Change("a fresh clone with copied results", new_times, nothing, configs=ALL),
    Change("torch in the pins", pin("torch"), unless(WITHOUT_TORCH), configs=ALL),
    Change("matplotlib in the pins", pin("matplotlib"), rule("draw_figure", "write_report")),
    Change("pytest in the pins", pin("pytest"), nothing),
    Change(
        "what jobs are given",
        lambda checkout, name: None,
        nothing,
        arguments=("--set-resources", "collect_statistics:layers_per_pass=3", "--set-threads", "post_train=2"),
    ),
    Change("one machine", lambda checkout, name: None, nothing, arguments=("--profile", "profiles/local")),
    Change("a cluster", lambda checkout, name: None, nothing, arguments=("--profile", "profiles/slurm")),
]

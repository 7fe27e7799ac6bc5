"""Changes that are tried, each with the jobs that it concerns: the table "what reruns when", as a test."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.workflow.changes import (
    INPUT,
    INPUTS,
    RECORDS,
    WITHOUT_TORCH,
    Change,
    add_row,
    add_suite,
    add_unused,
    answering,
    calibrate_on_more,
    code,
    comments,
    compressing,
    either,
    having,
    method,
    new_times,
    nothing,
    of_kind,
    other_ratio,
    pin,
    reverse_keys,
    rule,
    searching,
    showing,
    study,
    swap,
    text,
    unless,
    value,
)

LEFT_OUT = {
    "mini-paper": (),
    "paper": ("llama-2-13b", "llama-2-13b-chat"),
}
"""Configs of many jobs, and models that are left out of them; most methods are left at one ratio."""
REMOVES_NEURONS = (("rankwise-neurons", "quickstart"), ("rankwise", "paper"))
"""A preset, and the config that has it."""
ALL = ("quickstart", "mini-paper", "paper")
UNCONCERNED = [
    Change("a fresh clone with copied results", new_times, nothing, configs=ALL),
    Change("the frame of stages", code("lowrank/jobs/stage.py", "run_stage"), nothing),
    Change("a check", code("lowrank/config/presets.py", "Search._initial_points_fit"), nothing),
    Change(
        "a default that the config states",
        text("workflow_scripts/lowrank/config/suites.py", "new_tokens: Positive = 32", "new_tokens: Positive = 33"),
        nothing,
        configs=("quickstart", "paper"),
    ),
    Change("another order of keys", study(reverse_keys), nothing, configs=ALL),
    Change("unused presets", study(add_unused), nothing, configs=("quickstart", "paper")),
    Change("another cache", study(value("elsewhere", "cache")), nothing),
    Change("pytest in the pins", pin("pytest"), nothing),
    Change("comments and formatting", comments, nothing, configs=ALL),
]
"""What no job is to run for: tried all at once, since none of them may have any."""


def all_unconcerned(checkout: Path, name: str) -> None:
    """Each of them, where it is tried."""
    for change in UNCONCERNED:
        if name in change.configs:
            change.do(checkout, name)


CHANGES = [
    Change("what concerns nothing", all_unconcerned, nothing, configs=ALL),
    # code
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
    # the schema
    Change(
        "a default that the config leaves out",
        text("workflow_scripts/lowrank/config/suites.py", "repeats: Positive = 3", "repeats: Positive = 4"),
        either(rule("evaluate_cost"), showing("cost"), RECORDS),
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
    Change("fewer checkpoints that are kept", study(value({"ratios": [20]}, "keep_checkpoints")), nothing),
    Change(
        "a swapped pair of values",
        study(partial(swap, section="suites", preset="cost", one="prompt_tokens", other="new_tokens")),
        either(rule("evaluate_cost"), showing("cost"), RECORDS),
        configs=ALL,
    ),
    Change("a licence", study(value("MIT", "models", "smollm2-135m", "license")), RECORDS),
    Change(
        "the tokens that an expert needs, where no model has experts",
        study(value(100, "calibration", "c4-32", "expert_tokens")),
        RECORDS,
    ),
    Change(
        "the longest context of a model",
        study(value(4096, "models", "smollm2-135m", "max_length")),
        either(answering("smollm2-135m"), RECORDS),
    ),
    Change(
        "the longest context of a random model",
        study(value(4096, "models", "opt-random", "max_length")),
        either(having("fetch_model", model="opt-random"), answering("opt-random"), RECORDS),
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
    Change("torch in the pins", pin("torch"), unless(WITHOUT_TORCH), configs=ALL),
    Change("matplotlib in the pins", pin("matplotlib"), rule("draw_figure", "write_report")),
    Change(
        "what jobs are given",
        lambda checkout, name: None,
        nothing,
        arguments=("--set-resources", "collect_statistics:layers_per_pass=3", "--set-threads", "post_train=2"),
    ),
    Change("one machine", lambda checkout, name: None, nothing, arguments=("--profile", "profiles/local")),
    Change("a cluster", lambda checkout, name: None, nothing, arguments=("--profile", "profiles/slurm")),
]

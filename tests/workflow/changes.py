"""Changes of a checkout, and the jobs that they concern: the table "what reruns when"."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.cluster.planned_jobs import Job
from lowrank.config.study import Study
from tests.workflow.clones import change_code, read_config, replace, write, write_config

Config = dict[str, Any]
Concerns = Callable[[Job, Study], bool]
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


def answering(model: str) -> Concerns:
    """Evaluations that cut texts at the longest context of a model."""
    rules = ("evaluate_zero_shot", "evaluate_generation")
    return lambda job, study: job.rule in rules and job.wildcards["model"] == model


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
    """Comments, docstrings, blank lines and line breaks in every file of code, and blank lines in the config."""
    for path in [*(checkout / "workflow_scripts").rglob("*.py"), *(checkout / "rules").glob("*.smk")]:
        content = path.read_text().replace("\n    return ", "\n\n    # as it should be\n    return ")
        content = content.replace('"""The', '"""Here the').replace(" = (\n", " = (  # a comment\n")
        write(path, f"{content}\n# The end.\n")
    path = checkout / f"config/{name}.yaml"
    write(path, re.sub(r"(?m)^(?=\w)", "\n# A comment.\n", path.read_text()))


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

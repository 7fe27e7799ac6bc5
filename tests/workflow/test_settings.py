"""Rules hand their stages all that these read: a field that a rule left out would be its default, without a word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from lowrank.config.base import Section
from lowrank.config.load import load_study
from lowrank.methods import method_modules
from lowrank.reruns.fingerprint import CONFIG, Code
from tests.workflow.clones import REPOSITORY, Given, clone, given, pool

NAME = "mini-paper"  # it has jobs of every rule but one, which has the stage of another
STUDY = load_study(REPOSITORY / f"config/{NAME}.yaml")
CODE = Code(REPOSITORY / "workflow_scripts")
SECTIONS = {
    **{"model": "models", "corpus": "corpora", "task": "tasks"},
    **{"suite": "suites", "table": "tables", "figure": "figures"},
}
"""Sections of the config that are not called like the wildcard of one entry."""
STARTED = {
    "compress_model": [f"lowrank.methods.{name.replace('-', '_')}" for name in method_modules()],
    "post_train": ["lowrank.post_training.worker"],
}
"""Modules that no import leads to."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Given]:
    """All jobs of the study, with what they would be given."""
    with pool() as processes:
        place = clone(REPOSITORY, tmp_path_factory.mktemp("clones") / "source")
        return processes.submit(given, place, NAME).result()


def reached(stage: str) -> list[ast.stmt]:
    """The statements that a stage can reach, its own and the library's; the config's sections are no part of it."""
    nodes = CODE._reached(stage, STARTED.get(stage, []), {})
    modules = {place: CODE._module(place) for place, _ in nodes if not place.startswith(CONFIG)}
    return [
        statement
        for place, name in nodes
        if (module := modules.get(place))
        for statement in (module.definitions.get(name, []) if name else module.active)
    ]


def keys_read(stage: str) -> set[str]:
    """Keys of the settings that it reads, by itself or in functions that it hands them to."""
    return {
        node.slice.value
        for statement in reached(stage)
        for node in ast.walk(statement)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "settings"
        and isinstance(node.slice, ast.Constant)
    }


@cache
def attributes_read(stage: str) -> set[str]:
    """Names of all attributes in its code, whatever has them."""
    return {node.attr for part in reached(stage) for node in ast.walk(part) if isinstance(node, ast.Attribute)}


def sections_of(job: Given) -> Iterator[tuple[str, Section]]:
    """What a job is given of the config: a key of its settings, and the section that stands there."""
    settings = job.params["settings"]
    for key, value in settings.items():
        if key == "shape" and isinstance(settings.get("model"), str):
            yield key, STUDY.models[settings["model"]].shape
        elif key == "search":
            yield key, STUDY.search[STUDY.method(job.wildcards["method"]).search or ""]
        elif key in job.wildcards and isinstance(value, dict):
            name = job.wildcards[key]
            yield key, STUDY.method(name) if key == "method" else getattr(STUDY, SECTIONS.get(key, key))[name]


def test_every_key_that_a_stage_reads_is_there(jobs: list[Given]) -> None:
    there: dict[str, set[str]] = {}
    for job in jobs:
        there.setdefault(job.rule, set()).update(job.params["settings"])
    missing = {stage: keys_read(stage) - keys for stage, keys in there.items()}
    assert not any(missing.values()), missing
    assert sum(len(keys_read(stage)) for stage in there) > 60  # they are found at all


def test_no_field_is_left_out_that_a_stage_reads(jobs: list[Given]) -> None:
    """A stage makes sections of its settings again, with a default for what is not there."""
    seen, wrong = set(), []
    for job in jobs:
        attributes = attributes_read(job.rule)
        for key, section in sections_of(job):
            value, whole = job.params["settings"][key], section.plain()
            assert value.items() <= whole.items(), (job, key)
            seen.add(key)
            left_out = whole.keys() - value.keys() - job.params.keys()
            wrong += [f"{job.rule} reads {key}.{name}" for name in left_out & attributes]
    assert not wrong, sorted(set(wrong))
    assert seen >= {"model", "shape", "corpus", "task", "calibration", "covariance", "validation", "search", "method"}
    assert seen >= {"instructions", "sensitivity", "tuning", "suite", "table", "figure"}


def test_a_choice_that_keeps_every_window_is_given_no_more_of_the_model_than_its_name(jobs: list[Given]) -> None:
    given_to = {job.wildcards["validation"]: job.params["settings"] for job in jobs if job.rule == "select_validation"}
    assert given_to["wikipedia-top"].keys() - given_to["wikipedia-all"].keys() == {"dtype", "shape"}


def test_the_longest_context_of_a_random_model_is_no_default(jobs: list[Given]) -> None:
    """It decides what is made; of other models it decides nothing that is fetched."""
    fetched = {job.wildcards["model"]: job.params["settings"]["model"] for job in jobs if job.rule == "fetch_model"}
    assert "max_length" not in fetched["smollm2-135m"]
    assert fetched["llama-random"]["max_length"] == STUDY.models["llama-random"].max_length

"""Every place of a config that names an entry of another section."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank.config.sections import PerplexitySuite, SensitivityFigure, ZeroShotSuite
from lowrank.config.study import Study


def references(study: Study) -> Iterator[tuple[str, str, str]]:
    """(YAML path, section it must be in, name) of every reference."""
    for name, calibration in study.calibration.items():
        yield f"calibration.{name}.corpus", "corpora", calibration.corpus
    for name, validation in study.validation.items():
        yield f"validation.{name}.corpus", "corpora", validation.corpus
        yield f"validation.{name}.select.calibration", "calibration", validation.select.calibration
        yield f"validation.{name}.select.covariance", "covariance", validation.select.covariance
    for name, sensitivity in study.sensitivity.items():
        for section, target in (
            ("models", sensitivity.model),
            ("calibration", sensitivity.calibration),
            ("covariance", sensitivity.covariance),
            ("corpora", sensitivity.corpus),
        ):
            key = {"models": "model", "corpora": "corpus"}.get(section, section)
            yield f"sensitivity.{name}.{key}", section, target
    for name in study.methods:
        for section in ("calibration", "covariance", "validation", "search"):
            target = getattr(study.method(name), section)
            if target is not None:
                yield f"methods.{name}.{section}", section, target
    for name, tuning in study.tuning.items():
        yield f"tuning.{name}.instructions", "instructions", tuning.instructions
    yield from _suite_references(study)
    yield from _paper_references(study)


def _suite_references(study: Study) -> Iterator[tuple[str, str, str]]:
    for name, suite in study.suites.items():
        if isinstance(suite, PerplexitySuite):
            for index, corpus in enumerate(suite.corpora):
                yield f"suites.{name}.corpora[{index}]", "corpora", corpus
        elif isinstance(suite, ZeroShotSuite):
            for task in suite.tasks:
                yield f"suites.{name}.tasks.{task}", "tasks", task


def _paper_references(study: Study) -> Iterator[tuple[str, str, str]]:
    for name, table in study.tables.items():
        for index, suite in enumerate(table.suites):
            yield f"tables.{name}.suites[{index}]", "suites", suite
        for index, row in enumerate(table.rows):
            place = f"tables.{name}.rows[{index}]"
            yield f"{place}.model", "models", row.model
            yield f"{place}.method", "methods", row.method
            if row.tuning != "none":
                yield f"{place}.tuning", "tuning", row.tuning
    for name, figure in study.figures.items():
        if isinstance(figure, SensitivityFigure):
            yield f"figures.{name}.sensitivity", "sensitivity", figure.sensitivity
        else:
            yield f"figures.{name}.model", "models", figure.model
            yield f"figures.{name}.suite", "suites", figure.suite
            for index, method in enumerate(figure.methods):
                yield f"figures.{name}.methods[{index}]", "methods", method

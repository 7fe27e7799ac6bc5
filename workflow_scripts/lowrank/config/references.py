"""Every place of a config that names an entry of another section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank.config.outputs import (
    AgreementTable,
    ArithmeticTable,
    ComparisonFigure,
    PerplexityFigure,
    PredictedLossFigure,
    Row,
    SearchFigure,
    SensitivityFigure,
)
from lowrank.config.sources import RandomSource
from lowrank.config.study import Study
from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.config.tuning import FeatureDistillation


def references(study: Study) -> Iterator[tuple[str, str, str]]:
    """(YAML path, section it must be in, name) of every reference."""
    for name, calibration in study.calibration.items():
        for index, corpus in enumerate(calibration.corpora):
            yield f"calibration.{name}.corpora[{index}]", "corpora", corpus
    for name, validation in study.validation.items():
        for index, corpus in enumerate(validation.corpora):
            yield f"validation.{name}.corpora[{index}]", "corpora", corpus
        for section in ("calibration", "covariance"):
            if (target := getattr(validation.select, section)) is not None:
                yield f"validation.{name}.select.{section}", section, target
    for name, sensitivity in study.sensitivity.items():
        for section, target in (
            ("models", sensitivity.model),
            ("calibration", sensitivity.calibration),
            ("covariance", sensitivity.covariance),
            ("corpora", sensitivity.corpus),
        ):
            key = {"models": "model", "corpora": "corpus"}.get(section, section)
            yield f"sensitivity.{name}.{key}", section, target
    for name, model in study.models.items():
        if isinstance(model.source, RandomSource):
            yield f"models.{name}.source.tokenizer", "models", model.source.tokenizer
    for name in study.methods:
        method = study.method(name)
        for section in ("calibration", "covariance", "validation", "search"):
            target = getattr(method, section)
            if target is not None:
                yield f"methods.{name}.{section}", section, target
        if method.transfer is not None:
            yield f"methods.{name}.transfer.model", "models", method.transfer.model
            yield f"methods.{name}.transfer.method", "methods", method.transfer.method
    for name, tuning in study.tuning.items():
        if isinstance(tuning, FeatureDistillation):
            yield f"tuning.{name}.calibration", "calibration", tuning.calibration
        else:
            yield f"tuning.{name}.instructions", "instructions", tuning.instructions
    for index, target in enumerate(study.keep_checkpoints.methods or ()):
        yield f"keep_checkpoints.methods[{index}]", "methods", target
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
        yield from _row_references(f"tables.{name}", table.rows)
        if isinstance(table, AgreementTable):
            for index, shown in enumerate(table.tables):
                yield f"tables.{name}.tables[{index}]", "tables", shown
        if isinstance(table, ArithmeticTable):
            for index, check in enumerate(table.checks):
                yield f"tables.{name}.checks[{index}].model", "models", check.model
                if check.units_of is not None:
                    yield f"tables.{name}.checks[{index}].units_of", "models", check.units_of
    for name, figure in study.figures.items():
        if isinstance(figure, SensitivityFigure):
            for index, sensitivity in enumerate(figure.sensitivity):
                yield f"figures.{name}.sensitivity[{index}]", "sensitivity", sensitivity
        if isinstance(figure, PerplexityFigure | ComparisonFigure):
            yield f"figures.{name}.suite", "suites", figure.suite
        if isinstance(figure, ComparisonFigure):
            yield from _row_references(f"figures.{name}", figure.rows)
        if isinstance(figure, PredictedLossFigure):
            yield f"figures.{name}.calibration", "calibration", figure.calibration
            yield f"figures.{name}.corpus", "corpora", figure.corpus
            for index, covariance in enumerate(figure.covariance):
                yield f"figures.{name}.covariance[{index}]", "covariance", covariance
        if isinstance(figure, PerplexityFigure | SearchFigure | PredictedLossFigure):
            yield f"figures.{name}.model", "models", figure.model
        if isinstance(figure, PerplexityFigure | SearchFigure):
            for index, method in enumerate(figure.methods):
                yield f"figures.{name}.methods[{index}]", "methods", method


def _row_references(place: str, rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    for index, row in enumerate(rows):
        yield f"{place}.rows[{index}].model", "models", row.model
        yield f"{place}.rows[{index}].method", "methods", row.method
        if row.tuning != "none":
            yield f"{place}.rows[{index}].tuning", "tuning", row.tuning

"""The root of the config and the checks that look across its sections."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union

from pydantic import Field

from lowrank.config.sections import (
    Calibration,
    Corpus,
    CostSuite,
    Covariance,
    Figure,
    Instructions,
    MethodSettings,
    Model,
    Name,
    PerplexitySuite,
    Row,
    Search,
    Section,
    SensitivityFigure,
    SensitivityStudy,
    Suite,
    Table,
    TaskFile,
    Tuning,
    Validation,
    ZeroShotSuite,
)
from lowrank.methods import settings_classes

MethodPreset = Annotated[Union[tuple(settings_classes())], Field(discriminator="kind")]  # noqa: UP007


class Study(Section):
    """A whole study: what `snakemake --configfile FILE` reads."""

    run: Name = Field(description="results go to results/<run>")
    cache: str = Field(default="cache", description="folder of downloads, shared by all runs")
    smoke: bool = Field(default=False, description="a quick look, not a measurement: allows `limit`, and tables say so")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    models: dict[Name, Model] = Field(min_length=1)
    corpora: dict[Name, Corpus] = Field(default_factory=dict)
    instructions: dict[Name, Instructions] = Field(default_factory=dict)
    tasks: dict[Name, TaskFile] = Field(default_factory=dict)
    calibration: dict[Name, Calibration] = Field(default_factory=dict)
    covariance: dict[Name, Covariance] = Field(default_factory=dict)
    validation: dict[Name, Validation] = Field(default_factory=dict)
    search: dict[Name, Search] = Field(default_factory=dict)
    sensitivity: dict[Name, SensitivityStudy] = Field(default_factory=dict)
    methods: dict[Name, MethodPreset] = Field(min_length=1)  # type: ignore[valid-type]
    tuning: dict[Name, Tuning] = Field(default_factory=dict)
    suites: dict[Name, Suite] = Field(min_length=1)
    tables: dict[Name, Table] = Field(default_factory=dict)
    figures: dict[Name, Figure] = Field(default_factory=dict)

    def method(self, name: str) -> MethodSettings:
        """The method preset of that name, typed."""
        settings: MethodSettings = self.methods[name]
        return settings


def problems_of(study: Study) -> list[str]:
    """All inconsistencies between sections, each with its YAML path, reason and cure."""
    return [
        *_unknown_names(study),
        *_dense_and_ratio(study),
        *_table_suites(study),
        *_limits(study),
        *_overlaps(study),
        *_covariance_groups(study),
        *_lengths(study),
    ]


def _references(study: Study) -> Iterator[tuple[str, str, str]]:
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
                yield f"suites.{name}.tasks", "tasks", task


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


def suggestion(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """` - did you mean 'x'?` or the list of what there is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if close:
        return f" - did you mean '{close[0]}'?"
    return f" (there {'are' if len(known) != 1 else 'is'}: {', '.join(sorted(known)) or 'none'})"


def _unknown_names(study: Study) -> Iterator[str]:
    for place, section, name in _references(study):
        known = getattr(study, section)
        if name not in known:
            yield f"{place}: '{name}' is not in `{section}`{suggestion(name, known)}"


def _rows(study: Study) -> Iterator[tuple[str, Row]]:
    for name, table in study.tables.items():
        for index, row in enumerate(table.rows):
            yield f"tables.{name}.rows[{index}]", row


def _dense_and_ratio(study: Study) -> Iterator[str]:
    if "none" in study.tuning:
        yield "tuning.none: the name 'none' means no post-training; choose another"
    for place, row in _rows(study):
        if row.method not in study.methods:
            continue
        dense = study.method(row.method).kind == "dense"
        if dense and row.ratio:
            yield f"{place}.ratio: {row.ratio} on a dense row; write 0 or leave it out"
        if not dense and not row.ratio:
            yield f"{place}.ratio: missing; write how many percent of the parameters '{row.method}' removes (1-90)"
        if dense and row.tuning != "none":
            yield f"{place}.tuning: post-training works on low-rank factors, and this row is dense"
    for name, figure in study.figures.items():
        for index, method in enumerate(getattr(figure, "methods", [])):
            if method in study.methods and study.method(method).kind == "dense":
                yield f"figures.{name}.methods[{index}]: '{method}' is dense; it is drawn as a line of reference"


def _table_suites(study: Study) -> Iterator[str]:
    allowed: dict[str, tuple[type[Section], ...]] = {
        "accuracy": (ZeroShotSuite, PerplexitySuite),
        "statistics": (CostSuite,),
        "times": (CostSuite,),
        "allocations": (),
    }
    for name, table in study.tables.items():
        for index, suite in enumerate(table.suites):
            if suite in study.suites and not isinstance(study.suites[suite], allowed[table.kind]):
                kind = study.suites[suite].kind
                yield f"tables.{name}.suites[{index}]: a table of {table.kind} does not show a {kind} suite"
        if allowed[table.kind] and not table.suites:
            yield f"tables.{name}.suites: a table of {table.kind} needs at least one suite"
    for name, figure in study.figures.items():
        if not isinstance(figure, SensitivityFigure) and figure.suite in study.suites:
            if not isinstance(study.suites[figure.suite], PerplexitySuite):
                yield f"figures.{name}.suite: '{figure.suite}' does not measure perplexity"


def _limits(study: Study) -> Iterator[str]:
    for name, suite in study.suites.items():
        if isinstance(suite, ZeroShotSuite) and suite.limit is not None and not study.smoke:
            yield f"suites.{name}.limit: a limit on documents is allowed only in a config with `smoke: true`"


def _overlaps(study: Study) -> Iterator[str]:
    """No perplexity is reported on text that calibration or validation saw."""
    seen = {corpus: f"calibration.{name}" for name, c in study.calibration.items() for corpus in [c.corpus]}
    seen |= {corpus: f"validation.{name}" for name, v in study.validation.items() for corpus in [v.corpus]}
    for name, suite in study.suites.items():
        if not isinstance(suite, PerplexitySuite):
            continue
        for index, tested in enumerate(suite.corpora):
            for used, where in seen.items():
                if tested in study.corpora and used in study.corpora and _share(study, tested, used):
                    yield (
                        f"suites.{name}.corpora[{index}]: '{tested}' shares documents with '{used}', which {where} "
                        "uses; give them disjoint `documents:` ranges of the file, or different files"
                    )


def _share(study: Study, first: str, second: str) -> bool:
    one, two = study.corpora[first], study.corpora[second]
    if one.source != two.source:
        return False
    (start, stop), (other_start, other_stop) = one.documents, two.documents
    return (stop is None or other_start < stop) and (other_stop is None or start < other_stop)


def _covariance_groups(study: Study) -> Iterator[str]:
    for name in study.methods:
        method = study.method(name)
        calibration = study.calibration.get(method.calibration or "")
        covariance = study.covariance.get(method.covariance or "")
        if calibration and covariance and (covariance.groups or 1) > calibration.windows:
            yield (
                f"methods.{name}.covariance: '{method.covariance}' pools {covariance.groups} groups, but "
                f"'{method.calibration}' has only {calibration.windows} windows"
            )


def _lengths(study: Study) -> Iterator[str]:
    longest = min(model.max_length for model in study.models.values())
    used = {f"calibration.{name}": c.length for name, c in study.calibration.items()}
    used |= {f"validation.{name}": v.length for name, v in study.validation.items()}
    used |= {f"sensitivity.{name}": s.length for name, s in study.sensitivity.items()}
    used |= {f"suites.{name}": s.length for name, s in study.suites.items() if isinstance(s, PerplexitySuite)}
    for place, length in used.items():
        if length > longest:
            yield f"{place}.length: {length} tokens, more than the `max_length` of a model ({longest})"
    for name, suite in study.suites.items():
        if isinstance(suite, CostSuite) and suite.prompt_tokens + suite.new_tokens > longest:
            yield f"suites.{name}: prompt_tokens + new_tokens exceed the `max_length` of a model ({longest})"

"""The jobs that a study asks for, from its config alone: what Snakemake plans for `all` when nothing is there yet.

Rules say the same in Snakemake's terms, and a test compares both for every config that is shipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowrank.config.presets import ANY_MULTIPLE, MethodSettings, Selection
from lowrank.config.sources import RandomSource, TokensSource
from lowrank.config.study import Study
from lowrank.config.suites import PerplexitySuite, ZeroShotSuite
from lowrank.config.tuning import FeatureDistillation
from lowrank.layout import Layout, named_groups


@dataclass(frozen=True)
class Job:
    """One job: a rule, and the values of its wildcards."""

    rule: str
    values: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, rule: str, **wildcards: object) -> Job:
        """The job of a rule."""
        return cls(rule, tuple(sorted((name, str(value)) for name, value in wildcards.items())))

    @property
    def wildcards(self) -> dict[str, str]:
        """By name."""
        return dict(self.values)


Jobs = dict[Job, list[Job]]
"""Job -> those that it waits for, each after the ones that it waits for."""


def planned_jobs(study: Study) -> Jobs:
    """All jobs of a study, with what each waits for."""
    planner = _Planner(study)
    tables = [planner.table(name) for name in study.tables]
    figures = [planner.figure(name) for name in study.figures]
    provenance = planner.job(Job.of("write_provenance"), planner.paths(planner.layout.evidence()))
    planner.job(Job.of("write_report"), [*tables, *figures, provenance])
    for folder, results in planner.layout.given_up.items():
        planner.giving_up(folder, results)
    return planner.jobs


def rules_in_order(jobs: Jobs) -> list[str]:
    """The rules of a study's jobs, those first whose longest chain of jobs before them is shortest."""
    depth: dict[Job, int] = {}
    reach: dict[str, int] = {}
    for job, after in jobs.items():
        depth[job] = 1 + max((depth[one] for one in after), default=0)
        reach[job.rule] = max(depth[job], reach.get(job.rule, 0))
    return sorted(reach, key=lambda rule: reach[rule])


class _Planner:
    """Adds jobs after those that they wait for."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.layout = layout = Layout(study)
        self.jobs: Jobs = {}
        allocation = layout.allocation("{model}", "{method}", "{ratio}", "{seed}")
        self.makers: list[tuple[re.Pattern[str], Callable[..., Job]]] = [
            (_pattern(layout.evaluation), self.evaluation),
            (_pattern(f"{layout.compressed}/manifest.json"), self.compression),
            (_pattern(f"{layout.tuned}/manifest.json"), self.tuning),
            (_pattern(allocation), self.search),
            (_pattern(allocation.replace("allocation.json", "trials.csv")), self.search),
            (_pattern(f"{layout.run}/sensitivity/{{sensitivity}}.json"), self.sensitivity),
            (_pattern(layout.compared_texts), self.comparison),
            (_pattern(f"{layout.run}/truncations/{{figure}}/{{covariance}}.json"), self.truncations),
        ]

    def job(self, job: Job, after: list[Job]) -> Job:
        """Add a job, unless it is there."""
        self.jobs.setdefault(job, list(dict.fromkeys(after)))
        return job

    def paths(self, paths: list[str]) -> list[Job]:
        """The jobs that make some results."""
        return [self.path(path) for path in paths]

    def path(self, path: str) -> Job:
        """The job that makes a result."""
        for pattern, maker in self.makers:
            if found := pattern.fullmatch(path):
                return maker(**found.groupdict())
        raise AssertionError(f"{path}: no rule is known to make it")

    def table(self, name: str) -> Job:
        """A table; one of agreement waits for others."""
        table = self.study.tables[name]
        others = [self.table(other) for other in getattr(table, "tables", [])]
        paths = [*self.layout.table_inputs(name), *self.layout.comparison_of(table)]
        return self.job(Job.of("make_table", table=name), [*self.paths(paths), *others])

    def figure(self, name: str) -> Job:
        paths = [*self.layout.figure_inputs(name), *self.layout.comparison_of(self.study.figures[name])]
        return self.job(Job.of("draw_figure", figure=name), self.paths(paths))

    def comparison(self) -> Job:
        """Of tested texts with those that were seen."""
        return self.job(Job.of("compare_texts"), [self.corpus(name) for name in self.layout.compared_corpora()])

    def model(self, name: str) -> Job:
        source = self.study.models[name].source
        lender = [self.model(source.tokenizer)] if isinstance(source, RandomSource) else []
        return self.job(Job.of("fetch_model", model=name), lender)

    def corpus(self, name: str) -> Job:
        tokens = isinstance(self.study.corpora[name].source, TokensSource)
        return self.job(Job.of("fetch_token_corpus" if tokens else "fetch_corpus", corpus=name), [])

    def windows(self, model: str, calibration: str) -> Job:
        corpora = self.study.calibration[calibration].corpora
        after = [self.model(model), *(self.corpus(corpus) for corpus in corpora)]
        return self.job(Job.of("sample_calibration", model=model, calibration=calibration), after)

    def collected(self, what: str, model: str, calibration: str) -> Job:
        """Statistics or gradients."""
        after = [self.model(model), self.windows(model, calibration)]
        return self.job(Job.of(f"collect_{what}", model=model, calibration=calibration), after)

    def bases(self, model: str, calibration: str, covariance: str) -> Job:
        kinds = ["statistics"] if self.study.covariance[covariance].gradients == "none" else ["statistics", "gradients"]
        after = [self.collected(kind, model, calibration) for kind in kinds]
        return self.job(
            Job.of("compute_bases", model=model, calibration=calibration, covariance=covariance),
            [self.model(model), *after],
        )

    def elimination(self, model: str, calibration: str, covariance: str, multiple: str) -> Job:
        """Of neurons; with pairs of what is left after that without."""
        after = [self.model(model), *(self.collected(kind, model, calibration) for kind in ("statistics", "gradients"))]
        if multiple != ANY_MULTIPLE:
            after.append(self.elimination(model, calibration, covariance, ANY_MULTIPLE))
        of = {"model": model, "calibration": calibration, "covariance": covariance, "multiple": multiple}
        return self.job(Job.of("eliminate_neurons", **of), after)

    def validation(self, model: str, name: str) -> Job:
        validation = self.study.validation[name]
        after = [self.model(model), *self.bases_of(model, validation.select)]
        after += [self.corpus(corpus) for corpus in validation.corpora]
        return self.job(Job.of("select_validation", model=model, validation=name), after)

    def sensitivity(self, sensitivity: str) -> Job:
        study = self.study.sensitivity[sensitivity]
        after = [self.bases(study.model, study.calibration, study.covariance), self.corpus(study.corpus)]
        return self.job(Job.of("measure_sensitivity", sensitivity=sensitivity), after)

    def truncations(self, figure: str, covariance: str) -> Job:
        """What a figure of predicted losses measures."""
        drawn: Any = self.study.figures[figure]
        after = [self.bases(drawn.model, drawn.calibration, covariance), self.corpus(drawn.corpus)]
        return self.job(Job.of("measure_truncations", figure=figure, covariance=covariance), after)

    def search(self, model: str, method: str, ratio: str, seed: str) -> Job:
        preset = self.study.method(method)
        after = self.bases_of(model, preset)
        if preset.validation:
            after.append(self.validation(model, preset.validation))
        if source := self.layout.transferred(method, ratio, seed):
            after.append(self.path(source))
        return self.job(Job.of("search_allocation", model=model, method=method, ratio=ratio, seed=seed), after)

    def bases_of(self, model: str, preset: MethodSettings | Selection) -> list[Job]:
        """The bases that a preset slices, if it does."""
        if preset.calibration is None or preset.covariance is None:
            return []
        return [self.bases(model, preset.calibration, preset.covariance)]

    def compression(self, model: str, method: str, ratio: str, seed: str) -> Job:
        preset = self.study.method(method)
        after = [self.model(model), *self.bases_of(model, preset)]
        for read in ("statistics", "gradients"):
            if preset.calibration and read in preset.needs:
                after.append(self.collected(read, model, preset.calibration))
        if preset.calibration and "tokens" in preset.needs:
            after.append(self.windows(model, preset.calibration))
        if preset.eliminates and preset.calibration and preset.covariance:
            after.append(self.elimination(model, preset.calibration, preset.covariance, preset.eliminates))
        if preset.search:
            after.append(self.search(model, method, ratio, seed))
        return self.job(Job.of("compress_model", model=model, method=method, ratio=ratio, seed=seed), after)

    def giving_up(self, folder: str, results: list[str]) -> Job:
        """Of a checkpoint, after its last use."""
        after = self.paths([f"{folder}/manifest.json", *results])
        place = folder.removeprefix(f"{self.layout.run}/")
        return self.job(Job.of("give_up_checkpoint", place=place), after)

    def tuning(self, model: str, method: str, ratio: str, tuning: str, seed: str) -> Job:
        preset, after = self.study.tuning[tuning], [self.compression(model, method, ratio, seed)]
        named = {"model": model, "method": method, "ratio": ratio, "tuning": tuning, "seed": seed}
        if isinstance(preset, FeatureDistillation):
            after += [self.model(model), self.windows(model, preset.calibration)]
            return self.job(Job.of("distil_features", **named), after)
        after.append(self.job(Job.of("fetch_instructions", instructions=preset.instructions), []))
        return self.job(Job.of("post_train", **named), after)

    def evaluation(self, model: str, method: str, ratio: str, tuning: str, seed: str, suite: str) -> Job:
        named = {"model": model, "method": method, "ratio": ratio, "seed": seed}
        after = [self.compression(**named) if tuning == "none" else self.tuning(tuning=tuning, **named)]
        judge = self.study.suites[suite]
        if isinstance(judge, PerplexitySuite):
            after += [self.corpus(corpus) for corpus in judge.corpora]
        if isinstance(judge, ZeroShotSuite):
            after += [self.job(Job.of("fetch_task", task=task), []) for task in judge.tasks]
        rule = f"evaluate_{judge.kind.replace('-', '_')}"
        return self.job(Job.of(rule, tuning=tuning, suite=suite, **named), after)


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(named_groups(path))

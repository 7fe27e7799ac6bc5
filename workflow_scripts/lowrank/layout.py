"""Where every artefact of a study lies, and which artefacts a table, a figure or the report needs.

Wildcards are names of presets, never values of parameters; all paths start with `results/<run>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowrank.config.outputs import (
    AgreementTable,
    ComparisonFigure,
    Figure,
    PerplexityFigure,
    PredictedLossFigure,
    Row,
    SearchFigure,
    SensitivityFigure,
    Table,
)
from lowrank.config.sources import RandomSource, TokensSource
from lowrank.config.study import Study
from lowrank.config.tested import Pair, corpora_shown, pairs_of
from lowrank.errors import RankwiseError
from lowrank.files import read_json, read_record

LOGGED = (
    *("figure", "model", "calibration", "covariance", "multiple", "validation"),
    *("method", "ratio", "tuning", "seed", "suite"),
)
"""Wildcards in the order in which they make up the name of a log; a rule with another wildcard has only that one."""
TABLE_FORMATS = ("csv", "md", "tex", "html")
FIGURE_FORMATS = ("pdf", "png", "csv")


USED_CONFIG = "config.json"
PROVENANCE = "provenance.json"


def study_of(run: Path) -> Study:
    """The study that a folder of results is of.

    Args:
        run: the folder, `results/<run>`; finished or not.

    Raises:
        RankwiseError: it holds no run, or one of another version of rankwise.
    """
    if (run / USED_CONFIG).is_file():
        return _study(read_json(run / USED_CONFIG), run / USED_CONFIG)
    if (run / PROVENANCE).is_file():  # results that were copied, or made before configs were kept
        return _study(read_record(run / PROVENANCE)["config"], run / PROVENANCE)
    raise RankwiseError(
        f"{run}: holds no run ({USED_CONFIG} is missing). Name the folder of a study that has been "
        "started, as results/quickstart."
    )


def _study(config: Any, path: Path) -> Study:
    """A study of the config that a run has left in a file."""
    try:
        return Study.model_validate(_without_missing_shapes(config))
    except ValidationError as error:
        first, *_ = error.errors(include_url=False)
        at = ".".join(map(str, first["loc"]))
        raise RankwiseError(
            f"{path}: another version of rankwise made these results: their config is none of this version "
            f"({f'{at}: ' if at else ''}{first['msg']}). Look at them with that version, or run the workflow again."
        ) from error


def _without_missing_shapes(config: Any) -> Any:
    """Before its models are fetched, a run knows no shape of those whose config leaves it out."""
    try:
        models = {
            name: {key: value for key, value in model.items() if key != "shape" or value is not None}
            for name, model in config["models"].items()
        }
    except (TypeError, KeyError, AttributeError):
        return config  # which is told
    return config | {"models": models}


class Layout:
    """The files of one study.

    Attributes:
        run: folder of all results.
        state: folder of unfinished work.
        logs: folder of the logs.
        used_config: the config that a run was last started with, as far as it is used.
        frozen_config: the whole of it, for the jobs of that start.
        compared_texts: what tested texts were compared with.
        compressed, tuned, evaluation: patterns with wildcards, in braces.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.run = f"results/{study.run}"
        self.state = f"{self.run}/.state"
        self.logs = f"{self.run}/logs"
        self.used_config = f"{self.run}/{USED_CONFIG}"
        self.frozen_config = f"{self.run}/.{USED_CONFIG}"
        self.compared_texts = f"{self.run}/compared_texts.json"
        self.compressed = f"{self.run}/compressed/{{model}}/{{method}}/{{ratio}}/seed{{seed}}"
        self.tuned = f"{self.run}/tuned/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}"
        self.evaluation = f"{self.run}/evaluation/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}/{{suite}}.json"

    def log(self, rule: str, wildcards: Mapping[str, object]) -> str:
        """The log of a job."""
        order = [name for name in LOGGED if name in wildcards] or list(wildcards)
        parts = [f"seed{wildcards[name]}" if name == "seed" else str(wildcards[name]) for name in order]
        return "/".join([self.logs, rule.replace("fetch_token_corpus", "fetch_corpus"), *parts]) + ".log"

    def corpus_data(self, corpus: str) -> str:
        """A corpus's documents, or its token ids."""
        tokens = isinstance(self.study.corpora[corpus].source, TokensSource)
        return f"{self.run}/corpora/data/{corpus}.{'safetensors' if tokens else 'jsonl'}"

    def fetched(self) -> list[str]:
        """Everything that comes from outside."""
        return [
            *(f"{self.run}/models/{name}.json" for name in self.used_models()),
            *(f"{self.run}/corpora/{name}.json" for name in self.study.corpora),
            *(f"{self.run}/instructions/{name}.jsonl" for name in self.study.instructions),
            *(f"{self.run}/tasks/{name}.json" for name in self.study.tasks),
        ]

    @cached_property
    def text_pairs(self) -> list[Pair]:
        """The corpora that may share nothing."""
        return pairs_of(self.study)

    def compared_corpora(self) -> list[str]:
        """The corpora that are tested, and those that they are held against."""
        return sorted({corpus for pair in self.text_pairs for corpus in (pair.tested, pair.seen)})

    def comparison_of(self, shown: Table | Figure) -> list[str]:
        """The comparison of texts, if a table or figure shows numbers of text that is kept apart from other text."""
        kept_apart = corpora_shown(self.study, shown) & {pair.tested for pair in self.text_pairs}
        return [self.compared_texts] if kept_apart else []

    def used_models(self) -> list[str]:
        """The models whose weights something needs: a table of arithmetic needs no more than their shapes."""
        tables, figures = self.study.tables.values(), self.study.figures.values()
        used = {row.model for table in tables for row in table.rows}
        used |= {row.model for figure in figures for row in getattr(figure, "rows", [])}
        drawn = PerplexityFigure | SearchFigure | PredictedLossFigure
        used |= {figure.model for figure in figures if isinstance(figure, drawn)}
        used |= {study.model for study in self.study.sensitivity.values()}
        transfers = [self.study.method(method).transfer for method in self.study.methods]
        used |= {transfer.model for transfer in transfers if transfer is not None}
        sources = [self.study.models[name].source for name in used]
        used |= {source.tokenizer for source in sources if isinstance(source, RandomSource)}
        return [name for name in self.study.models if name in used]

    def bases(self, model: str, calibration: str, covariance: str) -> str:
        """Folder of the bases of one covariance."""
        return f"{self.run}/bases/{model}/{calibration}/{covariance}"

    def neurons(self, model: str, calibration: str, covariance: str, multiple: str) -> str:
        """Folder of what removing neurons is predicted to cost."""
        return f"{self.run}/neurons/{model}/{calibration}/{covariance}/{multiple}"

    def allocation(self, model: str, method: str, ratio: object, seed: object) -> str:
        """The result of a search."""
        return f"{self.run}/allocation/{model}/{method}/{ratio}/seed{seed}/allocation.json"

    def transferred(self, method: str, ratio: object, seed: object) -> str | None:
        """The allocation of another model that a search begins with, if its preset names one."""
        transfer = self.study.method(method).transfer
        return self.allocation(transfer.model, transfer.method, ratio, seed) if transfer else None

    def checkpoint(self, tuning: str) -> str:
        """Pattern of the folder of a checkpoint: as compressed, or after post-training."""
        return self.compressed if tuning == "none" else self.tuned

    def seeds(self, method: str, tuning: str) -> list[int]:
        """All seeds where something is random, else the first."""
        random = self.study.method(method).is_random or tuning != "none"
        return self.study.seeds if random else self.study.seeds[:1]

    def evaluations(self, model: str, method: str, ratio: int, tuning: str, suite: str) -> list[str]:
        """One evaluation for each seed."""
        return [
            self.evaluation.format(model=model, method=method, ratio=ratio, tuning=tuning, seed=seed, suite=suite)
            for seed in self.seeds(method, tuning)
        ]

    def manifests(self, row: Row) -> list[str]:
        """The account of a row's checkpoint; after post-training, also that of the checkpoint it began with."""
        return self._manifests(row.model, row.method, row.ratio, row.tuning)

    def _manifests(self, model: str, method: str, ratio: object, tuning: str) -> list[str]:
        named = {"model": model, "method": method, "ratio": ratio, "tuning": tuning}
        return [
            f"{pattern}/manifest.json".format(seed=seed, **named)
            for pattern in dict.fromkeys([self.compressed, self.checkpoint(tuning)])
            for seed in self.seeds(method, tuning)
        ]

    def checkpoints(self) -> dict[str, list[str]]:
        """Folder of every checkpoint that tables and figures need -> the results that are made from it."""
        evaluation, tuned = (re.compile(named_groups(pattern)) for pattern in (self.evaluation, self.tuned))
        readers: dict[str, list[str]] = {}
        for path in self.evidence():
            if found := evaluation.fullmatch(path):
                readers.setdefault(self.checkpoint(found["tuning"]).format(**found.groupdict()), []).append(path)
            elif path.endswith("/manifest.json"):
                readers.setdefault(path.removesuffix("/manifest.json"), [])
        for folder in list(readers):
            if found := tuned.fullmatch(folder):
                readers.setdefault(self.compressed.format(**found.groupdict()), []).append(f"{folder}/manifest.json")
        return readers

    @cached_property
    def given_up(self) -> dict[str, list[str]]:
        """Those of `checkpoints` that are deleted after their last use. Dense ones are links to what was fetched."""
        given_up = {}
        for folder, results in self.checkpoints().items():
            named = re.match(named_groups(f"{self.run}/{{place}}/{{model}}/{{method}}/{{ratio}}/"), folder)
            assert named is not None
            kept = self.study.keep_checkpoints.holds(named["method"], int(named["ratio"]))
            if not kept and self.study.method(named["method"]).kind != "dense":
                given_up[folder] = results
        return given_up

    def missing_checkpoints(self) -> list[str]:
        """Of the checkpoints that were given up, those from which something is still to be made."""
        return [
            f"{folder}/checkpoint"
            for folder, results in self.given_up.items()
            if not all(Path(result).is_file() for result in results)
        ]

    def searches(self, row: Row) -> list[str]:
        """The searches behind a row."""
        return self._searches(row.model, row.method, row.ratio, row.tuning)

    def _searches(self, model: str, method: str, ratio: object, tuning: str) -> list[str]:
        if self.study.method(method).search is None:
            return []
        return [self.allocation(model, method, ratio, seed) for seed in self.seeds(method, tuning)]

    def table_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table, each with the files that its numbers come from."""
        table = self.study.tables[name]
        return [
            {
                "row": row.plain(),
                "evaluations": self.judged(row, table.suites),
                "manifests": self.manifests(row),
                "allocations": self.searches(row) if table.kind in ("times", "differences") else [],
            }
            for row in table.rows
        ]

    def judged(self, row: Row, suites: Iterable[str]) -> dict[str, list[str]]:
        """Suite -> the evaluations of a row, one a seed."""
        return {suite: self.evaluations(row.model, row.method, row.ratio, row.tuning, suite) for suite in suites}

    def table_inputs(self, name: str) -> list[str]:
        """All results that a table shows numbers of."""
        rows = self.table_rows(name)
        return _unique(
            chain.from_iterable(
                [*chain.from_iterable(row["evaluations"].values()), *row["manifests"], *row["allocations"]]
                for row in rows
            )
        )

    def compared_tables(self, name: str) -> list[str]:
        """The tables that a table of agreement reads."""
        table = self.study.tables[name]
        if not isinstance(table, AgreementTable):
            return []
        return [f"{self.run}/tables/{compared}.csv" for compared in table.tables]

    def figure_results(self, name: str) -> dict[str, Any]:
        """The results that a figure draws, by what they are in it."""
        figure = self.study.figures[name]
        if isinstance(figure, SensitivityFigure):
            return {"sensitivity": [f"{self.run}/sensitivity/{study}.json" for study in figure.sensitivity]}
        if isinstance(figure, PredictedLossFigure):
            return {
                "truncations": {preset: f"{self.run}/truncations/{name}/{preset}.json" for preset in figure.covariance}
            }
        if isinstance(figure, SearchFigure):
            return {
                "trials": {
                    method: {str(ratio): self._trials(figure.model, method, ratio) for ratio in figure.ratios}
                    for method in figure.methods
                }
            }
        suite = {"suite": self.study.suites[figure.suite].plain()}
        if isinstance(figure, ComparisonFigure):
            return suite | {
                "rows": [
                    {
                        "row": row.plain(),
                        "evaluations": self.judged(row, [figure.suite])[figure.suite],
                        "manifests": self.manifests(row),
                    }
                    for row in figure.rows
                ]
            }
        dense = next((method for method in self.study.methods if self.study.method(method).kind == "dense"), None)
        return suite | {
            "dense": self.evaluations(figure.model, dense, 0, "none", figure.suite) if dense else [],
            "curves": {
                method: {
                    str(ratio): {
                        "evaluations": self.evaluations(figure.model, method, ratio, "none", figure.suite),
                        "manifests": self._manifests(figure.model, method, ratio, "none"),
                    }
                    for ratio in figure.ratios
                }
                for method in figure.methods
            },
        }

    def _trials(self, model: str, method: str, ratio: int) -> list[str]:
        allocations = [self.allocation(model, method, ratio, seed) for seed in self.seeds(method, "none")]
        return [str(Path(allocation).with_name("trials.csv")) for allocation in allocations]

    def figure_inputs(self, name: str) -> list[str]:
        """All files that a figure draws."""
        return _unique(_paths(self.figure_results(name), f"{self.run}/"))

    def tables(self) -> list[str]:
        """All tables, in all formats."""
        return [f"{self.run}/tables/{name}.{kind}" for name in in_order(self.study.tables) for kind in TABLE_FORMATS]

    def figures(self) -> list[str]:
        """All figures, in all formats."""
        return [f"{self.run}/figures/{name}.{kind}" for name in in_order(self.study.figures) for kind in FIGURE_FORMATS]

    def evidence(self) -> list[str]:
        """Every result that a table, a figure or the report shows; for the log of a search, the account beside it.

        The report says of every checkpoint what it keeps, so those that only a figure shows bring their manifests.
        """
        shown = chain(
            chain.from_iterable(self.table_inputs(name) for name in in_order(self.study.tables)),
            chain.from_iterable(self.figure_inputs(name) for name in in_order(self.study.figures)),
        )
        found = _unique(path.replace("/trials.csv", "/allocation.json") for path in shown)
        return _unique([*found, *self._behind(found)])

    def _behind(self, paths: Iterable[str]) -> Iterable[str]:
        """The manifests and searches of what was evaluated."""
        evaluation = re.compile(named_groups(self.evaluation))
        matches = [found for path in paths if (found := evaluation.fullmatch(path))]
        for subject in dict.fromkeys(found.group("model", "method", "ratio", "tuning") for found in matches):
            yield from self._manifests(*subject)
            yield from self._searches(*subject)


def named_groups(pattern: str) -> str:
    """The regular expression of a path with wildcards in braces."""
    parts = re.split(r"\{(\w+)\}", pattern)
    return "".join(f"(?P<{part}>[^/]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts))


def in_order(names: Iterable[str]) -> list[str]:
    """Names with numbers by their numbers, then the others: an order that does not depend on the config's."""
    parts = {name: re.split(r"(\d+)", name) for name in names}
    order = {
        name: [(int(part), "") if part.isdecimal() else (0, part) for part in found] for name, found in parts.items()
    }
    return sorted(parts, key=lambda name: (len(parts[name]) == 1, order[name], name))


def _paths(results: Any, start: str) -> Iterable[str]:
    """Every path of a nested value, in order."""
    if isinstance(results, str):
        if results.startswith(start):
            yield results
    elif isinstance(results, dict | list):
        for value in results.values() if isinstance(results, dict) else results:
            yield from _paths(value, start)


def _unique(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(paths))

# Shared by all rules: the checked config, names of files, settings and code fingerprints.
# All functions live here, so that every other file holds rules only.

import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# Relative, so that results stay valid in another clone; not always `config`, since the working directory may differ.
CONFIG = os.path.relpath(Path(workflow.basedir) / "config")
SCRIPTS = Path(workflow.basedir) / "workflow_scripts"
sys.path.insert(0, str(SCRIPTS))
from lowrank.config.load import check_study, read_yaml
from lowrank.config.sections import (
    PerplexityFigure,
    PerplexitySuite,
    SensitivityFigure,
    TokensSource,
    ZeroShotSuite,
    CostSuite,
)
from lowrank.errors import RankwiseError
from lowrank.files import read_json
from lowrank.files import sha256_file
from lowrank.fingerprint import fingerprint
from lowrank.paper.published import published_problems
from lowrank.stage import share_library

share_library(SCRIPTS)


def deepspeed_file(tuning):
    """DeepSpeed's own configuration for a post-training preset."""
    return f"{CONFIG}/deepspeed/{tuning.deepspeed}.json"


def checked_study():
    """The config as a `Study`; its errors are shown without a traceback."""
    files = [
        str(path)
        for path in workflow.config_settings.configfiles
        or [Path(workflow.basedir) / "config/quickstart.yaml"]
    ]
    try:
        for path in files:
            read_yaml(
                path
            )  # duplicate keys are lost once Snakemake has merged the files
        study = check_study(config, ", ".join(files))
        problems = published_problems(study.tables, f"{CONFIG}/published")
        for name, tuning in study.tuning.items():
            if not os.path.isfile(deepspeed_file(tuning)):
                problems.append(
                    f"tuning.{name}.deepspeed: there is no {deepspeed_file(tuning)}"
                )
        if problems:
            raise RankwiseError("\n".join(problems))
        return study
    except RankwiseError as error:
        raise WorkflowError(str(error))


STUDY = checked_study()
RUN = f"results/{STUDY.run}"
STATE = f"{RUN}/.state"
LOGS = f"{RUN}/logs"

COMPRESSED = f"{RUN}/compressed/{{model}}/{{method}}/{{ratio}}/seed{{seed}}"
TUNED = f"{RUN}/tuned/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}"
EVALUATION = (
    f"{RUN}/evaluation/{{model}}/{{method}}/{{ratio}}/{{tuning}}/seed{{seed}}/{{suite}}"
)


def one_of(names):
    """A wildcard constraint: one of these names, or nothing that exists."""
    return "|".join(re.escape(name) for name in names) or "$none"


def suites_of(kind):
    """Names of the suites of one kind."""
    return [name for name, suite in STUDY.suites.items() if suite.kind == kind]


wildcard_constraints:
    model=one_of(STUDY.models),
    corpus=one_of(STUDY.corpora),
    instructions=one_of(STUDY.instructions),
    task=one_of(STUDY.tasks),
    calibration=one_of(STUDY.calibration),
    covariance=one_of(STUDY.covariance),
    validation=one_of(STUDY.validation),
    sensitivity=one_of(STUDY.sensitivity),
    method=one_of(STUDY.methods),
    ratio=r"\d+",
    seed=r"\d+",
    tuning=one_of(["none", *STUDY.tuning]),
    suite=one_of(STUDY.suites),
    table=one_of(STUDY.tables),
    figure=one_of(STUDY.figures),


def with_code(stage, settings, *modules):
    """A stage's settings and the fingerprint of its code, as one plain dict: Snakemake compares params by value."""
    return dict(
        sorted((settings | {"code": fingerprint(SCRIPTS, stage, *modules)}).items())
    )


def templates(pattern):
    """Digests of the templates that a stage fills in: they are code too."""
    folder = SCRIPTS / "lowrank/paper/templates"
    return {path.name: sha256_file(path)[:16] for path in sorted(folder.glob(pattern))}


def model_settings(name):
    """What every stage that opens a model needs to know of it."""
    model = STUDY.models[name]
    return {
        "model": name,
        "dtype": model.dtype,
        "shape": model.shape.plain(),
        "trust_remote_code": model.trust_remote_code,
    }


# --- data ---


def corpus_data(corpus):
    """Where a corpus's documents or token ids lie."""
    tokens = isinstance(STUDY.corpora[corpus].source, TokensSource)
    return f"{RUN}/corpora/data/{corpus}.{'safetensors' if tokens else 'jsonl'}"


def corpus_files(corpus):
    return {
        "corpus": f"{RUN}/corpora/{corpus}.json",
        "corpus_data": corpus_data(corpus),
    }


def model_files(model):
    """A dense model: its folder never triggers anything, its manifest does."""
    return {
        "model": ancient(f"{RUN}/models/{model}"),
        "model_manifest": f"{RUN}/models/{model}.json",
    }


def data_files():
    """Everything that is fetched."""
    return [
        *(f"{RUN}/models/{name}.json" for name in STUDY.models),
        *(f"{RUN}/corpora/{name}.json" for name in STUDY.corpora),
        *(f"{RUN}/instructions/{name}.jsonl" for name in STUDY.instructions),
        *(f"{RUN}/tasks/{name}.json" for name in STUDY.tasks),
    ]


# --- bases and allocation ---


def bases_files(model, calibration, covariance):
    stem = f"{RUN}/bases/{model}/{calibration}/{covariance}"
    return {
        "bases": ancient(f"{stem}/layers"),
        "bases_manifest": f"{stem}/manifest.json",
    }


def validation_files(wildcards):
    validation = STUDY.validation[wildcards.validation]
    return (
        model_files(wildcards.model)
        | corpus_files(validation.corpus)
        | bases_files(
            wildcards.model, validation.select.calibration, validation.select.covariance
        )
    )


def sensitivity_files(wildcards):
    study = STUDY.sensitivity[wildcards.sensitivity]
    return (
        model_files(study.model)
        | corpus_files(study.corpus)
        | bases_files(study.model, study.calibration, study.covariance)
    )


def search_files(wildcards):
    method = STUDY.method(wildcards.method)
    return (
        model_files(wildcards.model)
        | bases_files(wildcards.model, method.calibration, method.covariance)
        | {
            "windows": f"{RUN}/validation/{wildcards.model}/{method.validation}.safetensors"
        }
    )


def searching_methods():
    """Presets whose ranks are searched."""
    return [name for name in STUDY.methods if STUDY.method(name).search]


def compression_files(wildcards):
    """A preset with a covariance reads bases, one with a search reads an allocation."""
    method = STUDY.method(wildcards.method)
    files = model_files(wildcards.model)
    if method.covariance:
        files |= bases_files(wildcards.model, method.calibration, method.covariance)
    if method.search:
        files["allocation"] = (
            f"{RUN}/allocation/{wildcards.model}/{wildcards.method}/{wildcards.ratio}/seed{wildcards.seed}/allocation.json"
        )
    return files


def method_module(method):
    """Module of a preset's method, for the fingerprint of the stage that runs it."""
    return f"lowrank.methods.{STUDY.method(method).kind.replace('-', '_')}"


def subject(wildcards, tuning="none"):
    """What a result is about."""
    return {
        "model": wildcards.model,
        "method": wildcards.method,
        "ratio": int(wildcards.ratio),
        "tuning": getattr(wildcards, "tuning", tuning),
        "seed": int(wildcards.seed),
    }


# --- evaluation ---


def checkpoint_files(wildcards):
    """The checkpoint that a row of a table is about: as compressed, or after post-training."""
    stem = (COMPRESSED if wildcards.tuning == "none" else TUNED).format(**wildcards)
    return {
        "checkpoint": ancient(f"{stem}/checkpoint"),
        "manifest": f"{stem}/manifest.json",
    }


def perplexity_files(wildcards):
    corpora = STUDY.suites[wildcards.suite].corpora
    return checkpoint_files(wildcards) | {
        "corpora": [f"{RUN}/corpora/{name}.json" for name in corpora],
        "data": [corpus_data(name) for name in corpora],
    }


def zero_shot_files(wildcards):
    tasks = STUDY.suites[wildcards.suite].tasks
    return checkpoint_files(wildcards) | {
        "tasks": [f"{RUN}/tasks/{name}.json" for name in tasks],
        "rows": [ancient(f"{RUN}/tasks/{name}") for name in tasks],
    }


def evaluation_settings(stage, wildcards):
    model = STUDY.models[wildcards.model]
    return with_code(
        stage,
        model_settings(wildcards.model)
        | {
            "suite": STUDY.suites[wildcards.suite].plain(),
            "subject": subject(wildcards),
            "max_length": model.max_length,
        },
    )


# --- tables and figures ---


def seeds_of(method, tuning):
    """All seeds where something is random, else the first."""
    random = STUDY.method(method).search or tuning != "none"
    return STUDY.seeds if random else STUDY.seeds[:1]


def evaluations_of(model, method, ratio, tuning, suite):
    """One evaluation for each seed."""
    return [
        f"{EVALUATION}.json".format(
            model=model,
            method=method,
            ratio=ratio,
            tuning=tuning,
            seed=seed,
            suite=suite,
        )
        for seed in seeds_of(method, tuning)
    ]


def manifests_of(row):
    """The account of a row's checkpoint; after post-training, also that of the checkpoint it began with."""
    stems = [COMPRESSED] if row.tuning == "none" else [COMPRESSED, TUNED]
    return [
        f"{stem}/manifest.json".format(
            model=row.model,
            method=row.method,
            ratio=row.ratio,
            tuning=row.tuning,
            seed=seed,
        )
        for stem in stems
        for seed in seeds_of(row.method, row.tuning)
    ]


def allocations_of(row):
    """The searches behind a row, whose times a table of times shows."""
    if not STUDY.method(row.method).search:
        return []
    return [
        f"{RUN}/allocation/{row.model}/{row.method}/{row.ratio}/seed{seed}/allocation.json"
        for seed in seeds_of(row.method, row.tuning)
    ]


def table_rows(name):
    """The rows of a table with the files that their numbers come from."""
    table = STUDY.tables[name]
    return [
        {
            "row": row.plain(),
            "evaluations": {
                suite: evaluations_of(
                    row.model, row.method, row.ratio, row.tuning, suite
                )
                for suite in table.suites
            },
            "manifests": manifests_of(row),
            "allocations": allocations_of(row) if table.kind == "times" else [],
        }
        for row in table.rows
    ]


def table_inputs(wildcards):
    files = []
    for row in table_rows(wildcards.table):
        files += [path for paths in row["evaluations"].values() for path in paths]
        files += row["manifests"] + row["allocations"]
    return list(dict.fromkeys(files))


def table_settings(wildcards):
    table = STUDY.tables[wildcards.table]
    return with_code(
        "make_table",
        {
            "name": wildcards.table,
            "templates": templates("table.*"),
            "table": table.plain(),
            "suites": {name: STUDY.suites[name].plain() for name in table.suites},
            "rows": table_rows(wildcards.table),
            "shape": {
                row.model: STUDY.models[row.model].shape.plain() for row in table.rows
            },
            "smoke": STUDY.smoke,
            "published_folder": f"{CONFIG}/published",
        },
    )


def published_files(wildcards):
    """The published values that a table shows beside ours."""
    rows = STUDY.tables[wildcards.table].rows
    return sorted(
        {
            f"{CONFIG}/published/{row.published.file}.csv"
            for row in rows
            if row.published
        }
    )


def figure_results(name):
    """The evaluations that a figure draws."""
    figure = STUDY.figures[name]
    if isinstance(figure, SensitivityFigure):
        return {"sensitivity": f"{RUN}/sensitivity/{figure.sensitivity}.json"}
    dense = [
        method for method in STUDY.methods if STUDY.method(method).kind == "dense"
    ][:1]
    return {
        "dense": [
            path
            for method in dense
            for path in evaluations_of(figure.model, method, 0, "none", figure.suite)
        ],
        "curves": {
            method: {
                str(ratio): evaluations_of(
                    figure.model, method, ratio, "none", figure.suite
                )
                for ratio in figure.ratios
            }
            for method in figure.methods
        },
        "suite": STUDY.suites[figure.suite].plain(),
    }


def figure_inputs(wildcards):
    results = figure_results(wildcards.figure)
    if "sensitivity" in results:
        return [results["sensitivity"]]
    return results["dense"] + [
        path
        for curve in results["curves"].values()
        for paths in curve.values()
        for path in paths
    ]


def figure_settings(wildcards):
    figure = STUDY.figures[wildcards.figure]
    return with_code(
        "draw_figure",
        {
            "name": wildcards.figure,
            "figure": figure.plain(),
            "results": figure_results(wildcards.figure),
            "smoke": STUDY.smoke,
        },
    )


def table_files():
    return expand(
        f"{RUN}/tables/{{table}}.{{format}}",
        table=STUDY.tables,
        format=["csv", "md", "tex", "html"],
    )


def figure_files():
    return expand(
        f"{RUN}/figures/{{figure}}.{{format}}",
        figure=STUDY.figures,
        format=["pdf", "png", "csv"],
    )


def evidence_files():
    """Every result that a table or figure shows."""
    files = []
    for table in STUDY.tables:
        for row in table_rows(table):
            files += [path for paths in row["evaluations"].values() for path in paths]
            files += row["manifests"]
    for name in STUDY.figures:
        results = figure_results(name)
        if "sensitivity" in results:
            files.append(results["sensitivity"])
        else:
            files += results["dense"]
            files += [
                path
                for curve in results["curves"].values()
                for paths in curve.values()
                for path in paths
            ]
    return list(dict.fromkeys(files))


def report_settings(wildcards):
    plain = STUDY.plain()
    presets = (
        "calibration",
        "covariance",
        "validation",
        "search",
        "sensitivity",
        "methods",
        "tuning",
        "suites",
    )
    return with_code(
        "write_report",
        {
            "run": STUDY.run,
            "templates": templates("report.*"),
            "smoke": STUDY.smoke,
            "seeds": list(STUDY.seeds),
            "models": {
                name: {"source": model["source"], "license": model["license"]}
                for name, model in plain["models"].items()
            },
            "presets": {section: plain[section] for section in presets},
            "tables": {
                name: {
                    "title": table.title,
                    "html": f"{RUN}/tables/{name}.html",
                    "csv": f"{RUN}/tables/{name}.csv",
                }
                for name, table in STUDY.tables.items()
            },
            "figures": {
                name: {"title": figure.title}
                | {
                    kind: f"{RUN}/figures/{name}.{kind}"
                    for kind in ("png", "pdf", "csv")
                }
                for name, figure in STUDY.figures.items()
            },
            "evidence": evidence_files(),
        },
    )

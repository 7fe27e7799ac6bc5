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
from lowrank.errors import RankwiseError
from lowrank.files import read_json, sha256_file
from lowrank.fingerprint import fingerprint
from lowrank.layout import Layout
from lowrank.needs import memory_request, runtime_request
from lowrank.paper.published import published_problems, published_references
from lowrank.resources import LAYERS_PER_PASS, LAYERWISE, Estimator
from lowrank.stage import share_library

share_library(SCRIPTS)


def deepspeed_file(tuning):
    """DeepSpeed's own configuration for a post-training preset."""
    return f"{CONFIG}/deepspeed/{tuning.deepspeed}.json"


def checked_study():
    """The config as a `Study`; its errors are shown without a traceback."""
    files = [
        str(path)
        for path in workflow.config_settings.configfiles or [Path(workflow.basedir) / "config/quickstart.yaml"]
    ]
    try:
        for path in files:
            read_yaml(path)  # duplicate keys are lost once Snakemake has merged the files
        study = check_study(config, ", ".join(files))
        problems = published_problems(study.tables, f"{CONFIG}/published")
        for name, tuning in study.tuning.items():
            if not os.path.isfile(deepspeed_file(tuning)):
                problems.append(f"tuning.{name}.deepspeed: there is no {deepspeed_file(tuning)}")
        if problems:
            raise RankwiseError("\n".join(problems))
        return study
    except RankwiseError as error:
        raise WorkflowError(str(error))


STUDY = checked_study()
LAYOUT = Layout(STUDY)
RUN, LOGS = LAYOUT.run, LAYOUT.logs
COMPRESSED, TUNED, EVALUATION = LAYOUT.compressed, LAYOUT.tuned, LAYOUT.evaluation


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


# --- settings of stages: one plain dict each, since Snakemake compares params by their text, without their names ---


def with_code(stage, settings, *modules):
    """A stage's settings with the fingerprint of its code."""
    return dict(sorted((settings | {"code": fingerprint(SCRIPTS, stage, *modules)}).items()))


def templates(pattern):
    """Digests of the templates that a stage fills in: they are code too."""
    folder = SCRIPTS / "lowrank/paper/templates"
    return {path.name: sha256_file(path)[:16] for path in sorted(folder.glob(pattern))}


def method_module(method):
    """Module of a preset's method, for the fingerprint of the stage that runs it."""
    return f"lowrank.methods.{STUDY.method(method).kind.replace('-', '_')}"


def untracked_cache(wildcards, output):
    """Where downloads are kept. Snakemake does not compare what a function of `output` gives: moving it reruns nothing."""
    return STUDY.cache


def fetch_settings(stage, key, name, section):
    """What decides the content of something fetched: not its licence, nor how it is used later."""
    plain = section[name].plain()
    return with_code(stage, {"name": name, key: {k: v for k, v in plain.items() if k not in ("license", "max_length")}})


def local_files(source):
    """The files of a source on this machine, so that a changed file is fetched again; a missing one is the stage's error."""
    place = getattr(source, "path", None) or getattr(source, "tokens", None)
    path = Path(place).expanduser() if place else None
    if path is None or not path.exists():
        return []
    if path.is_file():
        return [str(path)]
    return sorted(str(file) for file in path.glob(getattr(source, "file", None) or "*") if file.is_file())


def calibration_settings(name):
    """What decides the windows themselves; how many of them are used for gradients does not."""
    return {key: value for key, value in STUDY.calibration[name].plain().items() if key != "gradient_windows"}


def model_sources(name):
    """What a model is fetched from on this machine: files of a `path:`, or the model that lends its tokenizer."""
    source = STUDY.models[name].source
    lender = getattr(source, "tokenizer", None)
    if lender:
        return {"tokenizer": ancient(f"{RUN}/models/{lender}"), "tokenizer_manifest": f"{RUN}/models/{lender}.json"}
    return {"files": local_files(source)}


def model_settings(name):
    """What every stage that opens a model needs to know of it."""
    model = STUDY.models[name]
    return {
        "model": name,
        "dtype": model.dtype,
        "shape": model.shape.plain(),
    }


def subject(wildcards):
    """What a result is about."""
    return {
        "model": wildcards.model,
        "method": wildcards.method,
        "ratio": int(wildcards.ratio),
        "tuning": wildcards.get("tuning", "none"),
        "seed": int(wildcards.seed),
    }


def search_settings(wildcards):
    method = STUDY.method(wildcards.method)
    source = {"source_shape": STUDY.models[method.transfer.model].shape.plain()} if method.transfer else {}
    return with_code(
        "search_allocation",
        model_settings(wildcards.model)
        | source
        | {
            "method": method.plain(),
            "search": STUDY.search[method.search].plain(),
            "subject": subject(wildcards),
            "state": LAYOUT.state,
        },
    )


def post_training_settings(wildcards):
    tuning = STUDY.tuning[wildcards.tuning]
    return with_code(
        "post_train",
        model_settings(wildcards.model)
        | {
            "tuning": tuning.plain(),
            "deepspeed": read_json(deepspeed_file(tuning)),
            "subject": subject(wildcards),
            "state": LAYOUT.state,
        },
        "lowrank.post_training.worker",  # started as a process of its own, so no import leads to it
    )


def evaluation_settings(stage, wildcards):
    return with_code(
        stage,
        model_settings(wildcards.model)
        | {
            "suite": STUDY.suites[wildcards.suite].plain(),
            "subject": subject(wildcards),
            "max_length": STUDY.models[wildcards.model].max_length,
        },
    )


def shapes_of(table):
    """The models whose shapes a table needs."""
    checks = getattr(table, "checks", [])
    named = [row.model for row in table.rows] + [name for check in checks for name in (check.model, check.units_of)]
    return sorted({name for name in named if name})


def table_settings(wildcards):
    table = STUDY.tables[wildcards.table]
    return with_code(
        "make_table",
        {
            "name": wildcards.table,
            "templates": templates("table.*"),
            "table": table.plain(),
            "suites": {name: STUDY.suites[name].plain() for name in table.suites},
            "rows": LAYOUT.table_rows(wildcards.table),
            "shape": {name: STUDY.models[name].shape.plain() for name in shapes_of(table)},
            "compared": LAYOUT.compared_tables(wildcards.table),
            "smoke": STUDY.smoke,
            "published_folder": f"{CONFIG}/published",
        },
    )


def figure_settings(wildcards):
    figure = STUDY.figures[wildcards.figure]
    methods = {name: STUDY.method(name) for name in figure.methods} if figure.kind == "search" else {}
    judges = {
        name: {"validation": method.validation, "search": STUDY.search[method.search].plain()}
        for name, method in methods.items()
        if method.search
    }
    return with_code(
        "draw_figure",
        {
            "name": wildcards.figure,
            "figure": figure.plain(),
            "results": LAYOUT.figure_results(wildcards.figure),
            "smoke": STUDY.smoke,
        }
        | ({"judges": judges} if judges else {}),
    )


def truncation_settings(wildcards):
    """All that a figure of predicted losses says of its measurements; not how it is drawn."""
    plain = STUDY.figures[wildcards.figure].plain()
    study = {key: value for key, value in plain.items() if key not in ("kind", "title")}
    return with_code(
        "measure_truncations",
        model_settings(study["model"]) | {"truncations": study | {"covariance": wildcards.covariance}},
    )


def report_settings(wildcards):
    plain = STUDY.plain()
    sections = ("calibration", "covariance", "validation", "search", "sensitivity", "methods", "tuning", "suites")
    return with_code(
        "write_report",
        {
            "run": STUDY.run,
            "templates": templates("report.*"),
            "smoke": STUDY.smoke,
            "seeds": list(STUDY.seeds),
            "models": {
                name: {key: model[key] for key in ("source", "license")} for name, model in plain["models"].items()
            },
            "presets": {section: plain[section] for section in sections},
            "tables": {
                name: {"title": table.title} | {kind: f"{RUN}/tables/{name}.{kind}" for kind in ("html", "csv")}
                for name, table in STUDY.tables.items()
            },
            "figures": {
                name: {"title": figure.title} | {kind: f"{RUN}/figures/{name}.{kind}" for kind in ("png", "pdf", "csv")}
                for name, figure in STUDY.figures.items()
            },
            "evidence": LAYOUT.evidence(),
        },
    )


# --- inputs of rules: big folders never trigger anything, the small manifests beside them do ---


def corpus_files(corpus):
    return {"corpus": f"{RUN}/corpora/{corpus}.json", "corpus_data": LAYOUT.corpus_data(corpus)}


def corpora_files(corpora):
    return {
        "corpora": [f"{RUN}/corpora/{name}.json" for name in corpora],
        "corpus_data": [LAYOUT.corpus_data(name) for name in corpora],
    }


def model_files(model):
    return {"model": ancient(f"{RUN}/models/{model}"), "model_manifest": f"{RUN}/models/{model}.json"}


def statistics_files(model, calibration):
    folder = f"{RUN}/statistics/{model}/{calibration}"
    return {"statistics": ancient(f"{folder}/layers"), "statistics_manifest": f"{folder}/manifest.json"}


def basis_files(wildcards):
    """Statistics and, where the preset uses them, gradients."""
    statistics = f"{RUN}/statistics/{wildcards.model}/{wildcards.calibration}"
    files = {"layers": ancient(f"{statistics}/layers"), "manifest": f"{statistics}/manifest.json"}
    if STUDY.covariance[wildcards.covariance].gradients != "none":
        gradients = f"{RUN}/gradients/{wildcards.model}/{wildcards.calibration}"
        files |= {"gradients": ancient(f"{gradients}/layers"), "gradients_manifest": f"{gradients}/manifest.json"}
    return files


def bases_files(model, calibration, covariance):
    folder = LAYOUT.bases(model, calibration, covariance)
    return {"bases": ancient(f"{folder}/layers"), "bases_manifest": f"{folder}/manifest.json"}


def calibration_files(wildcards):
    return model_files(wildcards.model) | corpora_files(STUDY.calibration[wildcards.calibration].corpora)


def validation_files(wildcards):
    validation = STUDY.validation[wildcards.validation]
    choice = validation.select
    return (
        model_files(wildcards.model)
        | corpora_files(validation.corpora)
        | bases_files(wildcards.model, choice.calibration, choice.covariance)
    )


def sensitivity_files(wildcards):
    study = STUDY.sensitivity[wildcards.sensitivity]
    return (
        model_files(study.model)
        | corpus_files(study.corpus)
        | bases_files(study.model, study.calibration, study.covariance)
    )


def searching_methods():
    """Presets whose ranks are searched."""
    return [name for name in STUDY.methods if STUDY.method(name).search]


def truncation_files(wildcards):
    figure = STUDY.figures[wildcards.figure]
    return (
        model_files(figure.model)
        | corpus_files(figure.corpus)
        | bases_files(figure.model, figure.calibration, wildcards.covariance)
    )


def search_files(wildcards):
    """Bases, validation windows and, for a transfer, the allocation that was found for another model."""
    method = STUDY.method(wildcards.method)
    source = LAYOUT.transferred(wildcards.method, wildcards.ratio, wildcards.seed)
    return (
        model_files(wildcards.model)
        | bases_files(wildcards.model, method.calibration, method.covariance)
        | {"windows": f"{RUN}/validation/{wildcards.model}/{method.validation}.safetensors"}
        | ({"source": source} if source else {})
    )


def compression_files(wildcards):
    """A preset with a covariance reads bases, one with a search an allocation; a method may read its calibration too."""
    method = STUDY.method(wildcards.method)
    files = model_files(wildcards.model)
    if "statistics" in method.reads:
        files |= statistics_files(wildcards.model, method.calibration)
    if "tokens" in method.reads:
        files["tokens"] = f"{RUN}/calibration/{wildcards.model}/{method.calibration}.safetensors"
    if method.covariance:
        files |= bases_files(wildcards.model, method.calibration, method.covariance)
    if method.search:
        files["allocation"] = LAYOUT.allocation(**wildcards)
    return files


def checkpoint_files(wildcards):
    """The checkpoint that a row of a table is about."""
    folder = LAYOUT.checkpoint(wildcards.tuning).format(**wildcards)
    return {"checkpoint": ancient(f"{folder}/checkpoint"), "manifest": f"{folder}/manifest.json"}


def perplexity_files(wildcards):
    corpora = STUDY.suites[wildcards.suite].corpora
    return checkpoint_files(wildcards) | {
        "corpora": [f"{RUN}/corpora/{name}.json" for name in corpora],
        "data": [LAYOUT.corpus_data(name) for name in corpora],
    }


def zero_shot_files(wildcards):
    tasks = STUDY.suites[wildcards.suite].tasks
    return checkpoint_files(wildcards) | {
        "tasks": [f"{RUN}/tasks/{name}.json" for name in tasks],
        "rows": [ancient(f"{RUN}/tasks/{name}") for name in tasks],
    }


def published_files(wildcards):
    """The published values that a table shows beside ours."""
    references = published_references(STUDY.tables[wildcards.table])
    return sorted({f"{CONFIG}/published/{reference.file}.csv" for _, reference in references})


# --- resources: what a job asks its cluster for. Sizes are estimated in lowrank.resources; the site's part is in its
# profile. On one machine they bind nothing: Snakemake limits memory and GPUs only if `--resources` says how much there is.


def of_site(name):
    """A value that the profile gives under `default-resources`, as text, or None."""
    found = workflow.resource_settings._parsed_default_resources.get(name)
    return None if found is None or found.raw is None else str(found.raw).strip("'\"")


def of_rule(rule, name, default):
    """A number that the profile gives a rule under `set-resources`, or the default."""
    found = workflow.resource_settings._parsed_overwrite_resources.get(rule, {}).get(name)
    return default if found is None or found.raw is None else int(found.raw)


ESTIMATOR = Estimator(STUDY, **{name: of_rule(name, "layers_per_pass", LAYERS_PER_PASS) for name in LAYERWISE})


def gpus(rule, wildcards):
    """How many GPUs a job holds: none if it does not compute on one, or if the profile hands out none."""
    each = of_site("gpus_per_job")
    if each is None and workflow.non_local_exec:
        raise WorkflowError(
            "the profile does not say whether jobs get GPUs. Add `gpus_per_job: 1` to its `default-resources`, or "
            "`gpus_per_job: 0` to compute on CPUs (options on the command line replace those of the profile)."
        )
    return of_rule(rule, "gpu", int(each or 0)) if ESTIMATOR.need(rule, wildcards).gpu else 0


def asks(rule):
    """The resources of a rule that may run as a job of a cluster."""
    return {
        "gpu": lambda wildcards: gpus(rule, wildcards) or None,
        "nodes": lambda wildcards: 1 if gpus(rule, wildcards) else None,
        "gpu_model": lambda wildcards: of_site("gpu_type") if gpus(rule, wildcards) else None,
        "mem_mb": lambda wildcards, attempt: memory_request(
            ESTIMATOR.need(rule, wildcards), gpus(rule, wildcards), attempt
        ),
        "runtime": lambda wildcards, attempt, threads: runtime_request(
            ESTIMATOR.need(rule, wildcards), gpus(rule, wildcards), threads, attempt
        ),
    }

# Shared by all rules: the checked config, names of files, wildcards, and what jobs ask a cluster for. Functions live here,
# in settings.smk and in inputs.smk, so that every other file holds rules only.

import os
import re
import sys
from pathlib import Path

from snakemake.cli import get_argument_parser
from snakemake.common import async_run
from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

# Relative, so that results stay valid in another clone; not always `config`, since the working directory may differ.
CONFIG = os.path.relpath(Path(workflow.basedir) / "config")
SCRIPTS = Path(workflow.basedir) / "workflow_scripts"
sys.path.insert(0, str(SCRIPTS))
from lowrank.config.beside import check_beside, deepspeed_file
from lowrank.config.frozen import freeze, frozen_study
from lowrank.config.lines import Lines
from lowrank.config.load import check_study
from lowrank.config.used import used_study
from lowrank.config.yaml_file import read_yaml
from lowrank.errors import RankwiseError
from lowrank.files import is_of_a_model, matching_files, read_json, sha256_file, write_json
from lowrank.reruns.fingerprint import Code
from lowrank.layout import Layout, in_order
from lowrank.cluster.needs import memory_request, runtime_request
from lowrank.config.presets import ANY_MULTIPLE
from lowrank.config.published import published_references
from lowrank.config.sources import RandomSource
from lowrank.cluster.resources import LAYERS_PER_PASS, Estimator
from lowrank.cluster.site import check_rules, site_of, whole_number
from lowrank.jobs.gpus import deal_out_gpus
from lowrank.jobs.lock import Holder
from lowrank.jobs.record import made_with, record_file, refuse_made_otherwise
from lowrank.jobs.stage import remember_environment, serve_forks, share_library
from lowrank.progress.steps import HEAD, refuse_beside_another_start, refuse_while_jobs_run

share_library(SCRIPTS)
if workflow.is_main_process:
    deal_out_gpus(here=not workflow.non_local_exec)
if workflow.is_main_process and DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
    remember_environment()  # jobs run in no other, unless Snakemake makes one for them; no rule names a container


def only_fetches():
    """Whether nothing is asked for but `data`, which is planned without knowing the shapes of models.

    Snakemake reads the rules before it tells them the targets, so they are looked up in its command.
    """
    try:
        command, _ = get_argument_parser().parse_known_args(sys.argv[1:])
    except SystemExit:  # another program has loaded the rules
        return False
    return list(command.targets) == ["data"]


CONFIG_FILES = [
    str(path) for path in workflow.config_settings.configfiles or [Path(workflow.basedir) / "config/quickstart.yaml"]
]


def checked(check, *arguments):
    """A check of the config or the profile; its errors are shown without a traceback."""
    try:
        return check(*arguments)
    except RankwiseError as error:
        raise WorkflowError(str(error))


def checked_study():
    """The config as a `Study`: of a job that of its head, whatever the file says by now."""
    if not workflow.is_main_process and (study := frozen_study()):
        return study
    for path in CONFIG_FILES:
        read_yaml(path)  # duplicate keys are lost once Snakemake has merged the files
    where = ", ".join(CONFIG_FILES)
    study = check_study(config, where, CONFIG_FILES, unseen=only_fetches())
    return check_beside(study, CONFIG, where, Lines(CONFIG_FILES, config))


STUDY = checked(checked_study)
USED = used_study(STUDY)
LAYOUT = Layout(STUDY)
RUN, LOGS = LAYOUT.run, LAYOUT.logs
COMPRESSED, TUNED, EVALUATION = LAYOUT.compressed, LAYOUT.tuned, LAYOUT.evaluation


def one_of(names):
    """A wildcard constraint: one of these names, or nothing that exists."""
    return "|".join(re.escape(name) for name in names) or "$none"


def suites_of(kind):
    """Names of the suites of one kind."""
    return [name for name, suite in STUDY.suites.items() if suite.kind == kind]


def tunings(distilling):
    """Names of the presets of post-training: those that distil features, or the others, which train with DeepSpeed."""
    return [name for name, tuning in STUDY.tuning.items() if (tuning.kind == "feature-distillation") == distilling]


def figures_of(kind):
    """Names of the figures of one kind."""
    return [name for name, figure in STUDY.figures.items() if figure.kind == kind]


def labels_of(kind):
    """What Snakemake's own report calls a table or figure: its name and its title."""
    return lambda wildcards: {
        "name": wildcards[kind],
        "title": {"table": STUDY.tables, "figure": STUDY.figures}[kind][wildcards[kind]].title,
    }


wildcard_constraints:
    model=one_of(STUDY.models),
    corpus=one_of(STUDY.corpora),
    instructions=one_of(STUDY.instructions),
    task=one_of(STUDY.tasks),
    calibration=one_of(STUDY.calibration),
    covariance=one_of(STUDY.covariance),
    multiple=rf"{ANY_MULTIPLE}|\d+",
    validation=one_of(STUDY.validation),
    sensitivity=one_of(STUDY.sensitivity),
    method=one_of(STUDY.methods),
    ratio=r"\d+",
    seed=r"\d+",
    tuning=one_of(["none", *STUDY.tuning]),
    suite=one_of(STUDY.suites),
    table=one_of(STUDY.tables),
    figure=one_of(STUDY.figures),


# --- when a head starts


def note_orphans():
    """Note with Snakemake how results were made that jobs have finished after their head had been killed.

    Only a head notes that; without it no change of a setting would ever make them again. The records of the jobs tell.
    """
    made = {True: [], False: [], None: []}
    for job in workflow.dag.jobs:
        if job.log and job.params.get("settings") and not workflow.dag.needrun(job) and not is_noted(job):
            made[made_with(record_file(str(job.log[0])), job.params.settings)].append(job)
    checked(refuse_made_otherwise, [str(job.output[0]) for job in made[False]])
    for job in made[True]:
        async_run(workflow.persistence.finished(job))


def is_noted(job):
    """Whether Snakemake has a note of all outputs of a job that is no older than those that are files."""
    notes = {str(path): workflow.persistence.metadata(path) for path in job.output}
    return all(
        note is not None and (not os.path.isfile(path) or os.path.getmtime(path) <= note.endtime + 1)
        for path, note in notes.items()
    )


# --- resources: what a job asks its cluster for. Sizes are estimated in lowrank.cluster.resources; the site's part is in its
# profile. On one machine they bind nothing: Snakemake limits memory and GPUs only if `--resources` says how much there is.


def as_written(resources):
    """The values that a profile gives, as text, without those that are left open."""
    return {name: str(one.raw).strip("'\"") for name, one in resources.items() if one.raw is not None}


def of_rule(rule, name, default):
    """A number that the profile gives a rule under `set-resources`, or the default."""
    found = as_written(workflow.resource_settings._parsed_overwrite_resources.get(rule, {})).get(name)
    return default if found is None else checked(whole_number, rule, name, found)


SITE = checked(
    site_of,
    as_written(workflow.resource_settings._parsed_default_resources),
    as_written(workflow.resource_settings.resources).get("gpu"),
)
ESTIMATOR = Estimator(
    STUDY, SITE.dealing.memory, **{rule: of_rule(rule, "layers_per_pass", 0) for rule in LAYERS_PER_PASS}
)


def given(rule, wildcards):
    """The GPUs of a job: none if it does not compute on one, or if the profile hands out none."""
    if SITE.gpus_per_job is None and workflow.non_local_exec:
        raise WorkflowError(
            "the profile does not say whether jobs get GPUs. Add `gpus_per_job: 1` to its `default-resources`, or "
            "`gpus_per_job: 0` to compute on CPUs (options on the command line replace those of the profile)."
        )
    need = ESTIMATOR.need(rule, wildcards)
    said = of_rule(rule, "gpu", None)
    if said is None or not need.gpu:
        dealt = checked(SITE.dealing.given, rule, need)
    else:
        dealt = checked(SITE.dealing.on, rule, need, said)
    checked(SITE.check_gpus, rule, dealt.gpus)
    return dealt


def gpus(rule, wildcards):
    """How many GPUs a job holds."""
    return given(rule, wildcards).gpus


def of_node(rule, count):
    """How many of a job's GPUs or processes are on one node, whose memory is asked for."""
    return -(-count // of_rule(rule, "nodes", 1))


def processes_of(rule, wildcards):
    """How many processes of a job are on one node: `processes` of the profile, as jobs read it, or one a GPU."""
    if not ESTIMATOR.need(rule, wildcards).shared:
        return 1
    return of_rule(rule, "processes", of_node(rule, given(rule, wildcards).processes))


def memory_of(rule, wildcards, attempt):
    """What a job asks of a node's main memory, in MB."""
    need, node = ESTIMATOR.need(rule, wildcards), (of_node(rule, gpus(rule, wildcards)), processes_of(rule, wildcards))
    checked(SITE.check_memory, rule, need, *node)
    return memory_request(need, node[0], attempt, SITE.max_mem_mb, node[1])


def computing(rule, wildcards):
    """How many GPUs of a job compute at the same time, one for each process; 0: it computes on processors."""
    return gpus(rule, wildcards) and of_rule(rule, "nodes", 1) * processes_of(rule, wildcards)


def asks(rule):
    """The resources of a rule that may run as a job of a cluster."""
    return {
        "uses_gpu": lambda wildcards: int(ESTIMATOR.need(rule, wildcards).gpu),
        "spreads_model": lambda wildcards: int(ESTIMATOR.need(rule, wildcards).spreads),
        "shares_work": lambda wildcards: int(ESTIMATOR.need(rule, wildcards).shared),
        "gpu": lambda wildcards: gpus(rule, wildcards) or None,
        "nodes": lambda wildcards: 1 if gpus(rule, wildcards) else None,
        "processes": lambda wildcards: 1 if given(rule, wildcards).over > 1 else None,
        "gpu_model": lambda wildcards: SITE.gpu_type if gpus(rule, wildcards) else None,
        "mem_mb": lambda wildcards, attempt: memory_of(rule, wildcards, attempt),
        "runtime": lambda wildcards, attempt, threads: runtime_request(
            ESTIMATOR.need(rule, wildcards),
            computing(rule, wildcards),
            threads,
            attempt,
            SITE.max_runtime,
        ),
    }

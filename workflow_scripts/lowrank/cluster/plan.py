"""What a study will need, before anything is fetched or submitted: `python -m lowrank.cluster.plan CONFIG`.

For every rule and model: how many jobs, GPU and main memory of the largest, disk, and hours. All of it follows from
the config by the formulas of `resources` (docs/cluster.md); nothing is measured, no result is looked at.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from lowrank.cluster.dealing import AUTO, Dealing, Given, require_memory
from lowrank.cluster.needs import GIB, Need
from lowrank.cluster.planned_jobs import Job, Jobs, planned_jobs
from lowrank.cluster.resources import LAYERS_PER_PASS, Estimator
from lowrank.config.load import load_study
from lowrank.config.study import Study
from lowrank.errors import RankwiseError
from lowrank.layout import Layout

THREADS = 8
"""Of a job without a GPU, for its expected time."""
AT_ONCE = 8
"""Checkpoints on disk at the same time, of those that are deleted after their last use."""
ONE = Dealing()
"""A GPU a job, of whatever size."""
ELSEWHERE = "others"
"""What jobs that are about no single model are listed under."""


@dataclass(frozen=True)
class Entry:
    """The jobs of one rule for one model.

    Attributes:
        rule: its name.
        model: of the config, or `ELSEWHERE`.
        jobs: how many.
        gpu: bytes on a GPU, of the job that takes most; 0 if none computes on one.
        gpus: of the job that gets most.
        over: GPUs that one model lies on, at most.
        host: bytes of main memory, likewise.
        disk: bytes that all of them leave behind.
        scratch: bytes on disk while one of them runs, at most.
        gpu_hours: expected, of all jobs together that compute on GPUs.
        cpu_hours: of those that do not.
        largest: what takes most of the memory of the largest job (of the GPU's, if it has one).
        unfit: why a job of them cannot run on the site's GPUs; empty if all can.
        crowded: why the site's nodes have too little main memory for one; empty if they do not.
    """

    rule: str
    model: str
    jobs: int
    gpu: float
    gpus: int
    over: int
    host: float
    disk: float
    scratch: float
    gpu_hours: float
    cpu_hours: float
    largest: str
    unfit: str
    crowded: str


@dataclass(frozen=True)
class Plan:
    """All entries of a study, and the hours of the longest chain of jobs that wait for each other.

    Attributes:
        given_up: bytes of each checkpoint that is deleted after its last use, the largest first; no entry has them.
    """

    entries: list[Entry]
    chain_hours: float
    chain: list[Job]
    given_up: list[float]

    @property
    def gpu_hours(self) -> float:
        """Of all jobs."""
        return sum(entry.gpu_hours for entry in self.entries)

    @property
    def cpu_hours(self) -> float:
        """Of all jobs that compute on no GPU."""
        return sum(entry.cpu_hours for entry in self.entries)

    @property
    def disk(self) -> float:
        """Bytes that stay, of the job that needs most on the way, and of checkpoints that are there for a while."""
        stays = sum(entry.disk for entry in self.entries)
        return stays + max(entry.scratch for entry in self.entries) + sum(self.given_up[:AT_ONCE])

    @property
    def jobs(self) -> int:
        """How many."""
        return sum(entry.jobs for entry in self.entries)


@dataclass(frozen=True)
class Dealt:
    """A job's need and what it gets; `unfit` and `crowded` say why it cannot have what it needs."""

    need: Need
    given: Given
    unfit: str = ""
    crowded: str = ""

    @property
    def hours(self) -> float:
        """Expected; GPUs that hold one model compute one after the other."""
        return self.need.seconds(self.given.processes if self.given.gpus else 0, THREADS) / 3600

    @property
    def gpu(self) -> float:
        """Bytes on its fullest GPU."""
        holding = self.given.gpus if self.need.evenly else self.given.over
        return self.need.gpu_bytes_of(max(1, holding)) if self.given.gpus else 0

    @property
    def host(self) -> float:
        """Bytes of main memory."""
        return self.need.host_bytes(self.given.gpus, self.given.processes)


def make_plan(study: Study, dealing: Dealing = ONE, node_memory: float | None = None, **held: int) -> Plan:
    """Estimate all jobs of a study.

    Args:
        study: the config.
        dealing: the GPUs that the site hands out.
        node_memory: bytes of main memory of its largest node; None: not said, so that nothing is too much.
        held: blocks a pass of the rules that work layer by layer, as in `Estimator`.
    """
    estimator, jobs, layout = Estimator(study, dealing.memory, **held), planned_jobs(study), Layout(study)
    needs = {job: estimator.need(job.rule, job.wildcards) for job in jobs}
    folders = {job: _folder(layout, job) for job in jobs}
    passing = [job for job in jobs if folders[job] in layout.given_up]
    given_up = sorted((needs[job].disk for job in passing), reverse=True)
    needs |= {job: replace(needs[job], disk=0) for job in passing}
    dealt = {job: _dealt(dealing, job.rule, need, node_memory) for job, need in needs.items()}
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.rule, _model_of(study, job)), []).append(job)
    entries = [_entry(key, [dealt[job] for job in group]) for key, group in groups.items()]
    order = {rule: index for index, rule in enumerate(estimator.rules)}
    hours = {job: one.hours for job, one in dealt.items()}
    chain = _longest_chain(jobs, hours)
    return Plan(
        sorted(entries, key=lambda entry: order.get(entry.rule, len(order))),
        sum(hours[job] for job in chain),
        chain,
        given_up,
    )


def _folder(layout: Layout, job: Job) -> str | None:
    """Of the checkpoint that a job makes."""
    patterns = {"compress_model": layout.compressed, "post_train": layout.tuned, "distil_features": layout.tuned}
    return patterns[job.rule].format(**job.wildcards) if job.rule in patterns else None


def _model_of(study: Study, job: Job) -> str:
    wildcards = job.wildcards
    if "sensitivity" in wildcards:
        return study.sensitivity[wildcards["sensitivity"]].model
    if job.rule == "measure_truncations":
        return str(getattr(study.figures[wildcards["figure"]], "model", ELSEWHERE))
    return wildcards.get("model", ELSEWHERE)


def _dealt(dealing: Dealing, rule: str, need: Need, node_memory: float | None) -> Dealt:
    """What a job gets, or why it cannot."""
    try:
        dealt = Dealt(need, dealing.given(rule, need))
    except RankwiseError as error:
        dealt = Dealt(need, Given(1), str(error))
    try:
        if node_memory is not None:
            require_memory(rule, need, dealt.given.gpus, dealt.given.processes, node_memory, "--node-memory")
    except RankwiseError as error:
        return replace(dealt, crowded=str(error))
    return dealt


def _entry(key: tuple[str, str], mine: list[Dealt]) -> Entry:
    worst = max(mine, key=lambda one: (one.gpu, one.host))
    part, size = worst.need.largest(worst.given.gpus)
    return Entry(
        *key,
        jobs=len(mine),
        gpu=max(one.gpu for one in mine),
        gpus=max(one.given.gpus for one in mine),
        over=max(one.given.over for one in mine),
        host=max(one.host for one in mine),
        disk=sum(one.need.disk for one in mine),
        scratch=max(one.need.scratch for one in mine),
        gpu_hours=sum(one.hours * one.given.gpus for one in mine),
        cpu_hours=sum(one.hours for one in mine if not one.given.gpus),
        largest=f"{part} {_gib(size)}",
        unfit=next((one.unfit for one in mine if one.unfit), ""),
        crowded=next((one.crowded for one in mine if one.crowded), ""),
    )


def _longest_chain(jobs: Jobs, hours: Mapping[Job, float]) -> list[Job]:
    """The jobs that take longest one after the other; `jobs` names each after those that it waits for."""
    ends: dict[Job, float] = {}
    before: dict[Job, Job | None] = {}
    for job, after in jobs.items():
        last = max(after, key=lambda other: ends[other], default=None)
        ends[job], before[job] = hours[job] + (ends[last] if last else 0), last
    current: Job | None = max(ends, key=lambda job: ends[job])
    chain: list[Job] = []
    while current:
        chain.append(current)
        current = before[current]
    return chain[::-1]


# --- showing it ---


def _gib(size: float) -> str:
    """Bytes in words."""
    if size < 0.05 * GIB:
        return "-" if size < 2**20 else "<0.1 GiB"
    return f"{size / GIB:.1f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def _hours(hours: float) -> str:
    return "-" if hours == 0 else f"{hours:.1f}" if hours < 100 else f"{hours:,.0f}"


def _marked(size: str, wrong: str) -> str:
    return f"[bold red]{size} ![/]" if wrong else size


def as_table(plan: Plan, title: str) -> Table:
    """The plan, one line a rule and model; jobs that write texts and tables only are one line."""
    table = Table(title=title, title_justify="left", show_footer=True)
    disk, on_gpus = f"{_gib(plan.disk)}", plan.gpu_hours > 0
    columns = [
        ("rule", "all", "left"),
        ("model", "", "left"),
        ("jobs", f"{plan.jobs:,}", "right"),
        ("GPUs", str(max(entry.gpus for entry in plan.entries)), "right"),
        ("GPU memory", _gib(max(entry.gpu for entry in plan.entries)), "right"),
        ("main memory", _gib(max(entry.host for entry in plan.entries)), "right"),
        ("disk", disk, "right"),
        ("GPU hours", _hours(plan.gpu_hours), "right") if on_gpus else ("hours", _hours(plan.cpu_hours), "right"),
        ("largest part", "", "left"),
    ]
    for header, footer, justify in columns:
        table.add_column(header, footer, justify=justify)  # type: ignore[arg-type]
    for entry in plan.entries:
        if not any((entry.gpu, entry.disk, entry.scratch)) and entry.model == ELSEWHERE:
            continue
        table.add_row(
            entry.rule,
            entry.model,
            str(entry.jobs),
            str(entry.gpus or "-"),
            _marked(_gib(entry.gpu), entry.unfit),
            _marked(_gib(entry.host), entry.crowded),
            _gib(entry.disk) + (f" (+{_gib(entry.scratch)})" if entry.scratch >= 0.05 * GIB else ""),
            _hours(entry.gpu_hours if on_gpus else entry.cpu_hours),
            entry.largest,
        )
    return table


def remarks(plan: Plan) -> Iterable[str]:
    """What the table does not show."""
    light = [entry for entry in plan.entries if not any((entry.gpu, entry.disk, entry.scratch))]
    small = sum(entry.jobs for entry in light if entry.model == ELSEWHERE)
    if small:
        what = "fetch or compare texts, write tables and figures or delete checkpoints"
        yield f"{small} jobs {what}; they are counted, not listed."
    if plan.given_up:
        there = plan.given_up[:AT_ONCE]
        yield (
            f"{len(plan.given_up)} checkpoints of together {_gib(sum(plan.given_up))} are deleted after their last use "
            f"(`keep_checkpoints`). Disk counts the {len(there)} largest, {_gib(sum(there))}, as there at once."
        )
    rules = " > ".join(job.rule for job in plan.chain if job.rule != "write_report")
    yield f"The longest chain of jobs takes {plan.chain_hours:.1f} h, however many run side by side: {rules}."
    by_rule: dict[str, float] = {}
    for entry in plan.entries:
        by_rule[entry.rule] = by_rule.get(entry.rule, 0) + entry.gpu_hours
    most = sorted(by_rule, key=lambda name: by_rule[name], reverse=True)[:3]
    if plan.gpu_hours:
        yield (
            "Most GPU hours: "
            + ", ".join(f"{name} {100 * by_rule[name] / plan.gpu_hours:.0f} %" for name in most)
            + "."
        )
    spread = sorted({entry.rule for entry in plan.entries if entry.over > 1})
    if spread:
        yield f"One process has its model on several GPUs in {', '.join(spread)}: one of them computes at a time."
    reasons = [(entry.model, reason) for entry in plan.entries for reason in (entry.unfit, entry.crowded) if reason]
    for model, reason in dict.fromkeys(reasons):
        yield f"! {model}: {reason}"
    if plan.gpu_hours:
        speed = "for an A100; for a machine without GPUs: make plan CONFIG=... GPUS=0, or --gpus-per-job 0"
    else:
        speed = f"for {THREADS} threads of a processor"
    yield (
        f"Estimates from shapes, {speed}. Memory is that of the largest job (of GPUs, that of the fullest), disk "
        "that of all (in brackets: more while one runs). Formulas, and what was checked: docs/cluster.md."
    )


def _gpus_per_job(text: str) -> int | None:
    if text != AUTO and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number or `{AUTO}`, not '{text}'")
    return None if text == AUTO else int(text)


def main(arguments: list[str]) -> int:
    """Print the plan of a config.

    Returns:
        The exit code: 0 if all is well, 1 if the config is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m lowrank.cluster.plan", description="What a study will need.")
    parser.add_argument("config", help="a config file, as config/paper.yaml")
    parser.add_argument(
        "--gpus-per-job",
        type=_gpus_per_job,
        metavar="N",
        help=f"as in the profile; 0: no GPUs; {AUTO}, which is the default: as many as hold the model",
    )
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of one GPU; 80 if left out")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="what one job can have at most; 8 if left out"
    )
    parser.add_argument("--node-memory", type=float, metavar="GIB", help="main memory of the largest node")
    parser.add_argument(
        "--layers-per-pass", type=int, metavar="N", help="of the collect_* rules; without it, those of the rules"
    )
    options = parser.parse_args(arguments)
    try:
        study = load_study(os.path.expanduser(options.config))
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 1
    held = dict.fromkeys(LAYERS_PER_PASS, options.layers_per_pass) if options.layers_per_pass else {}
    dealing = Dealing(options.gpus_per_job, options.gpu_memory * GIB, options.gpus_per_node)
    plan = make_plan(study, dealing, options.node_memory and options.node_memory * GIB, **held)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(as_table(plan, f"Plan of {options.config}, run '{study.run}'"))
    for line in remarks(plan):
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

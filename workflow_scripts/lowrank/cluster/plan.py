"""What a study will need, before anything is fetched or submitted: `python -m lowrank.cluster.plan CONFIG`.

For every rule and model: how many jobs, GPU and main memory of the largest, disk, and hours. All of it follows from
the config by the formulas of `resources` (docs/cluster.md); nothing is measured, no result is looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

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
        host: bytes of main memory, likewise.
        disk: bytes that all of them leave behind.
        scratch: bytes on disk while one of them runs, at most.
        gpu_hours: expected, of all jobs together that compute on GPUs.
        cpu_hours: of those that do not.
        largest: what takes most of the memory of the largest job (of the GPU's, if it has one).
    """

    rule: str
    model: str
    jobs: int
    gpu: float
    host: float
    disk: float
    scratch: float
    gpu_hours: float
    cpu_hours: float
    largest: str


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
    def disk(self) -> float:
        """Bytes that stay, of the job that needs most on the way, and of checkpoints that are there for a while."""
        stays = sum(entry.disk for entry in self.entries)
        return stays + max(entry.scratch for entry in self.entries) + sum(self.given_up[:AT_ONCE])

    @property
    def jobs(self) -> int:
        """How many."""
        return sum(entry.jobs for entry in self.entries)


def make_plan(study: Study, gpus: int = 1, **held: int) -> Plan:
    """Estimate all jobs of a study.

    Args:
        study: the config.
        gpus: of a job that computes on them, if it can use so many; 0: everything on processors.
        held: blocks a pass of the rules that work layer by layer, as in `Estimator`.
    """
    estimator, jobs, layout = Estimator(study, **held), planned_jobs(study), Layout(study)
    needs = {job: estimator.need(job.rule, job.wildcards) for job in jobs}
    folders = {job: _folder(layout, job) for job in jobs}
    passing = [job for job in jobs if folders[job] in layout.given_up]
    given_up = sorted((needs[job].disk for job in passing), reverse=True)
    needs |= {job: replace(needs[job], disk=0) for job in passing}
    hours = {job: need.seconds(need.gpus(gpus), THREADS) / 3600 for job, need in needs.items()}
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.rule, _model_of(study, job)), []).append(job)
    entries = [_entry(key, group, needs, hours, gpus) for key, group in groups.items()]
    order = {rule: index for index, rule in enumerate(estimator.rules)}
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


def _entry(
    key: tuple[str, str], jobs: list[Job], needs: Mapping[Job, Need], hours: Mapping[Job, float], gpus: int
) -> Entry:
    mine = [needs[job] for job in jobs]
    given = {id(need): need.gpus(gpus) for need in mine}
    worst = max(mine, key=lambda need: (need.gpu_bytes if gpus else 0, need.host_bytes(given[id(need)])))
    part, size = worst.largest(given[id(worst)])
    return Entry(
        *key,
        jobs=len(jobs),
        gpu=max(need.gpu_bytes if gpus else 0 for need in mine),
        host=max(need.host_bytes(given[id(need)]) for need in mine),
        disk=sum(need.disk for need in mine),
        scratch=max(need.scratch for need in mine),
        gpu_hours=sum(hours[job] * needs[job].gpus(gpus) for job in jobs),
        cpu_hours=sum(hours[job] for job in jobs if not needs[job].gpus(gpus)),
        largest=f"{part} {_gib(size)}",
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


def as_table(plan: Plan, title: str, gpu_memory: float) -> Table:
    """The plan, one line a rule and model; jobs that write texts and tables only are one line."""
    table = Table(title=title, title_justify="left", show_footer=True)
    disk = f"{_gib(plan.disk)}"
    columns = [
        ("rule", "all", "left"),
        ("model", "", "left"),
        ("jobs", f"{plan.jobs:,}", "right"),
        ("GPU memory", _gib(max(entry.gpu for entry in plan.entries)), "right"),
        ("main memory", _gib(max(entry.host for entry in plan.entries)), "right"),
        ("disk", disk, "right"),
        ("GPU hours", _hours(plan.gpu_hours), "right"),
        ("largest part", "", "left"),
    ]
    for header, footer, justify in columns:
        table.add_column(header, footer, justify=justify)  # type: ignore[arg-type]
    for entry in plan.entries:
        if not any((entry.gpu, entry.disk, entry.scratch)) and entry.model == ELSEWHERE:
            continue
        too_large = entry.gpu > gpu_memory > 0
        table.add_row(
            entry.rule,
            entry.model,
            str(entry.jobs),
            f"[bold red]{_gib(entry.gpu)} ![/]" if too_large else _gib(entry.gpu),
            _gib(entry.host),
            _gib(entry.disk) + (f" (+{_gib(entry.scratch)})" if entry.scratch >= 0.05 * GIB else ""),
            _hours(entry.gpu_hours),
            entry.largest,
        )
    return table


def remarks(plan: Plan, gpu_memory: float) -> Iterable[str]:
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
    too_large = sorted({entry.rule for entry in plan.entries if entry.gpu > gpu_memory > 0})
    if too_large:
        yield (
            f"! More than a GPU of {gpu_memory / GIB:.0f} GiB holds: {', '.join(too_large)}. Fewer `layers_per_pass` "
            "help the collect_* rules (set-resources in the profile); nothing helps the others, since a model must fit "
            "one GPU."
        )
    yield (
        "Estimates from shapes, for an A100. Memory is that of the largest job, disk that of all (in brackets: more "
        "while one runs). Formulas, and what was checked: docs/cluster.md."
    )


def main(arguments: list[str]) -> int:
    """Print the plan of a config.

    Returns:
        The exit code: 0 if all is well, 1 if the config is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m lowrank.cluster.plan", description="What a study will need.")
    parser.add_argument("config", help="a config file, as config/paper.yaml")
    parser.add_argument("--gpus-per-job", type=int, default=1, metavar="N", help="as in the profile; 0: no GPUs")
    parser.add_argument(
        "--gpu-memory", type=float, default=80, metavar="GIB", help="of one GPU; what is larger is marked"
    )
    parser.add_argument(
        "--layers-per-pass", type=int, metavar="N", help="of the collect_* rules; without it, those of the rules"
    )
    options = parser.parse_args(arguments)
    try:
        study = load_study(options.config)
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 1
    held = dict.fromkeys(LAYERS_PER_PASS, options.layers_per_pass) if options.layers_per_pass else {}
    plan = make_plan(study, options.gpus_per_job, **held)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(as_table(plan, f"Plan of {options.config}, run '{study.run}'", options.gpu_memory * GIB))
    for line in remarks(plan, options.gpu_memory * GIB):
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Prints, as JSON, every job that Snakemake plans, what it asks for, and the sbatch line that the SLURM plugin makes.

    python submitted.py PARTITIONS snakemake-arguments...

Snakemake itself plans the jobs, and the plugin's own functions write the lines; nothing is run or submitted. If
PARTITIONS is `none`, the jobs are those of one machine, and have no line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import snakemake.cli
from snakemake.executors import dryrun
from snakemake.logging import logger
from snakemake_executor_plugin_slurm import ExecutorSettings
from snakemake_executor_plugin_slurm.partitions import get_best_partition, read_partition_file
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

SETTINGS = ExecutorSettings(requeue=True)  # which asks for SLURM's programs each time
partitions, *arguments = sys.argv[1:]
known = None if partitions == "none" else read_partition_file(Path(partitions))
planned: list[Any] = []
places: set[str] = set()
run_job = dryrun.Executor.run_job


def remember(self: dryrun.Executor, job: Any) -> None:
    planned.append(job)
    places.add(os.getcwd())
    run_job(self, job)


dryrun.Executor.run_job = remember  # type: ignore[method-assign]


def described(job: Any, attempt: int) -> dict[str, Any]:
    """A job at its first or a further try; those of the head node have neither resources nor a line."""
    known_by = {"rule": job.rule.name, "wildcards": dict(job.wildcards.items()), "local": job.is_local}
    if job.is_local and known:
        return known_by
    job.attempt = attempt  # Snakemake evaluates the resources anew
    values = {name: value for name, value in job.resources.items() if type(value) in (int, str)}
    known_by |= {"threads": job.threads, "resources": values}
    return known_by | submitted(job) if known else known_by


def submitted(job: Any) -> dict[str, str]:
    """Partition and line."""
    partition = get_best_partition(known, job, logger)
    parameters = {
        "run_uuid": "uuid",
        "slurm_logfile": "log",
        "comment_str": f"rule_{job.rule.name}",
        "account": "-A 'account'",
        "partition": f"-p {partition}",
        "workdir": "/work",
    }
    line = get_submit_command(job, parameters, settings=SETTINGS)
    return {"partition": partition, "line": line + set_gres_string(job)}


try:
    snakemake.cli.main([*arguments, "--dry-run", "--cores", "1000"])
except SystemExit as ended:
    if ended.code:
        raise
(place,) = places
os.chdir(place)  # Snakemake has left it, and resources look at the inputs
if known:
    for job in planned:  # from here on they are SLURM's
        job.dag.workflow._executor_plugin = ExecutorPluginRegistry().get_plugin("slurm")
print("JOBS " + json.dumps([[described(job, attempt) for attempt in (1, 2)] for job in planned]))

"""What made an artefact: a record of each finished job, beside the results.

`results/<run>/records/<rule>/<as its log>.json` tells of all outputs of the job, tables and figures included. It is no
job's input, so nothing runs again because of it; `provenance.json`, the report and `make why` read it.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowrank.errors import RankwiseError
from lowrank.files import digest_of, read_record, sha256_file, write_json
from lowrank.jobs.job import Job
from lowrank.versions import git_state, package_version

CODE = ("code", "packages")
"""Settings that are about code, not about the study."""
LOGS, RECORDS = "/logs/", "/records/"


def record_file(log: str) -> Path | None:
    """Where the record of a job is, by its log file; None if it has none."""
    before, found, name = log.rpartition(LOGS)
    return Path(f"{before}{RECORDS}{name}").with_suffix(".json") if found else None


def write_job_record(job: Job, project: Path, usage: dict[str, float]) -> None:
    """Record what a finished job was made from, and what it took.

    Args:
        job: with its outputs in place.
        project: the checkout whose code it ran.
        usage: seconds and peaks of memory, by their names.

    Raises:
        RankwiseError: it cannot be written.
    """
    path = record_file(str(job.log[0])) if len(job.log) else None
    if path is not None:
        write_json(path, describe_job(job, project) | {"usage": usage})


def describe_job(job: Job, project: Path) -> dict[str, Any]:
    """The record's content: paths are as the workflow has them, folders are told by the manifests beside them."""
    made_from = _made_from(job.params.get("settings", {}))
    return {
        "rule": job.rule,
        "wildcards": {name: str(value) for name, value in job.wildcards.items()},
        **made_from,
        "git": git_state(project),
        "inputs": _checksums(job.input),
        "outputs": _checksums(job.output),
        "versions": {"python": platform.python_version()}
        | {package: package_version(package) for package in made_from["pins"]},
        "device": device_name(),
        "machine": {"system": sys.platform, "architecture": platform.machine(), "threads": job.threads},
    }


def made_with(record: Path | None, settings: dict[str, Any]) -> bool | None:
    """Whether a job has had these settings, this code and these pins, by its record.

    None if that does not tell, or tells of other results than those that are there.

    Args:
        record: the file; None or missing: it has none.
        settings: that it would have now.
    """
    if record is None or not record.is_file():
        return None
    try:
        told = read_record(record)
    except RankwiseError:  # a damaged record, of which no result depends
        return None
    if any(os.path.isfile(path) and sha256_file(path) != checksum for path, checksum in told["outputs"].items()):
        return None
    now = _made_from(settings)
    return {key: told.get(key) for key in now} == now


def refuse_made_otherwise(outputs: Iterable[str]) -> None:
    """Stop a start that would take results for others.

    Args:
        outputs: of jobs that had other settings, of which Snakemake does not know.

    Raises:
        RankwiseError: there are some; each is named.
    """
    if listed := "".join(f"\n  {output}" for output in sorted(outputs)):
        raise RankwiseError(
            "Snakemake has no note of how these were made, and by their own records it was with other settings or code "
            f"than now:{listed}\nTo make them again, add `--forcerun` and their names to your options; to keep them as "
            "they are, `--touch --force` and their names, once."
        )


def _made_from(settings: dict[str, Any]) -> dict[str, Any]:
    """What settings say of a result, and of the code that makes it."""
    return {
        "config_digest": digest_of({key: value for key, value in settings.items() if key not in CODE}),
        "code": settings.get("code"),
        "pins": settings.get("packages", {}),
    }


def device_name() -> str:
    """The accelerator of this process, as far as it has loaded torch; else `cpu`."""
    torch: Any = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else "cpu"


def records_of(artefacts: Iterable[str | Path], folder: Path) -> dict[str, dict[str, Any]]:
    """Artefact -> the record of the job that made it; one that has changed since then, or has no record, is left out.

    Args:
        artefacts: paths as the workflow has them.
        folder: of the records of a run.

    Raises:
        RankwiseError: a record is damaged.
    """
    wanted = {os.path.normpath(path) for path in artefacts}
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.rglob("*.json")):
        record = read_record(file)
        for path, checksum in record["outputs"].items():
            if os.path.normpath(path) in wanted and sha256_file(path) == checksum:
                found[path] = record
    return found


def _checksums(paths: Iterable[Any]) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in paths if os.path.isfile(path)}

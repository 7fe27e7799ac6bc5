"""What a run was made from: config, commit, versions and the checksum of each artefact. No timestamps."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowrank.errors import RankwiseError
from lowrank.files import digest_of, sha256_file
from lowrank.jobs.record import records_of
from lowrank.versions import git_state, package_version

PROJECT = Path(__file__).resolve().parents[3]
PACKAGES = (
    "snakemake",
    "pydantic",
    "numpy",
    "pandas",
    "matplotlib",
    "torch",
    "transformers",
    "datasets",
    "safetensors",
    "gpytorch",
    "botorch",
    "deepspeed",
    "peft",
    "lm_eval",
)


def describe_run(
    run: str, config: dict[str, Any], artefacts: Iterable[str | Path], relative_to: str | Path
) -> dict[str, Any]:
    """The content of `provenance.json`.

    Args:
        run: name of the run.
        config: what the results use of the config, with all defaults filled in.
        artefacts: files whose checksums are recorded, and what made them.
        relative_to: the folder of the run, from which the artefacts are named.

    Raises:
        RankwiseError: an artefact is missing.
    """
    artefacts = list(artefacts)
    records = records_of(artefacts, Path(relative_to) / "records")
    return {
        "run": run,
        "config_digest": digest_of(config),
        "git": git_state(PROJECT),
        "versions": {
            "python": platform.python_version(),
            **{package: package_version(package) for package in PACKAGES},
        },
        "machine": {"system": sys.platform, "architecture": platform.machine()},
        "artefacts": {
            _relative(path, relative_to): _checksum(path) for path in sorted({Path(artefact) for artefact in artefacts})
        },
        "made_by": {_relative(Path(path), relative_to): _maker(record) for path, record in sorted(records.items())},
        "config": config,
    }


def _maker(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the job that made an artefact."""
    told = ("rule", "config_digest", "code", "git", "inputs", "versions", "device")
    return {key: record[key] for key in told}


def _relative(path: Path, folder: str | Path) -> str:
    return Path(os.path.relpath(path.resolve(), Path(folder).resolve())).as_posix()


def _checksum(path: Path) -> str:
    if not path.is_file():
        raise RankwiseError(f"{path}: missing, so its checksum cannot be recorded. Run the workflow again.")
    return sha256_file(path)

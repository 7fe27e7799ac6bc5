"""Clones of this repository whose study looks finished, changes of them, and what Snakemake would run then.

Nothing is computed: small files stand for the results, and Snakemake writes its own records of them (`--touch`). Every
dry run is Snakemake's own command line, in a process of its own that starts from one in which Snakemake is imported.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Container
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import yaml

REPOSITORY = Path(__file__).parents[2]
MADE = ("results", ".snakemake")
PARTS = ("Snakefile", "rules", "config", "profiles", "envs", "workflow_scripts")
BEING_WRITTEN = ("*.pyc.*", "fingerprints.json.*")
"""Temporary names, which may be gone before they are copied; Python's caches themselves are valid in a copy."""
SNAKEMAKE = (
    *("snakemake.cli", "snakemake.profiles", "snakemake.assets", "snakemake.storage"),
    *(
        "snakemake.report.html_reporter",
        "requests",
        "chardet",
        "smart_open",
        "yte",
        "platformdirs",
        "pandas",
        "pydantic",
    ),
)
"""What a run of Snakemake imports, but for the code of a checkout."""
LARGE = 1_100_000
"""Bytes of a pretended file of tensors: more than Snakemake compares by content unless told to."""


class Rerun(NamedTuple):
    """A job that would run."""

    rule: str
    wildcards: dict[str, str]
    reason: str


class Given(NamedTuple):
    """What a rule hands to its stage."""

    rule: str
    wildcards: dict[str, str]
    params: dict[str, Any]


def pool() -> ProcessPoolExecutor:
    """Two processes at a time, each for one task."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(SNAKEMAKE))
    return ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1)


def clone(source: Path, target: Path) -> Path:
    """A copy of a checkout with the times of all files; of this repository without its results, else with them.

    Files of a clone of a clone are links: who changes one makes it anew (`write`).
    """
    target.mkdir(parents=True)
    if source == REPOSITORY:
        for part in PARTS:
            if (source / part).is_dir():
                ignore = shutil.ignore_patterns(*BEING_WRITTEN)
                shutil.copytree(source / part, target / part, ignore=ignore)
            else:
                shutil.copy2(source / part, target / part)
        return target
    there = [source / part for part in (*PARTS, *MADE) if (source / part).exists()]
    subprocess.run(["cp", "--archive", "--link", *there, target], check=True)
    return target


def write(path: Path, text: str) -> None:
    """Another text in a file that other clones may have."""
    path.unlink(missing_ok=True)
    path.write_text(text)


# --- in processes of their own ---


def pretend_finished(checkout: Path, config: str) -> None:
    """Put small files in place of all results of a config, and let Snakemake record them as made."""
    from snakemake.executors import touch

    run_job = touch.Executor.run_job

    def pretend(self: touch.Executor, job: Any) -> None:
        for file in job.output:
            path = Path(file)
            if file.is_directory:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"in place of {file}\n")
            if path.suffix == ".safetensors":
                os.truncate(path, LARGE)
        run_job(self, job)

    touch.Executor.run_job = pretend  # type: ignore[method-assign]
    touch.Executor.SLEEPING_TIME = 0  # type: ignore[assignment]
    _silence(checkout)
    _snakemake(checkout, config, "--touch", "--forceall", "--cores", "1000")  # a round of the scheduler for many jobs


def reruns(checkout: Path, config: str, *arguments: str) -> list[Rerun]:
    """What a dry run would run, without the target."""
    _silence(checkout)
    from why import planned

    command = _command(checkout, config)
    return [Rerun(job.rule, job.wildcards, job.reason) for job in planned([*command, *arguments]) if job.output]


def given(checkout: Path, config: str) -> list[Given]:
    """What all jobs of a config would be given, in a checkout without results."""
    from snakemake.executors import dryrun

    found: list[Given] = []
    run_job = dryrun.Executor.run_job

    def remember(self: dryrun.Executor, job: Any) -> None:
        if job.output:  # not the targets, which only name files
            found.append(Given(job.rule.name, dict(job.wildcards_dict), dict(job.params.items())))
        run_job(self, job)

    dryrun.Executor.run_job = remember  # type: ignore[method-assign]
    _silence(checkout)
    _snakemake(checkout, config, "--dry-run")
    return found


def _command(checkout: Path, config: str) -> list[str]:
    os.chdir(checkout)
    return ["--cores", "1", "--snakefile", "Snakefile", "--configfile", f"config/{config}.yaml"]


def _snakemake(checkout: Path, config: str, *arguments: str) -> None:
    import snakemake.cli

    try:
        snakemake.cli.main([*_command(checkout, config), *arguments])
    except SystemExit as ended:
        if ended.code:
            raise


def _silence(checkout: Path) -> None:
    """Import the checkout's own library, and write what Snakemake says to a file."""
    assert "lowrank" not in sys.modules
    sys.path.insert(0, str(checkout / "workflow_scripts"))
    said = os.open(checkout / "snakemake.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)


# --- changes ---


def replace(checkout: Path, file: str, old: str, new: str, times: int | None = None) -> None:
    """Another text in a file, in the first so many places; by default in the only one."""
    path = checkout / file
    text = path.read_text()
    assert text.count(old) >= (times or 1), f"{file}: {old!r} stands there {text.count(old)} times"
    assert times or text.count(old) == 1, f"{file}: {old!r} stands there {text.count(old)} times"
    write(path, text.replace(old, new, times or 1))


def change_code(checkout: Path, file: str, function: str) -> None:
    """A statement more at the beginning of a function (or of a class's method, `Class.method`)."""
    path = checkout / "workflow_scripts" / file
    lines = path.read_text().splitlines(keepends=True)
    body: list[ast.stmt] = ast.parse("".join(lines)).body
    for name in function.split("."):
        (found,) = [each for each in body if getattr(each, "name", None) == name]
        body = found.body  # type: ignore[attr-defined]
    last = body[-1]
    lines.insert(last.lineno - 1, f"{' ' * last.col_offset}assert True\n")
    write(path, "".join(lines))


def read_config(checkout: Path, config: str) -> dict[str, Any]:
    """A config of the checkout, with the presets that it uses."""
    from lowrank.config.load import read_config as with_presets

    return with_presets(checkout / f"config/{config}.yaml")


def leave_out(content: dict[str, Any], models: Container[str] = ()) -> None:
    """Leave out of a config's tables and figures the rows of some models, and others than those at 0 and 20 %.

    What is left has the same kinds of jobs, half as often: methods that stand at other ratios only keep their rows.
    """
    tables, figures = content["tables"], content["figures"]
    rows = [row for output in (*tables.values(), *figures.values()) for row in output.get("rows", ())]
    common = {row["method"] for row in rows if row["model"] not in models and row.get("ratio", 0) in (0, 20)}
    for output in (*tables.values(), *figures.values()):
        if "rows" in output:
            output["rows"] = [
                row
                for row in output["rows"]
                if row["model"] not in models and (row.get("ratio", 0) in (0, 20) or row["method"] not in common)
            ]
        if "ratios" in output:
            output["ratios"] = output["ratios"][:1]
    for outputs in (tables, figures):
        for name in [name for name, output in outputs.items() if output.get("rows") == []]:
            del outputs[name]
    for table in tables.values():
        if table["kind"] == "agreement":
            table["tables"] = [name for name in table["tables"] if name in tables]


def write_config(checkout: Path, config: str, content: dict[str, Any]) -> None:
    """Another YAML."""
    write(checkout / f"config/{config}.yaml", yaml.safe_dump(content, sort_keys=False))

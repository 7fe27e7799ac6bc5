"""A fresh copy of the repository with a tiny study, and heads of Snakemake that run it on the throw-away cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from lowrank.jobs.forkserver import SERVER
from lowrank.jobs.lock import ENDED
from tests.slurm.slurm_cluster import GPU_FILES, GPU_TYPE, Cluster, Job, belonging, until
from tests.slurm.watcher import files_below
from tests.workflow.clones import BEING_WRITTEN

ROOT = Path(__file__).parents[2]
NOT_TRACKED = (".git", ".venv", ".snakemake", ".*_cache", ".hypothesis", "results", "cache", *BEING_WRITTEN)
GPUS_IN_FLIGHT = 2
"""Fewer than the cluster has, so that the profile's cap is what limits them."""
SITE = {
    "default-resources": {"gpus_per_job": 1, "gpu_type": GPU_TYPE, "device": "cpu"},
    "resources": {"gpu": GPUS_IN_FLIGHT},
    "slurm-partition-config": "partitions.yaml",
    "slurm-status-command": "squeue",  # there is no accounting
    "slurm-init-seconds-before-status-checks": 3,
    "latency-wait": 20,
    "set-resources": {"collect_statistics": {"layers_per_pass": 1}},
}
"""What profiles/README.md tells a site to write; `device: cpu`, since the GPUs are not real."""
PARTITIONS = {
    "processors": {"max_runtime": "2h", "max_mem_mb": 16000, "max_threads": 8},
    "accelerators": {
        "max_runtime": "2h",
        "max_mem_mb": 32000,
        "max_threads": 16,
        "max_gpu": len(GPU_FILES),
        "available_gpu_models": [GPU_TYPE],
    },
}


def small_study(folder: Path) -> dict[str, Any]:
    """Of the tiny study, each rule that may run on a node, and few jobs: some of its tables, figures and tasks."""
    from tests import tiny_study  # and with it torch, which only this needs

    full = tiny_study.config(folder)
    row = {"model": "tiny", "ratio": 20, "tolerance": 4}
    searched, trained = {**row, "method": "bolaco"}, {**row, "method": "bolaco", "tuning": "scales"}
    svd, rankwise = {**row, "method": "svd"}, {**row, "method": "rankwise"}
    tasks = {"boolq": "acc"}
    suites = full["suites"]
    return full | {
        "models": {"tiny": full["models"]["tiny"]},
        "corpora": {name: full["corpora"][name] for name in ("calibration", "validation", "test-a")},
        "tasks": {name: full["tasks"][name] for name in tasks},
        "suites": suites
        | {
            "held-out": {**suites["held-out"], "corpora": ["test-a"]},
            "zero-shot": {**suites["zero-shot"], "tasks": tasks},
        },
        # Without influence and identity blocks, and with all neurons, `rankwise` only slices bases, on a processor: a
        # job that can lose its node there.
        "methods": {name: full["methods"][name] for name in ("svd", "bolaco")}
        | {
            "rankwise": {**full["methods"]["rankwise"], "mlp": "pairs", "influence": False, "identity_block": False},
            "rankwise-neurons": {**full["methods"]["rankwise"], "mlp": "neurons"},
        },
        "tables": {
            "table_1": {
                "kind": "accuracy",
                "title": "Perplexity",
                "suites": ["held-out"],
                "rows": [svd, rankwise, searched, trained],
            },
            "table_2": {"kind": "accuracy", "title": "Accuracy", "suites": ["zero-shot"], "rows": [svd]},
            "table_7": {"kind": "statistics", "title": "Statistics", "suites": ["cost"], "rows": [svd]},
            "table_8": {
                "kind": "allocations",
                "title": "Ranks",
                "rows": [searched, {**row, "method": "rankwise-neurons"}],
            },
            "table_9": {"kind": "generations", "title": "Texts", "suites": ["prompts"], "rows": [svd]},
        },
        "figures": {"figure_1": full["figures"]["figure_1"]},
    }


class Study:
    """A folder with a copy of the repository, the profile of a site, and the inputs of a study.

    Attributes:
        clone: the copy, where Snakemake is started.
        run: its results.
        first: SLURM's jobs of the run that has made them, if that was done here.
    """

    def __init__(self, folder: Path, cluster: Cluster, fork_server: str) -> None:
        self.folder, self.cluster, self.fork_server = folder, cluster, fork_server
        self.clone, self.run = folder / "clone", folder / "clone/results/tiny"
        self.first: list[Job] = []
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def new(cls, folder: Path, cluster: Cluster, fork_server: str) -> Study:
        """As a user has it who has just cloned the repository and written a profile.

        Args:
            folder: a new one.
            cluster: where it runs.
            fork_server: of the jobs that nothing happens to; all nodes are this machine. They start without loading
                torch once more; the others start as on any cluster.
        """
        study = cls(folder, cluster, fork_server)
        shutil.copytree(ROOT, study.clone, symlinks=True, ignore=shutil.ignore_patterns(*NOT_TRACKED))
        from tests import tiny_study

        tiny_study.write_study(folder / "inputs")
        (folder / "inputs/tiny.yaml").write_text(yaml.safe_dump(small_study(folder / "inputs"), sort_keys=False))
        study.write_site()
        return study

    def copy(self, folder: Path, *without: str) -> Study:
        """The same study, finished as far as this one, but for its tables and these files and folders of its run.

        Snakemake makes nothing that only results need which are there: name all between the first that is to be made
        anew and the tables.
        """
        other = Study(folder, self.cluster, self.fork_server)
        shutil.copytree(self.clone, other.clone, symlinks=True)
        (folder / "inputs").mkdir()
        shutil.copy2(self.folder / "inputs/tiny.yaml", folder / "inputs")  # its paths are those of the original
        for pattern in ("tables", *without):
            found = list(other.run.glob(pattern))
            assert found, f"there is no {pattern}"
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        other.write_site()
        return other

    def write_site(self, **changes: Any) -> None:
        """The profile of the site, which is not in the repository; `set_resources` adds to its entries for rules."""
        site = self.folder / "site"
        site.mkdir(exist_ok=True)
        rules = {"set-resources": SITE["set-resources"] | changes.pop("set_resources", {})}
        (site / "profile.yaml").write_text(yaml.safe_dump(SITE | rules | changes))
        (site / "partitions.yaml").write_text(yaml.safe_dump({"partitions": PARTITIONS}))

    def command(self, *arguments: str) -> list[str]:
        """What the documentation says: `snakemake --profile slurm --profile mysite all`, and the study."""
        return [
            *(sys.executable, "-m", "snakemake", "all", "--profile", "slurm", "--profile", str(self.folder / "site")),
            *("--configfile", str(self.folder / "inputs/tiny.yaml"), *arguments),
        ]

    def environment(self, forks: bool) -> dict[str, str]:
        """Of the head and so of its jobs: one thread each, since the model is tiny."""
        return self.cluster.environment() | {"OMP_NUM_THREADS": "1"} | ({SERVER: self.fork_server} if forks else {})

    def snakemake(self, *arguments: str, fails: bool = False, seconds: float = 1800) -> str:
        """Run Snakemake to its end, which must be a success or a failure; what it said."""
        with self.head(*arguments, forks=True) as head:
            code = head.wait(timeout=seconds)
        said = self.said()
        assert bool(code) == fails, f"exit code {code}\n{said[-6000:]}"
        return said

    @contextmanager
    def head(self, *arguments: str, forks: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """A head of Snakemake at work; at the end of the block it is killed if it still runs."""
        with (self.folder / "head.log").open("wb") as log:
            self.process = process = subprocess.Popen(
                self.command(*arguments),
                cwd=self.clone,
                env=self.environment(forks),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _ended(self) -> str:
        """That there is no head any more, with its last words; nothing while it runs."""
        running = self.process is not None and self.process.poll() is None
        return "" if running else f"the head has ended.\n{self.said()[-4000:]}"

    def said(self) -> str:
        """What the last head has said so far."""
        return (self.folder / "head.log").read_text(errors="replace")

    def at_work(self, rule: str) -> Job:
        """The last head's job of a rule, once its stage has its lock."""
        found: list[Job] = []
        gone: set[str] = set()  # whose locks are still there

        def look() -> bool:
            holders = {number for number, of in self.holders().items() if of == rule} - gone
            for job in self.cluster.jobs() if holders else []:
                if job.number in holders and job.state in ENDED:
                    gone.add(job.number)
                elif job.number in holders and job.state == "RUNNING" and self.stage(job):
                    found.append(job)
            return bool(found)

        until(look, f"{rule} to be at work", seconds=1800, every=0.02, failed=self._ended)
        return found[0]

    def holders(self) -> dict[str, str]:
        """Jobs that hold a lock now, or left one, with their rules."""
        return dict(_holder(path) for path in files_below(self.run) if path.suffix == ".lock")

    def jobs(self) -> list[Job]:
        """The last head's jobs in the queue, the ended ones too."""
        run = self.name()
        return [job for job in self.cluster.jobs() if run and job.name == run]

    def name(self) -> str:
        """The name of all jobs of the last head, from its log; empty if it has not told yet."""
        return self.said().partition("SLURM run ID: ")[2].partition("\n")[0].strip()

    def stage(self, job: Job) -> psutil.Process | None:
        """The process of a job that runs the stage's script, if it has come so far."""
        for process in belonging(self.cluster.configuration, job.number):
            try:
                if any(".snakemake/scripts/" in argument for argument in process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    def freeze_at_locks(self, *comments: str) -> list[Job]:
        """The last head's jobs with these comments, each stopped as soon as its stage had taken its lock.

        A tiny model is evaluated in less than a second, so locks are looked at first, and the queue only for a new one.
        """
        waiting, seen = set(comments), set[str]()
        frozen: list[Job] = []

        def freeze_new() -> bool:
            holders = self.holders().keys() - {"", *seen}
            for job in self.jobs() if holders else []:
                if job.number in holders:
                    seen.add(job.number)
                    if job.comment in waiting:
                        self.freeze(job)
                        waiting.remove(job.comment)
                        frozen.append(job)
            return not waiting

        until(freeze_new, f"{sorted(comments)} to be at work", seconds=1800, every=0.05, failed=self._ended)
        return frozen

    def freeze(self, job: Job) -> psutil.Process:
        """Stop a job's stage where it is, so that it neither ends nor goes on before something happens to it."""
        stage = self.stage(job)
        assert stage is not None, f"{job} ended too early"
        stage.suspend()
        for process in stage.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        return stage

    def log(self, job: Job) -> str:
        """SLURM's own log of a job, which the profile keeps."""
        (path,) = (self.clone / "results/slurm-logs").glob(f"rule_{job.rule}/*/{job.number}.log")
        return path.read_text(errors="replace")

    def leftovers(self) -> list[Path]:
        """Locks, temporary files and unfinished work."""
        return [*self.run.rglob("*.lock*"), *self.run.rglob("*.tmp"), *self.run.glob(".state/*")]

    def tables(self) -> dict[str, bytes]:
        """All tables but the one of measured times, as they lie on disk."""
        return {path.name: path.read_bytes() for path in sorted((self.run / "tables").glob("table_[1289].*"))}


def _holder(lock: Path) -> tuple[str, str]:
    """The job that holds a lock, as its number, and its rule; empty if it was given back just now."""
    try:
        holder = json.loads(lock.read_text())
    except FileNotFoundError:
        return "", ""
    return str(holder["job"]), holder["rule"]

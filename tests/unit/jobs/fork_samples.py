"""A fork server with small modules in place of torch, and jobs beside it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from lowrank.jobs import forkserver

LIBRARY = Path(forkserver.__file__).parents[2]
LOADS = ("wave", "no_such_module", "colorsys")
"""In place of torch: two modules that nothing else here imports, and one that is not there."""
SERVE = f"""
import sys, tempfile
tempfile.gettempdir()  # as some libraries do
from lowrank.jobs import forkserver
forkserver.MODELS = {LOADS!r}
if found := forkserver.serve(sys.argv[1], int(sys.argv[2])):
    forkserver.become(*found)
"""
JOB = """
import os, sys, time
from pathlib import Path
from lowrank.jobs.forkserver import FORK_OF, SERVER, end_as, run_as_fork
if (status := run_as_fork("compute_bases")) is not None:
    end_as(status)
"""
"""The beginning of a job's script; what follows is done by the fork, or by the job's own process if there is none."""

FORKS = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="forks are watched by pidfd_open, which Linux has, and a Python built for it"
)


class Server:
    """A server, which first runs some code, and the jobs that are started beside it."""

    def __init__(self, folder: Path, library: Path | str = LIBRARY, first: str = "") -> None:
        self.folder, self.sockets = folder, folder / "sockets"
        self._numbers = count(1)
        self.sockets.mkdir(parents=True)
        self.environment = os.environ | {
            "PYTHONPATH": str(library),
            forkserver.SERVER: f"{self.sockets / 'socket'}:{sys.executable}",
            "ONLY_THE_SERVER": "has this, unless a test leaves it",
        }
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.sockets / "socket"))
            listener.listen()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", first + SERVE, str(self.sockets), str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env=self.environment,
                process_group=0,
            )

    def start(self, work: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A job whose fork does this; it is in the group of the server, as all are in the head's."""
        script = self.folder / f"job{next(self._numbers)}.py"  # the last one's may still be read
        script.write_text(JOB + textwrap.dedent(work))
        given: dict[str, Any] = {"env": self.environment, "process_group": self.process.pid} | options
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **given,
        )

    def run(self, work: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """A job to its end."""
        with self.start(work, *arguments, **options) as process:
            try:
                said, errors = process.communicate("typed\n", timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, said, errors)

    def still_forks(self) -> bool:
        """Whether a job is its fork yet: without a server it would do the same work itself."""
        run = self.run("print(os.environ.get(FORK_OF))")
        return (run.stdout, run.stderr) == (f"{self.process.pid}, compute_bases\n", "")

    def fork_of(self, job: subprocess.Popen[str]) -> psutil.Process:
        """The process that does the work of a job which prints its number first."""
        assert job.stdout
        return psutil.Process(int(job.stdout.readline()))


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    except psutil.NoSuchProcess:
        return True

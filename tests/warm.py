"""Snakemake for tests in which starting Python is not the point: forks of one process that has loaded what stages load.

A stage on a tiny model computes for a fraction of a second, after five that load torch and transformers. Here one
process loads them once. Each run of Snakemake is a fork of it, each script a fork of that run: processes of their own
as ever, with their own groups to be killed, and the same rules, stages and command lines. What is not seen is whether a
stage starts in an interpreter that has loaded nothing; the tests that type Snakemake's command see that.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import psutil

from tests.workflow.clones import SNAKEMAKE

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Without the hub, and with one thread a process: the models are tiny."""
NO_SERVER = {"RANKWISE_FORK_SERVER": ":"}
"""What runs of Snakemake have as their fork server: each would load torch once more."""


class Warm:
    """The process that has loaded everything, and runs Snakemake when it is told to, one run at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__, *loaded()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=REPOSITORY,
            env=os.environ | ENVIRONMENT,
        )

    def close(self) -> None:
        """End it."""
        self._server.communicate()

    def run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run Snakemake to its end.

        Args:
            arguments: of its command line, which is typed in the repository.
            environment: all of it.
        """
        with TemporaryDirectory() as folder:
            said = Path(folder) / "said"
            self._start(arguments, environment, said)
            return self._finished(arguments, said)

    def kill(
        self, arguments: Sequence[str], environment: Mapping[str, str], now: Callable[[], bool]
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake, and kill it with all its jobs (SIGKILL) as soon as `now()`, unless it has ended before."""
        with TemporaryDirectory() as folder:
            said = Path(folder) / "said"
            process = psutil.Process(self._start(arguments, environment, said))
            try:
                while not self._has_said_more() and not now():
                    pass
            finally:  # whatever is wrong, the next one finds no run of this one
                if not self._has_said_more():
                    _kill_family(process)
                run = self._finished(arguments, said)
            return run

    def _has_said_more(self) -> bool:
        return bool(select.select([self._server.stdout], [], [], 0.005)[0])

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str], said: Path) -> int:
        assert self._server.stdin
        asked = json.dumps([list(arguments), dict(environment), str(said)])
        self._server.stdin.write(asked.encode() + b"\n")
        return self._hear()

    def _finished(self, arguments: Sequence[str], said: Path) -> subprocess.CompletedProcess[str]:
        """What became of the run; a kill may have cut its last character short."""
        code = self._hear()
        return subprocess.CompletedProcess(["snakemake", *arguments], code, said.read_text(errors="replace"), "")

    def _hear(self) -> int:
        """A number: first that of the run's process, later its exit status."""
        assert self._server.stdout
        return int(self._server.stdout.readline())


def _kill_family(process: psutil.Process) -> None:
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # it ended just now
        family = [*process.children(recursive=True), process]
    with suppress(ProcessLookupError):  # at once, so that nothing starts meanwhile
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:  # those in groups of their own
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=30)


def loaded() -> tuple[str, ...]:
    """The modules to load; of the library none, since each run of Snakemake may have a copy of its own."""
    from lowrank.jobs.forkserver import MODELS, MORE

    return (
        *(*MODELS, *chain(*MORE.values()), "transformers.generation", "datasets", "deepspeed", "pandas"),
        *("matplotlib.figure", "matplotlib.font_manager", "matplotlib.backends.backend_agg"),
        *("matplotlib.backends.backend_pdf", *SNAKEMAKE),
    )


# --- in the process that has loaded everything ---


def serve() -> None:
    """Run what is asked for, until nobody asks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in sys.argv[1:]:
        __import__(name)
    _look_up_conversions()
    gc.freeze()  # its forks share what is there
    for line in sys.stdin:
        arguments, environment, said = json.loads(line)
        process = os.fork()
        if not process:
            answers.close()
            _end_with(partial(_snakemake, arguments, environment, said))
        print(process, file=answers, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _look_up_conversions() -> None:
    """What transformers looks up once a process, when it opens its first checkpoint."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")


def _snakemake(arguments: list[str], environment: dict[str, str], said: str) -> None:
    os.setsid()
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for old, new in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    os.environ.clear()
    os.environ.update(environment | NO_SERVER)
    import snakemake.cli
    from snakemake.script import PythonScript

    PythonScript.execute_script = _execute_script
    sys.argv = ["snakemake", *arguments]
    snakemake.cli.main(arguments)


def _execute_script(script: Any, file: str, edit: bool = False) -> None:
    """In place of Snakemake's own way, which starts Python with the file."""
    process = os.fork()
    if not process:
        _end_with(partial(_script, file, script.threads))
    _, status = os.waitpid(process, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise subprocess.CalledProcessError(code, [sys.executable, file])


def _script(file: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # as Snakemake sets it for what it starts
    sys.argv = [file]
    runpy.run_path(file, run_name="__main__")


def _end_with(work: Callable[[], None]) -> NoReturn:
    """Do this in a process that was forked, and leave it without coming back."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()

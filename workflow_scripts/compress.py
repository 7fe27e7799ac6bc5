"""Compress a model of one's own: `python workflow_scripts/compress.py MODEL RATIO`. `make compress` calls it.

It writes a small config, runs it with Snakemake, and prints what came out: the checkpoint, its perplexity before and
after, its size and its speed. Called again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from lowrank.cluster.needs import GIB
from lowrank.cluster.plan import make_plan
from lowrank.config.messages import did_you_mean
from lowrank.errors import RankwiseError
from lowrank.files import write_error
from lowrank.jobs.log_file import ending
from lowrank.layout import Layout
from lowrank.paper.outcome import checkpoint, outcome, tested_texts
from lowrank.sources.own import DTYPES, Own, Wish, again, own_study, write_config
from lowrank.sources.own_texts import FORMATS
from lowrank.sources.shared_text import SEEN

REPOSITORY = Path(__file__).resolve().parents[1]
VARIABLES = ("MODEL", "RATIO", "METHOD", "OUT", "CALIBRATION", "TEST", "DTYPE")
"""Of `make compress`."""
EVERYWHERE = ("PYTHON", "VENV")
"""Variables of the Makefile that every target reads."""
RUNNING = ".running"
"""A file in OUT that is locked while a run goes on there, and says since when."""


def parser() -> argparse.ArgumentParser:
    """The options: those of `make compress` in small letters."""
    made = argparse.ArgumentParser(prog="compress.py", description="Compress a model of one's own.")
    made.add_argument("model", help="a folder in the Hugging Face layout, or a .gguf file")
    made.add_argument("ratio", help="percent of the decoder's linear weights to remove, 1 to 90")
    made.add_argument("--method", default=Wish.method, help="a preset of config/presets/default.yaml")
    made.add_argument(
        "--out", default="", help="folder of all results; compressed/<model>-<method>-<ratio> if left out"
    )
    made.add_argument("--calibration", default="", metavar="TEXT", help=f"a file ({', '.join(FORMATS)}) or a folder")
    made.add_argument("--test", default="", metavar="TEXT", help="likewise, for the perplexity")
    made.add_argument("--dtype", default="", help=f"{', '.join(DTYPES)}; that of the model if left out")
    return made


def snakemake(arguments: Sequence[str]) -> int:
    """Run Snakemake in this repository, with a line of progress; returns its exit code."""
    command = [sys.executable, str(REPOSITORY / "workflow_scripts/run.py"), *arguments]
    # The lock of `alone` goes along: a run that outlives this process still holds it.
    with subprocess.Popen(command, cwd=REPOSITORY, close_fds=False) as process:
        while True:
            # Ctrl-C reaches Snakemake too, which ends its jobs and gives its own lock back: in its own time.
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


def arguments_of(own: Own) -> list[str]:
    """Snakemake's arguments for a study: of one model, so that what the profile gives one thread may have more.

    The option takes the place of all of the profile's `set-threads`; rules have the threads of their jobs otherwise.
    """
    folder = own.out.absolute()
    return [
        *("--set-threads", "compress_model=8", "evaluate_perplexity=8"),
        *("--snakefile", str(REPOSITORY / "Snakefile"), "--directory", str(folder)),
        *("--configfile", str(own.config.absolute()), "--profile", str(REPOSITORY / "profiles/local")),
    ]


def check_make(flags: str) -> None:
    """Refuse variables that `make compress` does not know: it would leave them out in silence.

    Args:
        flags: make's `MAKEFLAGS`: its options, and after ` -- ` the variables of its command line.

    Raises:
        RankwiseError: a variable that is none of ours.
    """
    _, _, given = f" {flags}".partition(" -- ")
    words = shlex.shlex(given, posix=True)
    words.whitespace_split, words.quotes, words.commenters = True, "", ""  # make escapes by backslashes alone
    for word in words:
        name, assigns, _ = word.partition("=")
        if assigns and name not in (*VARIABLES, *EVERYWHERE):
            raise RankwiseError(
                f"{name}: no option of `make compress`; there are {', '.join(VARIABLES)}{did_you_mean(name, VARIABLES)}"
            )


@contextlib.contextmanager
def alone(own: Own) -> Iterator[None]:
    """One run at a time in a folder: a second one would find Snakemake's lock there, and be told how to remove it.

    Raises:
        RankwiseError: a run goes on there.
    """
    path = own.out / RUNNING
    with _held(path, own) as file:
        os.set_inheritable(file.fileno(), True)
        file.truncate(0)
        file.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            file.close()
            _remove(path)


def _held(path: Path, own: Own) -> TextIO:
    """The file, locked. One that another run has removed in the meantime is no lock: then once more, from the start."""
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise write_error(path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read().strip()
            raise RankwiseError(
                f"OUT: a run goes on in {own.out}, {holder}. Follow it: make status RUN={shlex.quote(str(own.out))}"
            ) from error
        except OSError:  # a file system without locks: Snakemake's own stands
            return file
        if _is_at(file, path):
            return file
        file.close()


def _remove(path: Path) -> None:
    """Take the file away, unless a process of this run, or another run, still holds it: who holds the lock may."""
    with contextlib.suppress(OSError), path.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):
            path.unlink()


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def disk_remark(own: Own) -> list[str]:
    """A line if more will lie in OUT than there is room for, by the plan: it would be noticed after hours."""
    if (own.out / Layout(own.study).run / "report.html").exists():  # finished: what the plan has on the way is over
        return []
    there = sum(path.lstat().st_size for path in own.out.rglob("*") if path.is_file() and not path.is_symlink())
    needed, free = make_plan(own.study).disk - there, shutil.disk_usage(own.out).free
    if needed <= free:
        return []
    return [
        f"OUT: by the plan up to {needed / GIB:,.1f} GiB more will lie in {own.out}, and {free / GIB:,.1f} GiB are "
        "free there; the run may stop on the way, and goes on when there is room"
    ]


def how_to_go_on(own: Own, wish: Wish, began: float) -> str:
    """What to do after a run that has stopped.

    Args:
        own: the study.
        wish: what it grants.
        began: when the run was started; a log that is older says nothing of it.
    """
    log = own.out / Layout(own.study).log("compare_texts", {})
    found = ending(log)
    given = " or ".join(key.upper() for key in ("test", "calibration") if getattr(wish, key))
    if given and found and SEEN in found.error and log.stat().st_mtime >= began:
        return (
            "It stopped, and the same command would stop again: what is tested holds text that calibration or "
            f"validation reads, see above. Give another file as {given}, with another OUT, or after deleting {own.out}."
        )
    return (
        "It stopped, see above. The same command goes on from here. If a kill has left a lock, first:\n"
        f"{again(own)} --unlock"
    )


def linked(own: Own, result: Path) -> Path:
    """A short name in OUT for a result that lies deep in it: a link, or the result itself where no link can be."""
    link = own.out / result.name
    with contextlib.suppress(OSError):
        link.symlink_to(os.path.relpath(result, own.out))
    return link if link.resolve() == result.resolve() else result


def main(given: Sequence[str], run: Callable[[Sequence[str]], int] = snakemake) -> int:
    """Compress a model.

    Args:
        given: the command's arguments.
        run: runs Snakemake with some arguments.

    Returns:
        The exit code: 0 if all is well, 1 for a wish that cannot be granted, Snakemake's own if it stops.
    """
    console = Console(highlight=False, markup=False)  # of paths with brackets, too
    try:
        check_make(os.environ.get("MAKE_WAS_GIVEN", ""))
        wish = Wish(**vars(parser().parse_args(given)))
        own = own_study(wish, REPOSITORY / "cache")
        write_config(own)
        with alone(own):
            print(f"compressing {wish.model} by {wish.method}, {wish.ratio} %, in {own.out}", file=sys.stderr)
            for remark in [*own.remarks, *disk_remark(own)]:
                print(remark, file=sys.stderr)
            began = time.time()
            code = run(arguments_of(own))
        if code:
            print(f"\n{how_to_go_on(own, wish, began)}", file=sys.stderr)
            return code
        console.print(outcome(own.study, own.out))
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 1
    for name, what in {
        **tested_texts(own.study),
        "checkpoint": linked(own, checkpoint(own.study, own.out)),
        "report": linked(own, own.out / Layout(own.study).run / "report.html"),
        "config": own.config,
        "again": again(own),
    }.items():
        console.print(f"{name + ':':<12}{what}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

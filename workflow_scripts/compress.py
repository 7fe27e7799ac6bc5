"""Compress a model of one's own: `python workflow_scripts/compress.py MODEL RATIO`. `make compress` calls it.

It writes a small config, runs it with Snakemake, and prints what came out: the checkpoint, its perplexity before and
after, its size and its speed. Called again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from lowrank.errors import RankwiseError
from lowrank.layout import Layout
from lowrank.paper.outcome import checkpoint, outcome
from lowrank.sources.own import DTYPES, FORMATS, Own, Wish, again, own_study, write_config

REPOSITORY = Path(__file__).resolve().parents[1]


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
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


def arguments_of(own: Own) -> list[str]:
    """Snakemake's arguments for a study."""
    folder = own.out.absolute()
    return [
        *("--snakefile", str(REPOSITORY / "Snakefile"), "--directory", str(folder)),
        *("--configfile", str(own.config.absolute()), "--profile", str(REPOSITORY / "profiles/local")),
    ]


def main(given: Sequence[str], run: Callable[[Sequence[str]], int] = snakemake) -> int:
    """Compress a model.

    Args:
        given: the command's arguments.
        run: runs Snakemake with some arguments.

    Returns:
        The exit code: 0 if all is well, 1 for a wish that cannot be granted, Snakemake's own if it stops.
    """
    console = Console(highlight=False)
    try:
        own = own_study(Wish(**vars(parser().parse_args(given))), REPOSITORY / "cache")
        write_config(own)
        if code := run(arguments_of(own)):
            print(
                "\nIt stopped, see above. The same command goes on from here. If a kill has left a lock, first:\n"
                f"{again(own)} --unlock",
                file=sys.stderr,
            )
            return code
        console.print(outcome(own.study, own.out))
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 1
    for name, what in {
        "checkpoint": checkpoint(own.study, own.out),
        "report": own.out / Layout(own.study).run / "report.html",
        "config": own.config,
        "again": again(own),
    }.items():
        console.print(f"{name + ':':<12}{what}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What would run, and why, in plain words: `python workflow_scripts/why.py [TARGET...] [--configfile FILE] [...]`.

Takes the arguments of Snakemake, whose dry run it explains; nothing is run or written. `make why` calls it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import snakemake.cli
from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

sys.path.insert(0, str(Path(__file__).parent))
from lowrank.config.load import load_study
from lowrank.errors import RankwiseError
from lowrank.files import read_record
from lowrank.jobs.record import record_file
from lowrank.layout import Layout
from lowrank.reruns.reasons import Planned, explained

NO_SUCH = re.compile(r"No rule to produce (.+?) \(if you use input functions")
A_PATTERN = "Target rules may not contain wildcards."
"""What Snakemake says of a file that no rule makes, and of a rule that makes many."""
TARGETS = ("all", "data", "checkpoints")
CONFIG = Path(__file__).parents[1] / "config/quickstart.yaml"


class _Jobs(logging.Filter):
    """Keeps what Snakemake logs of the jobs that it plans, and lets only warnings and errors through.

    Attributes:
        found: the jobs.
        unknown: the file that was asked for, if no rule makes it.
        is_pattern: whether a rule was asked for that makes many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Planned] = []
        self.unknown = ""
        self.is_pattern = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        job = record.__dict__
        if job.get("event") == LogEvent.JOB_INFO:
            wildcards = {name: str(value) for name, value in (job["wildcards"] or {}).items()}
            output = tuple(map(str, job["output"]))
            commit = _commit(str(job["log"][0]) if job["log"] else "")
            made = any(map(os.path.exists, output))
            self.found.append(Planned(job["rule_name"], wildcards, str(job["reason"]), output, commit, made))
        if job.get("event") == LogEvent.ERROR:
            missing = NO_SUCH.search(record.getMessage())
            self.unknown = missing[1] if missing else ""
            self.is_pattern = A_PATTERN in record.getMessage()
            return not (self.unknown or self.is_pattern)
        return record.levelno >= logging.WARNING


def planned(arguments: list[str]) -> list[Planned]:
    """The jobs of a dry run, in Snakemake's order; ends the program where Snakemake does.

    Raises:
        RankwiseError: a target that is none.
    """
    jobs = _Jobs()
    logger.addFilter(jobs)
    try:
        with _where_it_was():
            ended = _dry_run(arguments)
    finally:
        logger.removeFilter(jobs)
    if jobs.unknown or jobs.is_pattern:
        raise RankwiseError(_no_target(arguments, jobs.unknown))
    if not ended:
        sys.exit(1)
    return jobs.found


def _dry_run(arguments: list[str]) -> bool:
    """Snakemake's `main`, without what it says of profiles; returns whether it ended well.

    Raises:
        RankwiseError: no folder of that name, which Snakemake would make.
    """
    try:
        parser, options = _parsed([*arguments, "--dry-run"])
        if options.directory and not options.directory.is_dir():
            raise RankwiseError(f"{options.directory}: there is no such folder; name the one of a run's results")
        return bool(snakemake.cli.args_to_api(options, parser))
    except RankwiseError:
        raise
    except Exception as error:
        snakemake.cli.print_exception(error)
        return False


def _parsed(arguments: list[str]) -> tuple[Any, Any]:
    """Snakemake's parser and options. It names the profile that it takes, which is shown only before a mistake."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser, options = snakemake.cli.parse_args(arguments)
    except SystemExit:
        sys.stderr.write(said.getvalue())
        raise
    if options.configfile:
        options.configfile = [Path(os.path.expanduser(path)) for path in options.configfile]
    options.directory = options.directory and Path(os.path.expanduser(options.directory))
    return parser, options


def _no_target(arguments: list[str], unknown: str) -> str:
    """What is wrong with a target, and what may have been meant.

    Args:
        arguments: of Snakemake.
        unknown: the file that no rule makes; empty if a rule was named that makes many.
    """
    _, options = _parsed(arguments)
    if not unknown:
        rules = [target for target in options.targets if "/" not in target and target not in TARGETS]
        return f"{', '.join(rules)}: a rule for many results; name one of them, or `all`, `data` or `checkpoints`"
    close = _close(unknown, _results(options.configfile or [CONFIG]))
    hint = (
        f" - did you mean {', '.join(close)}?"
        if close
        else "; targets are `all`, `data`, `checkpoints` and files of the results"
    )
    return f"{unknown}: nothing makes it in this study{hint}"


def _results(configs: list[Path]) -> list[str]:
    """The files that a study is asked for, and all that they show; of several configs that are merged, none."""
    if len(configs) > 1:
        return []
    layout = Layout(load_study(configs[0]))
    return [*layout.tables(), *layout.figures(), f"{layout.run}/report.html", *layout.evidence(), *layout.fetched()]


def _close(unknown: str, results: list[str]) -> list[str]:
    """The likeliest targets, three at most; by the names of files alone if no folder is named."""
    named = {path if "/" in unknown else Path(path).name: path for path in (*results, *TARGETS)}
    return [named[name] for name in difflib.get_close_matches(unknown, named)]


def _commit(log: str) -> str:
    """The commit of the code that made what a job would make again; nothing if that is not known."""
    path = record_file(log)
    if path is None or not path.is_file():
        return ""
    try:
        found = str(read_record(path)["git"]["commit"])
    except RankwiseError:  # a damaged record: the reason is told without it
        return ""
    return "" if found == "unknown" else found


@contextlib.contextmanager
def _where_it_was() -> Iterator[None]:
    """Snakemake changes the working directory."""
    place = os.getcwd()
    try:
        yield
    finally:
        os.chdir(place)


if __name__ == "__main__":
    try:
        print(explained(planned(sys.argv[1:])))
    except RankwiseError as error:
        sys.exit(str(error))

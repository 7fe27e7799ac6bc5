"""All benchmarks in one run: `make bench`, or `python -m tests.benchmarks [--size SIZE] [--only PART ...] [FILE]`.

Parts run one after the other, on the GPU if there is one. What does not begin or end within the time is listed as such,
and so is a part that a GPU's memory does not hold. FILE (`bench.json`) gets all numbers; a table is printed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lowrank.files import write_json
from lowrank.model.runtime import describe_environment
from tests.benchmarks.measuring import SIZES, Row, Setting, slowness

PARTS = {  # in the order in which they run: part -> module of this folder
    "start": "starting",
    "layers": "layers",
    "search": "search_trial",
    "statistics": "statistics_pass",
    "decoding": "decoding",
    "compression": "compression",
    "zero-shot": "answers",
    "gram": "gram",
    "plan": "planned",
    "memory": "memory",
}
MINUTES = {"tiny": 8.0, "small": 8.0, "7b": 10.0}
"""Time limit by size, if none is given."""
MEMORY_MINUTES = 20.0
"""More, if peaks of memory are asked for: whole studies run."""


DTYPES = {
    "tiny": ("float32", "bfloat16"),
    "small": ("float32", "bfloat16"),
    "7b": ("bfloat16",),
}
"""Of weights and activations, by size."""


SLOW = 4.0
"""Products in a dtype that take more than so many times as long as in float32 have no place in the time limit."""
FAILED = "failed"


class TimeIsUp(Exception):
    """Raised in the main thread when the time limit is reached."""


@contextmanager
def at_most(limit: float) -> Iterator[None]:
    """Raise `TimeIsUp` in what takes longer than so many seconds; it waits for a call into a library to return."""

    def ring(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(limit, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(parts: Sequence[str], setting: Setting, minutes: float) -> tuple[list[tuple[str, Row]], dict[str, str]]:
    """Run some parts.

    Returns:
        The rows, each with its part; part -> why it has none.
    """
    found: list[tuple[str, Row]] = []
    missing: dict[str, str] = {}
    end = time.monotonic() + 60 * minutes
    for part in parts:
        started = time.monotonic()
        try:
            with at_most(end - started):
                found += [
                    (part, row) for row in importlib.import_module(f"tests.benchmarks.{PARTS[part]}").rows(setting)
                ]
        except TimeIsUp:
            missing[part] = f"not within {minutes:g} minutes"
        except torch.OutOfMemoryError:
            missing[part] = "the GPU's memory does not hold it"
        except subprocess.CalledProcessError as error:
            missing[part] = f"{FAILED}: {error}"
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        print(f"{part}: {missing.get(part, f'{time.monotonic() - started:.0f} s')}", file=sys.stderr, flush=True)
    return found, missing


def too_slow(dtypes: Sequence[str], device: str) -> dict[str, str]:
    """Of some dtypes those that a device has no fast products of: dtype -> by how much."""
    found = {dtype: slowness(dtype, device) for dtype in dtypes if dtype != "float32"}
    return {
        dtype: f"products take {times:.0f} times as long as in float32"
        for dtype, times in found.items()
        if times > SLOW
    }


def record(size: str, setting: Setting, found: Sequence[tuple[str, Row]], missing: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the file holds."""
    return {
        "size": size,
        "device": setting.device,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "environment": describe_environment(),
        "model": asdict(setting.size),
        "rows": [{"part": part, **asdict(row), "met": row.met} for part, row in found],
        "missing": dict(missing),
    }


def processor() -> str:
    """Its name, as Linux has it, or what Python says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def table(found: Mapping[str, Any]) -> Table:
    """What was measured, beside its target."""
    machine, environment = found["machine"], found["environment"]
    where = environment["device"] if found["device"] == "cuda" else machine["processor"]
    title = f"{where}, {machine['threads']} threads, torch {environment['packages']['torch']}, size {found['size']}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name, justify in (
        ("", "left"),
        ("dtype", "left"),
        ("median", "right"),
        ("middle half", "right"),
        ("target", "right"),
    ):
        shown.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in found["rows"]:
        unit = "" if row["unit"] == "times" else f" {row['unit']}"
        target = "" if row["target"] is None else f"{row['target']:.2f}{unit}"
        target = target if row["least"] is None else f"{row['least']:.2f} to {target}"
        style = {True: "green", False: "red", None: None}[row["met"]]
        middle = "" if row["low"] == row["high"] else f"{row['low']:.2f} to {row['high']:.2f}"
        shown.add_row(row["measure"], row["dtype"], f"{row['median']:.2f}{unit}", middle, target, style=style)
    for part, why in found["missing"].items():
        shown.add_row(part, "", why, "", "", style="dim")
    return shown


def main(arguments: Sequence[str]) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Run all benchmarks.")
    parser.add_argument("--size", choices=SIZES, default="small", help="7b is for a GPU (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="some parts", metavar="PART")
    parser.add_argument("--model", type=Path, help="a folder with a small model: peaks of memory are measured on it")
    parser.add_argument("--minutes", type=float, help="time limit (default: by size)")
    parser.add_argument("--threads", type=int, default=1, help="of a processor (default: %(default)s)")
    parser.add_argument("file", nargs="?", type=Path, default=Path("bench.json"))
    asked = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(asked.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    slow = too_slow(DTYPES[asked.size], device)
    dtypes = tuple(dtype for dtype in DTYPES[asked.size] if dtype not in slow)
    setting = Setting(SIZES[asked.size], device, dtypes, asked.model)
    parts = [part for part in asked.only if part != "memory" or asked.model]
    found, missing = run(parts, setting, asked.minutes or MINUTES[asked.size] + MEMORY_MINUTES * bool(asked.model))
    missing |= slow
    missing |= {part: "needs --model FOLDER" for part in asked.only if part not in parts}
    whole = record(asked.size, setting, found, missing)
    write_json(asked.file, whole)
    Console(width=None if sys.stdout.isatty() else 150).print(table(whole))
    return int(any(why.startswith(FAILED) for why in missing.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
